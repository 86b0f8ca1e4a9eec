"""Thousands of damaged files: every outcome is an image or a counted error, never anything else."""

import io
import struct
import tarfile
import warnings
import zlib

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import tifffile
import torch
from PIL import Image

from backfold.data.decode import decode
from backfold.data.parquet import ParquetSource
from backfold.data.stream import TarStream
from backfold.data.tar import TarSource
from backfold.errors import BrokenImage, UserError

LIMIT = 10**6
# What decoders warn of is of no interest here, and raising it would hide what comes after it.
pytestmark = pytest.mark.filterwarnings("ignore")


def mutate(content, random):
    """One to a few of: bits flipped, bytes set, a piece cut, doubled, moved, or put to extremes."""
    data = bytearray(content)
    for _ in range(int(random.integers(1, 6))):
        if not data:
            break
        # Half of the damage goes to the first bytes, where the headers are.
        reach = len(data) if random.random() < 0.5 else min(len(data), 80)
        at = int(random.integers(reach))
        length = int(random.integers(1, 9))
        kind = int(random.integers(8))
        if kind == 0:
            data[at] ^= 1 << int(random.integers(8))
        elif kind == 1:
            data[at : at + length] = random.bytes(len(data[at : at + length]))
        elif kind == 2:
            data[at : at + length] = b"\xff" * len(data[at : at + length])
        elif kind == 3:
            data[at : at + length] = bytes(len(data[at : at + length]))
        elif kind == 4:
            del data[at : at + length * int(random.integers(1, 40))]
        elif kind == 5:
            data[at:at] = data[at : at + 4 * length]
        elif kind == 6:
            del data[at:]
        else:
            value = int(random.choice([0, 1, 2**15, 2**16 - 1, 2**31 - 1, 2**31, 2**32 - 1]))
            data[at : at + 4] = struct.pack(str(random.choice(["<", ">"])) + "I", value)
    return bytes(data)


def seal_png(content):
    """The chunks' checksums made right, so that damage gets past them."""
    parts, at = [content[:8]], 8
    while at + 12 <= len(content):
        length = int.from_bytes(content[at : at + 4], "big")
        body = content[at + 4 : at + 8 + length]
        if len(body) != length + 4:
            break
        parts.append(content[at : at + 4] + body + struct.pack(">I", zlib.crc32(body)))
        at += 12 + length
    return b"".join(parts) + content[at:]


def save(image, format, **options):
    buffer = io.BytesIO()
    image.save(buffer, format, **options)
    return buffer.getvalue()


def tiff(array, **options):
    buffer = io.BytesIO()
    tifffile.imwrite(buffer, array, **options)
    return buffer.getvalue()


def npy(array):
    buffer = io.BytesIO()
    np.save(buffer, array)
    return buffer.getvalue()


def seeds():
    random = np.random.default_rng(0)
    rgb = random.integers(0, 256, (12, 15, 3), dtype=np.uint8)
    deep = random.integers(0, 65536, (12, 15, 3)).astype(np.uint16)
    picture = Image.fromarray(rgb)
    rgba = picture.copy()
    rgba.putalpha(99)
    exif = Image.Exif()
    exif[0x0112] = 6
    frames = {"save_all": True, "append_images": [picture.rotate(90, expand=False)]}
    return {
        "jpeg": save(picture, "JPEG", exif=exif),
        "jpeg progressive": save(picture, "JPEG", progressive=True),
        "jpeg cmyk": save(picture.convert("CMYK"), "JPEG"),
        "png": save(rgba, "PNG", exif=exif),
        "png palette": save(picture.quantize(7), "PNG", transparency=3),
        "png 16": save(Image.fromarray(deep[..., 0]), "PNG"),
        "webp": save(rgba, "WEBP", lossless=True, exif=exif),
        "webp lossy": save(picture, "WEBP"),
        "webp animated": save(picture, "WEBP", **frames),
        "gif": save(picture, "GIF", **frames),
        "bmp": save(picture, "BMP"),
        "bmp palette": save(picture.quantize(7), "BMP"),
        "tiff": save(picture, "TIFF"),
        "tiff lzw": save(picture, "TIFF", compression="tiff_lzw"),
        "tiff jpeg": save(picture, "TIFF", compression="jpeg"),
        "tiff fax": save(picture.convert("1"), "TIFF", compression="group4"),
        "tiff 16": tiff(deep, photometric="rgb"),
        "tiff 16 lzw": tiff(deep, photometric="rgb", compression="lzw", predictor=True),
        "tiff 16 zlib tiles": tiff(deep, photometric="rgb", compression="zlib", tile=(16, 16)),
        "tiff pages": tiff(np.moveaxis(deep, 2, 0).copy(), photometric="minisblack"),
        "tiff ome": tiff(np.moveaxis(deep, 2, 0).copy(), ome=True, photometric="minisblack"),
        "tiff imagej": tiff(np.moveaxis(deep, 2, 0).copy(), imagej=True),
        "tiff float": tiff(rgb[..., 0].astype(np.float32), compression="zstd"),
        "npy": npy(deep),
        "npy float": npy(rgb.astype(np.float64)),
    }


