import io
import math
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from PIL import Image
from scipy.stats import norm
from sklearn.metrics import roc_auc_score
from torch import nn

from backfold.data.statistics import ChannelStatistics
from backfold.errors import UserError
from backfold.evaluation.energy import ONE_CLASS, auroc, energy, file_sizes, knn_distance
from backfold.evaluation.evaluate import EvaluateSettings
from backfold.evaluation.images import Images, Parts
from backfold.evaluation.severities import SEVERITIES, pretext_severities
from backfold.pretext import Masking, Sorting
from backfold.training.config import PretrainConfig, TaskSettings
from backfold.training.pretrained import Pretrained

STATISTICS = ChannelStatistics((0.5,), (0.25,))
SIZE = (6, 6)
TASKS = TaskSettings(Masking(mask_patch_size=2), Sorting(sorting_patch_size=2))
SCORES = {"energy", "kNN distance", "file size", "total variation"}


class Source:
    name, class_names = "memory", ()

    def __init__(self, images, labels=None):
        self.images = images
        self.labels = None if labels is None else labels.numpy()

    def __len__(self):
        return len(self.images)

    def read(self, index, _=None):
        return STATISTICS.denormalize(self.images[index])


class Mean(nn.Module):
    """An energy that is the mean pixel, or square, of either sign; its backbone keeps pixels."""

    def __init__(self, power=1, sign=1):
        super().__init__()
        self.backbone, self.power, self.sign = nn.Flatten(), power, sign

    def forward(self, images):
        return self.sign * images.pow(self.power).mean(dim=(1, 2, 3))


def evaluate(model, test, train, labels=(None, None), **options):
    subject = SimpleNamespace(
        run=Pretrained(model, PretrainConfig(tasks=TASKS), STATISTICS, 1, SIZE, step=0),
        channels=1,
        image_size=SIZE,
        max_pixels=1000,
        max_broken_share=0.0,
    )
    sources = Source(train, labels[0]), Source(test, labels[1])
    parts = Parts(*(Images(s, subject) for s in sources), torch.arange(0), torch.arange(0))
    given = SimpleNamespace(
        settings=EvaluateSettings(protocols="energy", **options),
        subject=subject,
        device=torch.device("cpu"),
        num_workers=0,
        parts=parts,
    )
    return {(row.case, row.contender): row for row in energy(given)}


def noise(count, seed):
    return torch.randn(count, 1, *SIZE, generator=torch.Generator().manual_seed(seed))


def flat(values):
    return torch.as_tensor(values, dtype=torch.float32)[:, None, None, None].expand(-1, 1, *SIZE)


def slow_auroc(usual, strange):
    wins = [(b > a) + 0.5 * (a == b) for a in usual for b in strange]
    return sum(wins) / len(wins)


def slow_knn_distance(bank, queries, k):
    bank, queries = (
        [row / np.linalg.norm(row) for row in rows.flatten(1).numpy()] for rows in (bank, queries)
    )
    return [np.mean(sorted(np.linalg.norm(query - row) for row in bank)[:k]) for query in queries]


def test_auroc_counts_pairs():
    rng = np.random.default_rng(0)
    usual, strange = rng.integers(0, 6, (3, 17)), rng.integers(2, 9, (3, 11))
    labels = np.repeat([0, 1], [17, 11])
    pairs = list(zip(usual, strange, strict=True))
    expected = [roc_auc_score(labels, np.concatenate(pair)) for pair in pairs]
    assert auroc(usual, strange) == pytest.approx(expected)
    assert auroc(usual.T, strange.T, axis=0) == pytest.approx([slow_auroc(*pair) for pair in pairs])


def test_shifted_normal_energies_have_the_closed_form_and_a_bent_energy_says_the_opposite(tmp_path):
    shift, count = 0.8, 400
    rng = np.random.default_rng(5)
    (tmp_path / "shifted").mkdir()
    for number, value in enumerate(rng.normal(shift, size=count)):
        grey = np.full(SIZE, np.clip(127.5 + 30 * value, 0, 255).round(), dtype=np.uint8)
        Image.fromarray(grey).save(tmp_path / "shifted" / f"{number}.png")
    usual = flat(4 * 30 / 255 * rng.normal(size=count))
    options = {"far": tmp_path / "shifted", "test_images": count}
    case = "test images against shifted (far)", "energy"
    row = evaluate(Mean(), usual, noise(4, 0), **options)[case]
    truth = norm.cdf(shift / math.sqrt(2))
    drawn = [
        float(auroc(rng.normal(size=count), rng.normal(shift, size=count))) for _ in range(400)
    ]
    assert np.mean(drawn) == pytest.approx(truth, abs=0.003)
    assert row.std == pytest.approx(np.std(drawn), rel=0.25)
    assert abs(row.mean - truth) < 3 * row.std
    bent = evaluate(Mean(sign=-1), usual, noise(4, 0), **options)[case]
    assert bent.mean == pytest.approx(1 - row.mean)


