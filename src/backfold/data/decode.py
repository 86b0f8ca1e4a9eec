"""From an image file's bytes or an array to a tensor, and from one channel count to another.

Pillow decodes what it keeps whole, but for grey and RGB TIFFs of 8 bits: torchvision's own decoders
are deprecated since torchvision 0.29. imagecodecs decodes PNG of 16 bits; tifffile decodes those
TIFFs, and what Pillow would cut to 8 bits or to the first channels.
"""

import contextlib
import io
import logging
import math
import threading
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import imagecodecs
import numpy as np
import tifffile
import torch
from numpy.typing import NDArray
from PIL import Image, UnidentifiedImageError
from tifffile import EXTRASAMPLE, PHOTOMETRIC
from torch import Tensor
from torchvision.transforms.v2 import functional as TF

from backfold.errors import BrokenImage, UserError

Pixels = NDArray[Any]  # (height, width, channels) unless said otherwise

# What Pillow calls a decompression bomb: a quarter of a gibibyte of colour pixels.
MAX_PIXELS = 89_478_485
MAX_CHANNELS = 32
# Pillow's other decoders are old, rare, or call other programs.
FORMATS = ("BMP", "GIF", "JPEG", "PNG", "TIFF", "WEBP")
NPY_MAGIC, PNG_MAGIC = b"\x93NUMPY", b"\x89PNG\r\n\x1a\n"
TIFF_MAGIC = (b"II*\0", b"MM\0*", b"II+\0", b"MM\0+")
ORIENTATION = 274
MOST_PAGES = 1000  # channels, thumbnails and the levels of a pyramid
ALPHA = {EXTRASAMPLE.UNASSALPHA, EXTRASAMPLE.ASSOCALPHA}
PLAIN = (PHOTOMETRIC.MINISWHITE, PHOTOMETRIC.MINISBLACK, PHOTOMETRIC.RGB)
PILLOW_KINDS = {"1": "bool", "I": "int32", "F": "float32"}
TURNED, ALPHA_ON_BLACK = "turned as EXIF says", "alpha composited on black"
_OPENING = threading.Lock()
# Each damaged file is counted and described by us; tifffile would log it on the terminal too.
logging.getLogger("tifffile").addHandler(logging.NullHandler())
logging.getLogger("tifffile").propagate = False


@dataclass(frozen=True)
class Decoded:
    """An image, and what was done to it on the way."""

    image: Tensor  # (channels, height, width), as `decode` returns it
    format: str  # of the file, as "JPEG"
    kind: str  # of its values in the file, as "uint16"
    conversions: tuple[str, ...] = ()  # what is not as it was stored, as `ALPHA_ON_BLACK`


def decode(content: bytes, min_side: int | None = None, max_pixels: int = MAX_PIXELS) -> Tensor:
    """The image in a file's bytes, (channels, height, width), turned as its EXIF data say.

    uint8, or float32 where the file has more than 8 bits: 16 bits without sign lie in [0, 1] (65535
    is 1); floating-point numbers and all other integers keep their values, whatever these are.
    Photographs have 1 (grey) or 3 channels; alpha is composited on black; palettes, CMYK and other
    colour spaces become RGB. TIFF files, whose first series of equal pages counts, and NumPy files
    (see `channels_last`) have 1 to 32 channels. Of an animation the first frame counts.

    Args:
        content: the file's bytes.
        min_side: pixels; where given, JPEG images may come at a half, a quarter or an eighth of
            their size, as long as both sides keep this length. Their pixels are then close to the
            means of the full ones (45 dB and more), in down to half of the time.
        max_pixels: larger images are refused before memory is taken for them.

    Raises:
        BrokenImage: no image, a damaged or too large one, or numbers that are not finite.
    """
    return examine(content, min_side, max_pixels).image


