"""Cut the embedded sample of Fashion-MNIST out of Debian's package dataset-fashion-mnist.

python scripts/cut_fashion_mnist.py
"""

import argparse
import gzip
import io
import json
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
from numpy.typing import NDArray
from PIL import Image

SOURCE = Path("/usr/share/datasets/fashion-mnist")
OUT = Path(__file__).parents[1] / "src/backfold/data/embedded"
SEED = 2017
CLASS_NAMES = (
    "T-shirt/top", "Trouser", "Pullover", "Dress", "Coat", "Sandal", "Shirt", "Sneaker", "Bag",
    "Ankle boot",
)  # fmt: skip
# split: (Debian's file prefix, images to keep)
SPLITS = {"train": ("train", 10_000), "test": ("t10k", 2_000)}


def read_idx(path: Path) -> NDArray[np.uint8]:
    """Array in a gzipped idx file of unsigned bytes (two zeros, type 8, rank, sizes, data)."""
    content = gzip.decompress(path.read_bytes())
    if content[:3] != b"\0\0\x08":
        raise ValueError(f"{path} is no idx file of unsigned bytes")
    shape = np.frombuffer(content, dtype=">u4", count=content[3], offset=4)
    return np.frombuffer(content, dtype=np.uint8, offset=4 + 4 * len(shape)).reshape(shape)


def encode_png(image: NDArray[np.uint8]) -> bytes:
    buffer = io.BytesIO()
    Image.fromarray(image).save(buffer, "PNG", optimize=True)
    return buffer.getvalue()


def cut(source: Path, out: Path, split: str) -> Path:
    """Write one split's parquet file, equally many images of each class, and return its path.

    Columns are image (PNG) and label; the schema's metadata is what Hugging Face datasets writes.
    """
    prefix, count = SPLITS[split]
    images = read_idx(source / f"{prefix}-images-idx3-ubyte.gz")
    labels = read_idx(source / f"{prefix}-labels-idx1-ubyte.gz").astype(np.int64)
    random, per_class = np.random.default_rng(SEED), count // len(CLASS_NAMES)
    chosen = [
        random.choice(np.flatnonzero(labels == label), per_class, replace=False)
        for label in range(len(CLASS_NAMES))
    ]
    places = np.sort(np.concatenate(chosen))
    features = {
        "image": {"_type": "Image"},
        "label": {"names": list(CLASS_NAMES), "_type": "ClassLabel"},
    }
    metadata = {"huggingface": json.dumps({"info": {"features": features}})}
    schema = pa.schema([("image", pa.binary()), ("label", pa.int64())], metadata=metadata)
    table = pa.table([[encode_png(image) for image in images[places]], labels[places]], schema)
    path = out / f"fashion_mnist_{split}.parquet"
    pq.write_table(
        table, path, compression="zstd", compression_level=19, use_dictionary=False, version="2.6"
    )
    return path


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--source", type=Path, default=SOURCE, help="folder of the idx gz files")
    options = parser.parse_args()
    if not options.source.is_dir():
        parser.error(f"--source {options.source} is no folder; apt install dataset-fashion-mnist")
    for split in SPLITS:
        path = cut(options.source, OUT, split)
        print(f"{path}: {path.stat().st_size} bytes")


if __name__ == "__main__":
    main()
