import math

import numpy as np
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
    adaptation_rows,
)
from backfold.evaluation.restoration_choice import (
    ClassifiedImages,
    RestorationChoice,
    Restorer,
    choose_restoration,
    restore_some,
)
from backfold.evaluation.severities import SEVERITIES, corrupt_images, corruption_names
from backfold.evaluation.severities import severity_case as case_of

STATISTICS = ChannelStatistics((0.4, 0.5, 0.6), (0.2, 0.25, 0.3))
NUM_CLASSES, SIDE = 4, 12


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


class Fragile(nn.Module):
    """Looks at one corner only, which little noise is enough to change."""

    def __init__(self, templates):
        super().__init__()
        self.corners = templates[:, :, :2, :2]

    def forward(self, images):
        return -squares(images[:, :, :2, :2], self.corners)


@pytest.fixture(scope="module")
def templates():
    """One image a class, as unlike as two opposite halves can be: corners differ slightly."""
    pixels = torch.full((NUM_CLASSES, 3, SIDE, SIDE), 0.5)
    for label in range(NUM_CLASSES):
        pixels[label, :, :, :2] += 0.05 * label
        pixels[label, label % 3, :, 2:] = 0.9 if label < 3 else 0.1
    return STATISTICS.normalize(pixels)


def classified(templates, count):
    labels = torch.arange(count) % NUM_CLASSES
    return ClassifiedImages(templates[labels], labels, STATISTICS)


def table(rows):
    return {(row.case, row.contender, row.metric): row for row in rows}


@pytest.fixture(scope="module")
def restorer(templates):
    return Restorer(NearestTemplate(templates), Fragile(templates), batch_size=5)


ALL = RestorationChoice(1, 1.0, 0.0, -math.inf)


@pytest.fixture(scope="module")
def rows(restorer, templates):
    return adaptation_rows(restorer, ALL, classified(templates, 60), seed=3)


def test_a_perfect_energy_recovers_clean_accuracy(rows):
    found = table(rows)
    cases = [case_of(name, level) for name in corruption_names(3) for level in SEVERITIES]
    assert list(dict.fromkeys(row.case for row in rows)) == [CLEAN, *cases, HARD]
    assert found[CLEAN, UNCHANGED, "accuracy (%)"].mean == 100
    assert found[case_of("noise", 5), UNCHANGED, "accuracy (%)"].mean < 60
    for case in (CLEAN, *(case_of("noise", level) for level in SEVERITIES)):
        assert found[case, RESTORED, "accuracy (%)"].mean == 100
        assert found[case, RESTORED, SHARE].mean == 100


def test_accuracies_are_counted_rightly(rows, restorer, templates):
    found, test = table(rows), classified(templates, 60)
    hard = []
    for name in corruption_names(3):
        for level in SEVERITIES:
            images = corrupt_images(test.images, name, level, STATISTICS, 3)
            right = (restorer.classifier(images).argmax(dim=1) == test.labels).double()
            nearest = squares(images, templates).argmin(dim=1)
            right_after = (nearest == test.labels).double()
            expected = {
                UNCHANGED: 100 * right,
                RESTORED: 100 * right_after,
                DIFFERENCE: 100 * (right_after - right),
            }
            for contender, values in expected.items():
                row = found[case_of(name, level), contender, "accuracy (%)"]
                assert row.mean == pytest.approx(float(values.mean()))
                assert row.std == pytest.approx(float(values.std()) / 60**0.5, rel=0.25, abs=1e-9)
                assert row.count == 100
            if level >= 3:
                hard.append(expected)
    for contender in (UNCHANGED, RESTORED, DIFFERENCE):
        each = torch.stack([values[contender] for values in hard])
        row = found[HARD, contender, "accuracy (%)"]
        assert row.mean == pytest.approx(float(each.mean()))
        assert row.std == pytest.approx(float(each.mean(dim=0).std()) / 60**0.5, rel=0.25, abs=1e-9)


def test_the_step_that_restores_is_chosen(restorer, templates):
    held_out = classified(templates, 16)
    choice = choose_restoration(restorer, held_out, num_steps=(1,), step_sizes=(0.05, 1.0))
    assert (choice.num_steps, choice.step_size) == (1, 1.0)
    test = classified(templates, 24)
    found = table(adaptation_rows(restorer, choice, test, severities=(3,), seed=9))
    assert found[CLEAN, DIFFERENCE, "accuracy (%)"].mean == 0
    assert found[case_of("noise", 3), RESTORED, "accuracy (%)"].mean == 100
    assert found[HARD, DIFFERENCE, "accuracy (%)"].mean > 10


