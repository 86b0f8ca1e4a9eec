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
import zipfile
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.csv
import pyarrow.parquet as pq
import torch
from numpy.lib import format as npy
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TimeRemainingColumn

from backfold.data.loading import evaluation_batches
from backfold.data.source import BrokenFiles, ImageSource
from backfold.errors import UserError
from backfold.files import LOCK, hold, write_atomically, write_json
from backfold.inference.jobs import INDEX, Job

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
    """A job on all images of a source, in parts that lie in ``OUT.parts`` while it goes on.

    Args:
        job: what is computed.
        source: the images.
        out: the file that the parts are joined in.
        batch_size: images that are computed at once.
        part_size: images that are kept at a time, rounded down to whole batches.

    Raises:
        UserError: no images, or sizes below 1.
    """

    job: Job
    source: ImageSource
    out: Path
    batch_size: int
    part_size: int

    def __post_init__(self) -> None:
        if self.batch_size < 1 or self.part_size < 1:
            sizes = f"batch_size is {self.batch_size}, part_size {self.part_size}"
            raise UserError(f"{sizes}; give 1 or more")
        if not len(self.source):
            raise UserError(f"{self.source.name} holds no images; give others")
        self.part_size = self.batch_size * max(1, self.part_size // self.batch_size)

    def __len__(self) -> int:
        return math.ceil(len(self.source) / self.part_size)

    def batches(self, part: int) -> list[range]:
        """The part's images, batch by batch."""
        end = min((part + 1) * self.part_size, len(self.source))
        starts = range(part * self.part_size, end, self.batch_size)
        return [range(start, min(start + self.batch_size, end)) for start in starts]

    def facts(self) -> dict[str, Any]:
        """What decides the rows and which are in a part; parts with other facts never mix."""
        paths, weights = hashlib.sha256(), hashlib.sha256()
        for name, tensor in self.job.run.energy.state_dict().items():
            values = tensor.detach().cpu().contiguous().flatten().view(torch.uint8)
            weights.update(name.encode())
            weights.update(values.numpy().data)
        for index in range(len(self.source)):
            paths.update(self.source.describe(index).encode("utf-8", "surrogateescape") + b"\0")
        facts = {
            **self.job.facts(),
            "weights": weights.hexdigest(),
            "step": self.job.run.step,
            "data": self.source.name,
            "paths": paths.hexdigest(),
            "count": len(self.source),
            "part_size": self.part_size,
            "batch_size": self.batch_size,
        }
        plain: dict[str, Any] = json.loads(json.dumps(facts))
        return plain

    @property
    def folder(self) -> Path:
        """Where the parts lie."""
        return self.out.with_name(self.out.name + ".parts")

    def path(self, part: int) -> Path:
        """Where a part lies when it is done."""
        return self.folder / f"part-{part:07d}.parquet"

    def read(self, part: int) -> pa.Table:
        """A part that is done; UserError if somebody damaged or removed it."""
        try:
            return from_bytes(self.path(part).read_bytes())
        except (OSError, pa.ArrowInvalid) as error:
            raise UserError(
                f"{self.path(part)} can't be read ({type(error).__name__}); remove it and run the "
                "command again"
            ) from error

    def tables(self) -> Iterator[pa.Table]:
        """All parts in order, one in memory at a time."""
        return (self.read(part) for part in range(len(self)))


def broken_of(table: pa.Table) -> list[str]:
    """A line for each of the part's images that could not be read."""
    lines: list[str] = json.loads((table.schema.metadata or {}).get(BROKEN, b"[]"))
    return lines


def to_bytes(table: pa.Table) -> bytes:
    """The table as a parquet file's content."""
    buffer = io.BytesIO()
    pq.write_table(table, buffer)
    return buffer.getvalue()


def from_bytes(content: bytes) -> pa.Table:
    """The inverse of `to_bytes`."""
    return pq.read_table(pa.BufferReader(content))


def check_out(out: Path, formats: Sequence[str], others: Sequence[Path], overwrite: bool) -> None:
    """Refuse, before anything is computed, a file that could not be written.

    Raises:
        UserError: its suffix is none of ``formats``; it or one of the ``others`` beside it is a
            folder, or exists.
    """
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

    Raises:
        UserError: parts of another job, a folder of somebody else's, one that is in use, or one
            that can't be written.
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
        yield


def compute(
    parts: Parts,
    engine: Engine,
    console: Console,
    *,
    overwrite: bool = False,
    finish: Callable[[Parts], None] | None = None,
) -> int:
    """Compute what is missing, join all parts, remove them; returns the rows.

    Images and speed are shown as a bar on a terminal, elsewhere in a line now and then. ``finish``
    is called when all parts are there, before they are removed; ``overwrite`` starts anew where
    parts of another job lie.

    Raises:
        UserError: what loading raises, too many broken images, or a disk that is full.
    """
    total = len(parts.source)
    with claim(parts, overwrite):
        broken = BrokenFiles(total, parts.job.run.config.max_broken_share)
        images = [sum(map(len, parts.batches(part))) for part in range(len(parts))]
        missing = [part for part in range(len(parts)) if not parts.path(part).exists()]
        done = sorted(set(range(len(parts))) - set(missing))
        for part in done:
            broken.add(broken_of(parts.read(part)))
        if done:
            LOGGER.info("%d of %d parts are done already", len(done), len(parts))
        first = count = sum(images[part] for part in done)
        start = last = time.monotonic()
        with Progress(
            "images", MofNCompleteColumn(), BarColumn(bar_width=None), "{task.fields[speed]}",
            TimeRemainingColumn(), console=console, transient=True,
            disable=not console.is_terminal,
        ) as bar:  # fmt: skip
            task = bar.add_task("", total=total, completed=count, speed="")
            for part, table in engine(missing) if missing else ():
                for line in broken.add(broken_of(table)):
                    LOGGER.warning("skipped: %s", line)
                write_atomically(parts.path(part), to_bytes(table))
                count, now = count + images[part], time.monotonic()
                speed = f"{(count - first) / max(now - start, 1e-9):.1f} images/s"
                bar.update(task, completed=count, speed=speed)
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

    An image that can't be read, or that crashes or hangs the process that loads it, has no row;
    `broken_of` has a line on it. Without workers this process loads, and a decoder can crash it.
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
                content = to_bytes(table)
        except UserError as error:
            message = str(error)
        return {"part": [part], "content": [content], "error": [message]}


def ray_parts(
    parts: Parts, numbers: Sequence[int], actors: int, gpus: float = 0
) -> Iterator[tuple[int, pa.Table]]:
    """(part, its rows) for the parts asked for, in whatever order they are done.

    Joins the cluster that ``RAY_ADDRESS`` names; without it, Ray starts on this machine. Each of a
    pool of actors holds the model and reads the images itself: the data must lie at the same path
    on every machine. Ray gives a part that a killed actor was working on to another one. An actor
    has one CPU and so many GPUs, fractions allowed.

    Raises:
        UserError: Ray is not installed or can't start, or what loading raises.
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
    if not ray.is_initialized():
        try:
            ray.init(logging_level=logging.WARNING)
        except (ConnectionError, RuntimeError, ValueError) as error:
            reason = str(error).strip().splitlines()[0]
            raise UserError(f"Ray can't start: {reason}; check RAY_ADDRESS") from error
    items = ray.data.from_items(
        [{"part": number} for number in numbers],
        override_num_blocks=min(len(numbers), MOST_BLOCKS),
    )
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
        yield int(row["part"]), from_bytes(row["content"])


def join(parts: Parts) -> int:
    """Write all rows, in the images' order, in the format of the suffix; returns how many.

    parquet and CSV have the parts' columns. npz has ``path`` (rows,), of text, and ``vector``
    (rows, features), float32.

    Raises:
        UserError: the disk is full or the folder can't be written; an old file is intact.
    """
    out = parts.out
    temporary = out.with_name(f".{out.name}.tmp")
    try:
        count = WRITERS[out.suffix](parts, temporary)
        with temporary.open("rb") as file:
            os.fsync(file.fileno())
        temporary.replace(out)
    except OSError as error:
        raise UserError(
            f"can't write {out}: {error.strerror or error}; free space or choose another --out"
        ) from error
    finally:
        temporary.unlink(missing_ok=True)
    return count


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
    count, longest, width = 0, 1, 0
    for table in _rows(parts):
        count += len(table)
        longest = max(longest, pc.max(pc.utf8_length(table["path"])).as_py() or 0)
        width = table.schema.field("vector").type.list_size
    shapes = {"path": (count,), "vector": (count, width)}
    dtypes = {"path": np.dtype(f"<U{longest}"), "vector": np.dtype("<f4")}
    with zipfile.ZipFile(path, "w", zipfile.ZIP_STORED) as archive:
        for name, dtype in dtypes.items():
            header = {"descr": dtype.str, "fortran_order": False, "shape": shapes[name]}
            with archive.open(f"{name}.npy", "w", force_zip64=True) as file:
                npy.write_array_header_1_0(file, header)
                for table in _rows(parts):
                    column = table[name].combine_chunks()
                    values = column if name == "path" else column.flatten()
                    file.write(values.to_numpy(zero_copy_only=False).astype(dtype).tobytes())
    return count


WRITERS: dict[str, Callable[[Parts, Path], int]] = {
    ".parquet": partial(_write_table, pq.ParquetWriter),
    ".csv": partial(_write_table, pyarrow.csv.CSVWriter),
    ".npz": _write_npz,
}
