"""Backfold: pretrain any vision backbone as an energy function on unlabelled images."""

from importlib import import_module
from typing import TYPE_CHECKING, Any

from backfold.errors import UserError
from backfold.version import __version__

if TYPE_CHECKING:
    from backfold.api import Backfold
    from backfold.energy import EnergyModel
    from backfold.evaluation.evaluate import evaluate
    from backfold.restoration import RestorationResult, restore

__all__ = [
    "Backfold",
    "EnergyModel",
    "RestorationResult",
    "UserError",
    "__version__",
    "evaluate",
    "restore",
]
# Imported when they are used: the command line answers before torch is loaded.
HOMES = {
    "Backfold": "backfold.api",
    "EnergyModel": "backfold.energy",
    "RestorationResult": "backfold.restoration",
    "evaluate": "backfold.evaluation.evaluate",
    "restore": "backfold.restoration",
}


def __getattr__(name: str) -> Any:
    if name not in HOMES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(import_module(HOMES[name]), name)
