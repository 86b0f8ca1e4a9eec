import numpy as np
import pytest
import torch
from PIL import Image
from torchvision.transforms import v2

from backfold.data.augmentation import Augmentation, Augmenter, cover
from backfold.errors import UserError


def coordinates(height, width):
    """An image whose channels are each pixel's row and column, in [0, 1]."""
    rows = torch.arange(height).view(-1, 1).expand(height, width) / (height - 1)
    columns = torch.arange(width).expand(height, width) / (width - 1)
    return torch.stack([rows, columns])


def test_crops_lie_within_the_asked_scale():
    torch.manual_seed(0)
    augment = Augmenter(Augmentation(crop_scale=(0.3, 0.6), horizontal_flip=False), (50, 50))
    image = coordinates(101, 101)
    areas = []
    for _ in range(300):
        view = augment(image)
        assert view.shape == (2, 50, 50)
        spans = view.amax(dim=(1, 2)) - view.amin(dim=(1, 2))
        areas.append(float(spans.prod()))
        assert view[1, 0, -1] > view[1, 0, 0]  # never mirrored
    # The resampled extreme pixels lie up to a pixel inside the crop.
    assert 0.26 < min(areas) < 0.34
    assert 0.52 < max(areas) < 0.62
    assert abs(np.mean(areas) - 0.44) < 0.02


@pytest.mark.parametrize("dtype", [torch.uint8, torch.float32])
def test_crops_are_torchvisions(dtype):
    image = torch.rand(3, 40, 60) if dtype.is_floating_point else torch.arange(7200) % 251
    image = image.to(dtype).view(3, 40, 60)
    augment = Augmenter(Augmentation(crop_scale=(0.1, 0.9), horizontal_flip=False), (16, 24))
    ratio = (3 / 4 * 1.5, 4 / 3 * 1.5)
    reference = v2.RandomResizedCrop((16, 24), scale=(0.1, 0.9), ratio=ratio, antialias=True)
    for seed in range(20):
        torch.manual_seed(seed)
        view = augment(image)
        torch.manual_seed(seed)
        torch.testing.assert_close(view, reference(image))


def test_half_of_the_images_are_mirrored():
    torch.manual_seed(0)
    augment = Augmenter(Augmentation(random_crop=False), (8, 8))
    image = coordinates(8, 8)
    views = [augment(image) for _ in range(400)]
    mirrored = sum(torch.equal(view, image.flip(2)) for view in views)
    plain = sum(torch.equal(view, image) for view in views)
    assert mirrored + plain == 400
    assert abs(mirrored - 200) < 50  # five standard deviations


def test_without_changes_the_image_is_covered():
    image = torch.randint(0, 256, (3, 20, 30), dtype=torch.uint8)
    augment = Augmenter(Augmentation(random_crop=False, horizontal_flip=False), (10, 10))
    assert torch.equal(augment(image), cover(image, (10, 10)))


@pytest.mark.parametrize("dtype", [torch.uint8, torch.float32])
def test_dtype_and_range_stay(dtype):
    top = 255 if dtype == torch.uint8 else 1
    image = (torch.randint(0, 2, (1, 12, 12)) * top).to(dtype)
    view = Augmenter(Augmentation(), (30, 30))(image)
    assert view.dtype == dtype
    assert view.min() >= 0
    assert view.max() <= top


@pytest.mark.parametrize(
    ("size", "target", "inner"),
    [
        ((40, 60), (20, 20), (20, 30)),
        ((60, 40), (20, 20), (30, 20)),
        ((10, 30), (20, 40), (20, 60)),
    ],
)
def test_cover_resizes_and_cuts_the_centre(size, target, inner):
    random = np.random.default_rng(0)
    array = random.integers(0, 256, (*size, 3), dtype=np.uint8)
    resized = np.array(Image.fromarray(array).resize(inner[::-1], Image.Resampling.BILINEAR))
    top, left = (inner[0] - target[0]) // 2, (inner[1] - target[1]) // 2
    expected = resized[top : top + target[0], left : left + target[1]].astype(int)
    view = cover(torch.from_numpy(array).permute(2, 0, 1), target)
    assert view.shape == (3, *target)
    assert np.abs(view.permute(1, 2, 0).numpy().astype(int) - expected).max() <= 1


@pytest.mark.parametrize("size", [(1, 1), (7, 333), (333, 7), (223, 225), (224, 224)])
def test_cover_fits_every_shape(size):
    image = torch.randint(0, 256, (1, *size), dtype=torch.uint8)
    assert cover(image, (224, 224)).shape == (1, 224, 224)
    assert cover(image, (5, 9)).shape == (1, 5, 9)


def test_an_image_of_the_right_size_is_untouched():
    image = torch.rand(3, 8, 9)
    assert torch.equal(cover(image, (8, 9)), image)


@pytest.mark.parametrize("scale", [(0.0, 1.0), (0.5, 0.2), (0.5, 1.5), (float("nan"), 1.0)])
def test_wrong_crop_scales_are_the_users_error(scale):
    with pytest.raises(UserError, match=r"crop_scale is .*; give two"):
        Augmentation(crop_scale=scale)


def test_crops_have_about_the_shape_of_the_training_size():
    # A ramp along each side: its slope in the crop tells how much of the side was taken.
    rows = torch.linspace(0, 1, 300)[:, None].expand(300, 600)
    columns = torch.linspace(0, 1, 600)[None].expand(300, 600)
    image = torch.stack([rows, columns])
    augmenter = Augmenter(Augmentation(horizontal_flip=False, crop_scale=(0.1, 0.3)), (40, 120))
    torch.manual_seed(0)
    stretches = []
    for _ in range(50):
        crop = augmenter(image)
        height = float(crop[0, -1].mean() - crop[0, 0].mean()) * 300
        width = float(crop[1, :, -1].mean() - crop[1, :, 0].mean()) * 600
        stretches.append((width / 120) / (height / 40))
    assert 0.7 < min(stretches) < 0.9
    assert 1.1 < max(stretches) < 1.45
