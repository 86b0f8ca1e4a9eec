import io
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from PIL import Image

from backfold.errors import UserError


def random_image(seed: int, shape: tuple[int, ...] = (9, 11, 3)) -> np.ndarray:
    return np.random.default_rng(seed).integers(0, 256, shape, dtype=np.uint8)


@pytest.fixture(scope="session")
def encode() -> Callable[..., bytes]:
    def encode_image(image: np.ndarray | Image.Image, format: str = "PNG", **options) -> bytes:
        buffer = io.BytesIO()
        picture = image if isinstance(image, Image.Image) else Image.fromarray(image)
        picture.save(buffer, format, **options)
        return buffer.getvalue()

    return encode_image


@pytest.fixture
def users_error() -> Callable[[Callable[[], object]], str]:
    """The one line of the UserError that a call raises."""

    def message(call: Callable[[], object]) -> str:
        try:
            call()
        except UserError as error:
            # torch's own frames tie the error and the loader's iterator into a cycle; left to the
            # garbage collector, the iterator would wait five seconds for each worker.
            line = str(error.with_traceback(None))
            assert "\n" not in line
            return line
        pytest.fail("no UserError was raised")

    return message


@pytest.fixture
def contents(encode) -> list[bytes]:
    """Twelve distinct PNG files."""
    return [encode(random_image(seed, (6, 7, 3))) for seed in range(12)]


@pytest.fixture
def make_folder(encode) -> Callable[..., Path]:
    def make(folder: Path, names: list[str], broken: tuple[str, ...] = ()) -> Path:
        """Distinct 9 x 11 PNG images with the given relative paths."""
        for seed, name in enumerate(names):
            path = folder / name
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_bytes(b"no image" if name in broken else encode(random_image(seed)))
        return folder

    return make


@pytest.fixture
def make_parquet(encode) -> Callable[..., Path]:
    def make(path: Path, count: int, first_seed: int = 0, **columns) -> Path:
        """Images of the seeds from ``first_seed`` on, and further columns."""
        images = [encode(random_image(first_seed + offset)) for offset in range(count)]
        path.parent.mkdir(parents=True, exist_ok=True)
        pq.write_table(pa.table({"image": images, **columns}), path)
        return path

    return make
