"""Checked reading of the files that a run leaves: what is wrong with one becomes a `UserError`."""

import csv
import json
import math
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, TypeVar, get_type_hints

import numpy as np
import yaml
from numpy.typing import NDArray

from backfold.errors import UserError

Series = NDArray[np.float64]
Record = TypeVar("Record")


def read_text(path: Path) -> str:
    """The file's text.

    Raises:
        UserError: a file that can't be read, or is no UTF-8 text.
    """
    try:
        return path.read_text(encoding="utf-8")
    except OSError as error:
        reason = error.strerror or type(error).__name__
        raise UserError(f"{path} can't be read: {reason}; restore the file") from error
    except UnicodeDecodeError as error:
        raise UserError(f"{path} is no UTF-8 text; restore the file or train again") from error


def read_json(path: Path) -> Mapping[str, Any]:
    """The mapping in a JSON file; ``NaN`` and ``Infinity`` are numbers.

    Raises:
        UserError: broken JSON, or anything but a mapping.
    """
    try:
        value = json.loads(read_text(path))
    except (json.JSONDecodeError, RecursionError) as error:
        raise UserError(
            f"{path} is broken JSON: {error}; restore the file or train again"
        ) from error
    return _as_mapping(value, str(path))


def check_yaml(path: Path) -> str:
    """The text of a YAML file, after a look that it holds a mapping.

    Raises:
        UserError: broken YAML, or anything but a mapping.
    """
    text = read_text(path)
    try:
        value = yaml.safe_load(text)
    except yaml.YAMLError as error:
        reason = " ".join(str(error).split())
        raise UserError(
            f"{path} is broken YAML: {reason}; restore the file or train again"
        ) from error
    _as_mapping(value, str(path))
    return text


def read_columns(path: Path) -> dict[str, Series]:
    """The columns of a table of numbers with a ``step`` column, in the order of the steps.

    Of rows with the same step, as a resumed run leaves them, the last one counts. A last line
    without its newline is still being written and does not count. Empty cells become NaN.

    Raises:
        UserError: no ``step`` column, or a cell that is no number.
    """
    lines = read_text(path).splitlines(keepends=True)
    if lines and not lines[-1].endswith("\n"):
        lines.pop()
    reader = csv.DictReader(lines)
    names = list(reader.fieldnames or [])
    if names and "step" not in names:
        raise UserError(f"{path} has the columns {', '.join(names)}, and no step; train again")
    rows: dict[float, list[float]] = {}
    for row in reader:
        where = f"{path} line {reader.line_num}"
        values = [_cell(row[name], where) for name in names]
        step = values[names.index("step")]
        if not math.isfinite(step):
            raise UserError(f"{where} has the step {row['step']!r}; restore the file")
        rows[step] = values
    table = np.array([rows[step] for step in sorted(rows)], dtype=np.float64)
    return {name: table[:, column] for column, name in enumerate(names)} if rows else {}


def _cell(text: str | None, where: str) -> float:
    try:
        return float(text) if text else math.nan
    except ValueError as error:
        raise UserError(f"{where} holds {text!r}, which is no number; restore the file") from error


def read_record(
    record_type: type[Record], values: Mapping[str, Any], where: str, **given: object
) -> Record:
    """Fill a dataclass from the values under its fields' names, each read by the field's type.

    Args:
        record_type: a dataclass of the types in `_READERS`, but for the fields given.
        values: what a file holds.
        where: names the file in errors.
        **given: fields that are ready.

    Raises:
        UserError: a value of another type than the field's.
    """
    hints = get_type_hints(record_type)
    read = {name: _READERS[hints[name]](values, name, where) for name in hints.keys() - given}
    return record_type(**read, **given)


def mapping(values: Mapping[str, Any], key: str, where: str) -> Mapping[str, Any]:
    """The mapping under a key; empty where it is missing or null."""
    value = values.get(key)
    return {} if value is None else _as_mapping(value, f"{key!r} in {where}")


def _as_mapping(value: object, what: str) -> Mapping[str, Any]:
    if not isinstance(value, dict) or not all(isinstance(key, str) for key in value):
        raise UserError(
            f"{what} holds {_excerpt(value)}, not names with values; restore it or train again"
        )
    return value


def mappings(values: Mapping[str, Any], key: str, where: str) -> Sequence[Mapping[str, Any]]:
    """The list of mappings under a key; empty where it is missing or null."""
    return [_as_mapping(item, f"{key!r} in {where}") for item in _sequence(values, key, where)]


def _sequence(values: Mapping[str, Any], key: str, where: str) -> Sequence[Any]:
    value = values.get(key)
    if value is None:
        return []
    if not isinstance(value, list):
        raise _unfit(values, key, where, "a list")
    return value


def number(values: Mapping[str, Any], key: str, where: str) -> float | None:
    """The number under a key, which may be NaN; None where it is missing or null."""
    value = values.get(key)
    if value is None:
        return None
    if not _is_number(value):
        raise _unfit(values, key, where, "a number")
    return float(value)


def _is_number(value: object) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool)


def numbers(values: Mapping[str, Any], key: str, where: str) -> tuple[float, ...]:
    """The list of numbers under a key, null as NaN; empty where it is missing."""
    items = _sequence(values, key, where)
    if not all(item is None or _is_number(item) for item in items):
        raise _unfit(values, key, where, "a list of numbers")
    return tuple(math.nan if item is None else float(item) for item in items)


def text(values: Mapping[str, Any], key: str, where: str) -> str | None:
    """The text under a key; None where it is missing or null."""
    value = values.get(key)
    if value is not None and not isinstance(value, str):
        raise _unfit(values, key, where, "a text")
    return value


def texts(values: Mapping[str, Any], key: str, where: str) -> tuple[str, ...]:
    """The list of texts under a key; empty where it is missing or null."""
    items = _sequence(values, key, where)
    if not all(isinstance(item, str) for item in items):
        raise _unfit(values, key, where, "a list of texts")
    return tuple(items)


_READERS: Mapping[Any, Callable[[Mapping[str, Any], str, str], Any]] = {
    float | None: number,
    str | None: text,
    tuple[float, ...]: numbers,
    tuple[str, ...]: texts,
    Mapping[str, Any]: mapping,
}


def _unfit(values: Mapping[str, Any], key: str, where: str, wanted: str) -> UserError:
    return UserError(
        f"{key!r} in {where} is {_excerpt(values[key])}, not {wanted}; "
        "restore the file or train again"
    )


def _excerpt(value: object) -> str:
    shown = repr(value)
    return shown if len(shown) <= 60 else f"{shown[:57]}..."
