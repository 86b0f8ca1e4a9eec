"""A run that takes a second, for tests in this process and in others, and what else they share."""

import csv
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import torch

from backfold.data.open import EMBEDDED
from backfold.energy import EnergyModel
from backfold.pretext import Masking, Sorting
from backfold.training.config import OptimizerSettings, PretrainConfig, TaskSettings
from backfold.training.run import RunFolder

TINY_VIT = {"patch_size": 7, "embed_dim": 16, "depth": 1, "num_heads": 2}
RESNET = {
    "backbone": "resnet10t", "backbone_options": {"channels": [8, 16, 24, 32]}, "image_size": 32,
}  # fmt: skip


def seeded(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def tiny_energy(size: int = 28, channels: int = 3, *, heads: Any = None, **vit: Any) -> EnergyModel:
    """On a ViT of such options; the same weights each time."""
    torch.manual_seed(0)
    options = {"image_size": size, "channels": channels, "backbone_options": TINY_VIT | vit}
    return EnergyModel("vit_tiny_patch16_224", **options, **(heads or {}))


def write_images(
    path: Path, count: int = 80, first: int = 0, torn_every: int = 0, labelled: bool = True
) -> Path:
    """Grey images of 28 x 28 pixels in 10 classes, out of the embedded ones; some can't be read."""
    path.parent.mkdir(parents=True, exist_ok=True)
    table = pq.read_table(EMBEDDED / "fashion_mnist_train.parquet").slice(first, count)
    if torn_every:
        rows = table.to_pylist()
        for row in rows[::torn_every]:
            row["image"] = b"torn"
        table = pa.Table.from_pylist(rows)
    pq.write_table(table if labelled else table.drop_columns(["label"]), path)
    return path


def tiny_config(**changes: Any) -> PretrainConfig:
    """Settings for these images; an epoch has 9 steps on 80 of them."""
    settings: dict[str, Any] = {
        "backbone": "vit_tiny_patch16_224",
        "backbone_options": dict(TINY_VIT),
        "image_size": 28,
        "batch_size": 8,
        "max_steps": 3,
        "held_out": 8,
        "tasks": TaskSettings(
            masking=Masking(mask_patch_size=7), sorting=Sorting(sorting_patch_size=7)
        ),
        "optimizer": OptimizerSettings(base_lr=0.05, warmup_epochs=0.1),
        "accelerator": "cpu",
        "devices": 1,
        "precision": "32-true",
        "num_workers": 0,
        "watch_labels": False,
        **changes,
    }
    return PretrainConfig(**settings)


def rows_of(folder: RunFolder) -> list[dict[str, str]]:
    """What ``metrics.csv`` holds."""
    with folder.metrics.open(newline="") as file:
        return list(csv.DictReader(file))
