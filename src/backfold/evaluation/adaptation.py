"""Whether restoring images first helps a classifier on corrupted ones.

How images are restored is chosen on held-out images: neither test images nor, if possible, those
that the classifier was trained on. The corruptions are the same there as in the test, so what is
measured is how well the energy adapts to known kinds of corruption in unknown images.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray
from torch import Tensor

from backfold.evaluation.measures import MeasureRow
from backfold.evaluation.restoration_choice import (
    HARD_SEVERITIES,
    ClassifiedImages,
    RestorationChoice,
    Restorer,
    restore_some,
)
from backfold.evaluation.severities import SEVERITIES, severity_case

PROTOCOL, ACCURACY, SHARE = "adaptation", "accuracy (%)", "images restored (%)"
UNCHANGED, RESTORED, DIFFERENCE = "as they are", "restored first", "difference"
CLEAN, HARD = "clean", "mean, severity 3 and above"
RESAMPLES = 100

Percents = NDArray[np.float64]


def adaptation_rows(
    restorer: Restorer,
    choice: RestorationChoice,
    test: ClassifiedImages,
    *,
    severities: Sequence[int] = SEVERITIES,
    seed: int = 0,
    resamples: int = RESAMPLES,
) -> list[MeasureRow]:
    """Accuracy on clean and on corrupted test images, with and without restoring them first.

    Cases are `CLEAN`, "noise, severity 3" and so on, and `HARD`: the mean over all corruptions at
    severity 3 and above. Contenders are `UNCHANGED`, `RESTORED` and their `DIFFERENCE`, for which
    both are judged on the same images. The mean is that of all images, the spread that of bootstrap
    samples of them, which are the same for all rows. Rows of `SHARE` say how many images the choice
    restores.

    Args:
        restorer: energy and classifier.
        choice: see `choose_restoration`.
        test: images that neither training nor the choice has seen.
        severities: at which to corrupt.
        seed: of the corruptions and the bootstrap samples.
        resamples: bootstrap samples, 2 or more.

    Raises:
        UserError: what corrupting raises.
    """
    count = len(test.images)
    samples = np.random.default_rng(seed).integers(count, size=(resamples, count))
    clean = _compare(restorer, choice, test.images, test.labels)
    rows = clean.rows(CLEAN, samples)
    hard = []
    for name, severity, images in test.corrupted(severities, seed):
        found = _compare(restorer, choice, images, test.labels)
        rows += found.rows(severity_case(name, severity), samples)
        if severity in HARD_SEVERITIES:
            hard.append(found)
    return rows + (_average(hard).rows(HARD, samples) if hard else [])


@dataclass(frozen=True)
class _Comparison:
    """For each image, in percent: right as it is, right if restored first, and restored at all."""

    unchanged: Percents
    restored: Percents
    chosen: Percents

    def rows(self, case: str, samples: NDArray[np.int64]) -> list[MeasureRow]:
        values = (
            (UNCHANGED, ACCURACY, self.unchanged),
            (RESTORED, ACCURACY, self.restored),
            (DIFFERENCE, ACCURACY, self.restored - self.unchanged),
            (RESTORED, SHARE, self.chosen),
        )
        return [
            MeasureRow(
                PROTOCOL,
                case,
                contender,
                metric,
                mean=float(each.mean()),
                std=float(each[samples].mean(axis=1).std(ddof=1)),
                count=len(samples),
            )
            for contender, metric, each in values
        ]


def _compare(
    restorer: Restorer, choice: RestorationChoice, images: Tensor, labels: Tensor
) -> _Comparison:
    restored, chosen = restore_some(restorer, images, choice)
    right = [restorer.classes(each) == labels for each in (images, restored)]
    return _Comparison(*(100 * flags.double().numpy() for flags in (*right, chosen)))


def _average(comparisons: Sequence[_Comparison]) -> _Comparison:
    return _Comparison(
        np.mean([each.unchanged for each in comparisons], axis=0),
        np.mean([each.restored for each in comparisons], axis=0),
        np.mean([each.chosen for each in comparisons], axis=0),
    )
