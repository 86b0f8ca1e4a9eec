import numpy as np
import pytest
import torch
from scipy.ndimage import gaussian_filter

from backfold.data.statistics import ChannelStatistics
from backfold.errors import UserError
from backfold.evaluation.severities import (
    SEVERITIES,
    corrupt_images,
    corruption_names,
    pretext_severities,
    seeded_batches,
)
from backfold.pretext import Masking, Sorting
from backfold.training.config import TaskSettings

STATISTICS = ChannelStatistics((0.4, 0.5, 0.6), (0.2, 0.25, 0.3))
SETTINGS = TaskSettings(masking=Masking(mask_patch_size=4), sorting=Sorting(sorting_patch_size=4))
SIZE = (24, 32)


def generator(seed=0):
    return torch.Generator().manual_seed(seed)


@pytest.fixture
def pixels():
    """Smooth colours in [0.2, 0.8], so that small noise is not cut off."""
    noise = torch.rand(6, 3, *SIZE, generator=generator(1)).numpy()
    smooth = gaussian_filter(noise, (0, 0, 2, 2))
    low, high = smooth.min(), smooth.max()
    return torch.from_numpy(0.2 + 0.6 * (smooth - low) / (high - low)).float()


@pytest.fixture
def images(pixels):
    return STATISTICS.normalize(pixels)


TASKS = pretext_severities(SETTINGS, 3, SIZE)


@pytest.mark.parametrize("name", TASKS)
def test_pretext_tasks_grow_with_severity_in_every_image(name, images):
    errors = torch.stack(
        [
            (task(images, generator()).corrupted - images).square().mean(dim=(1, 2, 3))
            for task in TASKS[name]
        ]
    )
    assert len(errors) == len(SEVERITIES)
    assert (errors > 0).all()
    means = errors.mean(dim=1)
    assert (means.diff() > 0).all()
    if name != "sorting":
        assert (errors.diff(dim=0) > 0).all()


def test_what_is_hidden_or_moved_stays_so(images):
    for name in ("masking", "sorting"):
        masks = torch.stack([task(images, generator()).loss_mask for task in TASKS[name]])
        assert (masks[:-1] <= masks[1:]).all()
        shares = masks.float().mean(dim=(1, 2, 3, 4)).tolist()
        expected = {"masking": (0.2, 0.4, 0.6, 0.75, 0.9), "sorting": (0.2, 0.35, 0.5, 0.75, 1.0)}
        assert shares == pytest.approx(expected[name], abs=0.02)


def test_noise_has_the_deviation_said(images):
    many = images.repeat(20, 1, 1, 1)
    for task, std in zip(TASKS["denoising"], (0.1, 0.25, 0.45, 0.8, 1.2), strict=True):
        assert float((task(many, generator()).corrupted - many).std()) == pytest.approx(std, 0.02)


def test_settings_are_kept_where_they_fit():
    settings = TaskSettings(Masking(mask_patch_size=8, fill="mean", hidden_share=0.5))
    tasks = pretext_severities(settings, 1, (28, 40))
    assert "colorization" not in tasks
    first = tasks["masking"][0]
    assert (first.mask_patch_size, first.fill, first.hidden_share) == (8, "mean", 1.0)
    assert tasks["sorting"][0].sorting_patch_size == 7
    image = torch.zeros(1, 1, 28, 40)
    assert all(task(image, generator()) for levels in tasks.values() for task in levels)


@pytest.mark.parametrize("name", corruption_names(3))
def test_corruptions_grow_with_severity_in_every_image(name, images):
    errors = torch.stack(
        [
            (corrupt_images(images, name, severity, STATISTICS, 3) - images)
            .square()
            .mean(dim=(1, 2, 3))
            for severity in SEVERITIES
        ]
    )
    assert (errors > 0).all()
    if name == "occlusion":
        assert (errors.diff(dim=0) >= 0).all()
        assert (errors.mean(dim=1).diff() > 0).all()
    else:
        assert (errors.diff(dim=0) > 0).all()


def test_noise_and_blur_and_grey_are_what_they_are_called(pixels, images):
    def corrupted(name, severity):
        return STATISTICS.denormalize(corrupt_images(images, name, severity, STATISTICS, 0))

    noise = corrupted("noise", 1) - pixels
    assert float(noise.std()) == pytest.approx(0.04, rel=0.03)
    assert float(noise.mean()) == pytest.approx(0, abs=2e-3)
    blurred = gaussian_filter(pixels.numpy(), (0, 0, 1.5, 1.5), mode="mirror", truncate=4)
    np.testing.assert_allclose(corrupted("blur", 4).numpy(), blurred, atol=2e-3)
    weights = torch.tensor([0.299, 0.587, 0.114]).view(1, 3, 1, 1)
    expected = (pixels * weights).sum(dim=1, keepdim=True).expand(-1, 3, -1, -1)
    assert torch.allclose(corrupted("gray", 5), expected, atol=1e-3)


def test_occlusion_hides_one_rectangle_of_the_area_said(images):
    areas = []
    for severity in SEVERITIES:
        hidden = corrupt_images(images, "occlusion", severity, STATISTICS, 0) == 0
        assert torch.equal(hidden[:, 0], hidden[:, 1])
        mask = hidden[:, 0]
        rows, columns = mask.any(dim=2), mask.any(dim=1)
        assert torch.equal(mask, rows[:, :, None] & columns[:, None, :])
        assert (rows.int().diff(dim=1).abs().sum(dim=1) <= 2).all()
        assert (columns.int().diff(dim=1).abs().sum(dim=1) <= 2).all()
        areas.append(float(mask.float().mean()))
        first = rows.int().argmax(dim=1)
        assert len(first.unique()) > 1
    assert areas == pytest.approx((0.05, 0.1, 0.2, 0.3, 0.45), abs=0.02)


def test_images_of_other_channels_have_no_grey():
    assert "gray" in corruption_names(3)
    assert "gray" not in corruption_names(1)
    statistics = ChannelStatistics((0.5,), (0.5,))
    with pytest.raises(UserError, match=r"'gray' of severity 1 is unknown for images of 1 channel"):
        corrupt_images(torch.zeros(1, 1, 8, 8), "gray", 1, statistics, 0)
    tiny = corrupt_images(torch.zeros(2, 1, 3, 3), "blur", 5, statistics, 0)
    assert torch.allclose(tiny, torch.zeros(2, 1, 3, 3), atol=1e-6)


@pytest.mark.parametrize(("name", "severity"), [("fog", 1), ("noise", 0), ("noise", 6)])
def test_unknown_corruptions(images, name, severity):
    with pytest.raises(UserError, match="choose from noise, blur"):
        corrupt_images(images, name, severity, STATISTICS, 0)


def test_pixels_of_another_scale_are_refused():
    with pytest.raises(UserError, match="pixels lie between 300 and 300"):
        corrupt_images(torch.zeros(1, 1, 8, 8), "noise", 1, ChannelStatistics((300.0,), (9.0,)), 0)


def test_batches_meet_the_same_noise_at_every_severity_and_each_its_own(images):
    first, second = (
        [float(torch.rand((), generator=each)) for _, each in seeded_batches(images.split(2), 4)]
        for _ in range(2)
    )
    assert first == second
    assert len(set(first)) == 3
    assert [len(batch) for batch, _ in seeded_batches(images.split(4), 4)] == [4, 2]
