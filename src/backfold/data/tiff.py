"""TIFF beyond what Pillow keeps: 16 bits, floats, many channels as planes, samples or pages."""

import io
import logging
import math
import struct
from dataclasses import dataclass

import numpy as np
from tifffile import (
    EXTRASAMPLE,
    PHOTOMETRIC,
    PLANARCONFIG,
    SAMPLEFORMAT,
    TiffFile,
    TiffPage,
    TiffPageSeries,
)

from backfold.data.arrays import ALPHA_ON_BLACK, Pixels, check_size, in_range, on_black
from backfold.errors import BrokenImage

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

# Each damaged file is counted and described by us; tifffile would log it on the terminal too.
logging.getLogger("tifffile").addHandler(logging.NullHandler())
logging.getLogger("tifffile").propagate = False


@dataclass(frozen=True)
class TiffImage:
    """What a TIFF file holds.

    Attributes:
        array: (height, width, channels) of uint8 or float32, as stored, not yet turned.
        kind: the stored values, as "uint16".
        orientation: the EXIF tag, 1 to 8.
        conversions: what was done to the values.
    """

    array: Pixels
    kind: str
    orientation: int
    conversions: tuple[str, ...]


def decode_tiff(content: bytes, max_pixels: int) -> TiffImage | None:
    """Read what Pillow would lose bits or channels of; None where it loses nothing.

    The first series of equal pages counts: thumbnails after it are no channels. Pages, planes or
    samples are its channels, 1 to 32 of them. Alpha is composited on black.

    Args:
        content: of the file.
        max_pixels: see `check_size`.

    Raises:
        BrokenImage: too large, or axes and colours that are no image of channels.
    """
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
        orientation = page.tags.valueof(ORIENTATION, 1)
        return TiffImage(
            array,
            str(series.dtype),
            orientation if orientation in range(1, 9) else 1,
            conversions,
        )


def _check_pages(content: bytes) -> None:
    """Follow the chain of pages; tifffile would follow one that leads back for minutes.

    Raises:
        BrokenImage: it leads back, or is too long.
    """
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
