"""Whether restoring images first helps a classifier on corrupted ones.

How images are restored is chosen on validation images, which the classifier was not trained on. The
corruptions are the same there as in the test, so what is measured is how well the energy adapts to
known kinds of corruption in unknown images.
"""

import logging
import math
from collections.abc import Callable, Sequence
from itertools import product
from typing import TYPE_CHECKING, NamedTuple

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Generator, Tensor
from torchvision.transforms.v2 import functional as TF

from backfold.data.statistics import ChannelStatistics
from backfold.errors import UserError
from backfold.evaluation.finetune import best_recipe, fine_tune
from backfold.evaluation.images import normalised, some
from backfold.evaluation.restoration import CHROMA_SHARES, FACTORS, SEVERITIES
from backfold.evaluation.results import ACCURACY, OVER, PRETRAINED, Row, severity_case
from backfold.pretext.pixels import down_and_up
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
CORRUPTIONS = {
    "noise": (0.04, 0.08, 0.12, 0.18, 0.26),  # deviation of Gaussian noise
    "blur": (0.5, 0.75, 1.0, 1.5, 2.0),  # Gaussian's sigma in pixels
    "low resolution": FACTORS,  # both ways bicubic
    "gray": CHROMA_SHARES,  # by Rec. 601; three channels only
    # Share of the image that a rectangle of its shape covers in the data set's mean colour.
    "occlusion": (0.05, 0.1, 0.2, 0.3, 0.45),
}
BLUR_RADIUS_SIGMAS, ROUNDING = 4, 1e-3


def adaptation(given: "Evaluation") -> list[Row]:
    """`adaptation_rows` of a classifier that was fine-tuned from the pretrained backbone."""
    run, parts, settings = given.subject.run, given.parts, given.settings
    assert run is not None
    recipe = best_recipe(given, PRETRAINED, parts.fit)
    classifier = fine_tune(given, PRETRAINED, parts.fit, recipe)
    classes, classified = classifier.classes.cpu(), []
    seed, tested = settings.seed, torch.arange(len(parts.test))
    for part, candidates in ((parts.train, parts.validation), (parts.test, tested)):
        places = some(candidates, settings.test_images, seed)
        images = torch.cat([batch for batch, _ in normalised(given, part, places)])
        labels = part.labels[places]
        unknown = labels[~torch.isin(labels, classes)]
        if len(unknown):
            raise UserError(
                f"class {int(unknown[0])} has no training images for adaptation's classifier; give "
                "some of each class"
            )
        classified.append((images, torch.searchsorted(classes, labels)))
    energy = run.energy.to(given.device).eval()
    restorer = Restorer(energy, classifier, given.statistics, given.device)
    sizes = [share * run.config.step_size for share in STEP_SIZES]
    choice = choose_restoration(restorer, *classified[0], step_sizes=sizes, seed=seed)
    LOGGER.info(f"adaptation: {choice}")
    return adaptation_rows(restorer, choice, *classified[1], seed=seed)


class RestorationChoice(NamedTuple):
    """How images are restored before they are classified; by default not at all."""

    num_steps: int = 0
    step_size: float = 0.0
    quantile: float = 1.0  # share of clean validation images that are left alone
    threshold: float = math.inf  # energy at this quantile; images of a higher one are restored


NEVER = RestorationChoice()


class Attempts(NamedTuple):
    """Energies (images,) and, by number of steps and step size, which images are then right."""

    energies: NDArray[np.float64]
    found: dict[tuple[int, float], NDArray[np.bool_]]

    def right(self, choice: RestorationChoice) -> NDArray[np.bool_]:
        """With those restored whose energy is high; images without an energy (nan) are not."""
        restored = self.found[choice.num_steps, choice.step_size]
        return np.where(self.energies > choice.threshold, restored, self.found[0, 0.0])


class Restorer(NamedTuple):
    """A classifier of normalised images and the energy that may restore them, both on a device."""

    energy: EnergyFn
    classifier: Callable[[Tensor], Tensor]
    statistics: ChannelStatistics
    device: torch.device

    def attempts(
        self, images: Tensor, labels: Tensor, num_steps: Sequence[int], sizes: Sequence[float]
    ) -> Attempts:
        """Classify normalised images as they are, and restored by these steps of each size."""
        energies, parts = [], []
        with eval_mode(self.classifier), torch.no_grad():
            for batch in images.to(self.device).split(BATCH_SIZE):
                logits = {(0, 0.0): self.classifier(batch)}
                for size in sizes:
                    result = restore(self.energy, batch, max(num_steps), size)
                    for steps in num_steps:
                        logits[steps, size] = self.classifier(result.trajectory[steps])
                energies.append(result.energies[0].cpu().double())
                parts.append({key: each.argmax(dim=1).cpu() for key, each in logits.items()})
        predicted = {key: torch.cat([part[key] for part in parts]) for key in parts[0]}
        right = {key: (classes == labels).numpy() for key, classes in predicted.items()}
        return Attempts(torch.cat(energies).numpy(), right)


