"""Settings of a run that takes a second, for tests in this process and in others."""

from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq

from backfold.data.open import EMBEDDED
from backfold.pretext import Masking, Sorting
from backfold.training.config import OptimizerSettings, PretrainConfig, TaskSettings

TINY_VIT = {"patch_size": 7, "embed_dim": 16, "depth": 1, "num_heads": 2}


def write_images(path: Path, count: int = 80, first: int = 0, torn_every: int = 0) -> Path:
    """Labelled grey images of 28 x 28 pixels, out of the embedded ones; some can't be read."""
    table = pq.read_table(EMBEDDED / "fashion_mnist_train.parquet").slice(first, count)
    if torn_every:
        rows = table.to_pylist()
        for row in rows[::torn_every]:
            row["image"] = b"torn"
        table = pa.Table.from_pylist(rows)
    pq.write_table(table, path)
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
