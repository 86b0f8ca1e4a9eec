import io
import struct
import zlib

import numpy as np
import pytest
import torch
from PIL import Image

from backfold.data.arrays import MAX_PIXELS
from backfold.data.decode import as_float, decode, examine, to_channels
from backfold.errors import BrokenImage, UserError

RANDOM = np.random.default_rng(0)
RGB = RANDOM.integers(0, 256, (9, 11, 3), dtype=np.uint8)
RGBA = RANDOM.integers(0, 256, (9, 11, 4), dtype=np.uint8)
GREY = RANDOM.integers(0, 256, (9, 11), dtype=np.uint8)
GREY_ALPHA = RANDOM.integers(0, 256, (9, 11, 2), dtype=np.uint8)


def channels_first(array: np.ndarray) -> torch.Tensor:
    return torch.from_numpy(array[None] if array.ndim == 2 else np.moveaxis(array, 2, 0).copy())


@pytest.mark.parametrize(
    ("array", "format", "options"),
    [
        (GREY, "PNG", {}),
        (GREY, "BMP", {}),
        (GREY, "TIFF", {}),
        (RGB, "PNG", {}),
        (RGB, "BMP", {}),
        (RGB, "TIFF", {"compression": "tiff_lzw"}),
        (RGB, "WEBP", {"lossless": True}),
    ],
)
def test_lossless_formats_round_trip(encode, array, format, options):
    image = decode(encode(array, format, **options))
    assert image.dtype == torch.uint8
    assert torch.equal(image, channels_first(array))


@pytest.mark.parametrize(("array", "mode"), [(GREY, "L"), (RGB, "RGB")])
def test_jpeg_is_what_pillow_reads(encode, array, mode):
    content = encode(array, "JPEG", quality=90)
    expected = np.array(Image.open(io.BytesIO(content)).convert(mode))
    assert torch.equal(decode(content), channels_first(expected))


def test_jpeg_in_cmyk_becomes_rgb(encode):
    content = encode(Image.fromarray(RGB).convert("CMYK"), "JPEG", quality=95)
    expected = np.array(Image.open(io.BytesIO(content)).convert("RGB"))
    assert torch.equal(decode(content), channels_first(expected))


@pytest.mark.parametrize("format", ["PNG", "BMP", "TIFF"])
def test_palettes_become_colours(encode, format):
    colours = np.array([[255, 0, 0], [0, 128, 7], [9, 9, 200]], dtype=np.uint8)
    chosen = np.random.default_rng(1).integers(0, 3, (9, 11))
    image = Image.frombytes("P", (11, 9), chosen.astype(np.uint8).tobytes())
    image.putpalette(colours.tobytes())
    assert torch.equal(decode(encode(image, format)), channels_first(colours[chosen]))


def on_black(array):
    """Colours times alpha, as exact fractions rounded to the nearest."""
    colours, alpha = array[..., :-1].astype(float), array[..., -1:].astype(float)
    return np.rint(colours * alpha / 255).astype(np.uint8)


@pytest.mark.parametrize("array", [GREY_ALPHA, RGBA])
@pytest.mark.parametrize("format", ["PNG", "TIFF"])
def test_alpha_is_composited_on_black(encode, array, format):
    found = examine(encode(array, format))
    assert torch.equal(found.image, channels_first(on_black(array)))
    assert found.conversions == ("alpha composited on black",)


def test_alpha_of_webp_and_what_pillow_makes_of_it(encode):
    content = encode(RGBA, "WEBP", lossless=True, exact=True)
    assert torch.equal(decode(content), channels_first(on_black(RGBA)))
    black = Image.new("RGBA", (11, 9), (0, 0, 0, 255))
    expected = np.array(Image.alpha_composite(black, Image.fromarray(RGBA)).convert("RGB"))
    assert (decode(content).int() - channels_first(expected).int()).abs().max() <= 1


@pytest.mark.parametrize("transparency", [1, bytes([255, 0, 100])])
def test_palettes_keep_their_transparency(encode, transparency):
    chosen = np.arange(99, dtype=np.uint8).reshape(9, 11) % 3
    image = Image.frombytes("P", (11, 9), chosen.tobytes())
    image.putpalette(bytes([250, 200, 150, 240, 190, 140, 230, 180, 130]))
    table = [255, 0, 255] if transparency == 1 else list(transparency)
    colours = np.array([[250, 200, 150], [240, 190, 140], [230, 180, 130]])
    expected = np.rint(colours * np.array(table)[:, None] / 255).astype(np.uint8)[chosen]
    content = encode(image, "PNG", transparency=transparency)
    assert torch.equal(decode(content), channels_first(expected))


@pytest.mark.parametrize(("array", "transparent"), [(GREY, 77), (RGB, (9, 8, 7))])
def test_a_transparent_colour_becomes_black(encode, array, transparent):
    array = array.copy()
    array[2:4, 3] = transparent
    expected = array.copy()
    expected[array == transparent if array.ndim == 2 else (array == transparent).all(axis=2)] = 0
    content = encode(array, "PNG", transparency=transparent)
    assert torch.equal(decode(content), channels_first(expected))


