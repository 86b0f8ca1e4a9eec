"""Continuing from existing weights: timm's, a run's, or those of any file that has timm's names."""

import logging
import re
import sys
from collections.abc import Callable, Collection, Mapping
from pathlib import Path
from textwrap import shorten
from typing import Any

from timm.models import adapt_input_conv, load_pretrained, load_state_dict
from torch import Tensor, nn

from backfold.errors import UserError, first_line
from backfold.training.run import RunFolder

LOGGER = logging.getLogger("backfold")
TIMM = "timm"
LEAST_SHARE = 0.5
# What others put before timm's names: our checkpoints, transformers' wrapper of timm models.
PREFIX = re.compile(r"(backbone|timm_model)\.")
FOLDER_FILES = ("backbone.safetensors", "model.safetensors", "checkpoints/last.ckpt")
CLASSIFIER = re.compile(r"(head|head_dist|fc|classifier|last_linear)\.")

Weights = dict[str, Tensor]


def initialise(backbone: nn.Module, path: Path | str) -> None:
    """Put existing weights into a timm model, in place, and say in one line what did not fit.

    They come from a safetensors or torch file, from a run's or an exported folder, or with "timm"
    are downloaded. Position embeddings, relative position tables and patch kernels are resampled to
    the backbone's image and patch size, and the first convolution is adapted to its channels, as
    timm does it. Classifiers are left out, and what the file lacks stays as it is; a UserError
    where that is more than half of the backbone.
    """
    if str(path) == TIMM:
        _load_from_timm(backbone)
        LOGGER.info("initialised with timm's pretrained weights")
        return
    own, weights = backbone.state_dict(), read_weights(Path(path))
    prefixed = {PREFIX.sub("", n, count=1): t for n, t in weights.items() if PREFIX.match(n)}
    weights = prefixed or weights
    if convert := _filter(backbone):
        # As timm itself converts checkpoints of this family: names, positions, patch kernels.
        try:
            weights = convert(weights, backbone)
        except Exception as error:
            # Each family's filter has its own expectations of what a checkpoint holds.
            raise UserError(
                f"timm can't fit {path} to {type(backbone).__name__}: {first_line(error)}; give "
                "weights of the same timm model"
            ) from error
    _adapt_channels(backbone, weights)
    fitting = {n: t for n, t in weights.items() if n in own and t.shape == own[n].shape}
    missing = sorted(own.keys() - fitting.keys())
    trained = {name: parameter.numel() for name, parameter in backbone.named_parameters()}
    share = sum(trained.get(name, 0) for name in fitting) / max(1, sum(trained.values()))
    if share < LEAST_SHARE:
        raise UserError(
            f"{path} has {share:.0%} of the backbone's weights ({_named('missing', missing)}"
            f"{_named('; in the file', weights)}); give weights of the same timm model"
        )
    backbone.load_state_dict(fitting, strict=False)
    unused = sorted(n for n in weights.keys() - fitting.keys() if not CLASSIFIER.match(n))
    details = _named("; kept random", missing) + _named("; not used", unused)
    LOGGER.info(f"initialised with {share:.1%} of the weights from {path}{details}")


def read_weights(path: Path) -> Weights:
    """The tensors of a file or a folder, by name; nothing but tensors is ever unpickled."""
    if not path.exists():
        raise UserError(
            f"there is no {path} to start from; give a file, a run's folder, or {TIMM!r}"
        )
    if path.is_dir():
        found = next((path / name for name in FOLDER_FILES if (path / name).is_file()), None)
        if found is None:
            raise UserError(f"{path} holds none of {', '.join(FOLDER_FILES)}; give a file")
        if found == RunFolder(path).last_checkpoint:
            LOGGER.warning("%s is not finished: its last checkpoint is taken", path)
        path = found
    try:
        content = load_state_dict(str(path), weights_only=True)
    except Exception as error:
        # torch and timm differ between versions in what they raise here.
        raise UserError(
            f"{path} can't be read ({type(error).__name__}): damaged, or no safetensors or torch "
            "file, or one with more than tensors in it, and loading such a file can run any code; "
            "save its state_dict as safetensors"
        ) from error
    if isinstance(content, Mapping):
        tensors = {str(name): item for name, item in content.items() if isinstance(item, Tensor)}
        if tensors:
            return tensors
    raise UserError(f"{path} holds no named tensors; give a state_dict")


def _filter(backbone: nn.Module) -> Callable[..., Any] | None:
    return getattr(sys.modules[type(backbone).__module__], "checkpoint_filter_fn", None)


def _adapt_channels(backbone: nn.Module, weights: Weights) -> None:
    """Bring the first convolutions' weights to the backbone's channels, in place."""
    first = getattr(backbone, "pretrained_cfg", {}).get("first_conv") or ()
    for layer in (first,) if isinstance(first, str) else first:
        name = f"{layer}.weight"
        if name not in weights or weights[name].ndim != 4:
            continue
        wanted, kernel = backbone.get_submodule(layer).weight, weights[name]
        assert isinstance(wanted, Tensor)
        have, channels = kernel.shape[1], wanted.shape[1]
        if have == channels or kernel.shape[2:] != wanted.shape[2:]:
            continue
        if have not in (1, 3):
            raise UserError(
                f"the weights are for {have} channels, and the images have {channels}; only "
                "weights for 1 or 3 channels can be adapted: leave --init out, or set --channels"
            )
        if have == 3:
            weights[name] = adapt_input_conv(channels, kernel)
        else:  # as much in all as before, whatever share of it each channel has
            weights[name] = kernel.expand(-1, channels, -1, -1) / channels


def _load_from_timm(backbone: nn.Module) -> None:
    config = getattr(backbone, "pretrained_cfg", None) or {}
    name = config.get("architecture", type(backbone).__name__)
    if not any(config.get(key) for key in ("hf_hub_id", "url", "file", "state_dict")):
        raise UserError(f"timm has no pretrained weights for {name!r}; give --init a file")
    convolutions = (part for part in backbone.modules() if isinstance(part, nn.Conv2d))
    channels = next((convolution.in_channels for convolution in convolutions), 3)
    try:
        convert = _filter(backbone)
        load_pretrained(backbone, config, 0, channels, filter_fn=convert, strict=False)
    except (OSError, RuntimeError, AssertionError) as error:
        raise UserError(
            f"timm's weights for {name!r} can't be had: {first_line(error)}; give --init a file, "
            "and no backbone options that change the layers"
        ) from error


def _named(what: str, names: Collection[str]) -> str:
    """The first names; nothing where there are none."""
    return f"{what}: {shorten(', '.join(names), 200, placeholder=' ...')}" if names else ""
