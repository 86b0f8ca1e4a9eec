"""Exporting a run into a folder that appears whole or not at all, with a model card."""

import html
import json
import os
import re
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, Literal

import yaml
from jinja2 import Environment, PackageLoader

from backfold.errors import UserError
from backfold.evaluation.results import ACCURACY, BEFORE, PIXELS, PRETRAINED, SCRATCH, read_rows
from backfold.exporting.graph import write_graph
from backfold.exporting.timm_folder import (
    CONFIG,
    WEIGHTS,
    Rebuilt,
    architecture,
    rebuild,
    write_timm_folder,
)
from backfold.files import write_atomically
from backfold.training.config import config_to_dict
from backfold.training.run import Pretrained, RunFolder, exported_backbone, load_pretrained
from backfold.version import __version__

Format = Literal["timm", "huggingface", "onnx", "pt2"]
CARD = "README.md"
OURS = {WEIGHTS, CONFIG, "model.onnx", "model.pt2", CARD}
SHOWN = (PRETRAINED, BEFORE, SCRATCH, PIXELS)
PATHS = ("data", "out", "init")


def export_run(checkpoint: Path, kind: Format, out: Path, overwrite: bool = False) -> None:
    """Write a run's backbone and a model card; what is written has been read back and compared.

    Args:
        checkpoint: a run's folder (its last checkpoint) or a checkpoint file.
        kind: "timm" and "huggingface" write ``model.safetensors`` and ``config.json``,
            "onnx" ``model.onnx``, "pt2" ``model.pt2``; all write ``README.md``.
        out: the folder.
        overwrite: replace an earlier export.

    Raises:
        UserError: no checkpoint, a folder that exists, a backbone that the format can't hold, or a
            full disk.
    """
    foreign = sorted({path.name for path in out.iterdir()} - OURS) if out.is_dir() else []
    if foreign:
        raise UserError(
            f"{out} holds files that are no export's ({', '.join(foreign[:3])}); choose another "
            "--out"
        )
    if out.exists() and not (out.is_dir() and (overwrite or not any(out.iterdir()))):
        raise UserError(f"{out} exists; give --overwrite to replace an export, or another --out")
    run = load_pretrained(checkpoint)
    files = RunFolder(checkpoint if checkpoint.is_dir() else checkpoint.parent.parent)
    source = files if files.checkpoints.is_dir() else None
    rebuilt = rebuild(run, exported_backbone(run, source.root if source else None))
    with replacing_folder(out) as folder:
        if kind in ("onnx", "pt2"):
            write_graph(folder / f"model.{kind}", run, rebuilt.model)
        else:
            write_timm_folder(folder, run, rebuilt, wrapped=kind == "huggingface")
        card = render_card(run, source, kind, out.name, rebuilt)
        write_atomically(folder / CARD, card.encode())


@contextmanager
def replacing_folder(out: Path) -> Iterator[Path]:
    """A temporary folder that becomes ``out`` when the block ends well.

    Raises:
        UserError: the disk is full or the place can't be written; an old folder is intact.
    """
    temporary, old = (out.with_name(f".{out.name}.{ending}") for ending in ("tmp", "old"))
    try:
        shutil.rmtree(temporary, ignore_errors=True)
        temporary.mkdir(parents=True)
        yield temporary
        for path in temporary.iterdir():
            with path.open("rb") as file:
                os.fsync(file.fileno())
        shutil.rmtree(old, ignore_errors=True)
        if out.exists():
            out.replace(old)
        temporary.replace(out)
    except OSError as error:
        if old.exists() and not out.exists():
            old.replace(out)
        raise UserError(
            f"can't write {out}: {error.strerror or error}; free space or choose another --out"
        ) from error
    finally:
        shutil.rmtree(temporary, ignore_errors=True)
        shutil.rmtree(old, ignore_errors=True)


def render_card(
    run: Pretrained, files: RunFolder | None, kind: Format, name: str, rebuilt: Rebuilt
) -> str:
    """The card in Markdown; without the run's ``files`` it lacks facts and results."""
    config = {
        # Where somebody's files lie is nobody else's business.
        key: Path(value).name if key in PATHS and value is not None else value
        for key, value in config_to_dict(run.config).items()
    }
    health = _read_json(files.health).get("history") if files else None
    found = read_rows(files.evaluation) if files and files.evaluation.exists() else []
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
        health=health[-1] if health else {},
        rows=[row for row in found if row.metric == ACCURACY and row.contender in SHOWN],
        recipe=yaml.safe_dump(config, sort_keys=False).rstrip().replace("```", "'''"),
        version=__version__,
    )


def as_text(value: object) -> str:
    """One line without HTML, links, code or table cells of its own: names may be anybody's."""
    escaped = html.escape(" ".join(str(value).split()), quote=False)
    return re.sub(r"([\\`\[\]|])", r"\\\1", escaped)


def _read_json(path: Path) -> dict[str, Any]:
    try:
        content = json.loads(path.read_text())
    except FileNotFoundError:
        return {}
    except (OSError, ValueError) as error:
        raise UserError(f"{path} can't be read: {error}; remove it or mend it") from error
    return content if isinstance(content, dict) else {}
