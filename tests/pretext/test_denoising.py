import numpy as np
import pytest
import scipy.stats
import torch

from backfold.errors import UserError
from backfold.pretext import Denoising


def seeded(seed):
    return torch.Generator().manual_seed(seed)


@pytest.mark.parametrize("noise_std", [0.05, 0.5, 2.0])
@pytest.mark.parametrize("channels", [1, 3, 12])
def test_noise_is_gaussian_of_the_given_deviation(photographs_of, noise_std, channels):
    clean = photographs_of(channels)
    corrupted = Denoising(noise_std, noise_std)(clean, seeded(0)).corrupted
    noise = (corrupted - clean).double().flatten(1).numpy()
    # The measured deviation of n draws itself deviates by 1 / sqrt(2 n).
    tolerance = 5 * noise_std / (2 * noise.shape[1]) ** 0.5
    np.testing.assert_allclose(noise.std(axis=1), noise_std, rtol=0, atol=tolerance)
    assert scipy.stats.kstest(noise.ravel() / noise_std, "norm").pvalue > 0.005


def test_noise_is_white(photographs):
    noise = Denoising(1.0, 1.0)(photographs, seeded(0)).corrupted - photographs
    pairs = {
        "image": (noise[:-1], noise[1:]),
        "channel": (noise[:, :-1], noise[:, 1:]),
        "row": (noise[:, :, :-1], noise[:, :, 1:]),
        "column": (noise[..., :-1], noise[..., 1:]),
        "image itself": (noise, photographs),
    }
    for name, (first, second) in pairs.items():
        correlation = np.corrcoef(first.flatten().numpy(), second.flatten().numpy())[0, 1]
        assert abs(correlation) < 5 / first.numel() ** 0.5, name


def test_deviation_is_uniform_over_the_range():
    corrupted = Denoising(0.1, 0.8)(torch.zeros(500, 3, 40, 40), seeded(0)).corrupted
    measured = corrupted.flatten(1).std(dim=1).numpy()
    # 2 % is five times the error of a deviation measured from 4800 values.
    assert measured.min() > 0.1 * 0.95
    assert measured.max() < 0.8 * 1.05
    assert scipy.stats.kstest(measured, scipy.stats.uniform(0.1, 0.7).cdf).pvalue > 0.01


def test_loss_counts_everywhere(photographs):
    assert Denoising()(photographs, seeded(0)).loss_mask.all()


@pytest.mark.parametrize(
    ("smallest", "largest"),
    [(-0.1, 0.5), (0.6, 0.5), (0.0, 0.0), (0.1, float("inf")), (float("nan"), 1.0)],
)
def test_refuses_bad_ranges(smallest, largest):
    shown = f"min_noise_std is {smallest} and max_noise_std {largest}"
    with pytest.raises(UserError, match=shown):
        Denoising(smallest, largest)


@pytest.mark.parametrize("octaves", [1, 2, 4])
@pytest.mark.parametrize(("height", "width"), [(32, 40), (19, 9)])
def test_each_octave_has_its_share_of_the_variance(octaves, height, width):
    clean = torch.zeros(4000, 1, height, width)
    noise = Denoising(1.0, 1.0, octaves)(clean, seeded(0)).corrupted[:, 0]

    def covariance(row, column):
        """With the pixel in the corner, over the images."""
        return float((noise[:, 0, 0] * noise[:, row, column]).mean())

    # A pixel shares the squares of 1, 2, 4, ... pixels with those at most so far from the corner.
    for distance in range(9):
        shared = sum(2**octave > distance for octave in range(octaves)) / octaves
        for row, column in ((distance, 0), (0, distance), (distance, distance)):
            if row < height and column < width:
                assert covariance(row, column) == pytest.approx(shared, abs=5 * (2 / 4000) ** 0.5)


def test_one_octave_is_the_noise_of_before():
    clean = torch.zeros(3, 2, 7, 5)
    generator = seeded(4)
    noise = torch.randn(clean.shape, generator=generator)
    share = torch.rand(3, 1, 1, 1, generator=generator)
    expected = (0.1 + 0.7 * share) * noise
    torch.testing.assert_close(Denoising()(clean, seeded(4)).corrupted, expected)


@pytest.mark.parametrize("octaves", [0, -1])
def test_refuses_no_octaves(octaves):
    with pytest.raises(UserError, match=f"^octaves is {octaves}; "):
        Denoising(octaves=octaves)


def test_refuses_squares_larger_than_the_image():
    with pytest.raises(UserError, match=r"squares of 16 pixels in a 32x15 pixel image; give 4 or"):
        Denoising(octaves=5)(torch.zeros(1, 3, 32, 15), seeded(0))