def test_a_useless_energy_is_not_used(restorer, templates):
    def away_from_all(images):
        return -squares(images, templates).sum(dim=1)

    useless = Restorer(away_from_all, restorer.classifier)
    choice = choose_restoration(useless, classified(templates, 12))
    assert choice == RestorationChoice()
    images = classified(templates, 12)
    rows = adaptation_rows(useless, choice, images, severities=(4,))
    idle = [row for row in rows if row.contender == DIFFERENCE or row.metric == SHARE]
    assert len(idle) == 14
    assert all(row.mean == row.std == 0 for row in idle)


def test_clean_images_are_left_alone_where_restoring_them_hurts(restorer, templates):
    spoiling = Restorer(SpoilsClean(templates), restorer.classifier)
    held_out = classified(templates, 16)
    options = {"num_steps": (1,), "step_sizes": (1.0,)}
    assert choose_restoration(spoiling, held_out, quantiles=(0.0,), **options).num_steps == 0
    choice = choose_restoration(spoiling, held_out, quantiles=(0.0, 0.5, 1.0), **options)
    assert choice.quantile > 0
    assert choice.threshold == pytest.approx(0, abs=1e-6)
    found = table(adaptation_rows(spoiling, choice, classified(templates, 20)))
    assert found[CLEAN, RESTORED, "accuracy (%)"].mean == 100
    assert found[CLEAN, RESTORED, SHARE].mean == 0
    assert found[case_of("noise", 5), RESTORED, SHARE].mean == 100
    assert found[HARD, DIFFERENCE, "accuracy (%)"].mean > 10
    at_any_price = choose_restoration(
        spoiling, held_out, quantiles=(0.0,), allowed_clean_loss=1.0, **options
    )
    assert at_any_price.num_steps == 1


def test_threshold_parts_the_images(restorer, templates):
    test = classified(templates, 12)
    images = corrupt_images(test.images, "occlusion", 4, STATISTICS, 0)
    images[3] = float("nan")
    found = restorer.energies(images)
    threshold = float(np.nanmedian(found.numpy()))
    some, chosen = restore_some(restorer, images, RestorationChoice(2, 0.5, 0.5, threshold))
    assert torch.equal(chosen, found > threshold)
    assert 0 < int(chosen.sum()) < 12
    nearest = templates[squares(images[chosen], templates).argmin(dim=1)]
    assert torch.allclose(some[chosen], nearest + (images[chosen] - nearest) / 4, atol=1e-5)
    assert torch.equal(some[~chosen].nan_to_num(), images[~chosen].nan_to_num())


def test_same_seed_same_rows_whatever_the_batch(restorer, templates):
    test = classified(templates, 18)
    other = Restorer(restorer.energy, restorer.classifier, batch_size=64)
    first = adaptation_rows(restorer, ALL, test, severities=(2,), seed=1)
    assert adaptation_rows(other, ALL, test, severities=(2,), seed=1) == first
    assert adaptation_rows(restorer, ALL, test, severities=(2,), seed=2) != first
    # No severity of 3 or more: no mean over them.
    assert all(row.case != HARD for row in first)


def test_the_classifier_keeps_its_mode(templates):
    classifier = nn.Sequential(nn.Flatten(), nn.Dropout(0.9), nn.Linear(3 * SIDE**2, 4)).train()
    restorer = Restorer(NearestTemplate(templates), classifier)
    first, again = restorer.classes(templates), restorer.classes(templates)
    assert torch.equal(first, again)
    assert classifier[1].training


@pytest.mark.parametrize(
    "options", [{"num_steps": ()}, {"num_steps": (0, 1)}, {"step_sizes": ()}, {"severities": ()}]
)
def test_nothing_to_choose_from(restorer, templates, options):
    with pytest.raises(UserError, match="nothing to choose from"):
        choose_restoration(restorer, classified(templates, 8), **options)


def test_energies_that_are_not_finite(restorer, templates):
    broken = Restorer(lambda images: images.sum(dim=(1, 2, 3)) * math.nan, restorer.classifier)
    with pytest.raises(UserError, match="energies of clean held-out images are not finite"):
        choose_restoration(broken, classified(templates, 8))
