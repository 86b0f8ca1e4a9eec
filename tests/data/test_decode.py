"""Files of all kinds become the pixels that were stored in them, or are broken in one line."""

import io
import struct
import zlib
from functools import partial

import imagecodecs
import numpy as np
import pytest
import tifffile
import torch
from PIL import Image

from backfold.data.decode import MAX_PIXELS, as_float, decode, examine, to_channels
from backfold.errors import BrokenImage, UserError

RANDOM = np.random.default_rng(0)


def u8(*shape):
    return RANDOM.integers(0, 256, shape, dtype=np.uint8)


def u16(*shape):
    return RANDOM.integers(0, 65536, shape).astype(np.uint16)


RGB, RGBA, GREY, GREY_ALPHA = u8(9, 11, 3), u8(9, 11, 4), u8(9, 11), u8(9, 11, 2)
TOP = {u8: 255, u16: 65535}


def written(write, *arguments, **options):
    buffer = io.BytesIO()
    write(buffer, *arguments, **options)
    return buffer.getvalue()


tiff, npy = partial(written, tifffile.imwrite), partial(written, np.save)


def first(array):
    """Channels first."""
    return array[None] if array.ndim == 2 else np.ascontiguousarray(np.moveaxis(array, 2, 0))


def levels(image, make=u16):
    """An image's levels as the file holds them."""
    assert image.dtype == (torch.uint8 if make is u8 else torch.float32)
    return np.rint(image.double().numpy() * (1 if make is u8 else 65535))


def tagged(orientation):
    exif = Image.Exif()
    exif[0x0112] = orientation
    return exif


def with_chunk(content, kind, data):
    """A PNG file with this chunk behind its header, or in its place."""
    head = content[: 8 if kind == b"IHDR" else 33]
    chunk = struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))
    return head + chunk + content[33:]


@pytest.mark.parametrize(
    ("array", "format", "options"),
    [
        (GREY, "BMP", {}),
        (GREY, "TIFF", {}),
        (RGB, "PNG", {}),
        (RGB, "TIFF", {"compression": "tiff_lzw"}),
        (RGB, "WEBP", {"lossless": True}),
    ],
)
def test_lossless_formats_round_trip(encode, array, format, options):
    assert np.array_equal(levels(decode(encode(array, format, **options)), u8), first(array))


@pytest.mark.parametrize("format", ["JPEG", "TIFF"])
@pytest.mark.parametrize(("mode", "made"), [("L", "L"), ("RGB", "RGB"), ("CMYK", "RGB")])
def test_colours_are_what_pillow_reads(encode, format, mode, made):
    content = encode(Image.fromarray(RGB).convert(mode), format, quality=90)
    expected = np.array(Image.open(io.BytesIO(content)).convert(made))
    found = examine(content)
    assert np.array_equal(levels(found.image, u8), first(expected))
    assert (found.format, found.kind) == (format, "uint8")
    assert found.conversions == (() if mode == made else ("CMYK made RGB",))


@pytest.mark.parametrize(
    ("array", "format", "options"),
    [
        (GREY_ALPHA, "PNG", {}),
        (RGBA, "TIFF", {}),
        (RGBA, "WEBP", {"lossless": True, "exact": True}),
    ],
)
def test_alpha_is_composited_on_black(encode, array, format, options):
    found = examine(encode(array, format, **options))
    colours, alpha = array[..., :-1].astype(float), array[..., -1:].astype(float)
    assert np.array_equal(levels(found.image, u8), first(np.rint(colours * alpha / 255)))
    assert found.conversions == ("alpha composited on black",)


@pytest.mark.parametrize("alpha", [None, (255, 0, 100)])
def test_palettes_become_colours_and_keep_their_transparency(encode, alpha):
    colours = np.array([[255, 0, 0], [0, 128, 7], [9, 9, 200]], dtype=np.uint8)
    chosen = np.random.default_rng(1).integers(0, 3, (9, 11)).astype(np.uint8)
    image = Image.frombytes("P", (11, 9), chosen.tobytes())
    image.putpalette(colours.tobytes())
    options = {} if alpha is None else {"transparency": bytes(alpha)}
    shares = np.array(alpha or (255,) * 3)[:, None] / 255
    found = examine(encode(image, "PNG", **options))
    assert np.array_equal(levels(found.image, u8), first(np.rint(colours * shares)[chosen]))
    assert found.conversions == ("alpha composited on black" if alpha else "palette made RGB",)
    seen_through = encode(RGB, "PNG", transparency=tuple(RGB[2, 3].tolist()))  # one colour
    expected = RGB * (RGB[2, 3] != RGB).any(axis=2, keepdims=True)
    assert np.array_equal(levels(decode(seen_through), u8), first(expected))


