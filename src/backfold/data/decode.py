"""From the bytes of an image file to a tensor, and from one channel count to another.

Pillow decodes what it keeps whole: torchvision's own decoders are deprecated since torchvision
0.29. Of what Pillow cuts to 8 bits or to the first channels, imagecodecs decodes PNG, and tifffile
TIFF.
"""

import io
import logging
import math
import struct
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass

import imagecodecs
import numpy as np
import torch
from PIL import Image, UnidentifiedImageError
from tifffile import (
    EXTRASAMPLE,
    PHOTOMETRIC,
    PLANARCONFIG,
    SAMPLEFORMAT,
    TiffFile,
    TiffPage,
    TiffPageSeries,
)
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
from backfold.errors import BrokenImage, UserError

# Pillow's other decoders are old, rare, or call other programs.
FORMATS = ("BMP", "GIF", "JPEG", "PNG", "TIFF", "WEBP")
PNG_MAGIC = b"\x89PNG\r\n\x1a\n"
TIFF_MAGIC = (b"II*\0", b"MM\0*", b"II+\0", b"MM\0+")
ORIENTATION = 274
MOST_PAGES = 1000  # channels, thumbnails and the levels of a pyramid
ALPHA = {EXTRASAMPLE.UNASSALPHA, EXTRASAMPLE.ASSOCALPHA}
# What Pillow reads without loss when it has 8 bits and no channels but the usual ones.
PILLOW_SAMPLES = {
    PHOTOMETRIC.MINISWHITE: 1,
    PHOTOMETRIC.MINISBLACK: 1,
    PHOTOMETRIC.RGB: 3,
    PHOTOMETRIC.PALETTE: 1,
    PHOTOMETRIC.SEPARATED: 4,
    PHOTOMETRIC.YCBCR: 3,
    PHOTOMETRIC.CIELAB: 3,
}
PLAIN = (PHOTOMETRIC.MINISWHITE, PHOTOMETRIC.MINISBLACK, PHOTOMETRIC.RGB)
TURNED = "turned as EXIF says"
_OPENING = threading.Lock()
# Each damaged file is counted and described by us; tifffile would log it on the terminal too.
logging.getLogger("tifffile").addHandler(logging.NullHandler())
logging.getLogger("tifffile").propagate = False


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
    colour spaces become RGB. TIFF files, whose first series of equal pages counts, and NumPy files
    (see `decode_npy`) have 1 to 32 channels. Of an animation the first frame counts.

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
            tiff = _decode_tiff(content, max_pixels)
            if tiff is not None:
                return tiff
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


def _decode_tiff(content: bytes, max_pixels: int) -> Decoded | None:
    """What Pillow would lose bits or channels of; None where it loses nothing."""
    _check_pages(content)
    # Another file that the metadata name is never opened.
    with TiffFile(io.BytesIO(content), _multifile=False) as file:
        series = file.series[0]
        page = series.keyframe
        if not isinstance(page, TiffPage) or _pillow_reads(series, page):
            return None
        if page.photometric not in PLAIN:
            raise BrokenImage(
                f"colours of kind {page.photometric} in {page.bitspersample} bits; "
                "store grey or RGB"
            )
        array, conversions = _values(_read_series(series, max_pixels), page)
        tag = page.tags.valueof(ORIENTATION, 1)
        array, turned = _upright(array, tag if tag in range(1, 9) else 1)
        return Decoded(to_tensor(array), "TIFF", str(series.dtype), (*conversions, *turned))


def _check_pages(content: bytes) -> None:
    """Refuse a chain of pages that leads back, which tifffile would follow for minutes."""
    order = "<" if content.startswith(b"II") else ">"
    big = content[2:4] in (b"+\0", b"\0+")
    count, offset, entry = ("Q", "Q", 20) if big else ("H", "I", 12)
    seen: set[int] = set()
    try:
        (place,) = struct.unpack_from(order + offset, content, 8 if big else 4)
        while place:
            if place in seen or len(seen) == MOST_PAGES:
                raise BrokenImage(f"pages that lead back, or more than {MOST_PAGES} of them")
            seen.add(place)
            (entries,) = struct.unpack_from(order + count, content, place)
            after = place + struct.calcsize(order + count) + entry * entries
            (place,) = struct.unpack_from(order + offset, content, after)
    except struct.error:
        return  # the chain ends too early: what there is of it may still be an image


def _pillow_reads(series: TiffPageSeries, page: TiffPage) -> bool:
    extra = tuple(page.extrasamples)
    return (
        len(series) == 1
        and page.sampleformat == SAMPLEFORMAT.UINT
        and page.bitspersample in (1, 2, 4, 8)
        and page.photometric in PILLOW_SAMPLES
        and page.samplesperpixel == PILLOW_SAMPLES[PHOTOMETRIC(page.photometric)] + len(extra)
        and extra in ((), *((kind,) for kind in ALPHA))
        and (page.samplesperpixel == 1 or page.planarconfig == PLANARCONFIG.CONTIG)
    )


def _read_series(series: TiffPageSeries, max_pixels: int) -> Pixels:
    lengths = dict(zip(series.axes, series.shape, strict=True))
    others = [axis for axis in series.axes if axis not in "YX"]
    if not {"Y", "X"} <= set(lengths) or len(others) > 1:
        raise BrokenImage(
            f"axes {series.axes} of {series.shape}; give height, width and one axis of channels"
        )
    channels = lengths[others[0]] if others else 1
    check_size(lengths["Y"], lengths["X"], channels, max_pixels)
    # One tile or strip may be far larger than the image that it holds a corner of.
    segment = math.prod(series.keyframe.chunks)
    if segment > 4 * max_pixels:
        raise BrokenImage(f"tiles or strips of {segment} values; write the file anew")
    array = np.asarray(series.asarray(maxworkers=1))
    order = [series.axes.index(axis) for axis in ("Y", "X", *others)]
    return array.transpose(order).reshape(lengths["Y"], lengths["X"], channels)


def _values(array: Pixels, page: TiffPage) -> tuple[Pixels, tuple[str, ...]]:
    conversions = []
    if page.photometric == PHOTOMETRIC.MINISWHITE and array.dtype.kind in "bu":
        top = True if array.dtype.kind == "b" else 2**page.bitspersample - 1
        array = np.bitwise_xor(array, array.dtype.type(top))
        conversions.append("white at zero turned round")
    values = in_range(array, page.bitspersample)
    alpha = [number for number, kind in enumerate(page.extrasamples) if kind in ALPHA]
    if not alpha or page.planarconfig == PLANARCONFIG.SEPARATE:
        return values, tuple(conversions)
    conversions.append(ALPHA_ON_BLACK)
    position = array.shape[2] - len(page.extrasamples) + alpha[0]
    colours = np.delete(values, position, axis=2)
    if page.extrasamples[alpha[0]] == EXTRASAMPLE.ASSOCALPHA:  # multiplied already
        return colours, tuple(conversions)
    joined = np.concatenate([colours, values[..., position : position + 1]], axis=2)
    return on_black(joined), tuple(conversions)


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
