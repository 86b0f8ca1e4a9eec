"""Backfold: pretrain any vision backbone as an energy function on unlabelled images."""

from importlib import import_module
from typing import TYPE_CHECKING, Any

from backfold.errors import UserError
from backfold.version import __version__

if TYPE_CHECKING:
    from backfold.api import Backfold, export, load, pretrain, report, score, stats
    from backfold.embedding import EmbeddingChoice
    from backfold.energy import EnergyModel
    from backfold.evaluation.evaluate import evaluate
    from backfold.pretext import (
        Bands,
        Colorization,
        Denoising,
        Masking,
        Mixture,
        Sorting,
        SuperResolution,
    )
    from backfold.restoration import RestorationResult, restore, training_step

__all__ = [
    "Backfold",
    "Bands",
    "Colorization",
    "Denoising",
    "EmbeddingChoice",
    "EnergyModel",
    "Masking",
    "Mixture",
    "RestorationResult",
    "Sorting",
    "SuperResolution",
    "UserError",
    "__version__",
    "evaluate",
    "export",
    "load",
    "pretrain",
    "report",
    "restore",
    "score",
    "stats",
    "training_step",
]
API, PRETEXT, RESTORATION = "backfold.api", "backfold.pretext", "backfold.restoration"
# Imported when they are used: the command line answers before torch is loaded.
HOMES = {
    **dict.fromkeys(("Backfold", "export", "load", "pretrain", "report", "score", "stats"), API),
    **dict.fromkeys(("Bands", "Colorization", "Denoising", "Masking"), PRETEXT),
    **dict.fromkeys(("RestorationResult", "restore", "training_step"), RESTORATION),
    "EmbeddingChoice": "backfold.embedding",
    "EnergyModel": "backfold.energy",
    **dict.fromkeys(("Mixture", "Sorting", "SuperResolution"), PRETEXT),
    "evaluate": "backfold.evaluation.evaluate",
}


def __getattr__(name: str) -> Any:
    if name not in HOMES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(import_module(HOMES[name]), name)
