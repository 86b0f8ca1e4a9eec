"""Running a job over a source into one file: parts, progress, what is broken, the join."""

import hashlib
import logging
import time
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import pyarrow as pa
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

from backfold.data.broken import BrokenFiles
from backfold.data.source import ImageSource
from backfold.errors import UserError
from backfold.inference.jobs import Job, weights_digest
from backfold.inference.joined import join
from backfold.inference.table import Parts, Plan, broken_of, claim_parts, remove_parts

LOGGER = logging.getLogger("backfold")
SECONDS_BETWEEN_LINES = 30.0

# (part numbers) -> (part, rows), as each is done.
Engine = Callable[[Sequence[int]], Iterator[tuple[int, pa.Table]]]


def make_plan(job: Job, source: ImageSource, batch_size: int, part_size: int) -> Plan:
    """The plan of a job on a source.

    Args:
        job: what is computed.
        source: all of its images.
        batch_size: images that are computed at once.
        part_size: how many images are kept at a time, rounded down to whole batches.

    Raises:
        UserError: no images, or sizes below 1.
    """
    if batch_size < 1 or part_size < 1:
        raise UserError(f"batch_size is {batch_size}, part_size {part_size}; give 1 or more")
    if not len(source):
        raise UserError(f"{source.name} holds no images; give others")
    facts: dict[str, Any] = {
        **job.facts(),
        "weights": weights_digest(job.run),
        "step": job.run.step,
        "data": source.name,
        "paths": _paths_digest(source),
    }
    return Plan(facts, len(source), batch_size * max(1, part_size // batch_size), batch_size)


def _paths_digest(source: ImageSource) -> str:
    digest = hashlib.sha256()
    for index in range(len(source)):
        digest.update(source.describe(index).encode("utf-8", "surrogateescape") + b"\0")
    return digest.hexdigest()


def compute(
    source: ImageSource,
    plan: Plan,
    engine: Engine,
    out: Path,
    console: Console,
    *,
    max_broken_share: float = 0.01,
    overwrite: bool = False,
    finish: Callable[[Parts], None] | None = None,
) -> int:
    """Compute what is missing, join all parts into ``out``, remove them; returns the rows.

    Args:
        source: the images.
        plan: as `make_plan` gives it.
        engine: computes parts, in any order.
        out: the file; parts gather in ``OUT.parts``.
        console: for the progress bar.
        max_broken_share: share of unreadable images at which the job stops.
        overwrite: start anew where parts of another job lie.
        finish: called when all parts are there, before they are removed.

    Raises:
        UserError: what loading raises, too many broken images, or a disk that is full.
    """
    with claim_parts(out, plan, overwrite) as parts:
        broken = BrokenFiles.for_source(source, max_broken_share)
        missing = parts.missing()
        done = sorted(set(range(len(plan))) - set(missing))
        for part in done:
            broken.add(broken_of(parts.read(part)))
        if done:
            LOGGER.info("%d of %d parts are done already", len(done), len(plan))
        with _Progress(console, plan, done) as progress:
            for part, table in engine(missing) if missing else ():
                for line in broken.add(broken_of(table)):
                    LOGGER.warning("skipped: %s", line)
                parts.write(part, table)
                progress.add(len(plan.indices(part)))
        if finish is not None:
            finish(parts)
        count = join(parts, out)
        remove_parts(parts)
    if count < plan.count:
        LOGGER.warning("%d of %d images could not be read", plan.count - count, plan.count)
    return count


class _Progress:
    """A bar on a terminal; elsewhere a line now and then."""

    def __init__(self, console: Console, plan: Plan, done: Sequence[int]) -> None:
        self._total = plan.count
        self._done = sum(len(plan.indices(part)) for part in done)
        self._start, self._first, self._last = time.monotonic(), self._done, time.monotonic()
        self._silent = console.is_terminal
        self._bar = Progress(
            TextColumn("images"),
            MofNCompleteColumn(),
            BarColumn(bar_width=None),
            TextColumn("{task.fields[speed]}"),
            TimeRemainingColumn(),
            console=console,
            transient=True,
            disable=not console.is_terminal,
        )
        self._task = self._bar.add_task("", total=self._total, completed=self._done, speed="")

    def __enter__(self) -> "_Progress":
        self._bar.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._bar.stop()

    def add(self, images: int) -> None:
        """So many images more are done."""
        self._done += images
        now = time.monotonic()
        speed = f"{(self._done - self._first) / max(now - self._start, 1e-9):.1f} images/s"
        self._bar.update(self._task, completed=self._done, speed=speed)
        if not self._silent and now - self._last > SECONDS_BETWEEN_LINES:
            LOGGER.info("%d of %d images, %s", self._done, self._total, speed)
            self._last = now
