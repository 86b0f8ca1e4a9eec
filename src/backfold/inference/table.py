"""Rows in parts: what is computed on which images, kept part by part, joined at the end.

Each part is a parquet file, written atomically, so whatever stops a job costs at most the parts
that it was working on. Parts hold an ``index`` column, the image's index in the source, which the
joined file leaves out.
"""

import fcntl
import io
import json
import math
import os
import shutil
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq

from backfold.errors import UserError
from backfold.training.run_folder import write_atomically, write_json

INDEX = "index"
BROKEN = b"broken"
PLAN = "plan.json"
LOCK = ".lock"


@dataclass(frozen=True)
class Plan:
    """What is computed on which images; parts of unequal plans never go together.

    Args:
        facts: of the job and the data, plain values for JSON.
        count: how many images there are.
        part_size: images in a part, a multiple of the batch size; the last part may have fewer.
        batch_size: images that are computed at once.
    """

    facts: Mapping[str, Any]
    count: int
    part_size: int
    batch_size: int

    def __len__(self) -> int:
        return math.ceil(self.count / self.part_size)

    def indices(self, part: int) -> range:
        """The part's images."""
        start = part * self.part_size
        return range(start, min(start + self.part_size, self.count))


@dataclass(frozen=True)
class Parts:
    """The folder that holds a job's parts while it goes on."""

    folder: Path
    plan: Plan

    def path(self, part: int) -> Path:
        """Where a part lies when it is done."""
        return self.folder / f"part-{part:07d}.parquet"

    def missing(self) -> list[int]:
        """Parts that are still to be computed, in order."""
        return [part for part in range(len(self.plan)) if not self.path(part).exists()]

    def write(self, part: int, table: pa.Table) -> None:
        """Keep a part.

        Raises:
            UserError: the disk is full or the folder can't be written.
        """
        write_atomically(self.path(part), to_bytes(table))

    def read(self, part: int) -> pa.Table:
        """A part that is done.

        Raises:
            UserError: somebody damaged or removed it.
        """
        try:
            return from_bytes(self.path(part).read_bytes())
        except (OSError, pa.ArrowInvalid) as error:
            raise UserError(
                f"{self.path(part)} can't be read ({type(error).__name__}); remove it and run the "
                "command again"
            ) from error

    def tables(self) -> Iterator[pa.Table]:
        """All parts in order."""
        return (self.read(part) for part in range(len(self.plan)))


def make_part(
    indices: Sequence[int], paths: Sequence[str], columns: Mapping[str, pa.Array]
) -> pa.Table:
    """A table of the columns ``index``, ``path`` and those given."""
    return pa.table(
        {INDEX: pa.array(indices, pa.int64()), "path": pa.array(paths, pa.string()), **columns}
    )


def with_broken(table: pa.Table, broken: Sequence[str]) -> pa.Table:
    """The part with a line for each of its images that could not be read."""
    return table.replace_schema_metadata({BROKEN: json.dumps(list(broken))})


def broken_of(table: pa.Table) -> list[str]:
    """What `with_broken` noted."""
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

    Args:
        out: the file.
        formats: suffixes that are known.
        others: files that are written beside it.
        overwrite: whether existing files may be replaced.

    Raises:
        UserError: an unknown format, a folder, or a file that exists.
    """
    if out.suffix not in formats:
        raise UserError(f"--out {out} is in no known format; end it in {' or '.join(formats)}")
    for path in (out, *others):
        if path.is_dir():
            raise UserError(f"{path} is a folder; choose another --out")
        if path.exists() and not overwrite:
            raise UserError(f"{path} exists; give --overwrite to replace it, or another --out")


@contextmanager
def claim_parts(out: Path, plan: Plan, overwrite: bool) -> Iterator[Parts]:
    """Make or enter ``OUT.parts``, and hold it until the block ends.

    Parts of an equal plan are kept. ``overwrite`` removes those of another one.

    Raises:
        UserError: parts of another plan, a folder of somebody else's, one that is in use, or one
            that can't be written.
    """
    folder = out.with_name(out.name + ".parts")
    wanted = json.loads(json.dumps(asdict(plan)))
    if folder.exists() and not (folder / LOCK).exists():
        raise UserError(f"{folder} is no folder of parts; choose another --out")
    try:
        folder.mkdir(parents=True, exist_ok=True)
        lock = (folder / LOCK).open("w")
    except OSError as error:
        reason = error.strerror or str(error)
        raise UserError(f"can't write to {folder}: {reason}; choose another --out") from error
    with lock:
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError as error:
            raise UserError(
                f"{folder} is in use by another process; wait for it or choose another --out"
            ) from error
        _match_plan(folder, wanted, overwrite)
        yield Parts(folder, plan)


def _match_plan(folder: Path, wanted: dict[str, Any], overwrite: bool) -> None:
    path = folder / PLAN
    if not path.exists():
        write_json(path, wanted)
        return
    found = json.loads(path.read_text())
    if found == wanted:
        return
    if not overwrite:
        flat, other = ({**plan, **plan["facts"]} for plan in (wanted, found))
        names = [name for name in flat if name != "facts" and flat[name] != other.get(name)]
        raise UserError(
            f"{folder} holds parts of another job (they differ in {', '.join(names)}); give "
            "--overwrite to start anew, or another --out"
        )
    for part in folder.glob("part-*.parquet"):
        part.unlink()
    write_json(path, wanted)


def remove_parts(parts: Parts) -> None:
    """Remove the folder, once its rows are elsewhere."""
    shutil.rmtree(parts.folder)


@contextmanager
def replacing(path: Path) -> Iterator[Path]:
    """A temporary path that becomes ``path``, synced, when the block ends well.

    Raises:
        UserError: the disk is full or the folder can't be written; an old file is intact.
    """
    temporary = path.with_name(f".{path.name}.tmp")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        yield temporary
        with temporary.open("rb") as file:
            os.fsync(file.fileno())
        temporary.replace(path)
    except OSError as error:
        raise UserError(
            f"can't write {path}: {error.strerror or error}; free space or choose another --out"
        ) from error
    finally:
        temporary.unlink(missing_ok=True)
