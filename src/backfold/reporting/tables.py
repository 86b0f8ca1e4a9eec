"""The report's tables, as headings and rows of text."""

from collections.abc import Sequence
from dataclasses import dataclass

from backfold.evaluation.protocol import EvaluationRow
from backfold.reporting import wording
from backfold.reporting.records import HealthEntry, RunFacts, TaskHealth
from backfold.reporting.verdicts import Comparison, compare

ABSENT = "-"


@dataclass(frozen=True)
class Table:
    """A caption, the columns' headings, and rows; the first cell of a row is its heading."""

    caption: str
    headings: tuple[str, ...]
    rows: tuple[tuple[str, ...], ...]


def task_table(latest: HealthEntry | None) -> Table | None:
    """The tasks' measures at the last look; columns that no task has are left out."""
    if latest is None or not latest.tasks:
        return None
    tasks = latest.tasks.values()
    columns = {
        "gain (dB)": [wording.signed(task.gain_db, 2) for task in tasks],
        "PSNR corrupted (dB)": [wording.decimals(task.psnr_corrupted_db, 2) for task in tasks],
        "PSNR restored (dB)": [wording.decimals(task.psnr_restored_db, 2) for task in tasks],
        "PSNR mean fill (dB)": [wording.decimals(task.psnr_mean_fill_db, 2) for task in tasks],
        "energy gap": [wording.significant(task.energy_gap) for task in tasks],
        "AUROC": [wording.decimals(task.auroc, 3) for task in tasks],
        "patches placed right": [_patches(task) for task in tasks],
        "error of the colours": [_chroma(task) for task in tasks],
    }
    kept = {name: cells for name, cells in columns.items() if set(cells) != {wording.ABSENT}}
    rows = zip(latest.tasks, *kept.values(), strict=True)
    caption = (
        f"Pretext tasks on held-out images, step {wording.whole(latest.step)}. "
        "PSNR counts the pixels where the task's loss counts."
    )
    return Table(caption, ("task", *kept), tuple(rows))


def _patches(task: TaskHealth) -> str:
    return _from_to(
        wording.percent(task.patches_placed_right_corrupted),
        wording.percent(task.patches_placed_right_restored),
    )


def _chroma(task: TaskHealth) -> str:
    return _from_to(
        wording.decimals(task.chroma_error_corrupted, 3),
        wording.decimals(task.chroma_error_restored, 3),
    )


def _from_to(corrupted: str, restored: str) -> str:
    return corrupted if corrupted == restored == wording.ABSENT else f"{corrupted} to {restored}"


def evaluation_table(rows: Sequence[EvaluationRow]) -> Table | None:
    """Test accuracies, pretrained beside untrained.

    What they were measured on is in the caption, or in a column where the rows differ.
    """
    if not rows:
        return None
    caption = (
        "Test accuracy in percent, the backbone frozen but for fine-tuning, where untrained means "
        "from scratch; mean ± deviation over draws of the labels."
    )
    headings: tuple[str, ...] = (
        "protocol", "labels a class", "untrained", "pretrained", "difference", "reading",
    )  # fmt: skip
    comparisons = compare(rows)
    cells = [_evaluation_row(comparison) for comparison in comparisons]
    origins = [_origin(comparison) for comparison in comparisons]
    if len(set(origins)) > 1:
        headings = (*headings, "measured on")
        cells = [(*row, origin or ABSENT) for row, origin in zip(cells, origins, strict=True)]
    elif origins[0]:
        caption += f" Measured on {origins[0]}."
    return Table(caption, headings, tuple(cells))


def _origin(comparison: Comparison) -> str:
    rows = (comparison.untrained, comparison.pretrained)
    known = (wording.origin_phrase(row.data, row.step) for row in rows if row is not None)
    return "; ".join(dict.fromkeys(phrase for phrase in known if phrase))


def _evaluation_row(comparison: Comparison) -> tuple[str, ...]:
    difference = comparison.difference
    reading = ABSENT
    if difference is not None:
        better = "better" if difference > 0 else "worse"
        reading = f"clearly {better}" if comparison.is_clear else "no clear difference"
    return (
        wording.protocol_name(comparison.protocol),
        str(comparison.labels),
        _accuracy(comparison.untrained),
        _accuracy(comparison.pretrained),
        ABSENT if difference is None else wording.signed(difference, 1),
        reading,
    )


def _accuracy(row: EvaluationRow | None) -> str:
    if row is None:
        return ABSENT
    deviation = "" if row.labels == "all" else f" ± {wording.decimals(row.accuracy_std, 1)}"
    return f"{wording.decimals(row.accuracy_mean, 1)}{deviation}"


def describe_facts(facts: RunFacts) -> list[tuple[str, str]]:
    """What was run: names and values; what was not recorded is left out."""
    per_channel = (
        ("mean of the channels", facts.mean),
        ("deviation of the channels", facts.std),
    )
    described = [
        ("backbone", facts.backbone),
        ("parameters", _count(facts.parameters)),
        ("pretext tasks", ", ".join(facts.tasks)),
        ("data", facts.data),
        ("training images", _count(facts.training_images)),
        ("held-out images", _count(facts.held_out_images)),
        ("image size", _image_size(facts)),
        *((name, ", ".join(map(wording.significant, values))) for name, values in per_channel),
        ("steps", _steps(facts)),
        ("epochs", None if facts.epochs is None else wording.decimals(facts.epochs, 1)),
        ("time in training", None if facts.seconds is None else wording.duration(facts.seconds)),
        ("started", facts.started),
        ("device", facts.device),
        ("hardware", facts.hardware),
        ("precision", facts.precision),
        ("versions", ", ".join(f"{name} {version}" for name, version in facts.versions.items())),
        ("command", facts.command),
    ]
    return [(name, value) for name, value in described if value]


def _count(value: float | None) -> str | None:
    return None if value is None else wording.whole(value)


def _image_size(facts: RunFacts) -> str | None:
    if not facts.image_size:
        return None
    size = " x ".join(map(wording.whole, facts.image_size))
    channels = "" if facts.channels is None else f", channels: {wording.whole(facts.channels)}"
    return f"{size} pixels{channels}"


def _steps(facts: RunFacts) -> str | None:
    if facts.steps is None:
        return None
    of_total = "" if facts.total_steps is None else f" of {wording.whole(facts.total_steps)}"
    return f"{wording.whole(facts.steps)}{of_total}"
