"""From the bytes of an image file to a tensor, and from one channel count to another.

Pillow decodes what it keeps whole: torchvision's own decoders are deprecated since torchvision
0.29. Of what Pillow cuts to 8 bits or to the first channels, imagecodecs decodes PNG, and tifffile
TIFF.
"""

import io
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass

import imagecodecs
import numpy as np
import torch
from PIL import Image, UnidentifiedImageError
from torch import Tensor
from torchvision.transforms.v2 import functional as TF

from backfold.data.arrays import (
    ALPHA_ON_BLACK,
    MAX_PIXELS,
    NPY_MAGIC,
    Pixels,
    check_size,
    decode_npy,
    in_range,
    on_black,
    to_tensor,
)
from backfold.data.tiff import ORIENTATION, TIFF_MAGIC, decode_tiff
from backfold.errors import BrokenImage, UserError

__all__ = [
    "BrokenImage",
    "Decoded",
    "as_float",
    "decode",
    "decode_pillow",
    "examine",
    "to_channels",
]

# Pillow's other decoders are old, rare, or call other programs.
FORMATS = ("BMP", "GIF", "JPEG", "PNG", "TIFF", "WEBP")
PNG_MAGIC = b"\x89PNG\r\n\x1a\n"
TURNED = "turned as EXIF says"
_OPENING = threading.Lock()


@dataclass(frozen=True)
class Decoded:
    """An image, and what was done to it on the way.

    Attributes:
        image: (channels, height, width), as `decode` returns it.
        format: of the file, as "JPEG".
        kind: how its values are stored, as "uint16".
        conversions: what is not as it was stored, as "alpha composited on black".
    """

    image: Tensor
    format: str
    kind: str
    conversions: tuple[str, ...] = ()


def decode(content: bytes, min_side: int | None = None, max_pixels: int = MAX_PIXELS) -> Tensor:
    """The image in a file's bytes, (channels, height, width), turned as its EXIF data say.

    uint8, or float32 where the file has more than 8 bits: 16 bits without sign lie in [0, 1] (65535
    is 1); floating-point numbers and all other integers keep their values, whatever these are.
    Photographs have 1 (grey) or 3 channels; alpha is composited on black; palettes, CMYK and other
    colour spaces become RGB. TIFF and NumPy files have 1 to 32 channels; see `decode_tiff` and
    `decode_npy`. Of an animation the first frame counts.

    Args:
        content: the file's bytes.
        min_side: pixels; where given, JPEG images may come at a half, a quarter or an eighth of
            their size, as long as both sides keep this length. Their pixels are then close to the
            means of the full ones (45 dB and more), in down to half of the time.
        max_pixels: larger images are refused as broken before memory is taken for them.

    Raises:
        BrokenImage: no image, a damaged or too large one, or numbers that are not finite.
    """
    return examine(content, min_side, max_pixels).image


def examine(content: bytes, min_side: int | None = None, max_pixels: int = MAX_PIXELS) -> Decoded:
    """As `decode`, with what was found out about the file."""
    try:
        if content.startswith(NPY_MAGIC):
            array = decode_npy(content, max_pixels)
            return Decoded(to_tensor(in_range(array)), "NPY", str(array.dtype))
        if content.startswith(TIFF_MAGIC):
            tiff = decode_tiff(content, max_pixels)
            if tiff is not None:
                array, turned = _upright(tiff.array, tiff.orientation)
                return Decoded(to_tensor(array), "TIFF", tiff.kind, (*tiff.conversions, *turned))
        with _open_pillow(content) as image:
            check_size(image.height, image.width, 1, max_pixels)
            if content.startswith(PNG_MAGIC) and content[24] == 16:
                return _decode_deep_png(content, image)
            if min_side is not None:
                image.draft(None, (min_side, min_side))  # only JPEG knows how
            return decode_pillow(image)
    except BrokenImage:
        raise
    except Exception as error:
        # Decoders raise whatever damaged bytes lead them to: OSError, SyntaxError, struct.error,
        # zlib.error, IndexError and more.
        raise BrokenImage(_reason(content, error)) from error


@contextmanager
def _open_pillow(content: bytes) -> Iterator[Image.Image]:
    # Our own limit, which an option can raise, stands in for Pillow's, which all programs share.
    with _OPENING:
        before, Image.MAX_IMAGE_PIXELS = Image.MAX_IMAGE_PIXELS, None
        try:
            image = Image.open(io.BytesIO(content), formats=FORMATS)
        finally:
            Image.MAX_IMAGE_PIXELS = before
    with image:
        yield image


