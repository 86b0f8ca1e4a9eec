"""What the protocols measured besides accuracies, as tables and in words."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TypeVar

from backfold.evaluation.measures import MeasureRow
from backfold.evaluation.severities import parse_case
from backfold.reporting import wording
from backfold.reporting.records import Measures
from backfold.reporting.tables import ABSENT, Table

Column = TypeVar("Column", bound=str | int)
SHOWN_ROWS = 12  # longer tables are folded
TITLES: Mapping[str, str] = {
    "segmentation": "Segmentation",
    "energy": "What the energy knows",
    "restoration": "Restoration",
    "adaptation": "Restoring before classifying",
}
EXPLANATIONS: Mapping[str, str] = {
    "segmentation": (
        "The class of every pixel is read from the backbone's feature map, by a linear head and by "
        "a small convolutional decoder, with the backbone frozen and fine-tuned. The mean "
        "intersection over union (mIoU) is 100 % if every pixel of every class is right, and the "
        "most frequent class everywhere is what needs no image. ± is the deviation over the seeds "
        "of the heads. The picture shows what the linear head makes of frozen features."
    ),
    "energy": (
        "How often the energy of a strange image is above that of a clean test image: 1 is always, "
        "0.5 is chance, and below 0.5 strange images look more plausible than clean ones. Beside "
        "it are scores that need no energy: the distance to the nearest training images in "
        "embedding space, the file size and the roughness. ± is the deviation over bootstrap "
        "samples of the images."
    ),
    "restoration": (
        "How close corrupted images come to the clean ones where they were corrupted, by the "
        "energy's steps and by methods that learn nothing. A higher PSNR and SSIM are better, a "
        "lower error of the colours is. ± is the deviation over the images: how much they differ, "
        "not how sure the mean is."
    ),
    "adaptation": (
        "The accuracy of a fine-tuned classifier on corrupted test images, as they are and after "
        "the energy has restored those that look implausible. How to restore was chosen on other "
        "images. Above 0 the difference is a gain; on clean images it should not be a loss. ± is "
        "the deviation over bootstrap samples of the images."
    ),
}


@dataclass(frozen=True)
class Section:
    """A protocol in the report.

    Args:
        name: of the protocol.
        title: of the section.
        explanation: what the numbers mean, and what they were measured on.
        picture: as a data URI, or nothing.
        alt: the picture in words.
        tables: all numbers.
        is_long: whether the tables are better folded.
    """

    name: str
    title: str
    explanation: str
    picture: str | None
    alt: str
    tables: tuple[Table, ...]
    is_long: bool


def measure_sections(measures: Sequence[Measures]) -> list[Section]:
    """A section for each protocol that was run."""
    return [_section(found) for found in measures]


def _section(found: Measures) -> Section:
    tables = tuple(measure_tables(found.rows))
    what = {
        "segmentation": "Test images, their true classes, and the classes predicted with each "
        "backbone, side by side."
    }.get(found.protocol, f"Curves of the measures by severity: {TITLES[found.protocol]}.")
    return Section(
        found.protocol,
        TITLES[found.protocol],
        f"{EXPLANATIONS[found.protocol]}{_origin(found.rows)}",
        found.picture,
        what,
        tables,
        sum(len(table.rows) for table in tables) > SHOWN_ROWS,
    )


def _origin(rows: Sequence[MeasureRow]) -> str:
    phrases = dict.fromkeys(wording.origin_phrase(row.data, row.step) for row in rows)
    known = "; ".join(phrase for phrase in phrases if phrase)
    return f" Measured on {known}." if known else ""


def measure_tables(rows: Sequence[MeasureRow]) -> list[Table]:
    """All numbers: a table for each metric and each corruption, whose columns are severities.

    Cases without a severity come first, in a table as those of `case_tables`.
    """
    parsed = [(row, parse_case(row.case)) for row in rows]
    tables = case_tables([row for row, case in parsed if case is None])
    groups: dict[tuple[str, str], list[tuple[MeasureRow, int]]] = {}
    for row, case in parsed:
        if case is not None:
            groups.setdefault((case[0], row.metric), []).append((row, case[1]))
    for (name, metric), members in groups.items():
        cells = {(row.contender, severity): row for row, severity in members}
        severities = sorted({severity for _, severity in cells})
        caption = f"{_title(rows)}, {name}: {metric}"
        headings = ("contender", *(f"severity {severity}" for severity in severities))
        tables.append(_pivot(caption, headings, cells, severities))
    return tables


def case_tables(rows: Sequence[MeasureRow]) -> list[Table]:
    """A table for each metric, with a row for each case and a column for each contender."""
    tables = []
    for metric in dict.fromkeys(row.metric for row in rows):
        cells = {(row.case, row.contender): row for row in rows if row.metric == metric}
        contenders = list(dict.fromkeys(contender for _, contender in cells))
        caption = f"{_title(rows)}: {metric}"
        tables.append(_pivot(caption, ("case", *contenders), cells, contenders))
    return tables


def _title(rows: Sequence[MeasureRow]) -> str:
    return TITLES.get(rows[0].protocol, rows[0].protocol)


def _pivot(
    caption: str,
    headings: tuple[str, ...],
    cells: Mapping[tuple[str, Column], MeasureRow],
    columns: Sequence[Column],
) -> Table:
    """A row for each first key, in their order, and a column for each second one."""
    names = list(dict.fromkeys(key[0] for key in cells))
    rows: tuple[tuple[str, ...], ...] = tuple(
        (name, *(_cell(cells.get((name, column))) for column in columns)) for name in names
    )
    return Table(f"{caption}, mean ± deviation", headings, rows)


def _cell(row: MeasureRow | None) -> str:
    if row is None:
        return ABSENT
    digits = 1 if "%" in row.metric else 2 if "dB" in row.metric else 3
    spread = "" if (row.count or 0) < 2 else f" ± {wording.decimals(row.std, digits)}"
    return f"{wording.decimals(row.mean, digits)}{spread}"
