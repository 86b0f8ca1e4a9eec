"""Backfold: pretrain any vision backbone as an energy function on unlabelled images."""

from typing import TYPE_CHECKING, Any

from backfold.energy import EnergyModel
from backfold.errors import UserError
from backfold.restoration import RestorationResult, restore
from backfold.version import __version__

if TYPE_CHECKING:
    from backfold.api import Backfold
    from backfold.evaluation.evaluate import evaluate

__all__ = [
    "Backfold",
    "EnergyModel",
    "RestorationResult",
    "UserError",
    "__version__",
    "evaluate",
    "restore",
]


def __getattr__(name: str) -> Any:
    # Reading and judging runs needs far more modules than restoring with an energy does.
    if name == "Backfold":
        from backfold.api import Backfold

        return Backfold
    if name == "evaluate":
        from backfold.evaluation.evaluate import evaluate

        return evaluate
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
