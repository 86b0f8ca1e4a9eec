"""What a run says: messages and a bar for people; numbers by step for files and services."""

import csv
import importlib.util
import io
import json
import logging
import os
import sys
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from pathlib import Path
from textwrap import shorten
from typing import Any, get_args

import numpy as np
from lightning.fabric.utilities import rank_zero_only
from numpy.typing import NDArray
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn
from torch.utils.tensorboard import SummaryWriter

from backfold.errors import UserError
from backfold.files import write_atomically, write_json
from backfold.training.config import LoggerName
from backfold.training.run import RunFolder

LOGGER = logging.getLogger("backfold")
COLUMNS = (
    "step", "epoch", "seconds", "images_per_second", "data_wait", "lr", "loss", "gradient_norm",
    "psnr_gain_db", "energy_gap",
)  # fmt: skip
IDENTITIES = "loggers.json"
PROJECT = "backfold"
QUIET = {"MLFLOW_DISABLE_TELEMETRY": "true", "WANDB_ERROR_REPORTING": "false"}
# Of the time of so many steps or more.
LONG_WAIT, JUDGED_STEPS = 0.2, 20


def is_first_process() -> bool:
    """Whether this process speaks for all that a run was started in."""
    return bool(getattr(rank_zero_only, "rank", 0) == 0)


def terminal() -> Console:
    """Where messages go: standard error, so that results alone are on standard output."""
    return Console(file=sys.stderr, soft_wrap=True)


@contextmanager
def log_to(
    path: Path | None, console: Console, earlier: Sequence[logging.LogRecord] = ()
) -> Iterator[list[logging.LogRecord]]:
    """Send the run's messages to the terminal and, given a path, append them to a file.

    Yields the list in which the messages gather; ``earlier`` ones go to the file first.
    """
    shown = _ConsoleHandler(console)
    handlers: list[logging.Handler] = [shown]
    if path is not None:
        file = _FileHandler(path)
        file.setFormatter(logging.Formatter("%(asctime)s %(levelname)s %(message)s"))
        handlers.append(file)
        for record in earlier:
            file.handle(record)
    LOGGER.setLevel(logging.INFO)
    LOGGER.propagate = False
    for handler in handlers:
        LOGGER.addHandler(handler)
    try:
        yield shown.records
    finally:
        for handler in handlers:
            LOGGER.removeHandler(handler)
            handler.close()


class _ConsoleHandler(logging.Handler):
    """Prints above the progress bar, so that neither breaks the other, and keeps the records."""

    def __init__(self, console: Console) -> None:
        super().__init__()
        self._console = console
        self.records: list[logging.LogRecord] = []

    def emit(self, record: logging.LogRecord) -> None:
        self.records.append(record)
        prefix = "" if record.levelno < logging.WARNING else f"{record.levelname.lower()}: "
        self._console.print(prefix + record.getMessage(), markup=False, highlight=False)


class _FileHandler(logging.FileHandler):
    """Leaves a full disk to who writes the run's results, in one line and not for each message."""

    def handleError(self, record: logging.LogRecord) -> None:  # noqa: N802 (the library's name)
        if not isinstance(sys.exc_info()[1], OSError):
            super().handleError(record)

    def close(self) -> None:
        with suppress(OSError):  # what could not be written is tried once more
            super().close()


def training_bar(console: Console, done: int, total: int) -> Progress:
    """A bar whose one task has the steps, and in its field ``numbers`` what `describe_row` says.

    Where the output is no terminal, nothing is drawn: the log has a line an epoch.
    """
    bar = Progress(
        TextColumn("step"),
        MofNCompleteColumn(),
        BarColumn(bar_width=None),
        TextColumn("{task.fields[numbers]}"),
        TimeRemainingColumn(),
        console=console,
        transient=True,
        disable=not console.is_terminal,
    )
    bar.add_task("step", total=total, completed=done, numbers="")
    return bar


def describe_row(row: Mapping[str, float]) -> str:
    """The numbers of a metrics row in one short line."""
    return (
        f"loss {row['loss']:.4f}  gain {row['psnr_gain_db']:+.2f} dB  "
        f"energy gap {row['energy_gap']:+.3g}  {row['images_per_second']:.0f} images/s  "
        f"data wait {row['data_wait']:.0%}"
    )


class Meter:
    """Seconds of training, images a second and the share of time spent waiting for data."""

    def __init__(self, seconds_before: float) -> None:
        self._mark = time.monotonic()
        self._start = self._mark - seconds_before
        # Steps, seconds and seconds of waiting, from the second reading on: in the first one
        # workers start, and code is compiled.
        self._judged: NDArray[np.float64] | None = None
        self._reset()

    def _reset(self) -> None:
        self._since, self._steps, self._images, self._waited = time.monotonic(), 0, 0, 0.0

    def before_batch(self) -> None:
        """A batch is asked for."""
        self._mark = time.monotonic()

    def before_step(self, images: int) -> None:
        """The batch is there, with this many images over all devices."""
        self._waited += time.monotonic() - self._mark
        self._images += images
        self._steps += 1

    def pause(self) -> None:
        """Something else than training begins."""
        self._mark = time.monotonic()

    def resume(self) -> None:
        """It is over."""
        self._start += time.monotonic() - self._mark
        self._reset()

    def seconds(self) -> float:
        """Seconds of training, looks at the held-out images left out."""
        return time.monotonic() - self._start

    def read(self) -> tuple[float, float]:
        """(images a second, share of waiting) since the last reading."""
        elapsed = max(time.monotonic() - self._since, 1e-9)
        result = self._images / elapsed, self._waited / elapsed
        found = np.array([self._steps, elapsed, self._waited])
        self._judged = np.zeros(3) if self._judged is None else self._judged + found
        self._reset()
        return result

    def long_wait(self) -> float | None:
        """The share of waiting over the last `JUDGED_STEPS` or more, if it is above `LONG_WAIT`.

        To be asked after each reading; None where it is short, or not yet to be judged.
        """
        if self._judged is None or self._judged[0] < JUDGED_STEPS:
            return None
        share = float(self._judged[2] / self._judged[1])
        self._judged = np.zeros(3)
        return share if share > LONG_WAIT else None