def check_image(image):
    channels, height, width = image.shape
    assert 1 <= channels <= 32
    assert min(height, width) >= 1
    assert height * width <= LIMIT
    assert image.dtype in (torch.uint8, torch.float32)
    assert bool(torch.isfinite(image.float()).all())


def check_message(error):
    assert str(error)
    assert "\n" not in str(error)


def outcome(content, min_side=None):
    """ "image" or "broken"; anything else raised fails the test."""
    try:
        check_image(decode(content, min_side, LIMIT))
    except BrokenImage as error:
        check_message(error)
        return "broken"
    return "image"


@pytest.mark.parametrize("name", list(seeds()))
def test_damaged_images(name, capfd):
    random = np.random.default_rng([1, *name.encode()])
    content = seeds()[name]
    assert outcome(content) == "image"
    counts = {"image": 0, "broken": 0}
    for number in range(600):
        damaged = mutate(content, random)
        if name.startswith("png") and number % 2:
            damaged = seal_png(damaged)
        counts[outcome(damaged, 4 if number % 3 else None)] += 1
    assert counts["broken"] > 0
    capfd.readouterr()  # libtiff writes about what it meets


def test_heads_and_bodies_of_different_files():
    random = np.random.default_rng(2)
    contents = list(seeds().values())
    broken = 0
    for _ in range(2000):
        one, other = (contents[int(random.integers(len(contents)))] for _ in range(2))
        cut = int(random.integers(1, min(len(one), 200)))
        broken += outcome(one[:cut] + other[cut:]) == "broken"
    assert 0 < broken < 2000


def test_random_bytes_after_every_magic():
    random = np.random.default_rng(3)
    for content in seeds().values():
        for length in (0, 3, 20, 300):
            assert (
                outcome(content[: int(random.integers(2, 16))] + random.bytes(length)) == "broken"
            )


def make_tar(compression=""):
    buffer = io.BytesIO()
    with tarfile.open(fileobj=buffer, mode=f"w:{compression}") as tar:
        for number, content in enumerate(list(seeds().values())[:5]):
            for suffix, data in (("png", content), ("cls", b"3")):
                member = tarfile.TarInfo(f"folder/{number}.{suffix}")
                member.size = len(data)
                tar.addfile(member, io.BytesIO(data))
    return buffer.getvalue()


def read_all(source):
    """Images and broken images in a source."""
    images = broken = 0
    for index in range(len(source)):
        assert "\n" not in source.describe(index)
        try:
            check_image(source.read(index))
            images += 1
        except BrokenImage:
            broken += 1
    return images, broken


def damaged_headers(content, random):
    """As `mutate`, with the tar's checksums made right half of the time."""
    data = bytearray(mutate(content, random))
    if random.random() < 0.5:
        for at in range(0, len(data) - 511, 512):
            if bytes(data[at + 257 : at + 262]) == b"ustar":
                data[at + 148 : at + 156] = b" " * 8
                data[at + 148 : at + 156] = b"%06o\0 " % sum(data[at : at + 512])
    return bytes(data)


def test_damaged_shards(tmp_path):
    random = np.random.default_rng(4)
    content = make_tar()
    refused = opened = 0
    path = tmp_path / "0.tar"
    for _ in range(700):
        path.write_bytes(damaged_headers(content, random))
        try:
            source = TarSource([path], labelled=True)
        except UserError as error:
            check_message(error)
            refused += 1
            continue
        opened += 1
        read_all(source)
    assert refused > 20
    assert opened > 20
    assert [entry.name for entry in tmp_path.iterdir()] == ["0.tar"]


@pytest.mark.parametrize("compression", ["", "gz", "xz"])
def test_damaged_shards_as_streams(tmp_path, compression):
    random = np.random.default_rng(5)
    content = make_tar(compression)
    path = tmp_path / "0.tar"
    ended = 0
    for _ in range(200):
        path.write_bytes(mutate(content, random))
        try:
            for item in TarStream([str(path)], count=5).open_shard(0):
                ended += item.content is None
                assert item.content is None or outcome(item.content) in ("image", "broken")
        except UserError as error:
            check_message(error)
    assert ended > 20


@pytest.mark.parametrize("compression", ["none", "snappy", "zstd"])
def test_damaged_parquet_files(tmp_path, compression):
    random = np.random.default_rng(6)
    contents = list(seeds().values())[:5]
    path = tmp_path / "0.parquet"
    table = pa.table({"image": contents, "label": [0, 1, 1, 0, 2]})
    pq.write_table(table, path, compression=compression)
    content = path.read_bytes()
    refused = opened = 0
    for number in range(250):
        damaged = bytearray(mutate(content, random))
        if number % 2 and len(damaged) > 600:
            at = len(damaged) - int(random.integers(9, 600))  # the footer
            damaged[at] ^= 1 << int(random.integers(8))
        path.write_bytes(damaged)
        try:
            source = ParquetSource(path)
        except UserError as error:
            check_message(error)
            refused += 1
            continue
        opened += 1
        read_all(source)
    assert refused > 20
    assert opened > 5


def test_the_mutations_are_the_same_on_every_run():
    content = seeds()["bmp"]
    first, again = (
        [mutate(content, random) for _ in range(50)]
        for random in (np.random.default_rng(7), np.random.default_rng(7))
    )
    assert first == again
    assert len(set(first)) > 40
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert outcome(content) == "image"