def examine(
    content: bytes,
    min_side: int | None = None,
    max_pixels: int = MAX_PIXELS,
    page: int | None = None,
) -> Decoded:
    """As `decode`, with what was found out; ``page``, from 0, of a TIFF or GIF is read alone."""
    try:
        if content.startswith(NPY_MAGIC):
            array = channels_last(np.load(io.BytesIO(content), allow_pickle=False))
            return Decoded(decode_array(array, max_pixels), "NPY", str(array.dtype))
        tiff = _decode_tiff(content, max_pixels, page) if content.startswith(TIFF_MAGIC) else None
        if tiff is not None:
            return tiff
        # Our own limit, which an option can raise, stands in for Pillow's, which all share.
        with _OPENING:
            before, Image.MAX_IMAGE_PIXELS = Image.MAX_IMAGE_PIXELS, None
            try:
                image = Image.open(io.BytesIO(content), formats=FORMATS)
            finally:
                Image.MAX_IMAGE_PIXELS = before
        with image:
            check_size((image.height, image.width, 1), max_pixels)
            if content.startswith(PNG_MAGIC) and content[24] == 16:
                array = in_range(np.atleast_3d(imagecodecs.png_decode(content)))
                has_alpha = array.shape[2] in (2, 4)
                array = on_black(array) if has_alpha else array
                # Asking Pillow for the tag decodes the pixels once more where it comes after them.
                tag = image.getexif().get(ORIENTATION) if b"eXIf" in content else None
                return _upright(array, tag, "PNG", "uint16", [ALPHA_ON_BLACK] * has_alpha)
            image.seek(page or 0)
            if min_side is not None:
                image.draft(None, (min_side, min_side))  # only JPEG knows how
            return decode_pillow(image)
    except BrokenImage:
        raise
    except UnidentifiedImageError as error:
        raise BrokenImage("not an image in a known format" if content else "empty") from error
    except Exception as error:  # whatever damaged bytes lead decoders to
        raise BrokenImage(" ".join(f"{type(error).__name__}: {error}".split())) from error


def decode_pillow(image: Image.Image) -> Decoded:
    """Any image of Pillow's; numbers that are not finite raise `BrokenImage`."""
    image.load()
    mode = image.mode
    made = "L" if mode in ("1", "L", "LA", "La") else "RGB"
    conversions: list[str] = []
    if mode in ("I", "F") or mode.startswith("I;16"):
        array = in_range(np.array(image))
    elif image.has_transparency_data:
        array = on_black(np.array(image.convert(f"{made}A")))
        conversions.append(ALPHA_ON_BLACK)
    else:
        array = np.array(image if mode == made else image.convert(made))
        if mode not in ("1", "L", "RGB"):
            conversions.append(f"{'palette' if mode == 'P' else mode} made RGB")
    kind = "uint16" if mode.startswith("I;16") else PILLOW_KINDS.get(mode, "uint8")
    format = "JPEG" if image.format == "MPO" else image.format or "Pillow"
    tag = image.getexif().get(ORIENTATION)
    return _upright(np.atleast_3d(array), tag, format, kind, conversions)


def open_tiff(content: bytes) -> tifffile.TiffFile:
    """A file that has at most `MOST_PAGES`, and opens no other that its metadata name."""
    file = tifffile.TiffFile(io.BytesIO(content), _multifile=False)
    # tifffile itself would follow some chains of pages that lead back for minutes.
    with contextlib.suppress(IndexError):
        file.pages[MOST_PAGES]
        raise BrokenImage(f"pages that lead back, or more than {MOST_PAGES} of them")
    return file


