"""How images are restored before they are classified, and the choice of it on held-out images."""

import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from itertools import product

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from backfold.data.statistics import ChannelStatistics
from backfold.errors import UserError
from backfold.evaluation.severities import corrupt_images, corruption_names
from backfold.restoration import EnergyFn, eval_mode, restore

HARD_SEVERITIES = (3, 4, 5)
NUM_STEPS = (1, 2, 4)
STEP_SIZES = (0.25, 0.5, 1.0)
QUANTILES = (0.0, 0.5, 0.8, 0.9, 0.95, 0.99)
ALLOWED_CLEAN_LOSS = 0.005

Flags = NDArray[np.bool_]


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
        for name in corruption_names(self.images.shape[1]):
            for severity in severities:
                images = corrupt_images(self.images, name, severity, self.statistics, seed)
                yield name, severity, images


@dataclass(frozen=True)
class Restorer:
    """A classifier and the energy that may restore its images, both on ``device``.

    Args:
        energy: images -> energies, (batch,).
        classifier: normalised images -> logits (batch, classes).
        batch_size: images at once.
        device: where both are.
    """

    energy: EnergyFn
    classifier: Callable[[Tensor], Tensor]
    batch_size: int = 256
    device: torch.device | str = "cpu"

    def classes(self, images: Tensor) -> Tensor:
        """Predicted classes, int64 (images,), on the CPU."""
        with eval_mode(self.classifier), torch.inference_mode():
            parts = [
                self.classifier(batch.to(self.device)).argmax(dim=1).cpu()
                for batch in images.split(self.batch_size)
            ]
        return torch.cat(parts)

    def energies(self, images: Tensor) -> Tensor:
        """Energies, (images,), on the CPU."""
        return self.descend(images, [0], 0.0)[0]

    def descend(
        self, images: Tensor, num_steps: Sequence[int], step_size: float
    ) -> tuple[Tensor, Tensor]:
        """Energies of the images, (images,), and the restored images after so many steps.

        The latter are (len(num_steps), images, channels, height, width); both are on the CPU.
        """
        energies, points = [], []
        for batch in images.split(self.batch_size):
            result = restore(self.energy, batch.to(self.device), max(num_steps), step_size)
            energies.append(result.energies[0].float().cpu())
            points.append(result.trajectory[list(num_steps)].cpu())
        return torch.cat(energies), torch.cat(points, dim=1)


@dataclass(frozen=True)
class RestorationChoice:
    """How images are restored before they are classified; by default not at all.

    Args:
        num_steps: K; 0 leaves every image alone.
        step_size: factor of the energy gradient.
        quantile: share of clean held-out images that look clean and are left alone; 0 restores all
            images.
        threshold: energy at this quantile; only images of a higher one are restored.
    """

    num_steps: int = 0
    step_size: float = 0.0
    quantile: float = 1.0
    threshold: float = math.inf


def choose_restoration(
    restorer: Restorer,
    held_out: ClassifiedImages,
    *,
    num_steps: Sequence[int] = NUM_STEPS,
    step_sizes: Sequence[float] = STEP_SIZES,
    quantiles: Sequence[float] = QUANTILES,
    severities: Sequence[int] = HARD_SEVERITIES,
    allowed_clean_loss: float = ALLOWED_CLEAN_LOSS,
    seed: int = 0,
) -> RestorationChoice:
    """The choice of the highest mean accuracy on corrupted held-out images.

    Every combination is tried on every corruption at these severities. Only those count that lose
    no more than ``allowed_clean_loss`` on the clean held-out images; between equals the first wins,
    and not to restore comes first.

    Args:
        restorer: energy and classifier.
        held_out: not the test images.
        num_steps: Ks to try, 1 or more each.
        step_sizes: to try, such as shares of the step size that the energy was trained with.
        quantiles: of clean energies up to which images are left alone, to try; 0 to 1, 0 restores
            all.
        severities: at which restoring should help.
        allowed_clean_loss: of accuracy, from 0 to 1.
        seed: of the corruptions.

    Raises:
        UserError: nothing to try, or held-out images whose energies are not finite.
    """
    if not (num_steps and step_sizes and quantiles and severities) or min(num_steps) < 1:
        raise UserError(
            f"there is nothing to choose from: numbers of steps {tuple(num_steps)}, step sizes "
            f"{tuple(step_sizes)}, quantiles {tuple(quantiles)}, severities {tuple(severities)}; "
            "give one or more of each, and 1 step or more"
        )

    def attempt(images: Tensor) -> _Attempts:
        return _attempt(restorer, images, held_out.labels, num_steps, step_sizes)

    clean = attempt(held_out.images)
    if not np.isfinite(clean.energies).all():
        raise UserError(
            "energies of clean held-out images are not finite; train with a lower learning rate, "
            "or take an earlier checkpoint"
        )
    hard = [attempt(images) for _, _, images in held_out.corrupted(severities, seed)]
    best, highest = RestorationChoice(), _mean([attempts.unchanged.mean() for attempts in hard])
    lowest_clean = clean.unchanged.mean() - allowed_clean_loss
    for steps, size, quantile in product(num_steps, step_sizes, quantiles):
        threshold = float(np.quantile(clean.energies, quantile)) if quantile > 0 else -math.inf
        choice = RestorationChoice(steps, size, quantile, threshold)
        accuracy = _mean([attempts.accuracy(choice) for attempts in hard])
        if accuracy > highest and clean.accuracy(choice) >= lowest_clean:
            best, highest = choice, accuracy
    return best


@dataclass(frozen=True)
class _Attempts:
    """Which of the same images are classified rightly, restored in several ways or not."""

    energies: NDArray[np.float64]
    unchanged: Flags
    restored: dict[tuple[int, float], Flags]

    def accuracy(self, choice: RestorationChoice) -> float:
        restored = self.restored[choice.num_steps, choice.step_size]
        return float(np.where(self.energies > choice.threshold, restored, self.unchanged).mean())


def _attempt(
    restorer: Restorer,
    images: Tensor,
    labels: Tensor,
    num_steps: Sequence[int],
    step_sizes: Sequence[float],
) -> _Attempts:
    restored = {}
    for size in step_sizes:
        energies, points = restorer.descend(images, num_steps, size)
        for steps, point in zip(num_steps, points, strict=True):
            restored[steps, size] = (restorer.classes(point) == labels).numpy()
    unchanged = (restorer.classes(images) == labels).numpy()
    return _Attempts(energies.double().numpy(), unchanged, restored)


def restore_some(
    restorer: Restorer, images: Tensor, choice: RestorationChoice
) -> tuple[Tensor, Tensor]:
    """The images, restored where the choice says so, and where: bool, (images,).

    Images whose energy is not finite are left alone.
    """
    if choice.num_steps == 0:
        return images, torch.zeros(len(images), dtype=torch.bool)
    chosen = restorer.energies(images) > choice.threshold
    result = images.clone()
    if chosen.any():
        _, points = restorer.descend(images[chosen], [choice.num_steps], choice.step_size)
        result[chosen] = points[0]
    return result, chosen


def _mean(values: Sequence[float]) -> float:
    return float(np.mean(values))
