"""Settings as plain values, for YAML files and checkpoints, and back."""

import dataclasses
from argparse import ArgumentError
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from jsonargparse import ArgumentParser

from backfold.errors import UserError
from backfold.training.config import PretrainConfig


def config_to_dict(config: PretrainConfig) -> dict[str, Any]:
    """Nested mappings, lists, strings and numbers; `config_from_dict` is the inverse."""
    plain: dict[str, Any] = _plain(dataclasses.asdict(config))
    return plain


def config_from_dict(values: Mapping[str, Any]) -> PretrainConfig:
    """Check and convert every value.

    Raises:
        UserError: an unknown key or a value of another type; both are named.
    """
    parser = ArgumentParser(exit_on_error=False)
    parser.add_class_arguments(PretrainConfig)
    try:
        checked = parser.instantiate(parser.parse_object(dict(values)))
    except ArgumentError as error:
        raise UserError(f"bad settings: {' '.join(str(error).split())}") from error
    return PretrainConfig(**vars(checked))


def _plain(value: Any) -> Any:
    if isinstance(value, dict):
        return {key: _plain(item) for key, item in value.items()}
    if isinstance(value, (list, tuple)):
        return [_plain(item) for item in value]
    return str(value) if isinstance(value, Path) else value
