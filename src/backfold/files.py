"""Files that are whole at every moment, and folders that one process at a time writes to."""

import errno
import fcntl
import json
import os
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

from backfold.errors import UserError

LOCK = ".lock"
FULL = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)


def refuse_missing_run(path: Path) -> None:
    """Raise UserError where there is neither a run's folder nor a checkpoint."""
    if not path.exists():
        raise UserError(f"there is no checkpoint at {path}; give a run's folder or a .ckpt file")


@contextmanager
def replacing(path: Path) -> Iterator[Path]:
    """A place beside the path: what is written there is synced and renamed when the block ends.

    A reader sees the old file or the new one.

    UserError is raised where the disk is full or the folder can't be written.
    """
    temporary = path.with_name(f".{path.name}.tmp")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        yield temporary
        with temporary.open("rb") as file:
            os.fsync(file.fileno())
        temporary.replace(path)
    except BaseException as error:
        with suppress(OSError):
            temporary.unlink()
        if not isinstance(error, OSError):
            raise
        free = "free space or " if error.errno in FULL else ""
        raise UserError(
            f"can't write {path}: {error.strerror or error}; {free}choose another --out"
        ) from error


def write_atomically(path: Path, content: bytes) -> None:
    """Write a whole file, or none; see `replacing`."""
    with replacing(path) as temporary:
        temporary.write_bytes(content)


def write_json(path: Path, content: Any) -> None:
    """`write_atomically` for JSON."""
    write_atomically(path, (json.dumps(content, indent=2) + "\n").encode())


@contextmanager
def hold(folder: Path) -> Iterator[None]:
    """Make a folder where there is none, and keep other processes out until the block ends.

    By a file lock, which the system drops when a process dies. UserError says that it is taken.
    """
    try:
        folder.mkdir(parents=True, exist_ok=True)
        lock = (folder / LOCK).open("w")
    except OSError as error:
        reason = error.strerror or error
        raise UserError(f"can't write to {folder}: {reason}; choose another --out") from error
    # Else loading workers, which outlive a killed run by seconds, would hold its lock.
    os.register_at_fork(after_in_child=lock.close)
    with lock:
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError as error:
            raise UserError(
                f"{folder} is in use by another process; wait for it or choose another --out"
            ) from error
        yield
