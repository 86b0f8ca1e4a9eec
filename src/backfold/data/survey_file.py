"""Where a survey is kept, and whether it is still of the same data."""

import dataclasses
import hashlib
import json
import os
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from backfold.data.files import PATTERN_SIGNS, expand_pattern
from backfold.data.protocol import ImageSource
from backfold.data.survey import Survey

FORMAT = "backfold-survey"
FORMAT_VERSION = 1
FOLDER = Path("runs/stats")
PACKED_SUFFIXES = (".parquet", ".tar", ".arrow")


def default_path(data: Path | str | None) -> Path:
    """Where `backfold stats` writes by default, and pretraining looks: below the current folder."""
    text = _identity(data)
    name = re.sub(r"[^\w.-]+", "-", Path(text).name).strip("-.") or "data"
    return FOLDER / f"{name}-{hashlib.blake2b(text.encode(), digest_size=4).hexdigest()}.json"


def to_record(found: Survey, data: Path | str | None) -> dict[str, Any]:
    """What is written: the survey, and what the data were when it was made."""
    return {
        "format": FORMAT,
        "format_version": FORMAT_VERSION,
        "data": {**_state(data), "images": found.images},
        **dataclasses.asdict(found),
    }


def find_survey(
    data: Path | str | None, source: ImageSource, channels: int, path: Path | None = None
) -> Survey | None:
    """The survey of these data, if there is one and they have not changed since.

    Data count as unchanged while their path, the number of images, and the newest time of change
    among their folders and packed files are the same. A file that is overwritten in place does not
    show.

    Args:
        data: as given to `open_source`.
        source: what that opened, wholly.
        channels: that mean and deviation must be of.
        path: of the survey; `default_path` by default.
    """
    try:
        record = json.loads((path or default_path(data)).read_text())
        if record.pop("format") != FORMAT or record.pop("format_version") != FORMAT_VERSION:
            return None
        if record.pop("data") != {**_state(data), "images": len(source)}:
            return None
        found = Survey(**record)
    except (OSError, ValueError, KeyError, TypeError, AttributeError):
        return None  # missing, damaged or of another version: it can be made again
    return found if found.channels == channels else None


def _identity(data: Path | str | None) -> str:
    if data is None:
        return "embedded"
    path = Path(data)
    return str(path.resolve()) if path.exists() else str(data)


def _state(data: Path | str | None) -> dict[str, Any]:
    times = [place.stat().st_mtime_ns for place in _places(data) if place.exists()]
    return {"path": _identity(data), "newest": max(times, default=0)}


def _places(data: Path | str | None) -> Iterator[Path]:
    """The folders and packed files that data lie in; none on the hub."""
    if data is None:
        return
    path = Path(data)
    if path.is_dir():
        for place, _, names in os.walk(path):
            yield Path(place)
            yield from (Path(place, name) for name in names if name.endswith(PACKED_SUFFIXES))
    elif path.exists():
        yield path
    elif any(sign in str(data) for sign in PATTERN_SIGNS):
        yield from expand_pattern(str(data))
