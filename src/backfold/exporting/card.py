"""A model card: what was trained on what, how well it does, how to load it."""

import html
import json
import re
from pathlib import Path
from typing import Any

import yaml
from jinja2 import Environment, PackageLoader

from backfold.errors import UserError
from backfold.evaluation.results import (
    ACCURACY,
    BEFORE,
    PIXELS,
    PRETRAINED,
    SCRATCH,
    Row,
    read_rows,
)
from backfold.exporting.timm_folder import Rebuilt, architecture
from backfold.training.config_file import config_to_dict
from backfold.training.pretrained import Pretrained
from backfold.training.run_folder import RunFolder
from backfold.version import __version__

SHOWN = (PRETRAINED, BEFORE, SCRATCH, PIXELS)
PATHS = ("data", "out", "init")


def render_card(
    run: Pretrained,
    folder: Path | None,
    kind: str,
    name: str,
    rebuilt: Rebuilt,
) -> str:
    """The card in Markdown.

    Args:
        run: the checkpoint.
        folder: the run's, for its facts and results; None leaves them out.
        kind: "timm", "huggingface", "onnx" or "pt2".
        name: of the exported folder.
        rebuilt: how timm builds the model.
    """
    files = RunFolder(folder) if folder is not None else None
    config = {key: _public(key, value) for key, value in config_to_dict(run.config).items()}
    environment = Environment(
        loader=PackageLoader("backfold.exporting", ""), trim_blocks=True, lstrip_blocks=True
    )
    environment.filters["text"] = as_text
    return environment.get_template("model_card.md.jinja").render(
        run=run,
        kind=kind,
        name=name,
        architecture=architecture(run),
        call=", ".join(f"{key}={value!r}" for key, value in rebuilt.arguments.items()),
        pooled=rebuilt.pooled,
        facts=_read_json(files.facts) if files else {},
        health=_last_health(files),
        rows=_rows(files),
        recipe=yaml.safe_dump(config, sort_keys=False).rstrip().replace("```", "'''"),
        version=__version__,
    )


def as_text(value: object) -> str:
    """One line without HTML, links, code or table cells of its own: names may be anybody's."""
    escaped = html.escape(" ".join(str(value).split()), quote=False)
    return re.sub(r"([\\`\[\]|])", r"\\\1", escaped)


def _public(key: str, value: Any) -> Any:
    # Where somebody's files lie is nobody else's business.
    return Path(value).name if key in PATHS and value is not None else value


def _rows(files: RunFolder | None) -> list[Row]:
    if files is None or not files.evaluation.exists():
        return []
    rows = read_rows(files.evaluation)
    return [row for row in rows if row.metric == ACCURACY and row.contender in SHOWN]


def _last_health(files: RunFolder | None) -> dict[str, Any]:
    history = _read_json(files.health).get("history", []) if files else []
    return dict(history[-1]) if history else {}


def _read_json(path: Path) -> dict[str, Any]:
    try:
        content = json.loads(path.read_text())
    except FileNotFoundError:
        return {}
    except (OSError, ValueError) as error:
        raise UserError(f"{path} can't be read: {error}; remove it or mend it") from error
    return content if isinstance(content, dict) else {}
