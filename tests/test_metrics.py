import math

import numpy as np
import pytest
import torch
from skimage.metrics import peak_signal_noise_ratio, structural_similarity
from sklearn.neighbors import KNeighborsClassifier

from backfold.errors import UserError
from backfold.metrics import energy_auroc, energy_gap, knn_accuracy, psnr_db, rank_me, ssim

MEAN, STD = torch.tensor([[0.5, 0.4, 0.3], [0.25, 0.2, 0.1]]).view(2, 3, 1, 1)


@pytest.mark.parametrize("size", [(20, 33), (11, 16), (3, 9)])
def test_psnr_and_ssim_equal_scikit_image_s_on_pixels(size):
    clean, noise = torch.rand(2, 3, 3, *size, generator=torch.Generator().manual_seed(0))
    restored = clean + torch.tensor([0.02, 0.16, 0.3]).view(3, 1, 1, 1) * (2 * noise - 1)
    normalised = [(images - MEAN) / STD for images in (restored, clean)]
    pairs = list(zip(clean.numpy(), restored.numpy(), strict=True))
    expected = [peak_signal_noise_ratio(*pair, data_range=1.0) for pair in pairs]
    assert psnr_db(*normalised, STD).tolist() == pytest.approx(expected, abs=1e-3)
    assert psnr_db(normalised[1], normalised[1], STD).tolist() == [100.0] * 3
    radius = min(5, (min(size) - 1) // 2)
    as_published = {
        # With truncate fixed at 3.5 the window's radius is int(3.5 * sigma + 0.5).
        "sigma": 1.5 if radius == 5 else radius / 3.5,
        "data_range": 1.0, "channel_axis": 0, "gaussian_weights": True,
        "use_sample_covariance": False,
    }  # fmt: skip
    expected = [structural_similarity(*pair, **as_published) for pair in pairs]
    assert ssim(*normalised, MEAN, STD).tolist() == pytest.approx(expected, abs=1e-4)
    assert max(expected) - min(expected) > 0.05


def test_rank_me_closed_forms():
    orthonormal = torch.linalg.qr(torch.randn(20, 6)).Q
    rank_one = torch.outer(torch.randn(20), torch.randn(6))
    assert rank_me(orthonormal) == pytest.approx(6.0, abs=1e-4)
    assert rank_me(rank_one) == pytest.approx(1.0, abs=1e-4)
    assert rank_me(torch.zeros(20, 6)) == 0.0
    entropy = -(0.75 * math.log(0.75) + 0.25 * math.log(0.25))
    assert rank_me(torch.diag(torch.tensor([3.0, 1.0, 0.0]))) == pytest.approx(math.exp(entropy))


def test_energy_auroc_counts_pairs():
    clean, corrupted = torch.tensor([1.0, 2.0, 4.0]), torch.tensor([2.0, 3.0])
    pairs = [1.0 if c < d else 0.5 if c == d else 0.0 for c in [1, 2, 4] for d in [2, 3]]
    assert energy_auroc(clean, corrupted) == pytest.approx(sum(pairs) / len(pairs))
    assert energy_auroc(clean, clean + 10) == 1.0
    assert energy_auroc(clean + 10, clean) == 0.0
    assert energy_gap(clean, corrupted) == pytest.approx(2.5 - 7 / 3)


def clusters(num_images, seed, classes=4, features=6):
    rng = np.random.default_rng(seed)
    centres = np.random.default_rng(99).normal(size=(classes, features))
    labels = rng.integers(0, classes, num_images)
    embeddings = centres[labels] + 1.5 * rng.normal(size=(num_images, features))
    return embeddings.astype(np.float32), labels


@pytest.mark.parametrize("k", [1, 7, 500])
def test_knn_equals_scikit_learn(k):
    (train_x, train_y), (test_x, test_y) = clusters(90, seed=1), clusters(70, seed=2)
    classifier = KNeighborsClassifier(
        min(k, 90),
        metric="cosine",
        algorithm="brute",
        weights=lambda distance: np.exp((1 - distance) / 0.07),
    ).fit(train_x, train_y)
    data = [torch.from_numpy(part) for part in (train_x, train_y, test_x, test_y)]
    whole = knn_accuracy(*data, k=k)
    assert whole == pytest.approx(classifier.score(test_x, test_y))
    assert 0.4 < whole < 0.99


def test_ssim_refuses_images_without_a_window():
    with pytest.raises(UserError, match=r"can't compare \(2, 9\) pixels; give 3 x 3 or more"):
        ssim(torch.zeros(1, 3, 2, 9), torch.zeros(1, 3, 2, 9), MEAN, STD)
