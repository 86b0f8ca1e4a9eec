"""What a run says: messages and a bar for people; numbers by step for files and services."""

import importlib.util
import json
import logging
import os
import sys
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any, get_args

import numpy as np
from lightning.fabric.utilities import rank_zero_only
from numpy.typing import NDArray
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TimeRemainingColumn
from torch.utils.tensorboard import SummaryWriter

from backfold.errors import UserError, first_line
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
    """Send messages to the terminal and, behind ``earlier`` ones, to a file; yields their list."""
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
    """Prints above the progress bar, and keeps the records."""

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


def progress_bar(console: Console, what: str, done: int, total: int) -> Progress:
    """A bar of one task, which shows its field ``numbers``; none where there is no terminal."""
    bar = Progress(
        what, MofNCompleteColumn(), BarColumn(bar_width=None), "{task.fields[numbers]}",
        TimeRemainingColumn(), console=console, transient=True, disable=not console.is_terminal,
    )  # fmt: skip
    bar.add_task("", total=total, completed=done, numbers="")
    return bar


class Meter:
    """Seconds of training, images a second and the share of time spent waiting for data."""

    def __init__(self, seconds_before: float) -> None:
        self._mark = time.monotonic()
        self._start = self._mark - seconds_before
        # Steps, seconds and seconds of waiting behind the first reading, until which workers start.
        self._judged: NDArray[np.float64] | None = None
        self._has_warned = False
        self._reset()

    def _reset(self) -> None:
        self._since, self._steps, self._images, self._waited = time.monotonic(), 0, 0, 0.0

    def before_batch(self) -> None:
        """A batch is asked for."""
        self._mark = time.monotonic()

    def before_step(self, images: int) -> None:
        """It is there, with so many images over all devices."""
        self._waited += time.monotonic() - self._mark
        self._images += images
        self._steps += 1

    @contextmanager
    def pause(self) -> Iterator[None]:
        """Within, something else than training happens."""
        begun = time.monotonic()
        yield
        self._start += time.monotonic() - begun
        self._reset()

    def seconds(self) -> float:
        """Of training, without pauses."""
        return time.monotonic() - self._start

    def read(self) -> tuple[float, float]:
        """(images a second, share of waiting) since the last reading; warns once of long waits."""
        elapsed = max(time.monotonic() - self._since, 1e-9)
        result = self._images / elapsed, self._waited / elapsed
        found = np.array([self._steps, elapsed, self._waited])
        self._judged = np.zeros(3) if self._judged is None else self._judged + found
        self._reset()
        steps, seconds, waited = self._judged
        if steps >= JUDGED_STEPS:
            self._judged = np.zeros(3)
            if waited > LONG_WAIT * seconds and not self._has_warned:
                self._has_warned = True
                LOGGER.warning(
                    f"waiting for images takes {waited / seconds:.0%} of the time; raise "
                    "--num-workers, or store the images smaller"
                )
        return result


class MetricsLog:
    """Appends rows to ``metrics.csv`` and to TensorBoard, and tells them `open_services`.

    Lightning's CSVLogger deletes an existing file where a run goes on, hence these few lines.
    Rows of steps later than ``steps_done`` are dropped: a resumed run writes them again. A service
    that fails in mid-run gets no more, with a warning.
    """

    def __init__(
        self, folder: RunFolder, steps_done: int, services: Mapping[LoggerName, Any] | None = None
    ) -> None:
        self._services = dict(services or {})
        header = ",".join(COLUMNS) + "\n"
        rows: list[str] = []
        if steps_done and folder.metrics.exists():
            first, *rows = folder.metrics.read_text().splitlines(keepends=True) or [""]
            # A killed run can leave half a row.
            whole = [
                row for row in rows if first == header and row[0].isdigit() and row.endswith("\n")
            ]
            rows = [row for row in whole if int(row.partition(",")[0]) <= steps_done]
        write_atomically(folder.metrics, "".join([header, *rows]).encode())
        self._file = folder.metrics.open("a")
        # TensorBoard reads its files in the order of their names, which begin with whole seconds.
        earlier = folder.tensorboard.glob("events.out.tfevents.*")
        last = max((int(path.name.split(".")[3]) for path in earlier), default=0)
        while int(time.time()) <= last < time.time() + 1:
            time.sleep(0.02)
        self._board = SummaryWriter(str(folder.tensorboard), purge_step=steps_done + 1)

    def add(self, row: Mapping[str, float]) -> None:
        """One row; its keys are `COLUMNS`."""
        values = [str(row["step"]), *(f"{row[name]:.6g}" for name in COLUMNS[1:])]
        self._file.write(",".join(values) + "\n")
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
        for name in list(self._services):
            try:
                self._services[name].log_metrics(dict(numbers), step)
            except Exception as error:
                del self._services[name]
                said = "%s failed (%s) and gets no more numbers of this start; metrics.csv has all"
                LOGGER.warning(said, name, first_line(error))

    def close(self, *, succeeded: bool = True) -> None:
        """Close all; whether the run has come to its end is told to services."""
        self._file.close()
        self._board.close()
        for name, logger in self._services.items():
            try:
                logger.finalize("success" if succeeded else "failed")
                if name == "wandb":
                    logger.experiment.finish(exit_code=0 if succeeded else 1)
            except Exception as error:
                LOGGER.warning("%s failed at the end (%s)", name, first_line(error))


def check_loggers(names: Sequence[LoggerName]) -> None:
    """Raise a UserError for a logger that is unknown, or whose package is missing."""
    for name in names:
        if name not in (known := get_args(LoggerName)):
            raise UserError(f"unknown logger {name!r}; choose from {', '.join(known)}")
        if importlib.util.find_spec(name) is None:
            raise UserError(
                f"loggers names {name}, which is not installed; run `pip install backfold[{name}]` "
                f"or leave {name} out"
            )


def open_services(
    names: Sequence[LoggerName], folder: RunFolder, settings: Mapping[str, Any]
) -> dict[LoggerName, Any]:
    """Lightning's loggers for Weights & Biases and MLflow; UserError for one that can't be reached.

    Environment variables of theirs, such as ``WANDB_MODE`` and ``MLFLOW_TRACKING_URI``, say where
    what is sent. Under the identities in ``loggers.json`` a resumed run goes on.
    """
    path, services = folder.checkpoints / IDENTITIES, {}
    known: dict[str, str] = json.loads(path.read_text()) if names and path.exists() else {}
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
                f"{name} can't be started ({first_line(error)}); check its environment "
                f"variables and login, or leave it out of loggers"
            ) from error
        services[name], known[name] = logger, found
        write_json(path, known)
    return services


def _open(name: LoggerName, run: str, identity: str | None) -> Any:
    # Lightning's Trainer, which these come with, takes a second to import.
    from lightning.pytorch.loggers import MLFlowLogger, WandbLogger

    for variable, value in QUIET.items():
        os.environ.setdefault(variable, value)
    if name == "wandb":
        return WandbLogger(
            name=os.environ.get("WANDB_NAME", run),
            project=os.environ.get("WANDB_PROJECT", PROJECT),
            save_dir=os.environ.get("WANDB_DIR", "."),
            version=identity,
        )
    import mlflow

    return MLFlowLogger(
        experiment_name=os.environ.get("MLFLOW_EXPERIMENT_NAME", PROJECT),
        run_name=run,
        tracking_uri=mlflow.get_tracking_uri(),
        run_id=identity,
    )
