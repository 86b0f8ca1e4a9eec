"""Weights & Biases and MLflow, for those who use them; neither is ever called unasked.

Lightning's loggers talk to them. Where they send what (server, project, offline or not) is said by
their own environment variables, such as ``WANDB_MODE`` and ``MLFLOW_TRACKING_URI``. What these
packages tell their makers of their own accord is switched off, unless those variables ask for it.
"""

import importlib.util
import json
import logging
import os
from collections.abc import Mapping, Sequence
from pathlib import Path
from textwrap import shorten
from typing import TYPE_CHECKING, Any, get_args

from backfold.errors import UserError
from backfold.training.config import LoggerName
from backfold.training.run_folder import RunFolder, write_json

if TYPE_CHECKING:
    from lightning.pytorch.loggers import MLFlowLogger, WandbLogger

LOGGER = logging.getLogger("backfold")
IDENTITIES = "loggers.json"
PROJECT = "backfold"
QUIET = {"MLFLOW_DISABLE_TELEMETRY": "true", "WANDB_ERROR_REPORTING": "false"}


def check_loggers(names: Sequence[LoggerName]) -> None:
    """Refuse a logger that is unknown, or whose package is missing.

    Raises:
        UserError: it is.
    """
    for name in names:
        if name not in get_args(LoggerName):
            raise UserError(
                f"unknown logger {name!r}; choose from {', '.join(get_args(LoggerName))}"
            )
        if importlib.util.find_spec(name) is None:
            raise UserError(
                f"loggers names {name}, which is not installed; run `pip install backfold[{name}]` "
                f"or leave {name} out"
            )


class ServiceLoggers:
    """Passes a run's numbers on to the services that its settings name.

    A service that fails in mid-run is left alone from then on, with a warning: no run ends for it,
    and ``metrics.csv`` has every row.

    Args:
        names: of the services; none does nothing.
        folder: the run's; ``loggers.json`` beside its checkpoints says under which identity each
            service knows the run, and a resumed run goes on under the same.
        settings: told to a service when the run is new to it.

    Raises:
        UserError: a service can't be reached, or its package is missing.
    """

    def __init__(
        self, names: Sequence[LoggerName], folder: RunFolder, settings: Mapping[str, Any]
    ) -> None:
        check_loggers(names)
        path = folder.checkpoints / IDENTITIES
        known = _identities(path) if names else {}
        self._loggers: dict[LoggerName, WandbLogger | MLFlowLogger] = {}
        for name in dict.fromkeys(names):
            try:
                logger = _open(name, folder.root.name, known.get(name))
                known[name] = _identity(name, logger, known.get(name), settings)
            except Exception as error:
                raise UserError(
                    f"{name} can't be started ({_first_line(error)}); check its environment "
                    f"variables and login, or leave it out of loggers"
                ) from error
            self._loggers[name] = logger
            write_json(path, known)

    def add(self, numbers: Mapping[str, float], step: int) -> None:
        """Numbers by name, at a step."""
        for name in list(self._loggers):
            try:
                self._loggers[name].log_metrics(dict(numbers), step)
            except Exception as error:
                del self._loggers[name]
                LOGGER.warning(
                    "%s failed (%s) and gets no more numbers of this start; metrics.csv has all",
                    name,
                    _first_line(error),
                )

    def close(self, *, succeeded: bool) -> None:
        """Send what is left, and say how the run ended."""
        for name, logger in self._loggers.items():
            try:
                logger.finalize("success" if succeeded else "failed")
                if name == "wandb":
                    logger.experiment.finish(exit_code=0 if succeeded else 1)
            except Exception as error:
                LOGGER.warning("%s failed at the end (%s)", name, _first_line(error))
        self._loggers.clear()


def _identities(path: Path) -> dict[str, str]:
    identities: dict[str, str] = json.loads(path.read_text()) if path.exists() else {}
    return identities


def _open(name: LoggerName, run: str, identity: str | None) -> "WandbLogger | MLFlowLogger":
    # Lightning's Trainer, which these come with, takes a second to import.
    from lightning.pytorch.loggers import MLFlowLogger, WandbLogger

    for variable, value in QUIET.items():
        os.environ.setdefault(variable, value)
    if name == "wandb":
        return WandbLogger(
            name=os.environ.get("WANDB_NAME", run),
            project=os.environ.get("WANDB_PROJECT", PROJECT),
            save_dir=os.environ.get("WANDB_DIR", "."),
            version=identity or os.environ.get("WANDB_RUN_ID"),
        )
    import mlflow

    return MLFlowLogger(
        experiment_name=os.environ.get("MLFLOW_EXPERIMENT_NAME", PROJECT),
        run_name=run,
        tracking_uri=mlflow.get_tracking_uri(),
        run_id=identity,
    )


def _identity(
    name: LoggerName,
    logger: "WandbLogger | MLFlowLogger",
    known: str | None,
    settings: Mapping[str, Any],
) -> str:
    """What the service calls the run; the first call to reach it."""
    found = str(logger.experiment.id if name == "wandb" else logger.version)
    # MLflow's parameters never change, and a resumed run may have other workers.
    if found != known:
        logger.log_hyperparams(dict(settings))
    return found


def _first_line(error: Exception) -> str:
    return shorten((str(error).strip() or type(error).__name__).splitlines()[0], 200)