class MetricsLog:
    """Appends rows to ``metrics.csv`` and to TensorBoard, and passes them on to services.

    Lightning's CSVLogger deletes an existing file where a run goes on, hence these few lines.

    Rows of steps later than ``steps_done`` are dropped: a resumed run writes them again.
    """

    def __init__(
        self, folder: RunFolder, steps_done: int, services: "ServiceLoggers | None" = None
    ) -> None:
        self._services = services
        rows: list[dict[str, str]] = []
        if steps_done and folder.metrics.exists():
            with folder.metrics.open(newline="") as file:
                # A killed run can leave half a row.
                whole = (row for row in csv.DictReader(file) if None not in row.values())
                rows = [row for row in whole if set(row) == set(COLUMNS)]
        text = io.StringIO()
        writer = csv.DictWriter(text, COLUMNS, lineterminator="\n")
        writer.writeheader()
        writer.writerows(row for row in rows if int(row["step"]) <= steps_done)
        write_atomically(folder.metrics, text.getvalue().encode())
        self._file = folder.metrics.open("a", newline="")
        self._writer = csv.DictWriter(self._file, COLUMNS, lineterminator="\n")
        # TensorBoard reads its files in the order of their names, which begin with whole seconds.
        earlier = folder.tensorboard.glob("events.out.tfevents.*")
        last = max((int(path.name.split(".")[3]) for path in earlier), default=0)
        while int(time.time()) <= last < time.time() + 1:
            time.sleep(0.02)
        self._board = SummaryWriter(str(folder.tensorboard), purge_step=steps_done + 1)

    def add(self, row: Mapping[str, float]) -> None:
        """One row; its keys are `COLUMNS`."""
        self._writer.writerow(
            {name: f"{row[name]:.6g}" for name in COLUMNS} | {"step": row["step"]}
        )
        self._file.flush()
        self._send({f"train/{name}": row[name] for name in COLUMNS[3:]}, int(row["step"]))

    def add_health(self, entry: Mapping[str, Any]) -> None:
        """An entry of the health history; not to the CSV, as ``health.json`` has it whole."""
        names = ("psnr_gain_db", "energy_gap", "auroc", "rank_me", "knn")
        numbers = {f"held_out/{name}": entry[name] for name in names if entry[name] is not None}
        for task, measures in entry["tasks"].items():
            numbers |= {f"held_out_{task}/{name}": value for name, value in measures.items()}
        self._send(numbers, int(entry["step"]))

    def _send(self, numbers: Mapping[str, float], step: int) -> None:
        for name, value in numbers.items():
            self._board.add_scalar(name, value, step)
        self._board.flush()  # a thread writes: what it has not yet written would die with the run
        if self._services is not None:
            self._services.add(numbers, step)

    def close(self, *, succeeded: bool = True) -> None:
        """Flush and close all; whether the run has come to its end is told to services."""
        self._file.close()
        self._board.close()
        if self._services is not None:
            self._services.close(succeeded=succeeded)


def check_loggers(names: Sequence[LoggerName]) -> None:
    """Raise a UserError for a logger that is unknown, or whose package is missing."""
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
    """Passes a run's numbers on to Weights & Biases and MLflow, where its settings name them.

    Lightning's loggers talk to them. Where they send what (server, project, offline or not) is said
    by their own environment variables, such as ``WANDB_MODE`` and ``MLFLOW_TRACKING_URI``. What
    they tell their makers of their own accord is switched off, unless those variables ask for it.

    A service that fails in mid-run is left alone from then on, with a warning: no run ends for it,
    and ``metrics.csv`` has every row. ``loggers.json`` beside the checkpoints says under which
    identity each service knows the run, and a resumed run goes on under the same; the settings are
    told to a service when the run is new to it.

    Raises:
        UserError: a service can't be reached, or its package is missing.
    """

    def __init__(
        self, names: Sequence[LoggerName], folder: RunFolder, settings: Mapping[str, Any]
    ) -> None:
        check_loggers(names)
        path = folder.checkpoints / IDENTITIES
        known: dict[str, str] = {}
        if names and path.exists():
            known = json.loads(path.read_text())
        self._loggers: dict[LoggerName, Any] = {}
        for name in dict.fromkeys(names):
            try:
                logger = _open(name, folder.root.name, known.get(name))
                # The first call to reach the service.
                found = str(logger.experiment.id if name == "wandb" else logger.version)
                # MLflow's parameters never change, and a resumed run may have other workers.
                if found != known.get(name):
                    logger.log_hyperparams(dict(settings))
            except Exception as error:
                raise UserError(
                    f"{name} can't be started ({_first_line(error)}); check its environment "
                    f"variables and login, or leave it out of loggers"
                ) from error
            self._loggers[name], known[name] = logger, found
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


def _open(name: LoggerName, run: str, identity: str | None) -> Any:
    """Lightning's logger of the service, for this run's name and its identity there."""
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


def _first_line(error: Exception) -> str:
    return shorten((str(error).strip() or type(error).__name__).splitlines()[0], 200)
