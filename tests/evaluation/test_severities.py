import numpy as np
import pytest
import torch
from scipy.ndimage import gaussian_filter

from backfold.data.statistics import ChannelStatistics
from backfold.errors import UserError
from backfold.evaluation.adaptation import SEVERITIES, corrupt_images, corruption_names
from backfold.evaluation.restoration import pretext_severities
from backfold.pretext import Masking, Sorting
from backfold.training.config import TaskSettings

STATISTICS = ChannelStatistics((0.4, 0.5, 0.6), (0.2, 0.25, 0.3))
SIZE = (24, 32)
TASKS = pretext_severities(TaskSettings(Masking(mask_patch_size=4), Sorting(4)), 3, SIZE)


def generator(seed=0):
    return torch.Generator().manual_seed(seed)


@pytest.fixture
def pixels():
    """Smooth colours in [0.2, 0.8], so that small noise is not cut off."""
    noise = torch.rand(6, 3, *SIZE, generator=generator(1)).numpy()
    smooth = gaussian_filter(noise, (0, 0, 2, 2))
    return torch.from_numpy(0.2 + 0.6 * (smooth - smooth.min()) / np.ptp(smooth)).float()


def corrupted(pixels, name, severity, seed=3):
    images = corrupt_images(STATISTICS.normalize(pixels), name, severity, STATISTICS, seed)
    return STATISTICS.denormalize(images)


def test_corruptions_grow_with_severity_in_every_image(pixels):
    images = STATISTICS.normalize(pixels)
    found = {name: [task(images, generator()).corrupted for task in TASKS[name]] for name in TASKS}
    for name in corruption_names(3):
        found[name] = [STATISTICS.normalize(corrupted(pixels, name, s)) for s in SEVERITIES]
    for name, levels in found.items():
        errors = (torch.stack(levels) - images).square().mean(dim=(2, 3, 4))
        assert (errors > 0).all()
        assert (errors.mean(dim=1).diff() > 0).all()
        if name != "sorting":
            assert (errors.diff(dim=0) > (-1e-6 if name == "occlusion" else 0)).all()


def test_what_is_hidden_or_moved_stays_so(pixels):
    shares = {"masking": (0.2, 0.4, 0.6, 0.75, 0.9), "sorting": (0.2, 0.35, 0.5, 0.75, 1.0)}
    for name, expected in shares.items():
        masks = torch.stack([task(pixels, generator()).loss_mask for task in TASKS[name]])
        assert (masks[:-1] <= masks[1:]).all()
        assert masks.float().mean(dim=(1, 2, 3, 4)).tolist() == pytest.approx(expected, abs=0.02)


def test_settings_are_kept_where_they_fit():
    settings = TaskSettings(Masking(mask_patch_size=8, fill="mean", hidden_share=0.5))
    tasks = pretext_severities(settings, 1, (28, 40))
    assert "colorization" not in tasks
    first = tasks["masking"][0]
    assert (first.mask_patch_size, first.fill, first.hidden_share) == (8, "mean", 1.0)
    assert tasks["sorting"][0].sorting_patch_size == 7


def test_noise_and_blur_and_grey_are_what_they_are_called(pixels):
    noise = corrupted(pixels, "noise", 1) - pixels
    assert float(noise.std()) == pytest.approx(0.04, rel=0.03)
    blurred = gaussian_filter(pixels.numpy(), (0, 0, 1.5, 1.5), mode="mirror", truncate=4)
    np.testing.assert_allclose(corrupted(pixels, "blur", 4).numpy(), blurred, atol=2e-3)
    expected = torch.einsum("nchw,c->nhw", pixels, torch.tensor([0.299, 0.587, 0.114]))
    assert torch.allclose(corrupted(pixels, "gray", 5), expected[:, None], atol=1e-3)
    assert "gray" not in corruption_names(1)
    tiny = torch.full((1, 1, 3, 3), 0.5)  # the reflected border can't be wider
    blurred = corrupt_images(tiny, "blur", 5, ChannelStatistics((0.5,), (1.0,)), 0)
    assert torch.allclose(blurred, tiny, atol=1e-6)


def test_occlusion_hides_one_rectangle_of_the_area_said(pixels):
    for severity, area in zip(SEVERITIES, (0.05, 0.1, 0.2, 0.3, 0.45), strict=True):
        mask = ((corrupted(pixels, "occlusion", severity) - pixels).abs() > 1e-4).any(dim=1)
        rows, columns = mask.any(dim=2), mask.any(dim=1)
        assert torch.equal(mask, rows[:, :, None] & columns[:, None, :])
        assert max((line.int().diff(dim=1) > 0).sum(dim=1).max() for line in (rows, columns)) <= 1
        assert float(mask.float().mean()) == pytest.approx(area, abs=0.02)
        assert len(rows.int().argmax(dim=1).unique()) > 1


def test_pixels_of_another_scale_are_refused():
    with pytest.raises(UserError, match="pixels lie between 300 and 300"):
        corrupt_images(torch.zeros(1, 1, 8, 8), "noise", 1, ChannelStatistics((300.0,), (9.0,)), 0)
