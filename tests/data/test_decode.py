import io

import numpy as np
import pytest
import torch
from PIL import Image

from backfold.data.decode import BrokenImage, as_float, decode, to_channels
from backfold.errors import UserError

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
        (GREY_ALPHA, "PNG", {}),
        (GREY_ALPHA, "TIFF", {}),
        (RGB, "PNG", {}),
        (RGB, "BMP", {}),
        (RGB, "TIFF", {"compression": "tiff_lzw"}),
        (RGB, "WEBP", {"lossless": True}),
        (RGBA, "PNG", {}),
        (RGBA, "TIFF", {}),
        (RGBA, "WEBP", {"lossless": True, "exact": True}),
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


@pytest.mark.parametrize("transparency", [1, bytes([255, 0, 100])])
def test_palettes_keep_their_transparency(encode, transparency):
    chosen = np.arange(99, dtype=np.uint8).reshape(9, 11) % 3
    image = Image.frombytes("P", (11, 9), chosen.tobytes())
    image.putpalette(bytes(range(9)))
    alpha = decode(encode(image, "PNG", transparency=transparency))[3]
    table = [255, 0, 255] if transparency == 1 else list(transparency)
    assert torch.equal(alpha, torch.from_numpy(np.array(table, dtype=np.uint8)[chosen]))


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


def test_thirty_two_bit_integers_count_to_65535(encode):
    values = np.arange(99, dtype=np.int32).reshape(9, 11) * 600
    assert np.array_equal(np.rint(decode(encode(values, "TIFF"))[0].numpy() * 65535), values)
    with pytest.raises(BrokenImage, match=r"from 0 to 70000; scale them to 0\.\.65535"):
        decode(encode(np.array([[0, 70000]], dtype=np.int32), "TIFF"))


def test_floats_stay_as_they_are(encode):
    values = np.random.default_rng(3).random((9, 11), dtype=np.float32)
    assert torch.equal(decode(encode(values, "TIFF")), channels_first(values))


@pytest.mark.parametrize("wrong", [-0.5, 255.0, float("nan")])
def test_floats_out_of_range_are_broken(encode, wrong):
    with pytest.raises(BrokenImage, match=r"scale them to 0\.\.1"):
        decode(encode(np.array([[0.5, wrong]], dtype=np.float32), "TIFF"))


@pytest.mark.parametrize("orientation", range(1, 9))
@pytest.mark.parametrize("format", ["JPEG", "PNG", "WEBP"])
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
    image = decode(content).int()
    assert (image - channels_first(upright).int()).abs().max() < 40


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


def test_to_channels_repeats_grey_and_drops_alpha():
    grey, grey_alpha, rgb, rgba = map(channels_first, (GREY, GREY_ALPHA, RGB, RGBA))
    assert torch.equal(to_channels(grey, 3), torch.cat([grey] * 3))
    assert torch.equal(to_channels(grey, 5), torch.cat([grey] * 5))
    assert torch.equal(to_channels(grey_alpha, 1), grey_alpha[:1])
    assert torch.equal(to_channels(grey_alpha, 3), torch.cat([grey_alpha[:1]] * 3))
    assert torch.equal(to_channels(rgba, 3), rgba[:3])
    for image in (grey, grey_alpha, rgb, rgba):
        assert torch.equal(to_channels(image, len(image)), image)


def test_luminance_agrees_with_pillow():
    expected = channels_first(np.array(Image.fromarray(RGB).convert("L"))).int()
    image = to_channels(channels_first(RGB), 1)
    assert image.dtype == torch.uint8
    assert (image.int() - expected).abs().max() <= 1
    assert torch.equal(
        to_channels(channels_first(RGBA), 1), to_channels(channels_first(RGBA)[:3], 1)
    )
    white = torch.full((3, 2, 2), 255, dtype=torch.uint8)
    assert torch.equal(to_channels(white, 1), white[:1])
    as_floats = to_channels(as_float(channels_first(RGB)), 1)
    assert (as_floats * 255 - expected).abs().max() < 1.0


@pytest.mark.parametrize(("have", "want"), [(3, 2), (3, 4), (4, 2), (4, 5)])
def test_impossible_channels_name_the_remedy(have, want):
    with pytest.raises(UserError, match=rf"{have} channels .* {want}; set --channels"):
        to_channels(torch.zeros(have, 2, 2), want)
