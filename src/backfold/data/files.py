"""Finding files: below folders, and by patterns; nothing here needs torch."""

import glob
import os
import re
import stat
from pathlib import Path

from braceexpand import braceexpand

from backfold.errors import BrokenImage, UserError

IMAGE_SUFFIXES = (".jpg", ".jpeg", ".png", ".webp", ".bmp", ".tif", ".tiff", ".npy")
FILE_SUFFIXES = (*IMAGE_SUFFIXES, ".gif", ".parquet", ".tar", ".tgz", ".gz", ".zip")
PATTERN_SIGNS = "*?[{"
HUB_NAME = re.compile(r"[\w-][\w.-]*/[\w-][\w.-]*(/[\w-][\w.-]*)?")
IN_MEMORY = " in memory"  # ends what stands in the place of data that have no path
WAYS = (
    "give a folder of images, parquet files, uncompressed tar shards such as "
    "shards/{000..012}.tar, a saved data set, or owner/name on the Hugging Face hub"
)


def is_pattern(data: object) -> bool:
    """Whether the text has wildcards or brace ranges."""
    return any(sign in str(data) for sign in PATTERN_SIGNS)


def refuse_missing(data: str) -> None:
    """Raise `UserError` at what is neither there nor a pattern, an address or a name on the hub."""
    on_hub = HUB_NAME.fullmatch(data) and not data.lower().endswith(FILE_SUFFIXES)
    if not (Path(data).exists() or "://" in data or is_pattern(data) or on_hub):
        raise UserError(f"{data} does not exist; {WAYS}")


def find_files(folder: Path, suffixes: tuple[str, ...]) -> list[str]:
    """Sorted paths, relative and with slashes, of the files below a folder; hidden ones left out.

    Suffixes are compared in lower case. Links are followed, but not back to where they lie in.
    """
    found = []
    for place, folders, names in os.walk(folder, followlinks=True):
        here = Path(place)
        folders[:] = [
            name
            for name in folders
            if not name.startswith(".")
            and not (
                (here / name).is_symlink()
                and here.resolve().is_relative_to((here / name).resolve())
            )
        ]
        found += [
            (here.relative_to(folder) / name).as_posix()
            for name in names
            if name.lower().endswith(suffixes) and not name.startswith(".")
        ]
    return sorted(found)


def read_file(path: Path, offset: int = 0, size: int = -1) -> bytes:
    """A regular file's bytes, or some of them.

    What can't be read, or is a pipe or device, which could keep a reader for ever, is broken.
    """
    try:
        if not stat.S_ISREG(path.stat().st_mode):
            raise BrokenImage("no regular file")
        with path.open("rb") as file:
            file.seek(offset)
            return file.read(size)
    except OSError as error:
        raise BrokenImage(error.strerror or type(error).__name__) from error


def expand_braces(pattern: str) -> list[str]:
    """The names that brace ranges as ``{000..012}`` stand for."""
    try:
        return list(braceexpand(pattern))
    except ValueError as error:
        raise UserError(f"{pattern!r} has unbalanced braces; write {{000..012}}") from error


def expand_pattern(pattern: str) -> list[Path]:
    """The files that a pattern names: brace ranges as ``{000..012}``, then ``*``, ``?``, ``[..]``.

    Files of brace ranges keep their order, files of one wildcard are sorted. No file at all is a
    `UserError`.
    """
    files: list[Path] = []
    for name in [pattern] if Path(pattern).is_file() else expand_braces(pattern):
        matched = [name] if Path(name).is_file() else glob.glob(name, recursive=True)  # noqa: PTH207
        if not matched:
            raise UserError(f"{name} does not exist; check the pattern {pattern!r}")
        files += sorted(path for path in map(Path, matched) if path.is_file())
    if not files:
        raise UserError(f"{pattern!r} matches folders only; match files, or give one folder")
    return files
