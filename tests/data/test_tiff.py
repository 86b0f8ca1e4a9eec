import io
import struct

import numpy as np
import pytest
import tifffile
import torch
from PIL import Image

from backfold.data.decode import decode, examine
from backfold.errors import BrokenImage

RANDOM = np.random.default_rng(0)


def u8(*shape):
    return RANDOM.integers(0, 256, shape, dtype=np.uint8)


def u16(*shape):
    return RANDOM.integers(0, 65536, shape).astype(np.uint16)


def tiff(array, **options):
    buffer = io.BytesIO()
    tifffile.imwrite(buffer, array, **options)
    return buffer.getvalue()


def first(array):
    """Channels first, as float64."""
    return (array[None] if array.ndim == 2 else np.moveaxis(array, 2, 0)).astype(np.float64)


TOP = {u8: 255, u16: 65535}


def levels(image, make=u16):
    """An image's levels as the file holds them."""
    assert image.dtype == (torch.uint8 if make is u8 else torch.float32)
    return np.rint(image.double().numpy() * (1 if make is u8 else 65535))


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
    planar = options.get("planarconfig") == "separate"
    stored = np.ascontiguousarray(np.moveaxis(array, 2, 0)) if planar else array
    found = examine(tiff(stored, photometric="rgb", **options))
    assert found.kind == "uint16"
    assert np.array_equal(levels(found.image), first(array))


@pytest.mark.parametrize(("count", "make"), [(2, u8), (5, u16), (32, u8)])
@pytest.mark.parametrize("layout", ["pages", "pages without metadata", "planes", "samples"])
def test_channels_as_pages_planes_or_samples(count, layout, make):
    array = make(9, 11, count)
    options = {
        "pages": {}, "pages without metadata": {"metadata": None},
        "planes": {"planarconfig": "separate"}, "samples": {"planarconfig": "contig"},
    }[layout]  # fmt: skip
    stored = array if layout == "samples" else np.ascontiguousarray(np.moveaxis(array, 2, 0))
    image = decode(tiff(stored, photometric="minisblack", **options))
    assert image.shape == (count, 9, 11)
    assert np.array_equal(levels(image, make), first(array))


@pytest.mark.parametrize("options", [{"imagej": True}, {"ome": True, "photometric": "minisblack"}])
def test_named_axes(options):
    planes = u16(6, 9, 11)
    image = decode(tiff(planes, metadata={"axes": "CYX"}, **options))
    assert np.array_equal(levels(image), planes)


@pytest.mark.parametrize(
    "dtype", ["float16", "float32", "float64", "int8", "int16", "int32", "uint32"]
)
def test_other_numbers_keep_their_values(dtype):
    if np.dtype(dtype).kind == "f":
        array = (RANDOM.standard_normal((9, 11)) * 1000).astype(dtype)
    else:
        info = np.iinfo(dtype)
        array = RANDOM.integers(info.min, info.max, (9, 11), dtype)
    image = decode(tiff(array, compression="zlib", predictor=dtype != "float16"))
    assert image.dtype == torch.float32
    np.testing.assert_allclose(image.numpy(), first(array), rtol=1e-6)


@pytest.mark.parametrize(
    ("make", "samples"), [(u8, "unassalpha"), (u16, "unassalpha"), (u16, "assocalpha")]
)
def test_alpha_is_composited_on_black(make, samples):
    array, top = make(9, 11, 4), TOP[make]
    found = examine(tiff(array, photometric="rgb", extrasamples=[samples]))
    assert found.conversions == ("alpha composited on black",)
    unknown = examine(tiff(array, photometric="rgb", extrasamples=["unspecified"]))
    assert np.array_equal(levels(unknown.image, make), first(array))  # four channels
    # Colours that alpha is multiplied into already are on black.
    alpha = first(array[..., 3:]) / top if samples == "unassalpha" else 1
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


