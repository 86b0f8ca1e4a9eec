"""What an evaluation found: rows, their file, and the tables that pivot them."""

import json
import logging
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any, NamedTuple, get_type_hints

import numpy as np
from torch import Tensor

from backfold.data.files import HUB_NAME, IN_MEMORY
from backfold.errors import UserError
from backfold.files import write_json

LOGGER = logging.getLogger("backfold")
PRETRAINED, BEFORE, RANDOM = "pretrained", "before", "random"
PIXELS, SCRATCH = "pixels", "from scratch"
ACCURACY = "accuracy (%)"
OVER = " over "


class About(NamedTuple):
    """What a protocol's numbers are, in words."""

    title: str
    sentence: str


ABOUT: Mapping[str, About] = {
    "knn": About(
        "Nearest neighbours", "The 20 most similar training images vote for a test image's class."
    ),
    "linear": About(
        "Linear probe", "A logistic regression reads the class from frozen backbones' vectors."
    ),
    "layers": About(
        "By layer", "What linear probes read from each layer and pooling, on validation images."
    ),
    "attentive": About(
        "Attentive probe", "Attention pooling and a linear classifier on frozen feature maps."
    ),
    "finetune": About(
        "Fine-tuning",
        "The whole backbone is trained with labels; from scratch it starts at random with the "
        "same recipe, and each gets the learning rate and steps that validation images prefer.",
    ),
    "lowshot": About(
        "Few labels", "Linear probe and fine-tuning with 1 to 25 labels a class, 1 and 10 %."
    ),
    "segmentation": About(
        "Segmentation",
        "The class of every pixel, read from the feature map by a linear head and by a small "
        "decoder, frozen and fine-tuned, as the mean intersection over union (mIoU), at best 100.",
    ),
    "energy": About(
        "What the energy knows",
        "How often a strange image's score is above a clean test image's; 0.5 is chance.",
    ),
    "restoration": About(
        "Restoration",
        "How close corrupted images come to the clean ones where they were corrupted, by the "
        "energy's steps and by methods that learn nothing.",
    ),
    "adaptation": About(
        "Restoring before classifying",
        "A fine-tuned classifier's accuracy on corrupted test images, as they are, after the "
        "energy restored all of them or those that look implausible, and by other ways.",
    ),
}


@dataclass(frozen=True)
class Row:
    """One number of one contender in one case."""

    protocol: str  # a name of `ABOUT`
    case: str  # what was done to which images: "10 labels a class", "denoising, severity 3"
    # Who did it, "pretrained", "energy, 1 step"; or a difference of two on the same draws and
    # images, "pretrained over before".
    contender: str
    metric: str  # name and unit: "accuracy (%)", "mIoU (%)", "AUROC", "PSNR (dB)"
    mean: float  # over the repetitions: draws of labels, seeds, images, bootstrap samples
    std: float  # over them; of a single accuracy, its standard error over the test images
    count: int  # of repetitions
    data: str | None = None  # the images' name (see `data_name`), if it was recorded
    step: int | None = None  # of the run's checkpoint, if there is one
    note: str = ""  # what was chosen on validation images, and what the number's trust rests on

    @classmethod
    def of(
        cls, protocol: str, case: str, contender: str, metric: str, values: Sequence[float]
    ) -> "Row":
        """A row of repeated measurements, one or more."""
        std = float(np.std(values, ddof=1)) if len(values) > 1 else 0.0
        return cls(protocol, case, contender, metric, float(np.mean(values)), std, len(values))


def accuracy_rows(
    protocol: str,
    case: str,
    correct: Mapping[str, Sequence[Tensor]],
    notes: Mapping[str, str] | None = None,
) -> list[Row]:
    """Each contender's accuracy in percent, and by how much the first is ahead of each other.

    By contender and draw, bool (test images,) tells which were right. Differences are taken draw by
    draw, or image by image where there is one draw: what is common to both contenders, whose draws
    and images are the same, is no part of their spread.
    """
    shares = {name: [100 * draw.double() for draw in draws] for name, draws in correct.items()}
    first, *others = shares
    for name in others:
        gaps = [ours - theirs for ours, theirs in zip(shares[first], shares[name], strict=True)]
        shares[f"{first}{OVER}{name}"] = gaps
    rows = []
    for name, draws in shares.items():
        row = Row.of(protocol, case, name, ACCURACY, [float(draw.mean()) for draw in draws])
        if len(draws) == 1 and len(draws[0]) > 1:
            row = replace(row, std=float(draws[0].std()) / len(draws[0]) ** 0.5)
        rows.append(replace(row, note=(notes or {}).get(name, "")))
    return rows