@pytest.mark.parametrize("format", ["PNG", "BMP", "TIFF"])
def test_black_and_white_spans_the_range(encode, format):
    bits = GREY > 127
    assert torch.equal(decode(encode(bits, format)), channels_first(bits.astype(np.uint8) * 255))


@pytest.mark.parametrize("format", ["PNG", "TIFF"])
def test_sixteen_bits_keep_precision_and_range(encode, format):
    values = np.random.default_rng(2).integers(0, 65536, (9, 11)).astype(np.uint16)
    values[0, :3] = [0, 1, 65535]
    image = decode(encode(values, format))
    assert image.dtype == torch.float32
    assert image.min() == 0.0
    assert image.max() == 1.0
    assert np.array_equal(np.rint(image[0].double().numpy() * 65535), values)


def test_thirty_two_bit_integers_keep_their_values(encode):
    values = np.arange(99, dtype=np.int32).reshape(9, 11) * 60000 - 7
    image = decode(encode(values, "TIFF"))
    assert image.dtype == torch.float32
    assert np.array_equal(image[0].numpy(), values)


@pytest.mark.parametrize("scale", [1.0, 1e-6, 3e7])
def test_floats_stay_as_they_are(encode, scale):
    values = (np.random.default_rng(3).random((9, 11), dtype=np.float32) - 0.3) * np.float32(scale)
    image = decode(encode(values, "TIFF"))
    assert torch.equal(image, channels_first(values))
    assert torch.equal(as_float(image), image)


@pytest.mark.parametrize("wrong", [float("inf"), float("nan")])
def test_numbers_that_are_not_finite_are_broken(encode, wrong):
    with pytest.raises(BrokenImage, match="not finite"):
        decode(encode(np.array([[0.5, wrong]], dtype=np.float32), "TIFF"))


@pytest.mark.parametrize("orientation", range(1, 9))
@pytest.mark.parametrize("format", ["JPEG", "PNG", "WEBP", "TIFF"])
def test_exif_orientation_is_applied(encode, orientation, format):
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
    content = encode(np.ascontiguousarray(stored), format, exif=exif, quality=95)
    found = examine(content)
    assert (found.image.int() - channels_first(upright).int()).abs().max() < 40
    assert found.conversions == (() if orientation == 1 else ("turned as EXIF says",))


