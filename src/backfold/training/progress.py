"""What a person sees while a run goes on."""

import logging
import sys
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from pathlib import Path

from lightning.fabric.utilities import rank_zero_only
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

LOGGER = logging.getLogger("backfold")


@contextmanager
def log_to(
    path: Path | None, console: Console, earlier: Sequence[logging.LogRecord] = ()
) -> Iterator[list[logging.LogRecord]]:
    """Send the run's messages to the terminal and, given a path, append them to a file.

    Yields the list in which the messages gather; ``earlier`` ones go to the file first.
    """
    kept = _Keeper()
    handlers: list[logging.Handler] = [_ConsoleHandler(console), kept]
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
        yield kept.records
    finally:
        for handler in handlers:
            LOGGER.removeHandler(handler)
            handler.close()


class _ConsoleHandler(logging.Handler):
    """Prints above the progress bar, so that neither breaks the other."""

    def __init__(self, console: Console) -> None:
        super().__init__()
        self._console = console

    def emit(self, record: logging.LogRecord) -> None:
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


class _Keeper(logging.Handler):
    def __init__(self) -> None:
        super().__init__()
        self.records: list[logging.LogRecord] = []

    def emit(self, record: logging.LogRecord) -> None:
        self.records.append(record)


class TrainingBar:
    """A bar with step, loss, PSNR gain, energy gap, speed, data wait and time left.

    Where the output is no terminal, nothing is drawn: the log has a line an epoch.
    """

    def __init__(self, console: Console, done: int, total: int) -> None:
        self._progress = Progress(
            TextColumn("step"),
            MofNCompleteColumn(),
            BarColumn(bar_width=None),
            TextColumn("{task.fields[numbers]}"),
            TimeRemainingColumn(),
            console=console,
            transient=True,
            disable=not console.is_terminal,
        )
        self._task = self._progress.add_task("step", total=total, completed=done, numbers="")

    def __enter__(self) -> "TrainingBar":
        self._progress.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._progress.stop()

    def advance(self) -> None:
        """One optimizer step is done."""
        self._progress.advance(self._task)

    def show(self, row: Mapping[str, float]) -> None:
        """The newest numbers."""
        self._progress.update(self._task, numbers=describe_row(row))


def describe_row(row: Mapping[str, float]) -> str:
    """The numbers of a metrics row in one short line."""
    return (
        f"loss {row['loss']:.4f}  gain {row['psnr_gain_db']:+.2f} dB  "
        f"energy gap {row['energy_gap']:+.3g}  {row['images_per_second']:.0f} images/s  "
        f"data wait {row['data_wait']:.0%}"
    )


def is_first_process() -> bool:
    """Whether this process speaks for all that a run was started in."""
    return bool(getattr(rank_zero_only, "rank", 0) == 0)


def terminal() -> Console:
    """Where messages go: standard error, so that results alone are on standard output."""
    return Console(file=sys.stderr, soft_wrap=True)
