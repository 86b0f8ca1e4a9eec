"""Backfold: pretrain any vision backbone as an energy function on unlabelled images."""

from backfold.energy import EnergyModel
from backfold.errors import UserError
from backfold.restoration import RestorationResult, restore
from backfold.version import __version__

__all__ = ["EnergyModel", "RestorationResult", "UserError", "__version__", "restore"]
