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