@pytest.mark.parametrize("format", ["PNG", "JPEG", "BMP", "TIFF", "WEBP"])
def test_truncated_files_are_broken(encode, format):
    content = encode(np.random.default_rng(4).integers(0, 256, (64, 64, 3), dtype=np.uint8), format)
    with pytest.raises(BrokenImage) as caught:
        decode(content[: len(content) // 2])
    assert "\n" not in str(caught.value)
    assert str(caught.value)


@pytest.mark.parametrize(
    ("content", "reason"),
    [
        (b"", "empty"),
        (b"hello, world", "not an image"),
        (b"\x89PNG\r\n\x1a\n" + bytes(40), "not an image"),
        (b"\xff\xd8\xff\xe0" + bytes(40), "not an image"),
    ],
)
def test_other_bytes_are_broken(content, reason):
    with pytest.raises(BrokenImage, match=reason):
        decode(content)


def test_as_float_scales_bytes_only():
    assert torch.equal(
        as_float(torch.tensor([0, 51, 255], dtype=torch.uint8)), torch.tensor([0.0, 0.2, 1.0])
    )
    half = torch.tensor([0.5])
    assert as_float(half) is half


def test_to_channels_repeats_grey():
    grey, rgb = channels_first(GREY), channels_first(RGB)
    assert torch.equal(to_channels(grey, 3), torch.cat([grey] * 3))
    assert torch.equal(to_channels(grey, 5), torch.cat([grey] * 5))
    for image in (grey, rgb, torch.zeros(2, 3, 3), torch.zeros(32, 3, 3)):
        assert to_channels(image, len(image)) is image


def test_luminance_agrees_with_pillow():
    expected = channels_first(np.array(Image.fromarray(RGB).convert("L"))).int()
    image = to_channels(channels_first(RGB), 1)
    assert image.dtype == torch.uint8
    assert (image.int() - expected).abs().max() <= 1
    white = torch.full((3, 2, 2), 255, dtype=torch.uint8)
    assert torch.equal(to_channels(white, 1), white[:1])
    as_floats = to_channels(as_float(channels_first(RGB)), 1)
    assert (as_floats * 255 - expected).abs().max() < 1.0


@pytest.mark.parametrize(
    ("have", "want", "choices"),
    [(3, 2, "1 or 3"), (3, 4, "1 or 3"), (4, 2, "4"), (4, 3, "4"), (2, 1, "2")],
)
def test_impossible_channels_name_the_remedy(have, want, choices):
    message = rf"{have} channels .* {want}; set --channels to {choices}$"
    with pytest.raises(UserError, match=message):
        to_channels(torch.zeros(have, 2, 2), want)


@pytest.mark.parametrize("format", ["PNG", "JPEG", "BMP", "TIFF", "WEBP", "GIF"])
def test_decompression_bombs_are_refused_and_the_limit_can_be_raised(encode, format):
    content = encode(np.zeros((60, 50), dtype=np.uint8), format)
    assert decode(content, max_pixels=3000).shape[1:] == (60, 50)
    with pytest.raises(BrokenImage, match=r"60 x 50 .* max_pixels 2999; raise it"):
        decode(content, max_pixels=2999)


def test_the_default_limit_is_pillows_and_pillow_is_left_alone(monkeypatch):
    assert MAX_PIXELS == Image.MAX_IMAGE_PIXELS
    # A header that promises a terabyte; nothing of that size is ever taken.
    header = struct.pack(">IIBBBBB", 1_000_000, 1_000_000, 8, 2, 0, 0, 0)
    chunk = b"IHDR" + header
    bomb = b"\x89PNG\r\n\x1a\n" + struct.pack(">I", 13) + chunk
    bomb += struct.pack(">I", zlib.crc32(chunk))
    with pytest.raises(BrokenImage, match="1000000 x 1000000 pixels"):
        decode(bomb + struct.pack(">I", 0) + b"IDAT" + struct.pack(">I", zlib.crc32(b"IDAT")))
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", 5)
    buffer = io.BytesIO()
    Image.new("L", (9, 9)).save(buffer, "PNG")
    assert decode(buffer.getvalue()).shape == (1, 9, 9)
    assert Image.MAX_IMAGE_PIXELS == 5


def test_formats_that_call_other_programs_are_not_tried(tmp_path):
    (tmp_path / "x.eps").write_bytes(b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 9 9\n")
    with pytest.raises(BrokenImage, match="not an image in a known format"):
        decode((tmp_path / "x.eps").read_bytes())


def test_what_was_found_out_about_a_file(encode):
    cmyk = encode(Image.fromarray(RGB).convert("CMYK"), "JPEG")
    palette = encode(Image.fromarray(RGB).quantize(8), "PNG")
    deep = encode(np.zeros((4, 4), dtype=np.uint16), "PNG")
    facts = [
        (found.format, found.kind, found.conversions)
        for found in map(examine, (encode(RGB, "BMP"), cmyk, palette, deep, encode(GREY > 9)))
    ]
    assert facts == [
        ("BMP", "uint8", ()),
        ("JPEG", "uint8", ("CMYK made RGB",)),
        ("PNG", "uint8", ("palette made RGB",)),
        ("PNG", "uint16", ()),
        ("PNG", "bool", ()),
    ]


def deep_png(array, *chunks):
    """A PNG of 16 bits, written by hand: (chunk type, data) pairs come before the pixels."""
    height, width, channels = array.shape
    colour_type = {1: 0, 2: 4, 3: 2, 4: 6}[channels]
    rows = b"".join(b"\0" + row.astype(">u2").tobytes() for row in array)
    header = struct.pack(">IIBBBBB", width, height, 16, colour_type, 0, 0, 0)
    parts = [(b"IHDR", header), *chunks, (b"IDAT", zlib.compress(rows)), (b"IEND", b"")]
    packed = [
        struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))
        for kind, data in parts
    ]
    return b"\x89PNG\r\n\x1a\n" + b"".join(packed)


@pytest.mark.parametrize("channels", [1, 2, 3, 4])
def test_sixteen_bit_png_keeps_its_bits_in_colour_too(channels):
    array = np.random.default_rng(5).integers(0, 65536, (9, 11, channels)).astype(np.uint16)
    found = examine(deep_png(array))
    assert found.kind == "uint16"
    assert found.image.dtype == torch.float32
    expected = np.moveaxis(array, 2, 0).astype(np.float64)
    if channels in (2, 4):
        assert found.conversions == ("alpha composited on black",)
        expected = expected[:-1] * expected[-1:] / 65535
    np.testing.assert_allclose(found.image.double().numpy() * 65535, expected, atol=0.01)


@pytest.mark.parametrize("orientation", [1, 3, 6])
def test_orientation_of_sixteen_bit_png(orientation):
    array = np.random.default_rng(6).integers(0, 65536, (4, 6, 3)).astype(np.uint16)
    exif = Image.Exif()
    exif[0x0112] = orientation
    image = decode(deep_png(array, (b"eXIf", exif.tobytes().removeprefix(b"Exif\0\0"))))
    turned = np.rot90(array, {1: 0, 3: 2, 6: -1}[orientation])
    assert np.array_equal(np.rint(image.double().numpy() * 65535), np.moveaxis(turned, 2, 0))


def test_sixteen_bit_png_bombs_and_damage():
    content = deep_png(np.zeros((20, 30, 3), dtype=np.uint16))
    with pytest.raises(BrokenImage, match=r"20 x 30 pixels .* max_pixels 599"):
        decode(content, max_pixels=599)
    with pytest.raises(BrokenImage):
        decode(content[:-30])
