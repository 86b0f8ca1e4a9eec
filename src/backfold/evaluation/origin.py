"""Which data, and which step of a run, rows were measured on."""

from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import TypeVar

from backfold.data.source import HUB_NAME
from backfold.evaluation.measures import MeasureRow
from backfold.evaluation.protocol import EvaluationRow

Row = TypeVar("Row", EvaluationRow, MeasureRow)
EMBEDDED_NAME = "embedded sample"


def data_name(data: str | Path | None) -> str:
    """What rows call these data: the folder's or file's own name, as rows may be shared.

    Args:
        data: as `open_source` takes it; None is the sample in this package. Of names on the Hugging
            Face hub nothing is left out.
    """
    if data is None:
        return EMBEDDED_NAME
    text = str(data)
    if HUB_NAME.fullmatch(text) and not Path(text).exists():
        return text
    path = Path(data)
    return path.resolve().name if path.name in ("", "..") else path.name


def with_origin(rows: Sequence[Row], data: str | Path | None, step: int) -> list[Row]:
    """The rows, with the name of the data and the step of the checkpoint."""
    name = data_name(data)
    return [replace(row, data=name, step=step) for row in rows]
