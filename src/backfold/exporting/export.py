"""Exporting a run into a folder that appears whole or not at all, with a model card."""

import html
import json
import os
import re
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from itertools import product
from pathlib import Path
from typing import Any, Literal, NamedTuple, get_args

import timm
import torch
import yaml
from jinja2 import Environment, PackageLoader
from safetensors.torch import save
from timm.models import split_model_name_tag
from torch import Tensor, nn

from backfold.backbone import feature_map
from backfold.embedding import embed
from backfold.errors import UserError
from backfold.evaluation.results import ACCURACY, BEFORE, PIXELS, PRETRAINED, SCRATCH, read_rows
from backfold.exporting.graph import write_graph
from backfold.files import write_json
from backfold.training.config import config_to_dict
from backfold.training.run import Pretrained, RunFolder, exported_backbone, load_pretrained
from backfold.version import __version__

Format = Literal["timm", "huggingface", "onnx", "pt2"]
WEIGHTS = "model.safetensors"
CONFIG = "config.json"
TOLERANCE = 1e-5
# How models are told to give the mean over positions, the embedding, as their output. Vision
# transformers with a mean move their last norm behind it unless they are told not to.
AVERAGE: dict[str, Any] = {"global_pool": "avg"}
POOLINGS: tuple[dict[str, Any], ...] = (AVERAGE, AVERAGE | {"fc_norm": False}, {})
CONFIG_KEYS = ("first_conv", "classifier", "fixed_input_size", "pool_size")
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
    if kind not in get_args(Format):
        raise UserError(f"format is {kind!r}; choose from {', '.join(get_args(Format))}")
    foreign = sorted({path.name for path in out.iterdir()} - OURS) if out.is_dir() else []
    if foreign:
        raise UserError(
            f"{out} holds files that are no export's ({', '.join(foreign[:3])}); choose another "
            "--out"
        )
    if out.exists() and not (out.is_dir() and (overwrite or not any(out.iterdir()))):
        raise UserError(f"{out} exists; give --overwrite to replace an export, or another --out")
    run = load_pretrained(checkpoint)
    files = RunFolder(RunFolder.of(checkpoint) or checkpoint)  # which has none, if it is a file
    rebuilt = _rebuild(run, exported_backbone(run, files.root))
    with _replacing_folder(out) as folder:
        if kind in ("onnx", "pt2"):
            write_graph(folder / f"model.{kind}", run, rebuilt.model)
        else:
            _write_timm_folder(folder, run, rebuilt, wrapped=kind == "huggingface")
        (folder / CARD).write_bytes(_card(run, files, kind, out.name, rebuilt).encode())


@contextmanager
def _replacing_folder(out: Path) -> Iterator[Path]:
    """A temporary folder that becomes ``out`` when the block ends well; else it is as it was."""
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


class Rebuilt(NamedTuple):
    """A backbone as timm alone builds it: its own layers with our weights, in eval mode."""

    model: nn.Module
    name: str  # without that of somebody's weights
    arguments: dict[str, Any]  # of `timm.create_model`, besides the name and ``num_classes=0``
    pooled: bool  # whether the model's output is the embedding, the last layer's average


@torch.no_grad()
def _rebuild(run: Pretrained, backbone: nn.Module) -> Rebuilt:
    """Build the backbone anew with arguments that anybody can give timm, and compare."""
    name = str(split_model_name_tag(run.config.backbone)[0])
    # Two images of noise: what differs anywhere differs on them.
    generator = torch.Generator().manual_seed(0)
    images = torch.randn(2, run.channels, *run.image_size, generator=generator)
    expected, features = embed(backbone, images), feature_map(backbone, images)
    own = {"in_chans": run.channels, **run.config.backbone_options}
    sizes: tuple[dict[str, Any], ...] = ({"img_size": list(run.image_size)}, {})
    fallback = None
    for pooling, size in product(POOLINGS, sizes):
        arguments = {**own, **size, **pooling}
        try:
            model: nn.Module = timm.create_model(name, num_classes=0, **arguments)
            model.load_state_dict(backbone.state_dict())
        except (TypeError, RuntimeError, AssertionError, ValueError):
            continue
        model.eval()
        if not _close(feature_map(model, images), features):
            continue
        if _close(model(images), expected):
            return Rebuilt(model, name, arguments, pooled=True)
        if not pooling:
            fallback = fallback or Rebuilt(model, name, arguments, pooled=False)
    if fallback is None:
        raise UserError(
            f"timm {timm.__version__} can't build {name!r} with these weights; use the versions in "
            "the run's run.json"
        )
    return fallback


