import io

import numpy as np
import pytest
import torch

from backfold.data.decode import decode, examine
from backfold.errors import BrokenImage


def npy(array, version=None):
    buffer = io.BytesIO()
    np.lib.format.write_array(buffer, array, version)
    return buffer.getvalue()


def values(shape, dtype, seed=0):
    random = np.random.default_rng(seed)
    if np.dtype(dtype).kind == "f":
        return (random.standard_normal(shape) * 100).astype(dtype)
    info = np.iinfo(dtype)
    return random.integers(info.min, info.max, shape, np.int64, endpoint=True).astype(dtype)


@pytest.mark.parametrize(
    ("dtype", "scale"),
    [
        ("uint8", None), ("uint16", 65535), (">u2", 65535), ("int16", 1), ("uint32", 1),
        ("float16", 1), ("float64", 1), (">f4", 1),
    ],
)  # fmt: skip
def test_numpy_files_keep_their_values(dtype, scale):
    array = values((9, 11, 5), dtype)
    found = examine(npy(array))
    assert found.format == "NPY"
    assert found.image.shape == (5, 9, 11)
    expected = np.moveaxis(array, 2, 0)
    if scale is None:
        assert found.image.dtype == torch.uint8
        assert np.array_equal(found.image.numpy(), expected)
    else:
        assert found.image.dtype == torch.float32
        np.testing.assert_allclose(
            found.image.numpy(), expected.astype(np.float64) / scale, rtol=2e-7
        )


@pytest.mark.parametrize(
    ("shape", "is_last"),
    [
        ((9, 11, 1), True),
        ((1, 9, 11), False),
        ((9, 11, 32), False),  # 9 is the shorter: it holds the channels
        ((40, 50, 32), True),
        ((7, 9, 7), True),  # equally long: the last
    ],
)
def test_the_shorter_end_holds_the_channels(shape, is_last):
    array = values(shape, "uint8")
    expected = np.moveaxis(array, 2, 0) if is_last else array
    assert np.array_equal(decode(npy(array)).numpy(), expected)
    assert np.array_equal(decode(npy(np.asfortranarray(array), (2, 0))).numpy(), expected)
    assert np.array_equal(decode(npy(array[0] > 99)).numpy(), 255 * (array[:1] > 99))


class Bomb:
    def __reduce__(self):
        return (pytest.fail, ("something was unpickled",))


@pytest.mark.parametrize(
    ("content", "reason"),
    [
        (npy(np.array([Bomb()], dtype=object)), "Object arrays cannot be loaded"),
        (npy(np.zeros((3, 3), dtype=complex)), "complex128; give integers"),
        (npy(np.zeros((3, 3), dtype=[("a", "u1")])), "give integers"),
        (npy(np.zeros((2, 3, 4, 5))), r"shape \(2, 3, 4, 5\); give \(height"),
        (npy(np.zeros((0, 3))), "0 x 3 pixels"),
        (npy(np.zeros((40, 40, 33))), "40 x 40 pixels of 33 channels; give 1 to 32"),
        (npy(np.zeros((3, 3)))[:-1], "EOF"),
        (npy(np.zeros((10, 10))).replace(b"(10, 10)", b"(9999,9)"), "EOF"),
        (npy(np.zeros((10, 10))).replace(b"(10, 10), ", b"(10**9,99)"), "malformed node"),
        (b"\x93NUMPY\x07\x00", "only support format version"),
        (npy(np.array([[1.0, np.nan]])), "not finite"),
        (npy(np.array([[1.0, 1e300]])), "not finite"),
    ],
)
def test_other_contents_are_broken(content, reason):
    with pytest.raises(BrokenImage, match=reason) as caught:
        decode(content)
    assert "\n" not in str(caught.value)


def test_large_arrays_are_refused_by_what_they_hold():
    array = np.zeros((30, 40, 8), dtype=np.uint8)
    assert decode(npy(array), max_pixels=2400).shape == (8, 30, 40)  # eight channels count twice
    with pytest.raises(BrokenImage, match=r"30 x 40 pixels of 8 .* max_pixels 2399"):
        decode(npy(array), max_pixels=2399)
