import numpy as np
import pytest
import torch
from scipy.stats import norm
from sklearn.covariance import LedoitWolf
from sklearn.metrics import roc_auc_score
from torch import nn
from torch.nn import functional as F
from toys import ArraySource

from backfold.data.statistics import ChannelStatistics
from backfold.errors import UserError
from backfold.evaluation import energy as module
from backfold.evaluation.energy import ONE_CLASS, auroc, energy
from backfold.evaluation.evaluate import EvaluateSettings, Evaluation
from backfold.evaluation.images import Images, Parts
from backfold.evaluation.restoration import pretext_severities
from backfold.evaluation.subject import Subject
from backfold.pretext import Masking, Sorting
from backfold.training.config import PretrainConfig, TaskSettings
from backfold.training.run import Pretrained

STATISTICS, SIZE = ChannelStatistics((0.5,), (0.25,)), (6, 6)
TASKS = TaskSettings(Masking(mask_patch_size=2), Sorting(sorting_patch_size=2))


class Mean(nn.Module):
    """An energy that is the mean pixel, of either sign; its backbone keeps pixels."""

    backbone, sign = nn.Flatten(), 1

    def forward(self, images):
        return self.sign * images.mean(dim=(1, 2, 3))


def evaluate(model, test, train, labels=None, train_labels=None, **options):
    run = Pretrained(model, PretrainConfig(tasks=TASKS), STATISTICS, 1, SIZE, step=0)
    subject = Subject("toy", {}, lambda _: model, 1, SIZE, STATISTICS, run=run)
    given = Evaluation(EvaluateSettings(num_workers=0, **options), subject, torch.device("cpu"))
    parts = [
        Images(ArraySource(STATISTICS.denormalize(pixels).numpy(), known), subject)
        for pixels, known in ((train, train_labels), (test, labels))
    ]
    given.parts = Parts(*parts, *torch.zeros(2, 0))
    return {(row.case, row.contender): row for row in energy(given)}


def noise(count, seed):
    return torch.randn(count, 1, *SIZE, generator=torch.Generator().manual_seed(seed))


def flat(values):
    return torch.as_tensor(values, dtype=torch.float32)[:, None, None, None].expand(-1, 1, *SIZE)


def slow_auroc(usual, strange):
    return roc_auc_score([0] * len(usual) + [1] * len(strange), [*usual, *strange])


def slow_knn_distance(bank, queries):
    bank, queries = (F.normalize(rows.flatten(1)) for rows in (bank, queries))
    return (queries[:, None] - bank).norm(dim=2).sort(dim=1).values[:, :10].mean(dim=1)


def slow_mahalanobis(bank, queries):
    bank, queries = (rows.flatten(1).double().numpy() for rows in (bank, queries))
    return torch.from_numpy(LedoitWolf().fit(bank).mahalanobis(queries) ** 0.5)


def test_shifted_energies_have_the_closed_form_and_a_bent_one_the_opposite(tmp_path, monkeypatch):
    monkeypatch.setattr(module, "pretext_severities", lambda *_: {})
    shift, count, rng = 0.8, 400, np.random.default_rng(5)
    for number, value in enumerate(127.5 + 30 * rng.normal(shift, size=count)):
        np.save(tmp_path / f"{number}.npy", np.full(SIZE, value.clip(0, 255).round(), np.uint8))
    given = flat(4 * 30 / 255 * rng.normal(size=count)), noise(4, 0)
    case = f"test images against {tmp_path.name} (far)", "energy"
    row = evaluate(Mean(), *given, far=tmp_path, test_images=count)[case]
    truth = norm.cdf(shift / 2**0.5)
    drawn = auroc(rng.normal(size=(200, count)), rng.normal(shift, size=(200, count)))
    assert np.mean(drawn) == pytest.approx(truth, abs=0.004)
    assert row.std == pytest.approx(np.std(drawn), rel=0.25)
    assert abs(row.mean - truth) < 3 * row.std
    monkeypatch.setattr(Mean, "sign", -1)
    bent = evaluate(Mean(), *given, far=tmp_path, test_images=count)[case]
    assert bent.mean == pytest.approx(1 - row.mean)
    assert auroc(np.array([0, 1]), np.array([1, 1, 2])) == pytest.approx(5 / 6)  # ties count half


def test_every_severity_of_every_task_is_scored():
    images, train = noise(12, 1), noise(8, 2)
    rows = evaluate(Mean(), images, train, seed=7)
    run = Pretrained(None, PretrainConfig(tasks=TASKS), STATISTICS, 1, SIZE, step=0)
    tasks = pretext_severities(run)
    assert len(rows) == len(tasks) * 5
    scores = {
        "energy": lambda part: part.mean(dim=(1, 2, 3)),
        "kNN distance": lambda part: slow_knn_distance(train, part),
        "Mahalanobis distance": lambda part: slow_mahalanobis(train, part),
    }
    for case, task in tasks.items():
        corrupted = task(images, torch.Generator().manual_seed(7)).corrupted
        for contender, score in scores.items():
            expected = slow_auroc(*(score(part).round(decimals=3) for part in (images, corrupted)))
            assert rows[case, contender].mean == pytest.approx(expected, abs=0.05)
    # Sorting keeps the mean pixel, so any sample of pairs has an AUROC of 0.5 but for rounding.
    assert rows["sorting, severity 5", "energy"].std < 0.05


def test_one_class_against_the_rest():
    labels, train_labels = np.arange(9) // 3, np.arange(12) % 3
    test, train = flat([1, 2, 3, 2, 4, 6, 1, 5, 9]) + 0.3 * noise(9, 6), noise(12, 7) + 1
    rows = evaluate(Mean(), test, train, labels, train_labels)
    distances = {"kNN distance": slow_knn_distance, "Mahalanobis distance": slow_mahalanobis}
    for contender in ("energy", *distances):
        found, values = [], test.mean(dim=(1, 2, 3))
        for label in range(3):
            if contender in distances:
                values = distances[contender](train[train_labels == label], test)
            found.append(slow_auroc(values[labels == label], values[labels != label]))
        row = rows[ONE_CLASS, contender]
        assert (row.mean, row.std) == pytest.approx((np.mean(found), np.std(found, ddof=1)))
    with pytest.raises(UserError, match="class 1 of the test images has no training images"):
        evaluate(Mean(), test, train, labels, 0 * train_labels)
    with pytest.raises(UserError, match="energies of 1 of 2 images are not finite"):
        evaluate(Mean(), flat([torch.nan, 0]), train)
