import numpy as np
import pytest
import torch
from PIL import Image
from torchvision.transforms import v2

from backfold.data.augmentation import Augmentation, Augmenter, cover
from backfold.errors import UserError


@pytest.mark.parametrize("dtype", [torch.uint8, torch.float32])
def test_crops_are_torchvisions(dtype):
    image = torch.rand(3, 40, 60) if dtype.is_floating_point else torch.arange(7200) % 251
    image = image.to(dtype).view(3, 40, 60)
    assert torch.equal(cover(image, (40, 60)), image)
    augment = Augmenter(Augmentation(crop_scale=(0.1, 0.9), horizontal_flip=False), (16, 24))
    ratio = (3 / 4 * 1.5, 4 / 3 * 1.5)
    reference = v2.RandomResizedCrop((16, 24), scale=(0.1, 0.9), ratio=ratio, antialias=True)
    for seed in range(10):
        torch.manual_seed(seed)
        view = augment(image)
        torch.manual_seed(seed)
        torch.testing.assert_close(view, reference(image))
        assert view.dtype == dtype


def test_half_of_the_images_are_mirrored():
    torch.manual_seed(0)
    augment = Augmenter(Augmentation(random_crop=False), (8, 8))
    image = torch.rand(2, 8, 8)
    views = [augment(image) for _ in range(400)]
    mirrored = sum(torch.equal(view, image.flip(2)) for view in views)
    assert mirrored + sum(torch.equal(view, image) for view in views) == 400
    assert abs(mirrored - 200) < 50  # five standard deviations


def test_jittered_colours_are_as_promised():
    """Each channel is a sum of itself, grey and a constant, whose weights tell the factors."""
    torch.manual_seed(0)
    strength, found = 0.4, []
    augment = Augmenter(Augmentation(False, horizontal_flip=False, color_jitter=strength), (6, 6))
    image = torch.rand(3, 6, 6)
    grey = image.mean(dim=0)
    terms = torch.stack([image, grey.expand(3, 6, 6), torch.ones(3, 6, 6)], dim=3).double()
    for _ in range(300):
        changed = augment(image).double().view(3, 36, 1)
        weights = torch.linalg.lstsq(terms.view(3, 36, 3), changed).solution
        torch.testing.assert_close(terms.view(3, 36, 3) @ weights, changed, atol=1e-5, rtol=0)
        own, of_grey, constant = weights[:, :, 0].unbind(dim=1)
        gain = own + of_grey + constant / grey.mean()
        saturation, contrast = own / (own + of_grey), (own + of_grey) / gain
        assert max(saturation.std(), contrast.std()) < 1e-3
        found.append([saturation[0], contrast[0], gain.mean(), gain.max() / gain.min()])
    saturation, contrast, brightness, channels = np.array(found).T
    assert 1.25 < channels.max() <= (1 + strength / 3) / (1 - strength / 3) + 1e-3
    coloured = saturation[saturation > 0.1]
    assert abs(300 - len(coloured) - 300 * strength / 2) < 35  # five standard deviations
    for factor in (coloured, contrast):
        assert (factor.min(), factor.max()) == pytest.approx((0.6, 1.4), abs=0.03)
    assert (brightness.min(), brightness.max()) == pytest.approx((0.6, 1.4), abs=0.15)


@pytest.mark.parametrize("channels", [1, 2, 12])
def test_bytes_of_any_channels_stay_bytes_when_jittered(channels):
    image = torch.randint(0, 256, (channels, 8, 8), dtype=torch.uint8)
    augment = Augmenter(Augmentation(False, horizontal_flip=False, color_jitter=1.0), (8, 8))
    for seed in range(20):
        torch.manual_seed(seed)
        view = augment(image)
        torch.manual_seed(seed)
        assert torch.equal(view, augment(image.float()).round().clamp(0, 255).to(torch.uint8))
        assert not torch.equal(view, image)
    with pytest.raises(UserError, match=r"augmentation.color_jitter is 2; give a share"):
        Augmentation(color_jitter=2.0)


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


@pytest.mark.parametrize("scale", [(0.0, 1.0), (0.5, 0.2), (float("nan"), 1.0)])
def test_wrong_crop_scales_are_the_users_error(scale):
    with pytest.raises(UserError, match=r"crop_scale is .*; give two"):
        Augmentation(crop_scale=scale)
