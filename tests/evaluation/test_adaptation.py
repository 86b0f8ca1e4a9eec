import math

import pytest
import torch
from torch import nn

from backfold.data.statistics import ChannelStatistics
from backfold.errors import UserError
from backfold.evaluation.adaptation import (
    CLEAN,
    DIFFERENCE,
    HARD,
    RESTORED,
    SHARE,
    UNCHANGED,
    ClassifiedImages,
    RestorationChoice,
    Restorer,
    adaptation_rows,
    choose_restoration,
)
from backfold.evaluation.results import ACCURACY, severity_case
from backfold.evaluation.severities import SEVERITIES, corrupt_images, corruption_names

STATISTICS = ChannelStatistics((0.4, 0.5, 0.6), (0.2, 0.25, 0.3))
NUM_CLASSES, SIDE = 4, 12
CPU = torch.device("cpu")
ALL = RestorationChoice(1, 1.0, 0.0, -math.inf)


def squares(images, templates):
    """Squared distances, (images, templates)."""
    return (images[:, None] - templates).square().sum(dim=(2, 3, 4))


class NearestTemplate(nn.Module):
    """E = |x - nearest template|^2 / 2: a step of size 1 puts the template in its place."""

    def __init__(self, templates):
        super().__init__()
        self.templates = templates

    def forward(self, images):
        return squares(images, self.templates).amin(dim=1) / 2


class SpoilsClean(NearestTemplate):
    """The same energies, but the step from a clean image leads to another class's template."""

    def forward(self, images):
        distances = squares(images.detach(), self.templates)
        nearest = distances.argmin(dim=1)
        is_clean = distances.amin(dim=1) < 1e-3
        targets = self.templates[torch.where(is_clean, (nearest + 1) % NUM_CLASSES, nearest)]
        steps = (images - targets).square().sum(dim=(1, 2, 3)) / 2
        return steps - steps.detach() + distances.amin(dim=1) / 2


@pytest.fixture(scope="module")
def templates():
    """One image a class, as unlike as two opposite halves can be: corners differ slightly."""
    pixels = torch.full((NUM_CLASSES, 3, SIDE, SIDE), 0.5)
    for label in range(NUM_CLASSES):
        pixels[label, :, :, :2] += 0.05 * label
        pixels[label, label % 3, :, 2:] = 0.9 if label < 3 else 0.1
    return STATISTICS.normalize(pixels)


def fragile(templates):
    """A classifier that looks at one corner only, which little noise is enough to change."""
    return lambda images: -squares(images[:, :, :2, :2], templates[:, :, :2, :2])


def restorer_of(energy, templates):
    return Restorer(energy, fragile(templates), CPU)


def classified(templates, count):
    labels = torch.arange(count) % NUM_CLASSES
    return ClassifiedImages(templates[labels], labels, STATISTICS)


def table(rows):
    return {(row.case, row.contender, row.metric): row for row in rows}


def test_a_perfect_energy_recovers_clean_accuracy_and_rows_are_counted_rightly(templates):
    restorer, test = restorer_of(NearestTemplate(templates), templates), classified(templates, 60)
    found = table(adaptation_rows(restorer, ALL, test, seed=3))
    assert found[CLEAN, UNCHANGED, ACCURACY].mean == 100
    hard = []
    for name in corruption_names(3):
        for level in SEVERITIES:
            images = corrupt_images(test.images, name, level, STATISTICS, 3)
            right = (restorer.classifier(images).argmax(dim=1) == test.labels).double()
            after = (squares(images, templates).argmin(dim=1) == test.labels).double()
            expected = {UNCHANGED: right, RESTORED: after, DIFFERENCE: after - right}
            case = severity_case(name, level)
            for contender, values in expected.items():
                row = found[case, contender, ACCURACY]
                assert row.mean == pytest.approx(100 * float(values.mean()))
                error = 100 * float(values.std()) / 60**0.5
                assert row.std == pytest.approx(error, rel=0.25, abs=1e-9)
            assert found[case, RESTORED, SHARE].mean == 100
            if level >= 3:
                hard.append(expected)
    for contender in (UNCHANGED, RESTORED, DIFFERENCE):
        each = 100 * torch.stack([values[contender] for values in hard])
        assert found[HARD, contender, ACCURACY].mean == pytest.approx(float(each.mean()))
    assert found[severity_case("noise", 5), UNCHANGED, ACCURACY].mean < 60
    assert found[severity_case("noise", 5), RESTORED, ACCURACY].mean == 100


def test_the_step_that_restores_is_chosen_and_a_bent_energy_is_not_used(templates):
    held_out, test = classified(templates, 16), classified(templates, 24)
    good = restorer_of(NearestTemplate(templates), templates)
    choice = choose_restoration(good, held_out, num_steps=(1,), step_sizes=(0.05, 1.0))
    assert (choice.num_steps, choice.step_size) == (1, 1.0)
    found = table(adaptation_rows(good, choice, test, seed=9))
    assert found[CLEAN, DIFFERENCE, ACCURACY].mean == 0
    assert found[HARD, DIFFERENCE, ACCURACY].mean > 10
    bent = restorer_of(lambda images: -squares(images, templates).sum(dim=1), templates)
    choice = choose_restoration(bent, held_out, step_sizes=(0.25, 1.0))
    assert choice == RestorationChoice()
    rows = adaptation_rows(bent, choice, test)
    assert all(r.mean == r.std == 0 for r in rows if DIFFERENCE in r.contender or SHARE in r.metric)


def test_clean_images_are_left_alone_where_restoring_them_hurts(templates):
    spoiling, held_out = restorer_of(SpoilsClean(templates), templates), classified(templates, 16)
    options = {"num_steps": (1,), "step_sizes": (1.0,)}
    assert choose_restoration(spoiling, held_out, quantiles=(0.0,), **options).num_steps == 0
    choice = choose_restoration(spoiling, held_out, quantiles=(0.0, 0.5, 1.0), **options)
    assert choice.quantile > 0
    assert choice.threshold == pytest.approx(0, abs=1e-6)
    found = table(adaptation_rows(spoiling, choice, classified(templates, 20)))
    assert found[CLEAN, RESTORED, ACCURACY].mean == 100
    assert found[CLEAN, RESTORED, SHARE].mean == 0
    assert found[severity_case("noise", 5), RESTORED, SHARE].mean == 100
    assert found[HARD, DIFFERENCE, ACCURACY].mean > 10


def test_threshold_parts_the_images_and_broken_energies_are_said(templates):
    restorer = restorer_of(NearestTemplate(templates), templates)
    images = corrupt_images(classified(templates, 12).images, "occlusion", 4, STATISTICS, 0)
    images[3] = float("nan")
    found = restorer.energy(images)
    threshold = float(found.nanmedian())
    some, chosen = restorer.restore_some(images, RestorationChoice(2, 0.5, 0.5, threshold))
    assert torch.equal(chosen, found > threshold)
    assert 0 < int(chosen.sum()) < 12
    nearest = templates[squares(images[chosen], templates).argmin(dim=1)]
    assert torch.allclose(some[chosen], nearest + (images[chosen] - nearest) / 4, atol=1e-5)
    assert torch.equal(some[~chosen].nan_to_num(), images[~chosen].nan_to_num())
    broken = restorer_of(lambda images: images.sum(dim=(1, 2, 3)) * math.nan, templates)
    with pytest.raises(UserError, match="energies of clean validation images are not finite"):
        choose_restoration(broken, classified(templates, 8), step_sizes=(1.0,))
