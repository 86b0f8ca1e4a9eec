"""Data small enough to travel to a borrowed GPU: the same pixels, in fewer bytes where needed."""

import io
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
from PIL import Image

from backfold.errors import UserError

MOST_BYTES = 60e6
QUALITIES = (92, 85, 75, 65, 50)
TEST_NAMES = ("test", "val", "validation")


def pack(data: Path, target: Path) -> int:
    """Write train.parquet and test.parquet; returns the JPEG quality, 0 if nothing was coded anew.

    Args:
        data: folder with a train and a test parquet file, each with ``image`` and ``label``.
        target: folder to write to.

    Raises:
        UserError: a file is missing, or no quality is small enough.
    """
    tables = {"train": _find(data, ("train",)), "test": _find(data, TEST_NAMES)}
    kept = {
        split: pq.read_table(file, columns=["image", "label"]) for split, file in tables.items()
    }
    for quality in (0, *QUALITIES):
        packed = {split: _coded(table, quality) for split, table in kept.items()}
        if sum(len(content) for content in packed.values()) <= MOST_BYTES:
            target.mkdir(parents=True, exist_ok=True)
            for split, content in packed.items():
                (target / f"{split}.parquet").write_bytes(content)
            return quality
    raise UserError(
        f"{data} does not fit into {MOST_BYTES / 1e6:.0f} MB at JPEG quality {QUALITIES[-1]}; "
        "give fewer images"
    )


def _find(data: Path, names: tuple[str, ...]) -> Path:
    for name in names:
        if (data / f"{name}.parquet").exists():
            return data / f"{name}.parquet"
    raise UserError(f"{data} holds no {' or '.join(names)}.parquet; give a folder that does")


def _coded(table: pa.Table, quality: int) -> bytes:
    if quality:
        images = [_jpeg(value.as_py(), quality) for value in table["image"]]
        table = pa.table({"image": images, "label": table["label"]})
    buffer = io.BytesIO()
    pq.write_table(table, buffer, compression="zstd")
    return buffer.getvalue()


def _jpeg(content: bytes, quality: int) -> bytes:
    buffer = io.BytesIO()
    Image.open(io.BytesIO(content)).convert("RGB").save(
        buffer, "JPEG", quality=quality, subsampling=0
    )
    return buffer.getvalue()
