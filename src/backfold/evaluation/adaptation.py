"""Whether restoring images first helps a classifier on corrupted ones.

How images are restored is chosen on validation images, which the classifier was not trained on. The
corruptions are the same there as in the test, so what is measured is how well the energy adapts to
known kinds of corruption in unknown images.
"""

import logging
import math
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from itertools import product
from typing import TYPE_CHECKING

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from backfold.data.statistics import ChannelStatistics
from backfold.errors import UserError
from backfold.evaluation.finetune import Classifier, best_recipe, fine_tune
from backfold.evaluation.images import Images
from backfold.evaluation.results import ACCURACY, OVER, PRETRAINED, Row, severity_case
from backfold.evaluation.severities import SEVERITIES, corrupt_images, corruption_names
from backfold.restoration import EnergyFn, eval_mode, restore

if TYPE_CHECKING:
    from backfold.evaluation.evaluate import Evaluation

LOGGER = logging.getLogger("backfold")
PROTOCOL, SHARE = "adaptation", "images restored (%)"
UNCHANGED, RESTORED = "as they are", "restored first"
DIFFERENCE = f"{RESTORED}{OVER}{UNCHANGED}"
CLEAN, HARD = "clean", "mean, severity 3 and above"
RESAMPLES, BATCH_SIZE = 100, 256

HARD_SEVERITIES = (3, 4, 5)
NUM_STEPS = (1, 2, 4)
STEP_SIZES = (0.25, 0.5, 1.0)  # shares of the step size that the energy was trained with
QUANTILES = (0.0, 0.5, 0.8, 0.9, 0.95, 0.99)
ALLOWED_CLEAN_LOSS = 0.005

Flags = NDArray[np.bool_]
Percents = NDArray[np.float64]


def adaptation(given: "Evaluation") -> list[Row]:
    """`adaptation_rows` of a classifier that was fine-tuned from the pretrained backbone.

    Raises:
        UserError: what fine-tuning or corrupting raises, energies that are not finite, or a class
            of the test images without training images.
    """
    run, parts, settings = given.subject.run, given.parts, given.settings
    assert run is not None
    recipe = best_recipe(given, PRETRAINED, parts.fit)
    backbone = given.subject.backbone(PRETRAINED, recipe.drop_path)
    classifier = fine_tune(backbone, parts.train, parts.fit, recipe, given.statistics, given.device)
    run.energy.to(given.device).eval()
    restorer = Restorer(run.energy, classifier, given.device)
    limit, seed = settings.test_images, settings.seed
    order = np.random.default_rng(seed).permutation(len(parts.validation))[:limit]
    drawn = parts.validation[torch.from_numpy(np.sort(order))].split(BATCH_SIZE)
    chosen_on = parts.train.batches([places.tolist() for places in drawn])
    validation = _classified(given, parts.train, chosen_on, classifier)
    sizes = [share * run.config.step_size for share in STEP_SIZES]
    choice = choose_restoration(restorer, validation, step_sizes=sizes, seed=seed)
    LOGGER.info(f"adaptation: {choice}")
    test = _classified(given, parts.test, [parts.test.load(limit, seed)], classifier)
    return adaptation_rows(restorer, choice, test, seed=seed)


def _classified(
    given: "Evaluation",
    part: Images,
    batches: Iterable[tuple[Tensor, Tensor]],
    classifier: Classifier,
) -> "ClassifiedImages":
    """Normalised images, with their labels as the classifier counts them."""
    loaded = [(given.statistics.normalize(images), places) for images, places in batches]
    images, places = (torch.cat(each) for each in zip(*loaded, strict=True))
    classes, labels = classifier.classes.cpu(), part.labels[places]
    unknown = labels[~torch.isin(labels, classes)]
    if len(unknown):
        raise UserError(
            f"class {int(unknown[0])} has no training images for adaptation's classifier; give "
            "some of each class"
        )
    return ClassifiedImages(images, torch.searchsorted(classes, labels), given.statistics)


