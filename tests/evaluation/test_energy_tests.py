import io
import math

import numpy as np
import pytest
import torch
from PIL import Image
from scipy.stats import norm
from sklearn.metrics import roc_auc_score
from torch import nn

from backfold.data.statistics import ChannelStatistics
from backfold.errors import UserError
from backfold.evaluation.energy_tests import (
    ONE_CLASS,
    EnergyTestImages,
    auroc,
    energies,
    energy_rows,
    file_sizes,
    knn_distance,
)
from backfold.evaluation.severities import SEVERITIES, pretext_severities
from backfold.pretext import Masking, Sorting
from backfold.training.config import PretrainConfig, TaskSettings
from backfold.training.pretrained import Pretrained

STATISTICS = ChannelStatistics((0.5,), (0.25,))
SIZE = (6, 6)
CONTENDERS = {"energy", "kNN distance", "file size", "total variation"}


class MeanPixel(nn.Module):
    """An energy that is the mean pixel, or the mean square; its backbone keeps the pixels."""

    def __init__(self, square=False):
        super().__init__()
        self.backbone, self.square = nn.Flatten(), square

    def forward(self, images):
        return (images.square() if self.square else images).mean(dim=(1, 2, 3))


def run_of(energy):
    settings = TaskSettings(Masking(mask_patch_size=2), Sorting(sorting_patch_size=2))
    return Pretrained(energy, PretrainConfig(tasks=settings), STATISTICS, 1, SIZE, step=0)


def noise(count, seed, size=SIZE):
    return torch.randn(count, 1, *size, generator=torch.Generator().manual_seed(seed))


def flat(values):
    return torch.as_tensor(values, dtype=torch.float32)[:, None, None, None].expand(-1, 1, *SIZE)


def table(rows):
    return {(row.case, row.contender): row for row in rows}


def slow_auroc(usual, strange):
    wins = [(b > a) + 0.5 * (a == b) for a in usual for b in strange]
    return sum(wins) / len(wins)


def slow_knn_distance(bank, queries, k):
    bank, queries = (
        [row / np.linalg.norm(row) for row in rows.numpy()] for rows in (bank, queries)
    )
    return [np.mean(sorted(np.linalg.norm(query - row) for row in bank)[:k]) for query in queries]


def test_auroc_counts_pairs():
    rng = np.random.default_rng(0)
    usual, strange = rng.integers(0, 6, (3, 17)), rng.integers(2, 9, (3, 11))
    found = auroc(usual, strange)
    assert found.shape == (3,)
    assert found == pytest.approx([slow_auroc(*pair) for pair in zip(usual, strange, strict=True)])
    labels = np.repeat([0, 1], [17, 11])
    expected = [
        roc_auc_score(labels, np.concatenate(pair)) for pair in zip(usual, strange, strict=True)
    ]
    assert found == pytest.approx(expected)
    assert auroc(usual.T, strange.T, axis=0) == pytest.approx(expected)


def test_shifted_normal_energies_have_the_closed_form():
    shift, count = 0.8, 400
    rng = np.random.default_rng(5)
    images = EnergyTestImages(
        flat(rng.normal(size=count)), {"shifted": flat(rng.normal(shift, size=count))}, noise(4, 0)
    )
    row = table(energy_rows(run_of(MeanPixel()), images))["test images against shifted", "energy"]
    truth = norm.cdf(shift / math.sqrt(2))
    drawn = [
        auroc(rng.normal(size=count), rng.normal(shift, size=count)).item() for _ in range(400)
    ]
    assert np.mean(drawn) == pytest.approx(truth, abs=0.003)
    assert row.std == pytest.approx(np.std(drawn), rel=0.25)
    assert abs(row.mean - truth) < 3 * row.std
    assert row.count == 100


def test_every_severity_of_every_task_is_scored():
    images = noise(12, 1)
    run = run_of(MeanPixel(square=True))
    rows = energy_rows(run, EnergyTestImages(images, {}, noise(8, 2)), seed=7, resamples=5)
    tasks = pretext_severities(run.config.tasks, 1, SIZE)
    assert len(rows) == len(tasks) * len(SEVERITIES) * len(CONTENDERS)
    found = table(rows)
    for name, levels in tasks.items():
        for severity, task in zip(SEVERITIES, levels, strict=True):
            corrupted = task(images, torch.Generator().manual_seed(7)).corrupted
            pixels = [part.square().mean(dim=(1, 2, 3)).tolist() for part in (images, corrupted)]
            variation = [
                (part.diff(dim=2).abs().sum((1, 2, 3)) + part.diff(dim=3).abs().sum((1, 2, 3)))
                for part in (images, corrupted)
            ]
            case = f"{name}, severity {severity}"
            assert found[case, "energy"].mean == pytest.approx(slow_auroc(*pixels), abs=1e-6)
            if name == "denoising":  # elsewhere equal images differ in their distance's last digit
                distances = [
                    slow_knn_distance(noise(8, 2).flatten(1), part.flatten(1), 10)
                    for part in (images, corrupted)
                ]
                expected = slow_auroc(*distances)
                assert found[case, "kNN distance"].mean == pytest.approx(expected)
            assert {row.contender for row in rows if row.case == case} == CONTENDERS
            expected = slow_auroc(*(part.round(decimals=3).tolist() for part in variation))
            assert found[case, "total variation"].mean == pytest.approx(expected, abs=0.02)