@pytest.mark.parametrize("orientation", range(1, 9))
def test_orientation_of_deep_images(orientation):
    array = u16(4, 6, 3)
    exif = Image.Exif()
    exif[0x0112] = orientation
    buffer = io.BytesIO()
    Image.fromarray((array >> 8).astype(np.uint8)).save(buffer, "PNG", exif=exif)
    tag = (274, "H", 1, orientation, True)
    image = decode(tiff(array, photometric="rgb", extratags=[tag]))
    eight = decode(buffer.getvalue())  # turned by another route; see test_decode
    assert np.array_equal(levels(image).astype(int) >> 8, eight.numpy())


def test_smaller_pages_after_the_first_are_no_channels():
    array = u16(40, 50)
    buffer = io.BytesIO()
    with tifffile.TiffWriter(buffer) as writer:
        writer.write(array, metadata=None)
        writer.write(u16(10, 12), subfiletype=1, metadata=None)
    assert np.array_equal(levels(decode(buffer.getvalue())), first(array))


@pytest.mark.parametrize(
    ("content", "reason"),
    [
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
    ],
)  # fmt: skip
def test_what_is_no_image_of_channels_is_broken(content, reason):
    with pytest.raises(BrokenImage, match=reason) as caught:
        decode(content)
    assert "\n" not in str(caught.value)


def test_bombs_are_refused_before_memory_is_taken():
    # 10**10 pixels in a few kilobytes: empty tiles count as zeros.
    buffer = io.BytesIO()
    tifffile.imwrite(
        buffer, shape=(100_000, 100_000), dtype=np.uint16, tile=(4096, 4096),
        data=iter([b""] * 625), compression="zlib",
    )  # fmt: skip
    assert len(buffer.getvalue()) < 20_000
    with pytest.raises(BrokenImage, match="100000 x 100000 pixels"):
        decode(buffer.getvalue())


def test_tiles_far_larger_than_the_image_are_refused():
    content = bytearray(tiff(u16(20, 24), tile=(16, 16)))
    with tifffile.TiffFile(io.BytesIO(content)) as file:
        tags = file.pages[0].tags
        for name in ("TileWidth", "TileLength"):
            assert tags[name].dtype in (3, 4)
            kind = "<H" if tags[name].dtype == 3 else "<I"
            value = struct.pack(kind, 65520)
            at = tags[name].valueoffset
            content[at : at + len(value)] = value
    with pytest.raises(BrokenImage, match="tiles or strips of 4292870400 values"):
        decode(bytes(content))


@pytest.mark.parametrize(("bigtiff", "byteorder"), [(False, "<"), (True, ">")])
def test_pages_that_lead_in_a_circle_end(bigtiff, byteorder):
    options = {"metadata": None, "photometric": "minisblack"}
    content = bytearray(tiff(u16(3, 9, 11), bigtiff=bigtiff, byteorder=byteorder, **options))
    assert decode(bytes(content)).shape == (3, 9, 11)
    with tifffile.TiffFile(io.BytesIO(content)) as file:
        places = [page.offset for page in file.pages]
    kind = byteorder + ("Q" if bigtiff else "I")
    # The second page names the third as the next; let it name the first.
    at = content.index(struct.pack(kind, places[2]), places[1])
    content[at : at + struct.calcsize(kind)] = struct.pack(kind, places[0])
    with pytest.raises(BrokenImage, match="pages that lead back"):
        decode(bytes(content))


def test_files_that_the_metadata_name_are_not_opened(tmp_path, monkeypatch):
    other = tmp_path / "other.ome.tif"
    other.write_bytes(tiff(u16(2, 9, 11), ome=True, photometric="minisblack"))
    content = tiff(u16(1, 9, 11), ome=True, photometric="minisblack", metadata={"axes": "CYX"})
    opened = []
    monkeypatch.setattr("builtins.open", lambda *a, **_: opened.append(a) or pytest.fail("opened"))
    assert decode(content).shape == (1, 9, 11)
    assert opened == []
