"""From the bytes of an image file to a tensor, and from one channel count to another.

Pillow decodes every format: torchvision's own decoders are deprecated since torchvision 0.29.
"""

import io

import numpy as np
import torch
from PIL import Image, ImageOps, UnidentifiedImageError
from torch import Tensor
from torchvision.transforms.v2 import functional as TF

from backfold.errors import UserError

UINT16_MAX = 65535.0
EIGHT_BIT_MODES = ("L", "LA", "RGB", "RGBA")


class BrokenImage(Exception):  # noqa: N818 - it is an event to count, not yet an error
    """Bytes that hold no readable image; the message is the reason, in one line."""


def decode(content: bytes) -> Tensor:
    """The image in a file's bytes, (channels, height, width), turned as its EXIF data say.

    uint8 with 1 (grey), 2 (grey and alpha), 3 (RGB) or 4 (RGBA) channels. Grey images of 16 bits
    become float32 in [0, 1] (65535 is 1), floating-point images stay float32 and must lie in
    [0, 1]. Colour images of 16 bits are read with 8 bits. Of an animation the first frame counts.

    Raises:
        BrokenImage: no image, a damaged one, or values out of range.
    """
    try:
        with Image.open(io.BytesIO(content)) as image:
            ImageOps.exif_transpose(image, in_place=True)
            array = _as_array(image)
    except BrokenImage:
        raise
    except Exception as error:
        # Pillow's plugins raise whatever damaged bytes lead them to: OSError, SyntaxError,
        # struct.error, zlib.error, IndexError and more.
        raise BrokenImage(_reason(content, error)) from error
    channels_last = array if array.ndim == 3 else array[..., None]
    return torch.from_numpy(channels_last).permute(2, 0, 1)


def _as_array(image: Image.Image) -> np.ndarray:
    mode = image.mode
    if mode in EIGHT_BIT_MODES:
        return np.array(image)
    if mode == "1":
        return np.array(image.convert("L"))
    if mode.startswith("I"):
        return _within_unit_range(np.array(image, dtype=np.float32) / np.float32(UINT16_MAX), mode)
    if mode == "F":
        return _within_unit_range(np.array(image), mode)
    has_alpha = "transparency" in image.info or mode in ("PA", "RGBa", "La")
    return np.array(image.convert("RGBA" if has_alpha else "RGB"))


def _within_unit_range(values: np.ndarray, mode: str) -> np.ndarray:
    low, high = float(values.min()), float(values.max())
    if low >= 0.0 and high <= 1.0:
        return values
    if mode == "F":
        raise BrokenImage(f"floating-point values from {low:g} to {high:g}; scale them to 0..1")
    low, high = low * UINT16_MAX, high * UINT16_MAX
    raise BrokenImage(f"integer values from {low:.0f} to {high:.0f}; scale them to 0..65535")


def _reason(content: bytes, error: Exception) -> str:
    if not content:
        return "empty"
    if isinstance(error, UnidentifiedImageError):
        return "not an image in a known format"
    return " ".join(f"{type(error).__name__}: {error}".split())


def as_float(image: Tensor) -> Tensor:
    """float32 in [0, 1] from a decoded image (uint8, or float32 already)."""
    return image.float().div_(255.0) if image.dtype == torch.uint8 else image


def count_without_alpha(channels: int) -> int:
    """How many of a decoded image's channels carry colour: 1 of 2, 3 of 4, else all."""
    return {2: 1, 4: 3}.get(channels, channels)


def to_channels(image: Tensor, channels: int) -> Tensor:
    """The image with ``channels`` channels; dtype and size stay.

    Grey is repeated, alpha is dropped, and RGB becomes its luminance where one channel is asked.

    Args:
        image: (1 to 4, height, width) as `decode` returns it.
        channels: 1 or more.

    Raises:
        UserError: no such conversion, as from RGB to 2 channels.
    """
    have = image.shape[0]
    if have == channels:
        return image
    colours = image[: count_without_alpha(have)]
    if len(colours) == channels:
        return colours
    if len(colours) == 1:
        return colours.expand(channels, -1, -1)
    if len(colours) == 3 and channels == 1:
        return _luminance(colours)
    raise UserError(
        f"an image of {have} channels can't be given {channels}; set --channels to 1 or {have}"
    )


def _luminance(image: Tensor) -> Tensor:
    # torchvision cuts decimals off; on floats it keeps them, so uint8 can be rounded here.
    grey = TF.rgb_to_grayscale(image.float())
    return grey if image.is_floating_point() else grey.round().to(image.dtype)
