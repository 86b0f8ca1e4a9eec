"""Rows of the protocols that measure something else than a classifier's accuracy."""

import json
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path

import numpy as np

from backfold.errors import UserError
from backfold.training.run_folder import write_json


@dataclass(frozen=True)
class MeasureRow:
    """One number of one contender in one case.

    Args:
        protocol: "segmentation", "energy", "restoration" or "adaptation".
        case: what was done to which images, such as "denoising, severity 3".
        contender: who did it: "pretrained", "untrained", "energy", "bicubic", ...
        metric: name and unit, such as "mIoU (%)", "AUROC" or "PSNR (dB)".
        mean: over the repetitions.
        std: sample deviation over the repetitions; 0 where there is one.
        count: how many repetitions: draws, seeds, or images.
        data: name of the images (see `data_name`); None where it was not recorded.
        step: of the run's checkpoint; None where it was not recorded.
    """

    protocol: str
    case: str
    contender: str
    metric: str
    mean: float
    std: float
    count: int
    data: str | None = None
    step: int | None = None

    @classmethod
    def of(
        cls, protocol: str, case: str, contender: str, metric: str, values: Sequence[float]
    ) -> "MeasureRow":
        """A row of repeated measurements, one or more."""
        std = float(np.std(values, ddof=1)) if len(values) > 1 else 0.0
        return cls(protocol, case, contender, metric, float(np.mean(values)), std, len(values))


def write_measures(path: Path, rows: Sequence[MeasureRow]) -> None:
    """Write the rows as a JSON list; a reader never sees half a file.

    Raises:
        UserError: the disk is full or the folder can't be written.
    """
    write_json(path, [asdict(row) for row in rows])


def read_measures(path: Path) -> list[MeasureRow]:
    """The rows that `write_measures` wrote.

    Raises:
        UserError: no such file, or one that is not a list of rows.
    """
    try:
        return [MeasureRow(**row) for row in json.loads(path.read_text())]
    except FileNotFoundError as error:
        raise UserError(f"there is no {path}; evaluate the run first") from error
    except (ValueError, TypeError) as error:
        raise UserError(f"{path} is no list of measures: {error}; evaluate again") from error