def _decode_tiff(content: bytes, max_pixels: int, number: int | None) -> Decoded | None:
    """None where it is left to Pillow: one page of 1, 2 or 4 bits, or of 8 in other colours."""
    with open_tiff(content) as file:
        series = file.series[0] if number is None else file.pages[number]
        page = series.keyframe
        assert page is not None
        is_plain = page.photometric in PLAIN
        if (number is not None or len(file.series[0]) == 1) and (
            page.bitspersample in (1, 2, 4)
            or (page.bitspersample == 8 and not is_plain and not page.extrasamples)
        ):
            return None
        if not is_plain:
            kind = f"{page.photometric} in {page.bitspersample} bits"
            raise BrokenImage(f"colours of kind {kind}; store grey or RGB")
        axes = series.axes
        channels = axes.replace("Y", "").replace("X", "")
        if not {"Y", "X"} <= set(axes) or len(channels) > 1:
            raise BrokenImage(
                f"axes {axes} of {series.shape}; give height, width and one axis of channels"
            )
        lengths = dict(zip(axes, series.shape, strict=True))
        shape = lengths["Y"], lengths["X"], lengths.get(channels, 1)
        check_size(shape, max_pixels)
        # One tile or strip may be far larger than the image that it holds a corner of.
        segment = math.prod(page.chunks)
        if segment > 4 * max_pixels:
            raise BrokenImage(f"tiles or strips of {segment} values; write the file anew")
        order = [axes.index(axis) for axis in f"YX{channels}"]
        array = np.asarray(series.asarray(maxworkers=1)).transpose(order).reshape(shape)
        conversions: list[str] = []
        if page.photometric == PHOTOMETRIC.MINISWHITE and array.dtype.kind in "bu":
            array = np.bitwise_xor(array, array.dtype.type(2**page.bitspersample - 1))
            conversions.append("white at zero turned round")
        array = in_range(array, page.bitspersample)
        if array.shape[2] > 1 and page.extrasamples and page.extrasamples[-1] in ALPHA:
            # Colours that alpha is multiplied into are on black.
            is_multiplied = page.extrasamples[-1] == EXTRASAMPLE.ASSOCALPHA
            array = array[..., :-1] if is_multiplied else on_black(array)
            conversions.append(ALPHA_ON_BLACK)
        tag = page.tags.valueof(ORIENTATION)
        return _upright(array, tag, "TIFF", str(series.dtype), conversions)


def _upright(
    array: Pixels, orientation: object, format: str, kind: str, conversions: Sequence[str]
) -> Decoded:
    """Undo what the EXIF orientation (2 to 8) says was done to (height, width, channels)."""
    if orientation in range(2, 9):
        conversions = [*conversions, TURNED]
    if orientation in (5, 6, 7, 8):
        array = array.swapaxes(0, 1)
    if orientation in (3, 4, 7, 8):
        array = array[::-1]
    if orientation in (2, 3, 6, 7):
        array = array[:, ::-1]
    return Decoded(to_tensor(array), format, kind, tuple(conversions))


def check_size(shape: Sequence[int], max_pixels: int) -> None:
    """Raise `BrokenImage` for an empty or too large (height, width, channels).

    Channels beyond four count as more pixels.
    """
    height, width, channels = shape
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
    """(height, width, channels) from an array of two or three axes, else `BrokenImage`.

    Of three axes the shorter of the first and the last holds the channels; the last, where they are
    equally long.
    """
    if array.ndim == 2:
        return array[..., None]
    if array.ndim != 3:
        raise BrokenImage(
            f"an array of shape {array.shape}; give (height, width), (height, width, channels) or "
            "(channels, height, width)"
        )
    return np.moveaxis(array, 0, 2) if array.shape[0] < array.shape[2] else array


def decode_array(array: Pixels, max_pixels: int) -> Tensor:
    """(channels, height, width) from (height, width, channels); as `decode` in all else."""
    check_size(array.shape, max_pixels)
    return to_tensor(in_range(array))


def in_range(array: Pixels, bits: int | None = None) -> Pixels:
    """uint8 as it is; 9 to 16 unsigned bits as float32 in [0, 1]; all else as float32, unscaled.

    True is 255; ``bits`` of an unsigned integer are in use, all by default. Other contents, or
    values that are not finite, raise `BrokenImage`.
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


def as_float(image: Tensor) -> Tensor:
    """float32 from a decoded image: uint8 scaled to [0, 1], float32 as it is, of any scale."""
    return image.float().div_(255.0) if image.dtype == torch.uint8 else image


def to_channels(image: Tensor, channels: int) -> Tensor:
    """The image, (1 to 32, height, width), with ``channels`` channels; dtype and size stay.

    One channel is repeated, RGB becomes its luminance where one is asked, and other conversions, as
    from RGB to 2 channels, raise `UserError`.
    """
    have = image.shape[0]
    if have == channels:
        return image
    if have == 1:
        return image.expand(channels, -1, -1)
    if have == 3 and channels == 1:
        # torchvision cuts decimals off; on floats it keeps them, so uint8 can be rounded here.
        grey = TF.rgb_to_grayscale(image.float())
        return grey if image.is_floating_point() else grey.round().to(image.dtype)
    choices = "1 or 3" if have == 3 else str(have)
    raise UserError(
        f"an image of {have} channels can't be given {channels}; it fits runs of --channels "
        f"{choices}"
    )