@pytest.mark.parametrize("format", ["PNG", "TIFF"])
def test_bits_span_the_range(encode, format):
    found = examine(encode(GREY > 127, format))
    assert found.kind == "bool"
    assert np.array_equal(levels(found.image[0], u8), 255 * (GREY > 127))
    floats = as_float(found.image)
    assert torch.equal(floats, found.image / 255)
    assert as_float(floats) is floats


@pytest.mark.parametrize("orientation", range(1, 9))
def test_exif_orientation_is_applied(encode, orientation):
    upright = np.zeros((16, 24, 3), dtype=np.uint8)
    upright[:8, :12] = 255  # white upper left quarter; the width differs from the height
    # How to store the pixels so that the tag's instruction makes them upright again.
    stored = {
        1: upright,
        2: upright[:, ::-1],
        3: upright[::-1, ::-1],
        4: upright[::-1],
        5: upright.transpose(1, 0, 2),
        6: np.rot90(upright, 1),
        7: upright[::-1, ::-1].transpose(1, 0, 2),
        8: np.rot90(upright, -1),
    }[orientation]
    for format in ("JPEG", "PNG", "WEBP", "TIFF"):
        options = {"exif": tagged(orientation), "quality": 95}
        found = examine(encode(np.ascontiguousarray(stored), format, **options))
        assert np.abs(levels(found.image, u8) - first(upright)).max() < 40
        assert found.conversions == (() if orientation == 1 else ("turned as EXIF says",))


def test_to_channels_repeats_grey_and_takes_the_luminance_as_pillow_does():
    grey, rgb = torch.from_numpy(GREY)[None], torch.from_numpy(first(RGB))
    assert torch.equal(to_channels(grey, 3), torch.cat([grey] * 3))
    for image in (grey, rgb, torch.zeros(32, 3, 3)):
        assert to_channels(image, len(image)) is image
    expected = np.array(Image.fromarray(RGB).convert("L")).astype(float)
    assert np.abs(levels(to_channels(rgb, 1), u8) - expected).max() <= 1
    assert np.abs(to_channels(as_float(rgb), 1).numpy() * 255 - expected).max() < 1.0
    for have, want, choices in ((3, 2, "1 or 3"), (4, 3, "4"), (2, 1, "2")):
        message = rf"{have} channels .* {want}; it fits runs of --channels {choices}$"
        with pytest.raises(UserError, match=message):
            to_channels(torch.zeros(have, 2, 2), want)


@pytest.mark.parametrize("format", ["PNG", "JPEG", "TIFF", "WEBP", "GIF"])
def test_decompression_bombs_are_refused_and_the_limit_can_be_raised(encode, format):
    content = encode(np.zeros((60, 50), dtype=np.uint8), format)
    assert decode(content, max_pixels=3000).shape[1:] == (60, 50)
    with pytest.raises(BrokenImage, match=r"60 x 50 .* max_pixels 2999; raise it"):
        decode(content, max_pixels=2999)
    array = npy(np.zeros((30, 40, 8), dtype=np.uint8))
    assert decode(array, max_pixels=2400).shape == (8, 30, 40)  # eight channels count twice
    with pytest.raises(BrokenImage, match=r"30 x 40 pixels of 8 .* max_pixels 2399"):
        decode(array, max_pixels=2399)


def test_the_default_limit_is_pillows_and_pillow_is_left_alone(encode, monkeypatch):
    assert MAX_PIXELS == Image.MAX_IMAGE_PIXELS
    # A header that promises terabytes; nothing of that size is ever taken.
    with pytest.raises(BrokenImage, match="1000000 x 1000000 pixels"):
        decode(
            with_chunk(encode(RGB), b"IHDR", struct.pack(">IIBBBBB", 10**6, 10**6, 16, 2, 0, 0, 0))
        )
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", 5)
    assert decode(encode(GREY)).shape == (1, 9, 11)
    assert Image.MAX_IMAGE_PIXELS == 5


@pytest.mark.parametrize("channels", [1, 2, 3, 4])
def test_sixteen_bit_png_keeps_its_bits_in_colour_too(channels):
    array = u16(9, 11, channels)
    array[0, :2] = [[0], [65535]]
    content = imagecodecs.png_encode(array)
    found = examine(content)
    assert found.kind == "uint16"
    expected = first(array).astype(np.float64)
    if channels in (2, 4):
        assert found.conversions == ("alpha composited on black",)
        expected = expected[:-1] * expected[-1:] / 65535
    np.testing.assert_allclose(found.image.double().numpy() * 65535, expected, atol=0.01)
    exif = tagged(3).tobytes().removeprefix(b"Exif\0\0")
    turned = decode(with_chunk(content, b"eXIf", exif))
    assert torch.equal(turned, found.image.flip(1, 2))
    with pytest.raises(BrokenImage, match=r"9 x 11 pixels .* max_pixels 98"):
        decode(content, max_pixels=98)


