"""What one run's backbone is worth with few labels and in segmentation, as tables."""

import json
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from backfold.evaluation.measures import MeasureRow, read_measures

PROBES = (
    ("linear", "untrained", "linear, untrained"),
    ("linear", "pretrained", "linear, pretrained"),
    ("finetune", "untrained", "from scratch"),
    ("finetune", "pretrained", "fine-tuned"),
)


@dataclass(frozen=True)
class Transfer:
    """Rows of one run, and how they were made.

    Attributes:
        lowshot: rows of ``evaluation.json``.
        segmentation: rows of its measures.
        facts: "run" (a sentence), "commands".
    """

    lowshot: list[dict[str, Any]]
    segmentation: list[MeasureRow]
    facts: dict[str, Any]


def read_transfer(folder: Path) -> Transfer | None:
    """What is in a folder, or None where there is none."""
    if not (folder / "facts.json").exists():
        return None
    lowshot = folder / "lowshot.json"
    segmentation = folder / "segmentation.json"
    return Transfer(
        json.loads(lowshot.read_text()) if lowshot.exists() else [],
        read_measures(segmentation) if segmentation.exists() else [],
        json.loads((folder / "facts.json").read_text()),
    )


def lowshot_table(transfer: Transfer) -> tuple[list[str], list[list[str]]]:
    """Head and rows: accuracy in percent, by the number of labels."""
    cells = {
        (row["labels"], row["protocol"], row["backbone"]): _number(
            row["accuracy_mean"], row["accuracy_std"]
        )
        for row in transfer.lowshot
    }
    labels = dict.fromkeys(row["labels"] for row in transfer.lowshot)
    rows = [
        [_labels(count), *(cells.get((count, *probe[:2]), "") for probe in PROBES)]
        for count in labels
    ]
    return ["labels", *(title for _, _, title in PROBES)], rows


def segmentation_table(transfer: Transfer) -> tuple[list[str], list[list[str]]]:
    """Head and rows: mIoU in percent, by the head and whether the backbone was trained too."""
    rows = transfer.segmentation
    contenders = _each(row.contender for row in rows)
    cells = {(row.case, row.contender): _number(row.mean, row.std) for row in rows}
    return (
        ["mIoU, %", *contenders],
        [
            [case, *(cells.get((case, name), "") for name in contenders)]
            for case in _each(row.case for row in rows)
        ],
    )


def _labels(count: int | str) -> str:
    return f"{count} of all" if isinstance(count, str) else f"{count} a class"


def _number(mean: float, std: float) -> str:
    return f"{mean:.1f} ± {std:.1f}"


def _each(values: Iterable[str]) -> list[str]:
    return list(dict.fromkeys(values))
