import io
import struct
import zlib

import numpy as np
import pytest
import torch
from PIL import Image

from backfold.data.decode import MAX_PIXELS, as_float, decode, examine, to_channels
from backfold.errors import BrokenImage, UserError

RANDOM = np.random.default_rng(0)
RGB = RANDOM.integers(0, 256, (9, 11, 3), dtype=np.uint8)
RGBA = RANDOM.integers(0, 256, (9, 11, 4), dtype=np.uint8)
GREY = RANDOM.integers(0, 256, (9, 11), dtype=np.uint8)
GREY_ALPHA = RANDOM.integers(0, 256, (9, 11, 2), dtype=np.uint8)


def channels_first(array: np.ndarray) -> torch.Tensor:
    return torch.from_numpy(array[None] if array.ndim == 2 else np.moveaxis(array, 2, 0).copy())


def png(shape, pixels, *chunks):
    """A PNG of 16 bits, written by hand: (chunk type, data) pairs come before the pixels."""
    height, width, channels = shape
    header = struct.pack(">IIBBBBB", width, height, 16, [0, 4, 2, 6][channels - 1], 0, 0, 0)
    parts = [(b"IHDR", header), *chunks, (b"IDAT", zlib.compress(pixels)), (b"IEND", b"")]
    packed = [
        struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))
        for kind, data in parts
    ]
    return b"\x89PNG\r\n\x1a\n" + b"".join(packed)


def deep_png(array, *chunks):
    rows = b"".join(b"\0" + row.astype(">u2").tobytes() for row in array)
    return png(array.shape, rows, *chunks)


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
    image = decode(encode(array, format, **options))
    assert image.dtype == torch.uint8
    assert torch.equal(image, channels_first(array))


@pytest.mark.parametrize(("mode", "made"), [("L", "L"), ("RGB", "RGB"), ("CMYK", "RGB")])
def test_jpeg_is_what_pillow_reads(encode, mode, made):
    content = encode(Image.fromarray(RGB).convert(mode), "JPEG", quality=90)
    expected = np.array(Image.open(io.BytesIO(content)).convert(made))
    found = examine(content)
    assert torch.equal(found.image, channels_first(expected))
    assert (found.format, found.kind) == ("JPEG", "uint8")
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
    expected = np.rint(colours * alpha / 255).astype(np.uint8)
    assert torch.equal(found.image, channels_first(expected))
    assert found.conversions == ("alpha composited on black",)


@pytest.mark.parametrize("alpha", [None, (255, 0, 100)])
def test_palettes_become_colours_and_keep_their_transparency(encode, alpha):
    colours = np.array([[255, 0, 0], [0, 128, 7], [9, 9, 200]], dtype=np.uint8)
    chosen = np.random.default_rng(1).integers(0, 3, (9, 11)).astype(np.uint8)
    image = Image.frombytes("P", (11, 9), chosen.tobytes())
    image.putpalette(colours.tobytes())
    options = {} if alpha is None else {"transparency": bytes(alpha)}
    shares = np.array(alpha or (255,) * 3)[:, None] / 255
    expected = np.rint(colours * shares).astype(np.uint8)[chosen]
    found = examine(encode(image, "PNG", **options))
    assert torch.equal(found.image, channels_first(expected))
    assert found.conversions == ("alpha composited on black" if alpha else "palette made RGB",)
    seen_through = encode(RGB, "PNG", transparency=tuple(RGB[2, 3].tolist()))  # one colour
    expected = RGB * (RGB[2, 3] != RGB).any(axis=2, keepdims=True)
    assert torch.equal(decode(seen_through), channels_first(expected.astype(np.uint8)))


def test_bits_span_the_range(encode):
    found = examine(encode(GREY > 127, "PNG"))
    assert found.kind == "bool"
    assert np.array_equal(found.image[0].numpy(), 255 * (GREY > 127))
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
    exif = Image.Exif()
    exif[0x0112] = orientation
    for format in ("JPEG", "PNG", "WEBP", "TIFF"):
        found = examine(encode(np.ascontiguousarray(stored), format, exif=exif, quality=95))
        assert (found.image.int() - channels_first(upright).int()).abs().max() < 40
        assert found.conversions == (() if orientation == 1 else ("turned as EXIF says",))


