"""JPEG images far larger than needed are decoded smaller: close to what full decoding gives."""

import io

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch
from PIL import Image
from torch.nn import functional as F
from torchvision.transforms import v2

from backfold.data.augmentation import Augmentation, Augmenter, cover
from backfold.data.decode import decode
from backfold.data.folder import FolderSource
from backfold.data.loading import BatchDataset, training_loader
from backfold.data.parquet import ParquetSource
from backfold.data.source import SubsetSource

# From Python 3.12 on, forking a process with threads warns; torch has threads and forks workers.
pytestmark = pytest.mark.filterwarnings(
    "ignore:This process .* is multi-threaded:DeprecationWarning"
)


def photo(height, width, seed=0):
    """Detail at all scales, weaker the finer, and smoother colours, as photographs have them."""
    random = np.random.default_rng(seed)
    frequencies = np.hypot(np.fft.fftfreq(height)[:, None], np.fft.fftfreq(width))
    frequencies[0, 0] = 1.0

    def noise(channels, steepness):
        white = np.fft.fft2(random.standard_normal((channels, height, width)), axes=(1, 2))
        coloured = np.fft.ifft2(white / frequencies**steepness, axes=(1, 2)).real
        return coloured / coloured.std(axis=(1, 2), keepdims=True)

    pixels = 128 + 40 * noise(1, 1) + 20 * noise(3, 2)
    return np.moveaxis(pixels.clip(0, 255).astype(np.uint8), 0, 2)


def psnr_db(left, right):
    error = (left.double() - right.double()).square().mean() / 255**2
    return float(-10 * torch.log10(error))


@pytest.fixture(scope="module")
def jpeg():
    buffer = io.BytesIO()
    Image.fromarray(photo(480, 640)).save(buffer, "JPEG", quality=92)
    return buffer.getvalue()


@pytest.mark.parametrize(
    ("min_side", "shape"),
    [
        (None, (480, 640)),
        (481, (480, 640)),  # larger than the image
        (241, (480, 640)),
        (240, (240, 320)),
        (121, (240, 320)),
        (120, (120, 160)),
        (60, (60, 80)),
        (1, (60, 80)),
    ],
)
def test_sides_stay_as_long_as_asked(jpeg, min_side, shape):
    assert decode(jpeg, min_side).shape == (3, *shape)


@pytest.mark.parametrize("size", [(65, 130), (127, 96), (8, 8), (1, 40)])
@pytest.mark.parametrize("min_side", [1, 8, 16, 31, 32])
def test_odd_sizes_never_come_too_small(encode, size, min_side):
    image = decode(encode(photo(*size), "JPEG"), min_side)
    for side, full in zip(image.shape[1:], size, strict=True):
        assert side >= min(full, min_side)


@pytest.mark.parametrize("reduction", [2, 4, 8])
def test_reduced_images_are_averages_of_the_full_pixels(jpeg, reduction):
    full, reduced = decode(jpeg), decode(jpeg, 480 // reduction)
    means = F.avg_pool2d(full.float(), reduction)
    assert psnr_db(reduced, means) > 45.0
    # Neither every second, fourth or eighth pixel would pass, nor means a pixel further.
    assert psnr_db(full[:, ::reduction, ::reduction], means) < 30.0
    for shifts in [(0, 1), (1, 0), (0, -1), (-1, 0)]:
        assert psnr_db(reduced.roll(shifts, (1, 2)), means) < 30.0


@pytest.mark.parametrize("size", [100, 48, 20])
def test_views_of_reduced_images_are_close_to_those_of_whole_ones(jpeg, size):
    full, reduced = decode(jpeg), decode(jpeg, size)
    assert reduced.shape[1] < full.shape[1]
    assert psnr_db(cover(reduced, (size, size)), cover(full, (size, size))) > 36.0


@pytest.mark.parametrize("orientation", range(1, 9))
def test_orientation_is_applied_to_reduced_images(encode, orientation):
    exif = Image.Exif()
    exif[0x0112] = orientation
    content = encode(photo(96, 160), "JPEG", exif=exif, quality=95)
    full, reduced = decode(content), decode(content, 48)
    assert reduced.shape == (3, full.shape[1] // 2, full.shape[2] // 2)
    assert psnr_db(reduced, F.avg_pool2d(full.float(), 2)) > 45.0


@pytest.mark.parametrize("mode", ["L", "CMYK"])
def test_other_modes_are_reduced_too(encode, mode):
    content = encode(Image.fromarray(photo(96, 160)).convert(mode), "JPEG", quality=95)
    full, reduced = decode(content), decode(content, 48)
    assert reduced.shape == (1 if mode == "L" else 3, 48, 80)
    assert psnr_db(reduced, F.avg_pool2d(full.float(), 2)) > 45.0


@pytest.mark.parametrize("format", ["PNG", "BMP", "TIFF", "WEBP", "GIF"])
def test_other_formats_keep_their_size(encode, format):
    content = encode(photo(96, 160), format)
    assert torch.equal(decode(content, 8), decode(content))


def test_images_that_are_not_much_larger_keep_their_bits(jpeg):
    assert torch.equal(decode(jpeg, 250), decode(jpeg))


@pytest.mark.parametrize("size", [(24, 24), (16, 32), (32, 16)])
@pytest.mark.parametrize("low", [0.05, 0.2, 1.0])
def test_no_crop_is_smaller_than_its_result(size, low):
    augment = Augmenter(Augmentation(crop_scale=(low, 1.0)), size)
    side = augment.min_side
    aspect = size[1] / size[0]
    crop = v2.RandomResizedCrop(size, (low, 1.0), (3 / 4 * aspect, 4 / 3 * aspect))
    torch.manual_seed(0)
    for shape in [(side, side), (side, 2 * side), (9 * side, side)]:
        image = torch.empty(1, *shape)
        for _ in range(300):
            params = crop.make_params([image])
            assert params["height"] >= size[0]
            assert params["width"] >= size[1]
    # And the bound is no larger than it must be, up to rounding.
    assert side <= max(size) * np.sqrt(4 / 3 / low) + 1


def test_without_random_crops_the_size_itself_is_enough():
    assert Augmenter(Augmentation(random_crop=False), (24, 40)).min_side == 40


@pytest.fixture
def sources(tmp_path, encode):
    contents = [encode(photo(160, 200, seed), "JPEG", quality=92) for seed in range(4)]
    for number, content in enumerate(contents):
        (tmp_path / f"{number}.jpg").write_bytes(content)
    pq.write_table(pa.table({"image": contents}), tmp_path / "images.parquet")
    folder = FolderSource(tmp_path)
    return folder, ParquetSource(tmp_path / "images.parquet"), SubsetSource(folder, [0, 1, 2, 3])


def test_every_source_hands_the_side_on(sources):
    for source in sources:
        assert source.read(2).shape == (3, 160, 200)
        assert source.read(2, 50).shape == (3, 80, 100)


def test_batches_are_close_to_those_of_full_decoding(sources):
    folder = sources[0]
    dataset = BatchDataset(folder, (32, 32), 3)
    batch = dataset[[(0, index) for index in range(4)]]
    assert batch.images.dtype == torch.uint8
    for index in range(4):
        assert psnr_db(batch.images[index], cover(folder.read(index), (32, 32))) > 36.0


def test_workers_do_not_change_the_bits(sources):
    runs = []
    for workers in (0, 2):
        loader = training_loader(
            sources[0], (16, 16), 3, Augmentation(), 2, 5, 0, 4, num_workers=workers, prefetch=3
        )
        runs.append(torch.stack([batch.images for batch in loader]))
    assert torch.equal(*runs)