def choose_restoration(
    restorer: Restorer,
    images: Tensor,
    labels: Tensor,
    *,
    num_steps: Sequence[int] = NUM_STEPS,
    step_sizes: Sequence[float],
    quantiles: Sequence[float] = QUANTILES,
    seed: int = 0,
) -> RestorationChoice:
    """The choice of the highest mean accuracy on corrupted validation images.

    Every combination is tried on every corruption at severity 3 and above of these images. Only
    those count that lose no more than `ALLOWED_CLEAN_LOSS` on the clean ones; between equals the
    first wins, and `NEVER` is first.
    """
    clean = restorer.attempts(images, labels, num_steps, step_sizes)
    if not np.isfinite(clean.energies).all():
        raise UserError(
            "energies of clean validation images are not finite; train with a lower learning rate, "
            "or take an earlier checkpoint"
        )
    hard = []
    for name, severity in product(corruption_names(images.shape[1]), HARD_SEVERITIES):
        corrupted = corrupt_images(images, name, severity, restorer.statistics, seed)
        hard.append(restorer.attempts(corrupted, labels, num_steps, step_sizes))
    best, highest = NEVER, np.mean([attempts.right(NEVER) for attempts in hard])
    lowest_clean = clean.right(NEVER).mean() - ALLOWED_CLEAN_LOSS
    for steps, size, quantile in product(num_steps, step_sizes, quantiles):
        threshold = float(np.quantile(clean.energies, quantile)) if quantile > 0 else -math.inf
        choice = RestorationChoice(steps, size, quantile, threshold)
        accuracy = np.mean([attempts.right(choice) for attempts in hard])
        if accuracy > highest and clean.right(choice).mean() >= lowest_clean:
            best, highest = choice, accuracy
    return best


def adaptation_rows(
    restorer: Restorer, choice: RestorationChoice, images: Tensor, labels: Tensor, seed: int = 0
) -> list[Row]:
    """Accuracy on clean and on corrupted test images, with and without restoring them first.

    `HARD` is the mean over all corruptions at severity 3 and above. The mean is that of all images,
    the spread that of bootstrap samples of them, which are the same for all rows.
    """
    samples = np.random.default_rng(seed).integers(len(images), size=(RESAMPLES, len(images)))

    def compared(images: Tensor) -> NDArray[np.float64]:
        """Per image, in percent: right as it is, right if restored first, restored at all."""
        attempts = restorer.attempts(images, labels, [choice.num_steps], [choice.step_size])
        chosen = attempts.energies > choice.threshold
        flags = [attempts.right(NEVER), attempts.right(choice), chosen]
        return 100 * np.stack(flags, dtype=np.float64)

    found, hard = {CLEAN: compared(images)}, []
    for name, severity in product(corruption_names(images.shape[1]), SEVERITIES):
        each = compared(corrupt_images(images, name, severity, restorer.statistics, seed))
        found[severity_case(name, severity)] = each
        hard += [each] if severity in HARD_SEVERITIES else []
    found[HARD] = np.mean(hard, axis=0)
    rows = []
    for case, (unchanged, restored, chosen) in found.items():
        for contender, metric, values in (
            (UNCHANGED, ACCURACY, unchanged),
            (RESTORED, ACCURACY, restored),
            (DIFFERENCE, ACCURACY, restored - unchanged),
            (RESTORED, SHARE, chosen),
        ):
            mean, std = float(values.mean()), float(values[samples].mean(axis=1).std(ddof=1))
            rows.append(Row(PROTOCOL, case, contender, metric, mean, std, len(samples)))
    return rows


def corruption_names(channels: int) -> tuple[str, ...]:
    """What `corrupt_images` can do to images of so many channels."""
    return tuple(name for name in CORRUPTIONS if name != "gray" or channels == 3)


def corrupt_images(
    images: Tensor, name: str, severity: int, statistics: ChannelStatistics, seed: int
) -> Tensor:
    """Corrupt normalised images: their pixels, which must be in [0, 1], stay in it.

    Blur and low resolution are counted in pixels, so large images suffer less from them.
    """
    level, generator = CORRUPTIONS[name][severity - 1], Generator().manual_seed(seed)
    height, width = images.shape[-2:]
    if name == "occlusion":
        places, inside = torch.rand(2, len(images), 1, generator=generator).to(images.device), []
        for length, place in zip((height, width), places, strict=True):
            extent = max(1, round(math.sqrt(level) * length))  # intervals grow around a place
            start = (place * (length - extent + 1)).floor()
            positions = torch.arange(length, device=images.device)
            inside.append((positions >= start) & (positions < start + extent))
        return images.masked_fill((inside[0][:, :, None] & inside[1][:, None, :])[:, None], 0.0)
    pixels = statistics.denormalize(images)
    lowest, highest = float(pixels.min()), float(pixels.max())
    if not -ROUNDING <= lowest <= highest <= 1 + ROUNDING:
        raise UserError(
            f"pixels lie between {lowest:.3g} and {highest:.3g}, and corruptions are defined for 0 "
            "to 1; give images of 8 bits, or values scaled to 0..1"
        )
    if name == "noise":
        pixels = pixels + level * torch.randn(pixels.shape, generator=generator).to(pixels)
    elif name == "blur":
        # The reflected border can't be wider than the image.
        radius = min(round(BLUR_RADIUS_SIGMAS * level), height - 1, width - 1)
        pixels = TF.gaussian_blur(pixels, [2 * radius + 1] * 2, [level, level])
    elif name == "low resolution":
        pixels = down_and_up(pixels, level)
    else:
        pixels = torch.lerp(pixels, TF.rgb_to_grayscale(pixels, 3), level)
    return statistics.normalize(pixels.clamp(0.0, 1.0))
