"""JPEG images far larger than needed are decoded smaller: close to what full decoding gives."""

import numpy as np
import pytest
import torch
from PIL import Image
from torch.nn import functional as F
from torchvision.transforms import v2

from backfold.data.augmentation import Augmentation, Augmenter
from backfold.data.decode import decode
from backfold.data.formats import FolderSource
from backfold.data.source import SubsetSource


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
def jpeg(encode):
    return encode(photo(480, 640), "JPEG", quality=92)


@pytest.mark.parametrize(
    ("min_side", "shape"),
    [
        (None, (480, 640)),
        (481, (480, 640)),  # larger than the image
        (241, (480, 640)),
        (240, (240, 320)),
        (120, (120, 160)),
        (1, (60, 80)),
    ],
)
def test_sides_stay_as_long_as_asked(jpeg, min_side, shape):
    assert decode(jpeg, min_side).shape == (3, *shape)


@pytest.mark.parametrize("size", [(65, 130), (127, 96), (1, 40)])
@pytest.mark.parametrize("min_side", [1, 16, 31])
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


@pytest.mark.parametrize(("mode", "orientation"), [("RGB", 1), ("RGB", 3), ("L", 6), ("CMYK", 6)])
def test_orientation_and_modes_of_reduced_images(encode, mode, orientation):
    exif = Image.Exif()
    exif[0x0112] = orientation
    picture = Image.fromarray(photo(96, 160)).convert(mode)
    content = encode(picture, "JPEG", exif=exif, quality=95)
    full, reduced = decode(content), decode(content, 48)
    assert reduced.shape == (len(full), full.shape[1] // 2, full.shape[2] // 2)
    assert psnr_db(reduced, F.avg_pool2d(full.float(), 2)) > 45.0
    lossless = encode(photo(96, 160), "PNG")
    assert torch.equal(decode(lossless, 8), decode(lossless))  # keeps its size


@pytest.mark.parametrize(("size", "low"), [((24, 24), 0.05), ((16, 32), 0.2), ((32, 16), 1.0)])
def test_no_crop_is_smaller_than_its_result(size, low):
    augment = Augmenter(Augmentation(crop_scale=(low, 1.0)), size)
    side = augment.min_side
    aspect = size[1] / size[0]
    crop = v2.RandomResizedCrop(size, (low, 1.0), (3 / 4 * aspect, 4 / 3 * aspect))
    torch.manual_seed(0)
    for shape in [(side, side), (side, 2 * side), (9 * side, side)]:
        image = torch.empty(1, *shape)
        for _ in range(100):
            params = crop.make_params([image])
            assert params["height"] >= size[0]
            assert params["width"] >= size[1]
    # And the bound is no larger than it must be, up to rounding.
    assert side <= max(size) * np.sqrt(4 / 3 / low) + 1
    assert Augmenter(Augmentation(random_crop=False), size).min_side == max(size)


def test_sources_hand_the_side_on(tmp_path, encode):
    (tmp_path / "0.jpg").write_bytes(encode(photo(160, 200), "JPEG", quality=92))
    source = SubsetSource(FolderSource(tmp_path), [0])
    assert source.read(0).shape == (3, 160, 200)
    assert source.read(0, 50).shape == (3, 80, 100)
