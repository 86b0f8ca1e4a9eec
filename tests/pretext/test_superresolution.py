import numpy as np
import pytest
import torch
from PIL import Image

from backfold.errors import UserError
from backfold.pretext import SuperResolution


def seeded(seed):
    return torch.Generator().manual_seed(seed)


def fixed(factor):
    return SuperResolution(factor, factor)


def pillow_down_and_up(image, factor):
    """The same by Pillow, for (channels, height, width) in float32."""
    _, height, width = image.shape
    channels = []
    for channel in image.numpy():
        small = Image.fromarray(channel).resize(
            (max(1, round(width / factor)), max(1, round(height / factor))),
            Image.Resampling.BICUBIC,
        )
        channels.append(np.asarray(small.resize((width, height), Image.Resampling.BICUBIC)))
    return torch.from_numpy(np.stack(channels))


@pytest.mark.parametrize("size", [(64, 96), (61, 33), (2, 3)])
@pytest.mark.parametrize("factor", [1.0, 1.5, 2.25, 4.0, 8.0])
def test_agrees_with_pillow(photographs_of, factor, size):
    clean = photographs_of(3, *size)
    corrupted = fixed(factor)(clean, seeded(0)).corrupted
    for image, original in zip(corrupted, clean, strict=True):
        torch.testing.assert_close(image, pillow_down_and_up(original, factor), atol=2e-5, rtol=0)


def test_factor_one_is_the_image_itself(photographs):
    assert torch.equal(fixed(1.0)(photographs, seeded(0)).corrupted, photographs)


@pytest.mark.parametrize(
    ("smallest", "largest", "factors"),
    [
        (2.0, 4.0, (2.0, 2.25, 2.5, 2.75, 3.0, 3.25, 3.5, 3.75, 4.0)),
        (3.0, 3.0, (3.0,)),
        (1.0, 1.125, (1.0, 1.125)),
        (1.0, 1.75, (1.0, 1.25, 1.5, 1.75)),
        (2.0, 2.75 - 0.375, (2.0, 2.1875, 2.375)),
    ],
)
def test_factors_are_evenly_spaced_and_include_both_ends(smallest, largest, factors):
    assert SuperResolution(smallest, largest).factors == pytest.approx(factors)


def test_each_image_has_its_own_factor_and_all_are_equally_frequent(photographs_of):
    task = SuperResolution(1.0, 2.0)
    clean = photographs_of(1, 16, 16)[:1]
    versions = torch.cat([fixed(factor)(clean, seeded(0)).corrupted for factor in task.factors])
    corrupted = task(clean.expand(1000, -1, -1, -1), seeded(0)).corrupted
    distances = (corrupted[:, None] - versions[None]).abs().amax(dim=(2, 3, 4))
    matches = distances < 1e-6
    assert (matches.sum(dim=1) == 1).all()
    # 5 standard deviations of a binomial with probability 1/5.
    assert (matches.sum(dim=0) - 200).abs().max() < 5 * (1000 * 0.16) ** 0.5


@pytest.mark.parametrize("factor", [2.0, 3.0, 4.0])
def test_frequencies_above_the_cut_are_lost(factor):
    noise = torch.randn(8, 2, 96, 96, generator=seeded(0))  # all frequencies alike
    corrupted = fixed(factor)(noise, seeded(0)).corrupted
    frequency = torch.fft.fftfreq(96).abs()
    radius = torch.maximum(frequency[:, None], frequency[None, :])
    cut = 0.5 / factor  # the small image's Nyquist frequency, in cycles a pixel
    above, below = radius > 1.25 * cut, radius < 0.5 * cut

    def power(images, band):
        return torch.fft.fft2(images).abs().square()[..., band].mean()

    assert power(corrupted, above) < 0.02 * power(noise, above)
    assert power(corrupted, below) > 0.5 * power(noise, below)


@pytest.mark.parametrize("factor", [2.0, 3.0, 4.0])
def test_smooth_images_come_back_nearly_unchanged(factor):
    y, x = torch.meshgrid(torch.arange(96.0), torch.arange(120.0), indexing="ij")
    smooth = (torch.cos(torch.pi * (y + 0.5) / 96) * torch.cos(torch.pi * (x + 0.5) / 60))[None]
    corrupted = fixed(factor)(smooth[None], seeded(0)).corrupted
    assert (corrupted - smooth).abs().max() < 0.02
    constant = torch.full((1, 3, 31, 17), 0.7)
    torch.testing.assert_close(fixed(factor)(constant, seeded(0)).corrupted, constant)


def test_larger_factors_lose_more(photographs):
    errors = [
        (fixed(factor)(photographs, seeded(0)).corrupted - photographs).square().mean().item()
        for factor in (1.25, 2.0, 3.0, 4.0)
    ]
    assert errors == sorted(errors)
    assert errors[0] > 0


def test_loss_counts_everywhere(photographs):
    assert SuperResolution()(photographs, seeded(0)).loss_mask.all()


@pytest.mark.parametrize(
    ("smallest", "largest"), [(0.5, 2.0), (3.0, 2.0), (2.0, float("inf")), (float("nan"), 2.0)]
)
def test_refuses_bad_ranges(smallest, largest):
    with pytest.raises(UserError, match=f"min_factor is {smallest} and max_factor {largest}"):
        SuperResolution(smallest, largest)