@dataclass(frozen=True)
class ClassifiedImages:
    """Clean images and their classes.

    Args:
        images: (images, channels, height, width), normalised, of pixels that were in [0, 1].
        labels: int64, (images,), as the classifier counts its classes.
        statistics: of the normalisation.
    """

    images: Tensor
    labels: Tensor
    statistics: ChannelStatistics

    def corrupted(self, severities: Sequence[int], seed: int) -> Iterator[tuple[str, int, Tensor]]:
        """Name, severity and images of every corruption; see `corrupt_images`."""
        for name, severity in product(corruption_names(self.images.shape[1]), severities):
            yield name, severity, corrupt_images(self.images, name, severity, self.statistics, seed)


@dataclass(frozen=True)
class Restorer:
    """A classifier and the energy that may restore its images, both on ``device``.

    Args:
        energy: images -> energies, (batch,).
        classifier: normalised images -> logits (batch, classes).
        device: where both are.
    """

    energy: EnergyFn
    classifier: Callable[[Tensor], Tensor]
    device: torch.device

    def classes(self, images: Tensor) -> Tensor:
        """Predicted classes, int64 (images,), on the CPU."""
        with eval_mode(self.classifier), torch.inference_mode():
            parts = [
                self.classifier(batch.to(self.device)).argmax(dim=1).cpu()
                for batch in images.split(BATCH_SIZE)
            ]
        return torch.cat(parts)

    def descend(
        self, images: Tensor, num_steps: Sequence[int], step_size: float
    ) -> tuple[Tensor, Tensor]:
        """Energies of the images, (images,), and the restored images after so many steps.

        The latter are (len(num_steps), images, channels, height, width); both are on the CPU.
        """
        energies, points = [], []
        for batch in images.split(BATCH_SIZE):
            result = restore(self.energy, batch.to(self.device), max(num_steps), step_size)
            energies.append(result.energies[0].float().cpu())
            points.append(result.trajectory[list(num_steps)].cpu())
        return torch.cat(energies), torch.cat(points, dim=1)

    def restore_some(self, images: Tensor, choice: "RestorationChoice") -> tuple[Tensor, Tensor]:
        """The images, restored where the choice says so, and where: bool, (images,).

        Images whose energy is not finite are left alone.
        """
        if choice.num_steps == 0:
            return images, torch.zeros(len(images), dtype=torch.bool)
        chosen = self.descend(images, [0], 0.0)[0] > choice.threshold
        result = images.clone()
        if chosen.any():
            _, points = self.descend(images[chosen], [choice.num_steps], choice.step_size)
            result[chosen] = points[0]
        return result, chosen


@dataclass(frozen=True)
class RestorationChoice:
    """How images are restored before they are classified; by default not at all.

    Args:
        num_steps: K; 0 leaves every image alone.
        step_size: factor of the energy gradient.
        quantile: share of clean validation images that look clean and are left alone; 0 restores
            all images.
        threshold: energy at this quantile; only images of a higher one are restored.
    """

    num_steps: int = 0
    step_size: float = 0.0
    quantile: float = 1.0
    threshold: float = math.inf


