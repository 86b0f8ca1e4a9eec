"""Running a job over a source into one file, part by part, in this process or on Ray.

Each part is a parquet file, written atomically, so whatever stops a job costs at most the parts
that it was working on. Parts hold an ``index`` column, the image's index in the source, which the
joined file leaves out.
"""

import hashlib
import io
import json
import logging
import math
import os
import shutil
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.csv
import pyarrow.parquet as pq
from rich.console import Console
from safetensors.torch import save

from backfold.data.loading import evaluation_batches
from backfold.data.source import BrokenFiles, ImageSource
from backfold.errors import UserError, first_line
from backfold.files import LOCK, hold, replacing, write_atomically, write_json
from backfold.inference.jobs import INDEX, Job
from backfold.training.log import progress_bar

LOGGER = logging.getLogger("backfold")
SECONDS_BETWEEN_LINES = 30.0
BROKEN = b"broken"  # in a part's metadata: a line for each of its images that could not be read
FACTS = "plan.json"
MOST_BLOCKS = 10_000  # of Ray
RAY_LOADERS = 1  # of each actor: a process apart, for a decoder that crashes or hangs

# (part numbers) -> (part, rows), as each is done.
Engine = Callable[[Sequence[int]], Iterator[tuple[int, pa.Table]]]


@dataclass
class Parts:
    """A job on all images of a source, in parts that lie in ``OUT.parts`` while it goes on."""

    job: Job
    source: ImageSource
    out: Path  # the file that they are joined in
    batch_size: int  # images that are computed at once
    part_size: int  # that are kept at a time, rounded down to whole batches

    def __post_init__(self) -> None:
        if not len(self.source):
            raise UserError(f"{self.source.name} holds no images; give others")
        self.part_size = self.batch_size * max(1, self.part_size // self.batch_size)
        self.folder = self.out.with_name(self.out.name + ".parts")

    def __len__(self) -> int:
        return math.ceil(len(self.source) / self.part_size)

    def batches(self, part: int) -> list[range]:
        """The part's images, batch by batch."""
        images = range(len(self.source))
        starts = images[part * self.part_size : (part + 1) * self.part_size : self.batch_size]
        return [images[start : start + self.batch_size] for start in starts]

    def images(self, part: int) -> int:
        """So many."""
        return sum(map(len, self.batches(part)))

    def facts(self) -> dict[str, Any]:
        """What decides the rows and which are in a part; parts with other facts never mix."""
        paths = hashlib.sha256()
        for index in range(len(self.source)):
            paths.update(self.source.describe(index).encode("utf-8", "surrogateescape") + b"\0")
        return {
            **self.job.facts(),
            "weights": hashlib.sha256(save(self.job.run.energy.state_dict())).hexdigest(),
            "step": self.job.run.step,
            "data": self.source.name,
            "paths": paths.hexdigest(),
            "count": len(self.source),
            "part_size": self.part_size,
            "batch_size": self.batch_size,
        }

    def path(self, part: int) -> Path:
        """Where a part lies when it is done."""
        return self.folder / f"part-{part:07d}.parquet"

    def read(self, part: int) -> pa.Table:
        """A part that is done; UserError if somebody damaged or removed it."""
        try:
            return _from_bytes(self.path(part).read_bytes())
        except (OSError, pa.ArrowInvalid) as error:
            raise UserError(
                f"{self.path(part)} can't be read ({type(error).__name__}); remove it and run the "
                "command again"
            ) from error

    def tables(self) -> Iterator[pa.Table]:
        """All parts in order, one in memory at a time."""
        return (self.read(part) for part in range(len(self)))


def _broken(table: pa.Table) -> list[str]:
    return list(json.loads(table.schema.metadata[BROKEN]))


def _to_bytes(table: pa.Table) -> bytes:
    buffer = io.BytesIO()
    pq.write_table(table, buffer)
    return buffer.getvalue()


def _from_bytes(content: bytes) -> pa.Table:
    return pq.read_table(pa.BufferReader(content))


def check_out(out: Path, formats: Sequence[str], others: Sequence[Path], overwrite: bool) -> None:
    """Refuse a file of no known format, or one that, or another beside it, exists."""
    if out.suffix not in formats:
        raise UserError(f"--out {out} is in no known format; end it in {' or '.join(formats)}")
    for path in (out, *others):
        if path.is_dir():
            raise UserError(f"{path} is a folder; choose another --out")
        if path.exists() and not overwrite:
            raise UserError(f"{path} exists; give --overwrite to replace it, or another --out")


@contextmanager
def claim(parts: Parts, overwrite: bool) -> Iterator[None]:
    """Make or enter the parts' folder, and hold it until the block ends.

    Parts of an equal job are kept. ``overwrite`` removes those of another one.
    """
    folder = parts.folder
    if folder.exists() and not (folder / LOCK).exists():
        raise UserError(f"{folder} is no folder of parts; choose another --out")
    with hold(folder):
        wanted, path = parts.facts(), folder / FACTS
        found = json.loads(path.read_text()) if path.exists() else {}
        names = [name for name, fact in wanted.items() if found.get(name) != fact]
        if names and found and not overwrite:
            raise UserError(
                f"{folder} holds parts of another job (they differ in {', '.join(names)}); give "
                "--overwrite to start anew, or another --out"
            )
        if names:
            for part in folder.glob("part-*.parquet"):
                part.unlink()
            write_json(path, wanted)
        try:
            yield
        finally:
            if not any(folder.glob("part-*.parquet")):  # nothing is there to go on from
                shutil.rmtree(folder, ignore_errors=True)


def compute(
    parts: Parts,
    engine: Engine,
    console: Console,
    *,
    overwrite: bool = False,
    finish: Callable[[Parts], None] | None = None,
) -> int:
    """Compute what is missing, join all parts, remove them; returns the rows.

    ``finish`` is called when all parts are there, before they are removed; ``overwrite`` starts
    anew where parts of another job lie.

    Raises:
        UserError: what loading raises, too many broken images, or a disk that is full.
    """
    total = len(parts.source)
    with claim(parts, overwrite):
        broken = BrokenFiles(total, parts.job.run.config.max_broken_share)
        done = [part for part in range(len(parts)) if parts.path(part).exists()]
        missing = sorted(set(range(len(parts))) - set(done))
        for part in done:
            broken.add(_broken(parts.read(part)))
        if done:
            LOGGER.info("%d of %d parts are done already", len(done), len(parts))
        first = count = sum(map(parts.images, done))
        start = last = time.monotonic()
        with progress_bar(console, "images", count, total) as bar:
            for part, table in engine(missing) if missing else ():
                for line in broken.add(_broken(table)):
                    LOGGER.warning("skipped: %s", line)
                write_atomically(parts.path(part), _to_bytes(table))
                count, now = count + parts.images(part), time.monotonic()
                speed = f"{(count - first) / max(now - start, 1e-9):.1f} images/s"
                bar.update(bar.task_ids[0], completed=count, numbers=speed)
                if not console.is_terminal and now - last > SECONDS_BETWEEN_LINES:
                    LOGGER.info("%d of %d images, %s", count, total, speed)
                    last = now
        if finish is not None:
            finish(parts)
        rows = join(parts)
        shutil.rmtree(parts.folder)
    if rows < total:
        LOGGER.warning("%d of %d images could not be read", total - rows, total)
    return rows


def local_parts(
    parts: Parts, numbers: Sequence[int], num_workers: int = 0
) -> Iterator[tuple[int, pa.Table]]:
    """(part, its rows) for the parts of these rising numbers, in their order.

    An image that can't be read, or that crashes or hangs the process that loads it, has no row but
    a line in the metadata. Without workers this process loads, and a decoder can crash it.
    """
    job, source, run = parts.job, parts.source, parts.job.run
    run.energy.to(job.device)
    batches = [wanted for part in numbers for wanted in parts.batches(part)]
    loader = evaluation_batches(source, run.image_size, run.channels, batches, num_workers)
    for part in numbers:
        tables, broken = [], []
        for wanted in parts.batches(part):
            batch = next(loader)
            indices = batch.indices.tolist()
            paths = pa.array([source.describe(index) for index in indices], pa.string())
            columns = {INDEX: pa.array(indices, pa.int64()), "path": paths}
            table = pa.table({**columns, **job(batch.images, indices)})
            # Without images that stand in for broken ones.
            kept = [index == expected for index, expected in zip(indices, wanted, strict=True)]
            tables.append(table.filter(pa.array(kept)))
            broken += batch.broken
        lines = json.dumps(list(dict.fromkeys(broken)))
        yield part, pa.concat_tables(tables).replace_schema_metadata({BROKEN: lines})


class PartWorker:
    """One of Ray's actors: a part's number to its content."""

    def __init__(self, parts: Parts) -> None:
        self._parts = parts

    def __call__(self, batch: dict[str, np.ndarray]) -> dict[str, list[Any]]:
        """Columns ``part``, ``content`` and ``error``, which is empty if all went well."""
        part, content, message = int(batch["part"][0]), b"", ""
        try:
            for _, table in local_parts(self._parts, [part], RAY_LOADERS):
                content = _to_bytes(table)
        except UserError as error:
            message = str(error)
        return {"part": [part], "content": [content], "error": [message]}


def ray_parts(
    parts: Parts, numbers: Sequence[int], actors: int, gpus: float = 0
) -> Iterator[tuple[int, pa.Table]]:
    """(part, its rows) for the parts asked for, in whatever order they are done.

    Joins the cluster that ``RAY_ADDRESS`` names; without it, Ray starts on this machine. Each of a
    pool of actors holds the model and reads the images itself: the data must lie at the same path
    on every machine. Ray gives a part that a killed actor was working on to another one.
    """
    os.environ.setdefault("RAY_USAGE_STATS_ENABLED", "0")  # nothing is reported to anybody
    try:
        import ray
        import ray.data
    except ImportError as error:
        raise UserError(
            'the ray engine needs Ray; pip install "backfold[ray]", or leave --engine out'
        ) from error
    ray.data.DataContext.get_current().enable_progress_bars = False
    try:
        ray.init(logging_level=logging.WARNING, ignore_reinit_error=True)
    except (ConnectionError, RuntimeError, ValueError) as error:
        raise UserError(f"Ray can't start: {first_line(error)}; check RAY_ADDRESS") from error
    rows, blocks = [{"part": number} for number in numbers], min(len(numbers), MOST_BLOCKS)
    items = ray.data.from_items(rows, override_num_blocks=blocks)
    contents = items.map_batches(
        PartWorker,
        batch_size=1,
        fn_constructor_args=(parts,),
        compute=ray.data.ActorPoolStrategy(size=min(actors, len(numbers))),
        num_cpus=1,
        num_gpus=gpus,
    )
    for row in contents.iter_rows():
        if row["error"]:
            raise UserError(row["error"])
        yield int(row["part"]), _from_bytes(row["content"])


def join(parts: Parts) -> int:
    """Write all rows, in the images' order, in the format of the suffix; returns how many.

    parquet and CSV have the parts' columns. npz has ``path`` (rows,), of text, and ``vector``
    (rows, features), float32, and is put together in memory, where its readers have it too.
    """
    with replacing(parts.out) as temporary:
        return WRITERS[parts.out.suffix](parts, temporary)


def _rows(parts: Parts) -> Iterator[pa.Table]:
    for table in parts.tables():
        yield table.drop_columns([INDEX]).replace_schema_metadata(None)


def _write_table(writer_class: Any, parts: Parts, path: Path) -> int:
    count = 0
    with writer_class(path, next(_rows(parts)).schema) as writer:
        for table in _rows(parts):
            writer.write_table(table)
            count += len(table)
    return count


def _write_npz(parts: Parts, path: Path) -> int:
    table = pa.concat_tables(_rows(parts)).combine_chunks()
    vectors = table["vector"].chunk(0)
    values = vectors.flatten().to_numpy().reshape(-1, vectors.type.list_size)
    with path.open("wb") as file:
        np.savez(file, path=np.array(table["path"].to_pylist(), str), vector=values)
    return len(table)


WRITERS: dict[str, Callable[[Parts, Path], int]] = {
    ".parquet": partial(_write_table, pq.ParquetWriter),
    ".csv": partial(_write_table, pyarrow.csv.CSVWriter),
    ".npz": _write_npz,
}