def test_images_that_are_the_same_can_not_be_told_apart():
    images = noise(9, 3)
    rows = energy_rows(
        run_of(MeanPixel()), EnergyTestImages(images, {"itself": images}, noise(5, 4)), resamples=5
    )
    for contender in CONTENDERS:
        assert table(rows)["test images against itself", contender].mean == pytest.approx(0.5)


def test_noise_on_black_images_is_told_apart_by_all_that_can():
    # Black images have no direction that the kNN distance could compare.
    rows = table(
        energy_rows(
            run_of(MeanPixel(square=True)),
            EnergyTestImages(torch.zeros(8, 1, *SIZE), {}, noise(4, 0)),
            resamples=4,
        )
    )
    for contender in ("energy", "file size", "total variation"):
        row = rows["denoising, severity 5", contender]
        assert (row.mean, row.std) == (1.0, 0.0)


def test_one_class_against_the_rest():
    labels = torch.tensor([0, 0, 0, 1, 1, 1, 2, 2, 2])
    levels = torch.tensor([1.0, 2, 3, 2, 4, 6, 1, 5, 9])
    test = flat(levels) + 0.3 * noise(9, 6)
    train, train_labels = noise(12, 7) + 1, torch.arange(12) % 3
    images = EnergyTestImages(test, {}, train, labels, train_labels)
    rows = table(energy_rows(run_of(MeanPixel()), images, resamples=2))
    found = test.mean(dim=(1, 2, 3))
    by_energy, by_distance = [], []
    for label in range(3):
        inside = labels == label
        by_energy.append(slow_auroc(found[inside].tolist(), found[~inside].tolist()))
        bank = train[train_labels == label].flatten(1)
        near, far = (
            slow_knn_distance(bank, test[part].flatten(1), 10) for part in (inside, ~inside)
        )
        by_distance.append(slow_auroc(near, far))
    for contender, values in (("energy", by_energy), ("kNN distance", by_distance)):
        row = rows[ONE_CLASS, contender]
        assert row.mean == pytest.approx(np.mean(values))
        assert row.std == pytest.approx(np.std(values, ddof=1))
        assert row.count == 3


def test_one_class_needs_labels_and_training_images():
    images = EnergyTestImages(noise(6, 0), {}, noise(6, 1), torch.arange(6) % 2)
    assert all(row.case != ONE_CLASS for row in energy_rows(run_of(MeanPixel()), images))
    images = EnergyTestImages(
        noise(6, 0), {}, noise(6, 1), torch.arange(6) % 2, torch.zeros(6, dtype=torch.int64)
    )
    with pytest.raises(UserError, match="class 1 of the test images has no training images"):
        energy_rows(run_of(MeanPixel()), images, resamples=2)


def test_same_seed_same_rows():
    images = EnergyTestImages(noise(10, 0), {"others": noise(10, 1)}, noise(6, 2))
    first, again, other = (
        energy_rows(run_of(MeanPixel(square=True)), images, seed=seed, resamples=5, batch_size=size)
        for seed, size in ((1, 256), (1, 256), (2, 256))
    )
    assert first == again
    assert first != other


def test_knn_distance_is_the_mean_of_the_nearest():
    bank, queries = noise(15, 1).flatten(1), noise(7, 2).flatten(1)
    for k in (1, 4, 99):
        expected = slow_knn_distance(bank, queries, k)
        assert knn_distance(bank, queries, k).tolist() == pytest.approx(expected, rel=1e-4)


@pytest.mark.parametrize("channels", [1, 2, 3, 5])
def test_file_size_is_that_of_a_png(channels):
    statistics = ChannelStatistics((0.5,) * channels, (0.25,) * channels)
    pixels = torch.randint(256, (3, channels, 12, 9), generator=torch.Generator().manual_seed(0))
    pixels[1] = 7
    found = file_sizes(statistics.normalize(pixels.to(torch.uint8)), statistics)
    for image, size in zip(pixels.to(torch.uint8), found.tolist(), strict=True):
        planes = image.permute(1, 2, 0) if channels == 3 else image.flatten(0, 1)
        buffer = io.BytesIO()
        Image.fromarray(planes.numpy()).save(buffer, "PNG")
        assert size == len(buffer.getvalue())
    assert found[1] < found[0]


def test_energies_that_are_not_finite():
    images = noise(5, 0)
    images[1] = float("nan")
    with pytest.raises(UserError, match="energies of 1 of 5 images are not finite"):
        energies(MeanPixel(), images, 2, "cpu")
    assert energies(MeanPixel(), images[2:], 2, "cpu").shape == (3,)


def test_a_corrupted_image_is_drawn_with_its_clean_one():
    images = noise(100, 8)
    rows = table(
        energy_rows(
            run_of(MeanPixel()), EnergyTestImages(images, {"others": noise(100, 9)}, noise(4, 0))
        )
    )
    # Sorting keeps the mean pixel, so any sample of pairs has an AUROC of 0.5 but for rounding.
    sorting = rows["sorting, severity 5", "energy"]
    assert sorting.mean == pytest.approx(0.5, abs=0.01)
    assert sorting.std < 0.01
    assert rows["test images against others", "energy"].std > 0.02
