"""`backfold stats`: what a data set looks like."""

from collections.abc import Mapping
from dataclasses import asdict, dataclass
from pathlib import Path

from rich.console import Console
from rich.markup import escape
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TimeRemainingColumn
from rich.table import Table

from backfold.data.decode import MAX_PIXELS
from backfold.data.loading import default_workers
from backfold.data.open import open_source
from backfold.data.survey import Survey, survey
from backfold.errors import UserError
from backfold.files import write_json
from backfold.training.log import log_to, terminal

SHOWN = 5  # broken files and groups of duplicates on the terminal


@dataclass
class StatsSettings:
    """How `backfold stats` looks at a data set.

    Args:
        data: as pretrain takes it; its training split is looked at.
        channels: that mean and deviation are of; none takes the most common count.
        max_images: look at a random sample of this size; none looks at all.
        max_pixels: larger images are broken.
        num_workers: processes that read images; none takes up to 8, one core left free.
        seed: of the sample.
        out: a JSON file for what was found; none writes none.
    """

    data: str | None = None
    channels: int | None = None
    max_images: int | None = None
    max_pixels: int = MAX_PIXELS
    num_workers: int | None = None
    seed: int = 0
    out: Path | None = None

    def __post_init__(self) -> None:
        for name in ("channels", "max_images", "max_pixels"):
            value = getattr(self, name)
            if value is not None and value < 1:
                raise UserError(f"{name} is {value}; give 1 or more")
        if self.seed < 0 or (self.num_workers or 0) < 0:
            raise UserError("seed and num_workers can't be negative; give 0 or more")


def run_stats(settings: StatsSettings) -> None:
    """`backfold stats`: prints a table, and writes JSON where a file is named."""
    console, limit = terminal(), settings.max_images
    source = open_source(settings.data, "train", max_pixels=settings.max_pixels)
    workers = default_workers() if settings.num_workers is None else settings.num_workers
    bar = Progress(
        "images", MofNCompleteColumn(), BarColumn(bar_width=None), TimeRemainingColumn(),
        console=console, transient=True, disable=not console.is_terminal,
    )  # fmt: skip
    task = bar.add_task("", total=min(len(source), limit or len(source)))
    with log_to(None, console), bar:
        found = survey(
            source, settings.channels, limit, settings.seed, workers,
            lambda done: bar.update(task, completed=done),
        )  # fmt: skip
    if settings.out is not None:
        write_json(settings.out, asdict(found))
    Console().print(render_survey(found))
    if settings.out is not None:
        print(f"stats: {settings.out}")


def render_survey(found: Survey) -> Table:
    """The survey as a table of two columns."""
    table = Table(title=escape(found.name), show_header=False)
    table.add_column(no_wrap=True)
    table.add_column()
    part = f"{found.looked_at} of " if found.looked_at < found.images else ""
    duplicates = [" = ".join(group) for group in found.duplicates]
    rows = {
        "images": f"{part}{found.images}",
        "broken": _listed(found.broken_count, found.broken),
        "formats": _counts(found.formats),
        "values": f"{_counts(found.kinds)}, from {found.lowest:.6g} to {found.highest:.6g}",
        "channels": _counts(found.channel_counts),
        "can't be given these channels": str(found.unfit_count or ""),
        "height": "{0} to {2}, median {1} pixels".format(*found.height),
        "width": "{0} to {2}, median {1} pixels".format(*found.width),
        "in reading": _counts(found.conversions),
        "duplicates": _listed(found.duplicate_count, duplicates),
        f"mean of {found.channels} channel(s)": "  ".join(f"{each:.5g}" for each in found.mean),
        "deviation": "  ".join(f"{each:.5g}" for each in found.std),
    }
    for name, value in rows.items():
        if value:
            table.add_row(name, escape(value))
    return table


def _counts(counts: Mapping[str, int]) -> str:
    return ", ".join(f"{name} ({count})" for name, count in counts.items())


def _listed(count: int, names: list[str]) -> str:
    more = [f"and {len(names) - SHOWN} more"] if len(names) > SHOWN else []
    return "\n".join([str(count), *names[:SHOWN], *more])
