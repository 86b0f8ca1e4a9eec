from collections.abc import Callable
from pathlib import Path
from typing import Any

import pyarrow.parquet as pq
import pytest
from rich.console import Console

from backfold.data.source import EMBEDDED
from backfold.pretext import Masking, Sorting
from backfold.training.config import PretrainConfig, TaskSettings
from backfold.training.optimizer import OptimizerSettings

TINY_VIT = {"patch_size": 7, "embed_dim": 16, "depth": 1, "num_heads": 2}


@pytest.fixture
def quiet() -> Console:
    return Console(quiet=True)


@pytest.fixture
def make_parquet(tmp_path) -> Callable[..., Path]:
    def make(count: int, first: int = 0, name: str = "images.parquet") -> Path:
        """Labelled grey images of 28 x 28 pixels, out of the embedded ones."""
        table = pq.read_table(EMBEDDED / "fashion_mnist_train.parquet")
        pq.write_table(table.slice(first, count), tmp_path / name)
        return tmp_path / name

    return make


@pytest.fixture
def tiny(tmp_path, make_parquet) -> Callable[..., PretrainConfig]:
    def make(**changes: Any) -> PretrainConfig:
        """Settings of a run that takes a second; data of 80 images unless they are given."""
        settings: dict[str, Any] = {
            "out": tmp_path / "run",
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
        if "data" not in settings:
            settings["data"] = make_parquet(80)
        return PretrainConfig(**settings)

    return make