@pytest.mark.parametrize(
    ("content", "reason"),
    [
        (b"", "empty"),
        (b"\x89PNG\r\n\x1a\n" + bytes(40), "not an image"),
        (b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 9 9\n", "not an image in a known format"),
        (b"\xff\xd8\xff\xe0" + bytes(40), "not an image"),
    ],
)
def test_other_bytes_are_broken(content, reason):
    with pytest.raises(BrokenImage, match=reason):
        decode(content)


def test_to_channels_repeats_grey_and_takes_the_luminance_as_pillow_does():
    grey, rgb = channels_first(GREY), channels_first(RGB)
    assert torch.equal(to_channels(grey, 3), torch.cat([grey] * 3))
    for image in (grey, rgb, torch.zeros(32, 3, 3)):
        assert to_channels(image, len(image)) is image
    expected = channels_first(np.array(Image.fromarray(RGB).convert("L"))).int()
    assert to_channels(rgb, 1).dtype == torch.uint8
    assert (to_channels(rgb, 1).int() - expected).abs().max() <= 1
    assert (to_channels(as_float(rgb), 1) * 255 - expected).abs().max() < 1.0
    for have, want, choices in ((3, 2, "1 or 3"), (4, 3, "4"), (2, 1, "2")):
        message = rf"{have} channels .* {want}; set --channels to {choices}$"
        with pytest.raises(UserError, match=message):
            to_channels(torch.zeros(have, 2, 2), want)


@pytest.mark.parametrize("format", ["PNG", "JPEG", "TIFF", "WEBP", "GIF"])
def test_decompression_bombs_are_refused_and_the_limit_can_be_raised(encode, format):
    content = encode(np.zeros((60, 50), dtype=np.uint8), format)
    assert decode(content, max_pixels=3000).shape[1:] == (60, 50)
    with pytest.raises(BrokenImage, match=r"60 x 50 .* max_pixels 2999; raise it"):
        decode(content, max_pixels=2999)


def test_the_default_limit_is_pillows_and_pillow_is_left_alone(encode, monkeypatch):
    assert MAX_PIXELS == Image.MAX_IMAGE_PIXELS
    # A header that promises terabytes; nothing of that size is ever taken.
    with pytest.raises(BrokenImage, match="1000000 x 1000000 pixels"):
        decode(png((1_000_000, 1_000_000, 3), b""))
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", 5)
    assert decode(encode(GREY)).shape == (1, 9, 11)
    assert Image.MAX_IMAGE_PIXELS == 5


@pytest.mark.parametrize("channels", [1, 2, 3, 4])
def test_sixteen_bit_png_keeps_its_bits_in_colour_too(channels):
    array = np.random.default_rng(5).integers(0, 65536, (9, 11, channels)).astype(np.uint16)
    array[0, :2] = [[0], [65535]]
    found = examine(deep_png(array))
    assert found.kind == "uint16"
    assert found.image.dtype == torch.float32
    expected = np.moveaxis(array, 2, 0).astype(np.float64)
    if channels in (2, 4):
        assert found.conversions == ("alpha composited on black",)
        expected = expected[:-1] * expected[-1:] / 65535
    np.testing.assert_allclose(found.image.double().numpy() * 65535, expected, atol=0.01)
    exif = Image.Exif()
    exif[0x0112] = 3
    turned = decode(deep_png(array, (b"eXIf", exif.tobytes().removeprefix(b"Exif\0\0"))))
    assert torch.equal(turned, found.image.flip(1, 2))
    with pytest.raises(BrokenImage, match=r"9 x 11 pixels .* max_pixels 98"):
        decode(deep_png(array), max_pixels=98)
    with pytest.raises(BrokenImage):
        decode(deep_png(array)[:-30])