@pytest.mark.parametrize(
    "options",
    [
        {"compression": "lzw", "predictor": True},
        {"compression": "zstd"},
        {"tile": (16, 16)},
        {"byteorder": ">"},
        {"planarconfig": "separate"},
    ],
)
def test_sixteen_bit_colours_keep_their_bits(options):
    array = u16(20, 24, 3)
    stored = first(array) if "planarconfig" in options else array
    found = examine(tiff(stored, photometric="rgb", **options))
    assert found.kind == "uint16"
    assert np.array_equal(levels(found.image), first(array))


@pytest.mark.parametrize(("count", "make"), [(2, u8), (5, u16), (32, u8)])
@pytest.mark.parametrize(
    "options",
    [
        {},
        {"metadata": None},
        {"planarconfig": "separate"},
        {"planarconfig": "contig"},
        {"metadata": {"axes": "CYX"}, "imagej": True},
        {"metadata": {"axes": "CYX"}, "ome": True},
    ],
)
def test_channels_as_pages_planes_or_samples(count, options, make):
    array = make(9, 11, count)
    stored = array if "contig" in options.values() else first(array)
    image = decode(tiff(stored, photometric="minisblack", **options))
    assert np.array_equal(levels(image, make), first(array))


def values(shape, dtype):
    if np.dtype(dtype).kind == "f":
        return (RANDOM.standard_normal(shape) * 1000).astype(dtype)
    info = np.iinfo(dtype)
    return RANDOM.integers(info.min, info.max, shape, np.int64, endpoint=True).astype(dtype)


@pytest.mark.parametrize(
    "dtype", ["float16", "float32", "float64", "int8", "int16", "int32", "uint32"]
)
def test_other_numbers_keep_their_values(dtype):
    array = values((9, 11), dtype)
    contents = (
        tiff(array, compression="zlib", predictor=dtype != "float16"),
        npy(array),
        npy(array.astype(array.dtype.newbyteorder(">"))),
    )
    for content in contents:
        image = decode(content)
        assert image.dtype == torch.float32
        np.testing.assert_allclose(image.numpy(), array[None].astype(np.float64), rtol=1e-6)


@pytest.mark.parametrize(
    ("make", "samples"),
    [(u8, "unassalpha"), (u8, "assocalpha"), (u16, "unassalpha"), (u16, "assocalpha")],
)
def test_alpha_of_tiff_files_is_composited_unless_it_was(make, samples):
    array, top = make(9, 11, 4), TOP[make]
    found = examine(tiff(array, photometric="rgb", extrasamples=[samples]))
    assert found.conversions == ("alpha composited on black",)
    unknown = examine(tiff(array, photometric="rgb", extrasamples=["unspecified"]))
    assert np.array_equal(levels(unknown.image, make), first(array))  # four channels
    # Colours that alpha is multiplied into already are on black.
    alpha = array[None, ..., 3] / top if samples == "unassalpha" else 1
    expected = first(array[..., :3]) * alpha
    assert np.abs(levels(found.image, make) - expected).max() < 0.51


@pytest.mark.parametrize("make", [u8, u16])
def test_white_at_zero_is_turned_round(make):
    array = make(9, 11)
    image = decode(tiff(array, photometric="miniswhite"))
    assert np.array_equal(levels(image, make), TOP[make] - first(array))


def test_twelve_bits_span_the_range():
    array = (u16(8, 8) >> 4).astype(np.uint16)
    array[0, :2] = [0, 4095]
    image = decode(tiff(array, bitspersample=12))
    assert np.array_equal(np.rint(image.double().numpy() * 4095), first(array))


def test_smaller_pages_after_the_first_are_no_channels():
    array, buffer = u16(40, 50), io.BytesIO()
    with tifffile.TiffWriter(buffer) as writer:
        writer.write(array, metadata=None)
        writer.write(u16(10, 12), subfiletype=1, metadata=None)
    assert np.array_equal(levels(decode(buffer.getvalue())), first(array))


@pytest.mark.parametrize("make", [u8, u16])
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
def test_the_shorter_end_of_an_array_holds_the_channels(shape, is_last, make):
    array = make(*shape)
    expected = first(array) if is_last else array
    for stored in (array, np.asfortranarray(array)):
        found = examine(npy(stored))
        assert (found.format, found.kind) == ("NPY", array.dtype.name)
        assert np.array_equal(levels(found.image, make), expected)
    assert np.array_equal(decode(npy(array[0] > 99)).numpy(), 255 * (array[:1] > 99))