def choose_restoration(
    restorer: Restorer,
    validation: ClassifiedImages,
    *,
    num_steps: Sequence[int] = NUM_STEPS,
    step_sizes: Sequence[float],
    quantiles: Sequence[float] = QUANTILES,
    seed: int = 0,
) -> RestorationChoice:
    """The choice of the highest mean accuracy on corrupted validation images.

    Every combination is tried on every corruption at severity 3 and above. Only those count that
    lose no more than `ALLOWED_CLEAN_LOSS` on the clean images; between equals the first wins, and
    not to restore comes first.

    Args:
        restorer: energy and classifier.
        validation: not the test images.
        num_steps: Ks to try, 1 or more each.
        step_sizes: to try.
        quantiles: to try, from 0 to 1; see `RestorationChoice`.
        seed: of the corruptions.

    Raises:
        UserError: images whose energies are not finite.
    """

    def attempt(images: Tensor) -> _Attempts:
        restored = {}
        for size in step_sizes:
            energies, points = restorer.descend(images, num_steps, size)
            for steps, point in zip(num_steps, points, strict=True):
                restored[steps, size] = (restorer.classes(point) == validation.labels).numpy()
        unchanged = (restorer.classes(images) == validation.labels).numpy()
        return _Attempts(energies.double().numpy(), unchanged, restored)

    clean = attempt(validation.images)
    if not np.isfinite(clean.energies).all():
        raise UserError(
            "energies of clean validation images are not finite; train with a lower learning rate, "
            "or take an earlier checkpoint"
        )
    hard = [attempt(images) for _, _, images in validation.corrupted(HARD_SEVERITIES, seed)]
    best, highest = RestorationChoice(), np.mean([attempts.unchanged.mean() for attempts in hard])
    lowest_clean = clean.unchanged.mean() - ALLOWED_CLEAN_LOSS
    for steps, size, quantile in product(num_steps, step_sizes, quantiles):
        threshold = float(np.quantile(clean.energies, quantile)) if quantile > 0 else -math.inf
        choice = RestorationChoice(steps, size, quantile, threshold)
        accuracy = np.mean([attempts.accuracy(choice) for attempts in hard])
        if accuracy > highest and clean.accuracy(choice) >= lowest_clean:
            best, highest = choice, accuracy
    return best


@dataclass(frozen=True)
class _Attempts:
    """Which of the same images are classified rightly, restored in several ways or not."""

    energies: NDArray[np.float64]
    unchanged: Flags
    restored: Mapping[tuple[int, float], Flags]

    def accuracy(self, choice: RestorationChoice) -> float:
        restored = self.restored[choice.num_steps, choice.step_size]
        return float(np.where(self.energies > choice.threshold, restored, self.unchanged).mean())


def adaptation_rows(
    restorer: Restorer, choice: RestorationChoice, test: ClassifiedImages, seed: int = 0
) -> list[Row]:
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
        seed: of the corruptions and the bootstrap samples.

    Raises:
        UserError: what corrupting raises.
    """
    count = len(test.images)
    samples = np.random.default_rng(seed).integers(count, size=(RESAMPLES, count))
    rows = list(_rows(CLEAN, _compare(restorer, choice, test.images, test.labels), samples))
    hard = []
    for name, severity, images in test.corrupted(SEVERITIES, seed):
        found = _compare(restorer, choice, images, test.labels)
        rows += _rows(severity_case(name, severity), found, samples)
        if severity in HARD_SEVERITIES:
            hard.append(found)
    return [*rows, *_rows(HARD, np.mean(hard, axis=0), samples)]


def _compare(
    restorer: Restorer, choice: RestorationChoice, images: Tensor, labels: Tensor
) -> Percents:
    """Per image, in percent: right as it is, right if restored first, restored at all; (3, n)."""
    restored, chosen = restorer.restore_some(images, choice)
    right = [restorer.classes(each) == labels for each in (images, restored)]
    found: Percents = 100 * torch.stack([*right, chosen]).double().numpy()
    return found


def _rows(case: str, found: Percents, samples: NDArray[np.int64]) -> Iterator[Row]:
    unchanged, restored, chosen = found
    for contender, metric, values in (
        (UNCHANGED, ACCURACY, unchanged),
        (RESTORED, ACCURACY, restored),
        (DIFFERENCE, ACCURACY, restored - unchanged),
        (RESTORED, SHARE, chosen),
    ):
        std = float(values[samples].mean(axis=1).std(ddof=1))
        yield Row(PROTOCOL, case, contender, metric, float(values.mean()), std, len(samples))
