"""Backfold: pretrain any vision backbone as an energy function on unlabelled images."""

from typing import TYPE_CHECKING, Any

from backfold.energy import EnergyModel
from backfold.errors import UserError
from backfold.restoration import RestorationResult, restore
from backfold.version import __version__

if TYPE_CHECKING:
    from backfold.api import Backfold

__all__ = [
    "Backfold",
    "EnergyModel",
    "RestorationResult",
    "UserError",
    "__version__",
    "restore",
]


def __getattr__(name: str) -> Any:
    # Reading runs needs far more modules than restoring with an energy does.
    if name == "Backfold":
        from backfold.api import Backfold

        return Backfold
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