def test_every_severity_of_every_task_is_scored():
    images, train = noise(12, 1), noise(8, 2)
    rows = evaluate(Mean(power=2), images, train, seed=7)
    tasks = pretext_severities(TASKS, 1, SIZE)
    assert len(rows) == len(tasks) * len(SEVERITIES) * len(SCORES)
    for name, levels in tasks.items():
        for severity, task in zip(SEVERITIES, levels, strict=True):
            corrupted = task(images, torch.Generator().manual_seed(7)).corrupted
            both = images, corrupted
            case = f"{name}, severity {severity}"
            pixels = [part.square().mean(dim=(1, 2, 3)).tolist() for part in both]
            assert rows[case, "energy"].mean == pytest.approx(slow_auroc(*pixels), abs=0.03)
            if name == "denoising":  # elsewhere equal images differ in their distance's last digit
                distances = [slow_knn_distance(train, part, 10) for part in both]
                assert rows[case, "kNN distance"].mean == pytest.approx(slow_auroc(*distances))
            variation = [
                part.diff(dim=2).abs().sum((1, 2, 3)) + part.diff(dim=3).abs().sum((1, 2, 3))
                for part in both
            ]
            expected = slow_auroc(*(part.round(decimals=3).tolist() for part in variation))
            assert rows[case, "total variation"].mean == pytest.approx(expected, abs=0.02)


def test_what_is_seen_on_black_images_and_what_sorting_can_not_change():
    black = evaluate(Mean(power=2), torch.zeros(8, 1, *SIZE), noise(4, 0))
    # Black images have no direction that the kNN distance could compare.
    for contender in SCORES - {"kNN distance"}:
        row = black["denoising, severity 5", contender]
        assert (row.mean, row.std) == (1.0, 0.0)
    # Sorting keeps the mean pixel, so any sample of pairs has an AUROC of 0.5 but for rounding.
    row = evaluate(Mean(), noise(100, 8), noise(4, 0))["sorting, severity 5", "energy"]
    assert row.mean == pytest.approx(0.5, abs=0.01)
    assert row.std < 0.01


def test_one_class_against_the_rest():
    labels, train_labels = torch.arange(9) // 3, torch.arange(12) % 3
    levels = torch.tensor([1.0, 2, 3, 2, 4, 6, 1, 5, 9])
    test, train = flat(levels) + 0.3 * noise(9, 6), noise(12, 7) + 1
    rows = evaluate(Mean(), test, train, (train_labels, labels))
    found = test.mean(dim=(1, 2, 3))
    by_energy, by_distance = [], []
    for label in range(3):
        inside = labels == label
        by_energy.append(slow_auroc(found[inside].tolist(), found[~inside].tolist()))
        bank = train[train_labels == label]
        distances = [slow_knn_distance(bank, test[part], 10) for part in (inside, ~inside)]
        by_distance.append(slow_auroc(*distances))
    for contender, values in (("energy", by_energy), ("kNN distance", by_distance)):
        row = rows[ONE_CLASS, contender]
        assert row.mean == pytest.approx(np.mean(values))
        assert row.std == pytest.approx(np.std(values, ddof=1))
        assert row.count == 3
    with pytest.raises(UserError, match="class 1 of the test images has no training images"):
        evaluate(Mean(), test, train, (torch.zeros_like(train_labels), labels))
    unlabelled = evaluate(Mean(), test, train, (train_labels, None))
    assert all(case != ONE_CLASS for case, _ in unlabelled)


def test_energies_that_are_not_finite():
    images = noise(5, 0)
    images[1] = float("nan")
    with pytest.raises(UserError, match="energies of 1 of 5 images are not finite"):
        evaluate(Mean(), images, noise(4, 0))


def test_knn_distance_is_the_mean_of_the_nearest():
    bank, queries = noise(15, 1).flatten(1), noise(7, 2).flatten(1)
    for k in (1, 4, 99):
        expected = slow_knn_distance(bank, queries, k)
        assert knn_distance(bank, queries, k).tolist() == pytest.approx(expected, rel=1e-4)


@pytest.mark.parametrize("channels", [1, 2, 3])
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
