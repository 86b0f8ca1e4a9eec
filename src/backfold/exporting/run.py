"""Exporting a run into a folder that appears whole or not at all."""

import os
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Literal

from backfold.errors import UserError
from backfold.exporting.card import render_card
from backfold.exporting.graph import EnergyGraph, write_onnx, write_pt2
from backfold.exporting.timm_folder import (
    CONFIG,
    WEIGHTS,
    rebuild,
    write_timm_folder,
)
from backfold.exporting.weights import exported_backbone
from backfold.training.pretrained import load_pretrained
from backfold.training.run_folder import write_atomically

Format = Literal["timm", "huggingface", "onnx", "pt2"]
ONNX, PT2, CARD = "model.onnx", "model.pt2", "README.md"
OURS = {WEIGHTS, CONFIG, ONNX, PT2, CARD}


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
    check_out(out, overwrite)
    run = load_pretrained(checkpoint)
    source = _run_folder(checkpoint)
    rebuilt = rebuild(run, exported_backbone(run, source))
    with replacing_folder(out) as folder:
        if kind == "pt2":
            write_pt2(folder / PT2, run, EnergyGraph(run, rebuilt.model).eval())
        elif kind == "onnx":
            write_onnx(folder / ONNX, run, EnergyGraph(run, rebuilt.model).eval())
        else:
            write_timm_folder(folder, run, rebuilt, wrapped=kind == "huggingface")
        card = render_card(run, source, kind, out.name, rebuilt)
        write_atomically(folder / CARD, card.encode())


def _run_folder(checkpoint: Path) -> Path | None:
    folder = checkpoint if checkpoint.is_dir() else checkpoint.parent.parent
    return folder if (folder / "checkpoints").is_dir() else None


def check_out(out: Path, overwrite: bool) -> None:
    """Refuse, before anything is computed, a folder that could not be written.

    Raises:
        UserError: it exists and may not be replaced, or holds files that are no export's.
    """
    if out.is_dir():
        foreign = sorted({path.name for path in out.iterdir()} - OURS)
        if foreign:
            raise UserError(
                f"{out} holds files that are no export's ({', '.join(foreign[:3])}); choose "
                "another --out"
            )
        if overwrite or not any(out.iterdir()):
            return
    elif not out.exists():
        return
    raise UserError(f"{out} exists; give --overwrite to replace an export, or another --out")


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