def write_rows(path: Path, rows: Sequence[Row]) -> None:
    """Write the rows as a JSON list; a reader never sees half a file."""
    write_json(path, [asdict(row) for row in rows])


def read_rows(path: Path) -> list[Row]:
    """The rows that `write_rows` wrote; any other file, or none, raises a `UserError`."""
    try:
        return [_row(values) for values in json.loads(path.read_text())]
    except FileNotFoundError as error:
        raise UserError(f"there is no {path}; evaluate the run first") from error
    except (OSError, ValueError, TypeError) as error:
        raise UserError(f"{path} is no list of evaluation rows: {error}; evaluate again") from error


def _row(values: Mapping[str, Any]) -> Row:
    row = Row(**values)
    for name, kind in get_type_hints(Row).items():
        kinds = int | float if kind is float else kind
        if not isinstance(found := getattr(row, name), kinds):
            raise TypeError(f"{name} is {found!r}")
    return row


def add_rows(path: Path, new: Sequence[Row]) -> None:
    """Write new rows after those of the file whose protocol, case and data no new row has."""
    try:
        old = read_rows(path) if path.exists() else []
    except UserError as error:
        LOGGER.warning(f"{error}: it is replaced")
        old = []
    replaced = {(row.protocol, row.case, row.data) for row in new}
    write_rows(path, [r for r in old if (r.protocol, r.case, r.data) not in replaced] + list(new))


def severity_case(name: str, severity: int) -> str:
    """The case of a row: "denoising, severity 3"."""
    return f"{name}, severity {severity}"


def parse_case(case: str) -> tuple[str, int] | None:
    """The inverse of `severity_case`; None for any other case."""
    name, _, level = case.rpartition(", severity ")
    return (name, int(level)) if name and level.isdecimal() else None


def data_name(data: object) -> str:
    """What rows call data, as they may be shared: its own name, without the folders above."""
    if data is None:
        return "embedded sample"
    if not isinstance(data, (str, Path)):
        return type(data).__name__ + IN_MEMORY
    text = str(data)
    if HUB_NAME.fullmatch(text) and not Path(text).exists():
        return text
    path = Path(text)
    return path.resolve().name if path.name in ("", "..") else path.name


class Table(NamedTuple):
    """A caption, the columns' headings, and rows; the first cell of a row is its heading."""

    caption: str
    headings: tuple[str, ...]
    rows: tuple[tuple[str, ...], ...]


def tables_of(rows: Sequence[Row], severity: int | None = None) -> list[Table]:
    """The rows of one protocol as tables: one for each metric, cases by contenders.

    Cases with severities have a table for each corruption and metric, contenders by severities; or
    a ``severity`` is shown alone, as one more case by contenders.
    """
    cells: dict[tuple[str, str], dict[tuple[str, str], str]] = {}  # by caption and corner
    for row in rows:
        case = parse_case(row.case)
        if case is None or case[1] == severity:
            table, key = (row.metric, "case"), (row.case, row.contender)
        elif severity is None:
            table = f"{case[0]}: {row.metric}", "contender"
            key = row.contender, f"severity {case[1]}"
        else:
            continue
        cells.setdefault(table, {})[key] = _cell(row)
    tables = []
    for (caption, corner), found in sorted(cells.items(), key=lambda item: item[0][1] != "case"):
        names, columns = (list(dict.fromkeys(key[place] for key in found)) for place in (0, 1))
        body = ((name, *(found.get((name, each), "-") for each in columns)) for name in names)
        tables.append(Table(f"{caption}, mean ± spread", (corner, *columns), tuple(body)))
    return tables


def _cell(row: Row) -> str:
    if not np.isfinite(row.mean):
        return "not finite"
    digits = 1 if "%" in row.metric else 2 if "dB" in row.metric else 3
    sign = "+" if OVER in row.contender else ""
    spread = f" ± {row.std:.{digits}f}" if row.std else ""
    return f"{round(row.mean, digits) + 0.0:{sign}.{digits}f}{spread}"