class Bomb:
    def __reduce__(self):
        return (pytest.fail, ("something was unpickled",))


@pytest.mark.parametrize(
    ("content", "reason"),
    [
        (b"", "empty"),
        (b"\x89PNG\r\n\x1a\n" + bytes(40), "not an image"),
        (b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 9 9\n", "not an image in a known format"),
        (b"\xff\xd8\xff\xe0" + bytes(40), "not an image"),
        (imagecodecs.png_encode(u16(9, 11, 3))[:-30], "."),
        (tiff(u8(4, 9, 11, 3), photometric="rgb"), "axes QYXS .* one axis of channels"),
        (tiff(u8(33, 9, 11), photometric="minisblack"), "33 channels; give 1 to 32"),
        (
            tiff(u8(1001, 2, 2), photometric="minisblack", metadata=None),
            r"1001 channels; give|more than 1000",
        ),
        (tiff(np.array([[np.nan, 1]], dtype=np.float32)), "not finite"),
        (tiff(np.zeros((3, 3), dtype=np.complex64)), "complex64; give integers"),
        (tiff(u16(9, 11, 4), photometric="separated"), "store grey or RGB"),
        (tiff(u16(40, 40))[:-800], "TiffFileError|ValueError|corrupted|truncated|size"),
        (b"II*\0", "."),
        (npy(np.array([Bomb()], dtype=object)), "Object arrays cannot be loaded"),
        (npy(np.zeros((3, 3), dtype=complex)), "complex128; give integers"),
        (npy(np.zeros((2, 3, 4, 5))), r"shape \(2, 3, 4, 5\); give \(height"),
        (npy(np.zeros((0, 3))), "0 x 3 pixels"),
        (npy(np.zeros((40, 40, 33))), "40 x 40 pixels of 33 channels; give 1 to 32"),
        (npy(np.zeros((3, 3)))[:-1], "EOF"),
        (npy(np.zeros((10, 10))).replace(b"(10, 10)", b"(9999,9)"), "EOF"),
        (npy(np.array([[1.0, 1e300]])), "not finite"),
    ],
)
def test_what_is_no_image_is_broken(content, reason):
    with pytest.raises(BrokenImage, match=reason) as caught:
        decode(content)
    assert "\n" not in str(caught.value)


def test_bombs_are_refused_before_memory_is_taken():
    # 10**10 pixels in a few kilobytes: empty tiles count as zeros.
    content = tiff(
        iter([b""] * 625), shape=(100_000, 100_000), dtype=np.uint16, tile=(4096, 4096),
        compression="zlib",
    )  # fmt: skip
    assert len(content) < 20_000
    with pytest.raises(BrokenImage, match="100000 x 100000 pixels"):
        decode(content)


def test_tiles_far_larger_than_the_image_are_refused():
    content = bytearray(tiff(u16(20, 24), tile=(16, 16)))
    with tifffile.TiffFile(io.BytesIO(content)) as file:
        for name in ("TileWidth", "TileLength"):
            tag = file.pages[0].tags[name]
            value = struct.pack({3: "<H", 4: "<I"}[tag.dtype], 65520)
            content[tag.valueoffset : tag.valueoffset + len(value)] = value
    with pytest.raises(BrokenImage, match="tiles or strips of 4292870400 values"):
        decode(bytes(content))


@pytest.mark.parametrize(("bigtiff", "byteorder"), [(False, "<"), (True, ">")])
@pytest.mark.parametrize("count", [3, 150])
def test_pages_that_lead_in_a_circle_end(count, bigtiff, byteorder):
    options = {"metadata": None, "photometric": "minisblack"}
    content = bytearray(tiff(u16(count, 9, 11), bigtiff=bigtiff, byteorder=byteorder, **options))
    with tifffile.TiffFile(io.BytesIO(content)) as file:
        places = [page.offset for page in file.pages]
    kind = byteorder + ("Q" if bigtiff else "I")
    # The last page but one names the last as the next; let it name the first.
    at = content.index(struct.pack(kind, places[-1]), places[-2])
    content[at : at + struct.calcsize(kind)] = struct.pack(kind, places[0])
    with pytest.raises(BrokenImage, match="pages that lead back"):
        decode(bytes(content))


def test_files_that_the_metadata_name_are_not_opened(monkeypatch):
    content = tiff(u16(1, 9, 11), ome=True, photometric="minisblack", metadata={"axes": "CYX"})
    monkeypatch.setattr("builtins.open", lambda *_, **__: pytest.fail("opened"))
    assert decode(content).shape == (1, 9, 11)
