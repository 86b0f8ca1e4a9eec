"""Thousands of damaged files: every outcome is an image or a counted error, never anything else."""

import io
import struct
import zlib

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch
from PIL import Image
from test_decode import npy, tiff, written
from webdataset import TarWriter

from backfold.data.decode import examine
from backfold.data.formats import TarSource, open_parquet
from backfold.data.stream import Stream
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
        at, length = int(random.integers(reach)), int(random.integers(1, 9))
        extreme = int(random.choice([0, 1, 2**15, 2**16 - 1, 2**31 - 1, 2**31, 2**32 - 1]))
        size = len(data[at : at + length])
        start, end, put = [
            (at, at + 1, bytes([data[at] ^ 1 << int(random.integers(8))])),
            (at, at + size, random.bytes(size)),
            (at, at + size, b"\xff" * size),
            (at, at + size, bytes(size)),
            (at, at + length * int(random.integers(1, 40)), b""),
            (at, at, data[at : at + 4 * length]),
            (at, len(data), b""),
            (at, at + 4, struct.pack(str(random.choice(["<", ">"])) + "I", extreme)),
        ][int(random.integers(8))]
        data[start:end] = put
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
        "jpeg": written(picture.save, "JPEG", exif=exif),
        "jpeg cmyk": written(picture.convert("CMYK").save, "JPEG"),
        "png": written(rgba.save, "PNG", exif=exif),
        "png palette": written(picture.quantize(7).save, "PNG", transparency=3),
        "png 16": written(Image.fromarray(deep[..., 0]).save, "PNG"),
        "webp": written(rgba.save, "WEBP", lossless=True, exif=exif),
        "webp animated": written(picture.save, "WEBP", **frames),
        "gif": written(picture.save, "GIF", **frames),
        "bmp palette": written(picture.quantize(7).save, "BMP"),
        "tiff alpha": tiff(np.array(rgba), photometric="rgb", extrasamples=["unassalpha"]),
        "tiff jpeg": written(picture.save, "TIFF", compression="jpeg"),
        "tiff fax": written(picture.convert("1").save, "TIFF", compression="group4"),
        "tiff 16 lzw": tiff(deep, photometric="rgb", compression="lzw", predictor=True),
        "tiff 16 zlib tiles": tiff(deep, photometric="rgb", compression="zlib", tile=(16, 16)),
        "tiff pages": tiff(np.moveaxis(deep, 2, 0).copy(), photometric="minisblack"),
        "tiff ome": tiff(np.moveaxis(deep, 2, 0).copy(), ome=True, photometric="minisblack"),
        "tiff float": tiff(rgb[..., 0].astype(np.float32), compression="zstd"),
        "npy": npy(deep),
    }


def check_message(error):
    assert len(str(error).splitlines()) == 1


def outcome(content, min_side=None, page=None):
    """ "image" or "broken"; anything else raised fails the test."""
    try:
        image = examine(content, min_side, LIMIT, page).image
    except BrokenImage as error:
        check_message(error)
        return "broken"
    channels, height, width = image.shape
    assert 1 <= channels <= 32
    assert 1 <= height * width <= LIMIT
    assert image.dtype in (torch.uint8, torch.float32)
    assert bool(torch.isfinite(image.float()).all())
    return "image"


@pytest.mark.parametrize("name", list(seeds()))
def test_damaged_images(name, capfd):
    random = np.random.default_rng([1, *name.encode()])
    content = seeds()[name]
    assert outcome(content) == "image"
    counts = {"image": 0, "broken": 0}
    for number in range(300):
        damaged = mutate(content, random)
        if name.startswith("png") and number % 2:
            damaged = seal_png(damaged)
        counts[outcome(damaged, 4 if number % 3 else None, None if number % 5 else 1)] += 1
    assert counts["broken"] > 0
    capfd.readouterr()  # libtiff writes about what it meets


def make_tar(compress=False):
    buffer = io.BytesIO()
    with TarWriter(buffer, compress=compress, mtime=0) as tar:
        for number, content in enumerate(list(seeds().values())[:5]):
            tar.write({"__key__": f"folder/{number}", "png": content, "cls": b"3"})
    return buffer.getvalue()


def make_parquet():
    table = pa.table({"image": list(seeds().values())[:5], "label": [0, 1, 1, 0, 2]})
    return written(lambda buffer: pq.write_table(table, buffer, compression="zstd"))


def seal_tar(data):
    """The headers' checksums made right, so that damage gets past them."""
    data = bytearray(data)
    for at in range(0, len(data) - 511, 512):
        if bytes(data[at + 257 : at + 262]) == b"ustar":
            data[at + 148 : at + 156] = b" " * 8
            data[at + 148 : at + 156] = b"%06o\0 " % sum(data[at : at + 512])
    return data


@pytest.mark.parametrize(
    ("make", "open_damaged", "mend"),
    [
        (make_tar, lambda path: TarSource([path], labelled=True), seal_tar),
        (make_parquet, lambda path: open_parquet([path]), bytes),
    ],
)
def test_damaged_containers(tmp_path, make, open_damaged, mend):
    random = np.random.default_rng(4)
    content, path = make(), tmp_path / "images"
    counts = {"refused": 0, "opened": 0}
    for number in range(300):
        damaged = mutate(content, random)
        path.write_bytes(mend(damaged) if number % 2 else damaged)
        try:
            source = open_damaged(path)
        except UserError as error:
            check_message(error)
            counts["refused"] += 1
            continue
        counts["opened"] += 1
        for index in range(len(source)):
            assert "\n" not in source.describe(index)
            outcome(source.content(index))
    assert min(counts.values()) > 10
    assert [entry.name for entry in tmp_path.iterdir()] == ["images"]


@pytest.mark.parametrize("compress", [False, True])
def test_damaged_shards_as_streams(tmp_path, compress):
    random = np.random.default_rng(5)
    content = make_tar(compress)
    path = tmp_path / "0.tar"
    ended = 0
    for _ in range(100):
        path.write_bytes(mutate(content, random))
        for row in Stream([str(path)], 5).rows([0]):
            is_broken = isinstance(row["content"], BrokenImage)
            ended += is_broken
            if not is_broken:
                outcome(row["content"])
    assert ended > 20