def _close(given: object, expected: Tensor) -> bool:
    return (
        isinstance(given, Tensor)
        and given.shape == expected.shape
        and torch.allclose(given, expected, rtol=TOLERANCE, atol=TOLERANCE)
    )


def _write_timm_folder(folder: Path, run: Pretrained, rebuilt: Rebuilt, wrapped: bool) -> None:
    """Weights and config; ``wrapped`` names transformers' wrapper as the model's type."""
    model, arguments = rebuilt.model, rebuilt.arguments
    tensors = {name: t.detach().contiguous().clone() for name, t in model.state_dict().items()}
    (folder / WEIGHTS).write_bytes(save(tensors, metadata={"format": "pt"}))
    known = dict(getattr(model, "pretrained_cfg", None) or {})
    config = {
        "architecture": rebuilt.name,
        "num_classes": 0,
        "num_features": int(getattr(model, "num_features", 0)),
        "model_args": arguments,
        "pretrained_cfg": {
            **{key: known[key] for key in CONFIG_KEYS if key in known},
            "input_size": [run.channels, *run.image_size],
            "mean": list(run.statistics.mean),
            "std": list(run.statistics.std),
            "interpolation": "bilinear",
            "crop_pct": 1.0,
            "crop_mode": "center",
            "num_classes": 0,
            "tag": "backfold",
            "custom_load": False,
        },
    }
    if "global_pool" in arguments:
        config["global_pool"] = arguments["global_pool"]
    write_json(folder / CONFIG, {"model_type": "timm_wrapper", **config} if wrapped else config)


def _card(run: Pretrained, files: RunFolder, kind: Format, name: str, rebuilt: Rebuilt) -> str:
    """The card in Markdown; it lacks facts and results whose ``files`` are not there."""
    config = {
        # Where somebody's files lie is nobody else's business.
        key: Path(value).name if key in PATHS and value is not None else value
        for key, value in config_to_dict(run.config).items()
    }
    health = _read_json(files.health).get("history")
    found = read_rows(files.evaluation) if files.evaluation.exists() else []
    rows = [row for row in found if row.step == run.step]  # and not of a later checkpoint
    environment = Environment(
        loader=PackageLoader("backfold.exporting", ""), trim_blocks=True, lstrip_blocks=True
    )
    environment.filters["text"] = _as_text
    return environment.get_template("model_card.md.jinja").render(
        run=run,
        kind=kind,
        name=name,
        architecture=rebuilt.name,
        call=", ".join(f"{key}={value!r}" for key, value in rebuilt.arguments.items()),
        pooled=rebuilt.pooled,
        facts=_read_json(files.facts),
        health=health[-1] if health else {},
        rows=[row for row in rows if row.metric == ACCURACY and row.contender in SHOWN],
        recipe=yaml.safe_dump(config, sort_keys=False).rstrip().replace("```", "'''"),
        version=__version__,
    )


def _as_text(value: object) -> str:
    """One line without HTML, links, code or table cells of its own: names may be anybody's."""
    escaped = html.escape(" ".join(str(value).split()), quote=False)
    return re.sub(r"([\\`\[\]|])", r"\\\1", escaped)


def _read_json(path: Path) -> dict[str, Any]:
    try:
        return dict(json.loads(path.read_text())) if path.exists() else {}
    except (OSError, ValueError, TypeError) as error:
        raise UserError(f"{path} can't be read: {error}; remove it or mend it") from error
