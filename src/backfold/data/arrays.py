"""Pixel values as arrays: which ranges they have, where their channels are, NumPy files."""

import io
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from backfold.errors import BrokenImage

Pixels = NDArray[Any]  # (height, width, channels) unless said otherwise

# What Pillow calls a decompression bomb: a quarter of a gibibyte of colour pixels.
MAX_PIXELS = 89_478_485
MAX_CHANNELS = 32
NPY_MAGIC = b"\x93NUMPY"
ALPHA_ON_BLACK = "alpha composited on black"


def check_size(height: int, width: int, channels: int, max_pixels: int) -> None:
    """Refuse an image before memory is taken for it.

    Args:
        height: in pixels.
        width: in pixels.
        channels: 1 to `MAX_CHANNELS`; beyond four, they count as more pixels.
        max_pixels: the limit.

    Raises:
        BrokenImage: an empty image, too many channels or too many pixels.
    """
    if min(height, width, channels) < 1 or channels > MAX_CHANNELS:
        raise BrokenImage(
            f"{height} x {width} pixels of {channels} channels; give 1 to {MAX_CHANNELS} channels"
        )
    if height * width * max(1.0, channels / 4) > max_pixels:
        raise BrokenImage(
            f"{height} x {width} pixels of {channels} channel(s) are more than max_pixels "
            f"{max_pixels}; raise it if the file can be trusted"
        )


def channels_last(array: Pixels) -> Pixels:
    """(height, width, channels) from an array of two or three axes.

    Of three axes the shorter of the first and the last holds the channels; the last, where they are
    equally long.

    Raises:
        BrokenImage: another number of axes.
    """
    if array.ndim == 2:
        return array[..., None]
    if array.ndim != 3:
        raise BrokenImage(
            f"an array of shape {array.shape}; give (height, width), (height, width, channels) or "
            "(channels, height, width)"
        )
    return np.moveaxis(array, 0, 2) if array.shape[0] < array.shape[2] else array


def in_range(array: Pixels, bits: int | None = None) -> Pixels:
    """uint8 as it is; 9 to 16 unsigned bits as float32 in [0, 1]; all else as float32, unscaled.

    Args:
        array: booleans, integers or floats; true is 255.
        bits: how many bits of an unsigned integer are in use; all of them by default.

    Raises:
        BrokenImage: other contents, or values that are not finite numbers.
    """
    if array.dtype == np.bool_:
        return array.astype(np.uint8) * np.uint8(255)
    if array.dtype == np.uint8:
        return array
    if array.dtype.kind not in "iuf":
        raise BrokenImage(f"an array of {array.dtype}; give integers or floating-point numbers")
    with np.errstate(over="ignore"):  # float64 beyond float32 becomes infinite, and is refused
        values = array.astype(np.float32)
    if array.dtype.kind == "f" and not np.isfinite(values).all():
        raise BrokenImage("values that are not finite (NaN or infinite)")
    if array.dtype.kind == "u" and array.dtype.itemsize == 2:
        values /= np.float32(2 ** (bits or 16) - 1)
    return values


def on_black(array: Pixels) -> Pixels:
    """Composite (height, width, colours and alpha) on black; float alpha lies in [0, 1]."""
    colours, alpha = array[..., :-1], array[..., -1:]
    if array.dtype == np.uint8:
        product: Pixels = colours.astype(np.uint16) * alpha + 127
        return (product // 255).astype(np.uint8)
    return colours * alpha


def to_tensor(array: Pixels) -> Tensor:
    """(channels, height, width) from (height, width, channels) in the machine's byte order."""
    native = array.astype(array.dtype.newbyteorder("="), copy=False)
    return torch.from_numpy(np.require(native, requirements=["C", "W"])).permute(2, 0, 1)


def decode_npy(content: bytes, max_pixels: int = MAX_PIXELS) -> Pixels:
    """The array in a ``.npy`` file's bytes as (height, width, channels); see `channels_last`.

    Nothing is ever unpickled.

    Raises:
        BrokenImage: damaged, not an image's array, or too large.
    """
    stream = io.BytesIO(content)
    try:
        version = np.lib.format.read_magic(stream)
        readers = {
            (1, 0): np.lib.format.read_array_header_1_0,
            (2, 0): np.lib.format.read_array_header_2_0,
        }
        shape, fortran_order, kind = readers[version](stream)
    except Exception as error:  # whatever a damaged header leads NumPy's parser to
        raise BrokenImage(f"no readable NumPy file ({type(error).__name__})") from error
    if kind.hasobject or kind.kind not in "biuf":
        raise BrokenImage(f"an array of {kind}; give integers or floating-point numbers")
    count = int(np.prod(shape, dtype=object)) if shape else 1
    if min(shape, default=0) < 1 or len(content) - stream.tell() != count * kind.itemsize:
        raise BrokenImage(
            f"{len(content) - stream.tell()} bytes of pixels for shape {shape} of {kind}: "
            "empty, truncated or damaged"
        )
    flat = np.frombuffer(content, kind, count, stream.tell())
    array = channels_last(flat.reshape(shape, order="F" if fortran_order else "C"))
    height, width, channels = array.shape
    check_size(height, width, channels, max_pixels)
    return array
