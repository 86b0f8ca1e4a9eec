"""Joining parts into one parquet, npz or CSV file, one part in memory at a time."""

import zipfile
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import IO

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.csv as pa_csv
import pyarrow.parquet as pq
from numpy.lib import format as npy

from backfold.inference.table import INDEX, Parts, replacing

Column = Callable[[pa.Table], np.ndarray]


def join(parts: Parts, out: Path) -> int:
    """Write all rows, in the images' order, in the format of the suffix; returns how many.

    parquet and CSV have the parts' columns. npz has ``path`` (rows,), of text, and ``vector``
    (rows, features), float32.

    Raises:
        UserError: the disk is full or the folder can't be written.
    """
    writers = {".parquet": _write_parquet, ".csv": _write_csv, ".npz": _write_npz}
    with replacing(out) as temporary:
        return writers[out.suffix](parts, temporary)


def _rows(parts: Parts) -> Iterator[pa.Table]:
    for table in parts.tables():
        yield table.drop_columns([INDEX]).replace_schema_metadata(None)


def _write_parquet(parts: Parts, path: Path) -> int:
    tables = _rows(parts)
    first = next(tables)
    count = len(first)
    with pq.ParquetWriter(path, first.schema) as writer:
        writer.write_table(first)
        for table in tables:
            writer.write_table(table)
            count += len(table)
    return count


def _write_csv(parts: Parts, path: Path) -> int:
    tables = _rows(parts)
    first = next(tables)
    count = len(first)
    with pa_csv.CSVWriter(path, first.schema) as writer:
        writer.write_table(first)
        for table in tables:
            writer.write_table(table)
            count += len(table)
    return count


def _write_npz(parts: Parts, path: Path) -> int:
    count, longest, width = 0, 1, 0
    for table in _rows(parts):
        count += len(table)
        longest = max(longest, pc.max(pc.utf8_length(table["path"])).as_py() or 0)
        width = table.schema.field("vector").type.list_size
    with zipfile.ZipFile(path, "w", zipfile.ZIP_STORED) as archive:
        text = np.dtype(f"<U{longest}")
        with archive.open("path.npy", "w", force_zip64=True) as file:
            _write_array(file, parts, (count,), text, lambda table: _text(table, text))
        with archive.open("vector.npy", "w", force_zip64=True) as file:
            _write_array(file, parts, (count, width), np.dtype("<f4"), _vectors)
    return count


def _text(table: pa.Table, dtype: np.dtype) -> np.ndarray:
    return np.array(table["path"].to_pylist(), dtype=dtype)


def _vectors(table: pa.Table) -> np.ndarray:
    values: np.ndarray = table["vector"].combine_chunks().flatten().to_numpy()
    return values.astype("<f4")


def _write_array(
    file: IO[bytes], parts: Parts, shape: tuple[int, ...], dtype: np.dtype, column: Column
) -> None:
    header = {"descr": npy.dtype_to_descr(dtype), "fortran_order": False, "shape": shape}
    npy.write_array_header_1_0(file, header)
    for table in _rows(parts):
        file.write(column(table).tobytes())
