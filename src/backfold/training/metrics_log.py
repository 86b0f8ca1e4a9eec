"""A run's numbers by step: as CSV, as TensorBoard events, and to the services that it names."""

import csv
import io
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from torch.utils.tensorboard import SummaryWriter

from backfold.training.loggers import ServiceLoggers
from backfold.training.run_folder import RunFolder, write_atomically

COLUMNS = (
    "step", "epoch", "seconds", "images_per_second", "data_wait", "lr", "loss", "gradient_norm",
    "psnr_gain_db", "energy_gap",
)  # fmt: skip


class MetricsLog:
    """Appends rows to ``metrics.csv`` and to TensorBoard, and passes them on to services.

    Lightning's CSVLogger deletes an existing file where a run goes on, hence these few lines.

    Args:
        folder: the run's.
        steps_done: rows of later steps are dropped: a resumed run writes them again.
        services: further receivers; none by default.
    """

    def __init__(
        self, folder: RunFolder, steps_done: int, services: ServiceLoggers | None = None
    ) -> None:
        self._services = services
        kept = _rows_until(folder.metrics, steps_done) if steps_done else []
        text = io.StringIO()
        writer = csv.DictWriter(text, COLUMNS, lineterminator="\n")
        writer.writeheader()
        writer.writerows(kept)
        write_atomically(folder.metrics, text.getvalue().encode())
        self._file = folder.metrics.open("a", newline="")
        self._writer = csv.DictWriter(self._file, COLUMNS, lineterminator="\n")
        _wait_for_a_later_name(folder.tensorboard)
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
        """Flush and close all.

        Args:
            succeeded: the run has come to its end.
        """
        self._file.close()
        self._board.close()
        if self._services is not None:
            self._services.close(succeeded=succeeded)


def _wait_for_a_later_name(folder: Path) -> None:
    """TensorBoard reads its files in the order of their names, which begin with whole seconds."""
    seconds = [int(path.name.split(".")[3]) for path in folder.glob("events.out.tfevents.*")]
    while seconds and int(time.time()) <= max(seconds) < time.time() + 1:
        time.sleep(0.02)


def _rows_until(path: Path, step: int) -> list[dict[str, str]]:
    if not path.exists():
        return []
    with path.open(newline="") as file:
        rows = list(csv.DictReader(file))
    # A killed run can leave half a row.
    return [
        row
        for row in rows
        if set(row) == set(COLUMNS) and None not in row.values() and int(row["step"]) <= step
    ]
