"""Images in parquet files."""

import json
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq
from numpy.typing import NDArray

from backfold.data.arrays import MAX_PIXELS
from backfold.data.encoded import EncodedSource
from backfold.errors import BrokenImage, UserError


class ParquetSource(EncodedSource):
    """Images in parquet files, held in memory in their compressed form.

    Column ``image``: bytes of an image file, or a struct with such ``bytes`` (as Hugging Face
    datasets writes). Column ``label``, optional: integers from 0. Class names are taken from
    Hugging Face's schema metadata, or else are the numbers.

    Args:
        files: one file or more with the same columns.
        labelled: read the labels, if there are any.
        name: for logs; the files' paths by default.
        max_pixels: larger images are broken.

    Raises:
        UserError: no parquet file, no images, or labels that are no integers from 0.
    """

    def __init__(
        self,
        files: Path | Sequence[Path],
        labelled: bool = True,
        name: str | None = None,
        max_pixels: int = MAX_PIXELS,
    ) -> None:
        self.max_pixels = max_pixels
        self._files = [files] if isinstance(files, Path) else list(files)
        more = f" and {len(self._files) - 1} more" if len(self._files) > 1 else ""
        self.name = name or f"{self._files[0]}{more}"
        tables = [_read_table(file) for file in self._files]
        self._ends = np.cumsum([len(table) for table in tables])
        if not self._ends[-1]:
            raise UserError(f"{self.name}: no rows; give parquet files that hold images")
        columns = [
            _image_column(table, file) for table, file in zip(tables, self._files, strict=True)
        ]
        self._images = pa.chunked_array([chunk for column in columns for chunk in column.chunks])
        if labelled and all("label" in table.column_names for table in tables):
            labels = [
                _label_column(table, file) for table, file in zip(tables, self._files, strict=True)
            ]
            self.labels = np.concatenate(labels)
            self.class_names = _class_names(tables[0]) or tuple(
                str(label) for label in range(int(self.labels.max()) + 1)
            )

    def __len__(self) -> int:
        return len(self._images)

    def content(self, index: int) -> bytes:
        """See `EncodedSource.content`; a path beside the bytes is never followed."""
        content = self._images[index].as_py()
        if content is None:
            raise BrokenImage("no image in this row")
        return bytes(content)

    def describe(self, index: int) -> str:
        """The file's path and the row, counted from 0."""
        file = int(np.searchsorted(self._ends, index, side="right"))
        start = int(self._ends[file - 1]) if file else 0
        return f"{self._files[file]} row {index - start}"


def _read_table(file: Path) -> pa.Table:
    try:
        schema = pq.read_schema(file)
        names = [name for name in ("image", "label") if name in schema.names]
        if "image" not in names:
            raise UserError(
                f"{file} has columns {', '.join(schema.names)} but no `image`; "
                "rename the column that holds the images' bytes to `image`"
            )
        return pq.read_table(file, columns=names)
    except (pa.ArrowException, OSError) as error:
        reason = " ".join(str(error).split())
        raise UserError(f"{file} is no readable parquet file ({reason}); replace it") from error


def _image_column(table: pa.Table, file: Path) -> pa.ChunkedArray:
    column = table["image"]
    kind = column.type
    if pa.types.is_struct(kind) and kind.get_field_index("bytes") >= 0:
        column = pc.struct_field(column, "bytes")
    if not (pa.types.is_binary(column.type) or pa.types.is_large_binary(column.type)):
        raise UserError(
            f"{file}: column `image` holds {kind}, not bytes; store each image's encoded file there"
        )
    return column.cast(pa.large_binary())


def _label_column(table: pa.Table, file: Path) -> NDArray[np.int64]:
    column = table["label"]
    if (
        not pa.types.is_integer(column.type)
        or column.null_count
        or (pc.min(column).as_py() or 0) < 0
    ):
        raise UserError(
            f"{file}: column `label` is {column.type} or has nulls or negative numbers; "
            "give integers from 0, or drop the column"
        )
    return np.asarray(column.to_numpy(), dtype=np.int64)


def _class_names(table: pa.Table) -> tuple[str, ...]:
    metadata = (table.schema.metadata or {}).get(b"huggingface", b"{}")
    label = json.loads(metadata).get("info", {}).get("features", {}).get("label", {})
    return tuple(label.get("names") or ())