def decode_pillow(image: Image.Image) -> Decoded:
    """Any image of Pillow's; see `decode`.

    Raises:
        BrokenImage: numbers that are not finite.
    """
    tag = _orientation(image)
    image.load()
    array, conversions = _pixels(image)
    left = _orientation(image)  # Pillow turns TIFF images itself, and takes the tag away
    array, turned = _upright(array, left)
    if left == 1 and tag != 1:
        turned = (TURNED,)
    kind = "bool" if image.mode == "1" else _kind(image.mode)
    format = "JPEG" if image.format == "MPO" else image.format or "Pillow"
    return Decoded(to_tensor(array), format, kind, (*conversions, *turned))


def _kind(mode: str) -> str:
    if mode.startswith("I;16"):
        return "uint16"
    return {"I": "int32", "F": "float32"}.get(mode, "uint8")


def _pixels(image: Image.Image) -> tuple[Pixels, tuple[str, ...]]:
    mode = image.mode
    if mode in ("I", "F") or mode.startswith("I;16"):
        array = np.array(image)
        return in_range(array if array.ndim == 3 else array[..., None]), ()
    if image.has_transparency_data:
        target = "LA" if mode in ("1", "L", "LA", "La") else "RGBA"
        array = np.array(image if mode == target else image.convert(target))
        return on_black(array), (ALPHA_ON_BLACK,)
    if mode == "1":
        return np.array(image.convert("L"))[..., None], ()
    if mode == "L":
        return np.array(image)[..., None], ()
    if mode == "RGB":
        return np.array(image), ()
    return np.array(image.convert("RGB")), (f"{'palette' if mode == 'P' else mode} made RGB",)


def _decode_deep_png(content: bytes, image: Image.Image) -> Decoded:
    array = imagecodecs.png_decode(content)
    values = in_range(array if array.ndim == 3 else array[..., None])
    conversions: tuple[str, ...] = ()
    if values.shape[2] in (2, 4):
        values, conversions = on_black(values), (ALPHA_ON_BLACK,)
    # Asking Pillow for the tag decodes the pixels once more where it comes after them.
    values, turned = _upright(values, _orientation(image) if b"eXIf" in content else 1)
    return Decoded(to_tensor(values), "PNG", "uint16", (*conversions, *turned))


def _orientation(image: Image.Image) -> int:
    tag = image.getexif().get(ORIENTATION, 1)
    return tag if tag in range(1, 9) else 1


def _upright(array: Pixels, orientation: int) -> tuple[Pixels, tuple[str, ...]]:
    """Undo what the EXIF orientation (1 to 8) says was done to (height, width, channels)."""
    if orientation == 1:
        return array, ()
    if orientation >= 5:
        array = array.swapaxes(0, 1)
    if orientation in (3, 4, 7, 8):
        array = array[::-1]
    if orientation in (2, 3, 6, 7):
        array = array[:, ::-1]
    return array, (TURNED,)


def _reason(content: bytes, error: Exception) -> str:
    if not content:
        return "empty"
    if isinstance(error, UnidentifiedImageError):
        return "not an image in a known format"
    return " ".join(f"{type(error).__name__}: {error}".split())


def as_float(image: Tensor) -> Tensor:
    """float32 from a decoded image: uint8 scaled to [0, 1], float32 as it is, of any scale."""
    return image.float().div_(255.0) if image.dtype == torch.uint8 else image


def to_channels(image: Tensor, channels: int) -> Tensor:
    """The image with ``channels`` channels; dtype and size stay.

    One channel is repeated, and RGB becomes its luminance where one channel is asked.

    Args:
        image: (1 to 32, height, width) as `decode` returns it.
        channels: 1 or more.

    Raises:
        UserError: no such conversion, as from RGB to 2 channels.
    """
    have = image.shape[0]
    if have == channels:
        return image
    if have == 1:
        return image.expand(channels, -1, -1)
    if have == 3 and channels == 1:
        return _luminance(image)
    choices = "1 or 3" if have == 3 else str(have)
    raise UserError(
        f"an image of {have} channels can't be given {channels}; set --channels to {choices}"
    )


def _luminance(image: Tensor) -> Tensor:
    # torchvision cuts decimals off; on floats it keeps them, so uint8 can be rounded here.
    grey = TF.rgb_to_grayscale(image.float())
    return grey if image.is_floating_point() else grey.round().to(image.dtype)
