"""Whether an energy helps a classifier on corrupted test images, and what else would.

Images are restored first, all of them or the implausible ones; or a feature map of the classifier
descends the classifier's own energy, -log sum exp of its logits; or its norms adapt by entropy.
Every sample stays where its energy last fell, and the class that was guessed of the image as it is
may join the energy (Xiao et al., ICLR 2023). How each is done is chosen on validation images, which
the classifier was not trained on, under the test's kinds of corruption.
"""

import copy
import logging
import math
from collections import defaultdict
from collections.abc import Callable, Iterable
from itertools import product
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Generator, Tensor, nn
from torch.nn import functional as F
from torchvision.transforms.v2 import functional as TF

from backfold.batch_norm import batch_norms
from backfold.data.statistics import ChannelStatistics
from backfold.errors import UserError
from backfold.evaluation.finetune import best_recipe, fine_tune
from backfold.evaluation.images import normalised, some
from backfold.evaluation.restoration import CHROMA_SHARES, FACTORS, SEVERITIES
from backfold.evaluation.results import ACCURACY, OVER, PRETRAINED, Row, severity_case
from backfold.pretext.pixels import down_and_up
from backfold.restoration import EnergyFn, RestorationResult, energy_gradient, eval_mode, restore

if TYPE_CHECKING:
    from backfold.evaluation.evaluate import Evaluation

LOGGER = logging.getLogger("backfold")
PROTOCOL, SHARE = "adaptation", "images restored (%)"
UNCHANGED, RESTORED, IMPLAUSIBLE = "as they are", "restored first", "restored where implausible"
FEATURES, ENTROPY = "features moved", "norms adapted by entropy"
CLEAN, HARD = "clean", "mean, severity 3 and above"
RESAMPLES, BATCH_SIZE = 100, 256
HARD_SEVERITIES = (3, 4, 5)
NUM_STEPS = (1, 2, 4)
STEP_SIZES = (0.25, 0.5, 1.0)  # shares of the step size that the energy was trained with
GUIDES = (0.0, 30.0)  # weights of the guessed class's cross-entropy beside the energy
MOVES = (0.03, 0.1, 0.3)  # of features, in their root mean square
QUANTILES = (0.5, 0.8, 0.9, 0.95, 0.99)  # of clean energies: the thresholds that are tried
RATES = (1e-4, 1e-3, 1e-2)  # of Adam, around Tent's own 1e-3
ENTROPY_BATCH = 200
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

# The energy that descends, where it starts, and the logits of its points.
Descent = tuple[EnergyFn, Tensor, Callable[[Tensor], Tensor]]
Values = NDArray[np.floating[Any]]  # (images,)


def adaptation(given: "Evaluation") -> list[Row]:
    """`adaptation_rows` of a classifier that was fine-tuned from the pretrained backbone."""
    run, parts, settings = given.subject.run, given.parts, given.settings
    assert run is not None
    recipe = best_recipe(given, PRETRAINED, parts.fit)
    classifier = fine_tune(given, PRETRAINED, parts.fit, recipe)
    classes, classified = classifier.classes.cpu(), []
    tested = torch.arange(len(parts.test))
    for part, candidates in ((parts.train, parts.validation), (parts.test, tested)):
        places = some(candidates, settings.test_images, settings.seed)
        images = torch.cat([batch for batch, _ in normalised(given, part, places)])
        labels = part.labels[places]
        # Of classes that it did not learn none is right, as in `finetune`.
        known = torch.where(torch.isin(labels, classes), torch.searchsorted(classes, labels), -1)
        classified.append((images, known))
    energy = run.energy.to(given.device).eval()
    restorer = Restorer(energy, classifier, given.statistics, given.device)
    sizes = [share * run.config.step_size for share in STEP_SIZES]
    restored = [Way(*each) for each in product(NUM_STEPS, sizes, GUIDES)]
    ways = {RESTORED: restored, IMPLAUSIBLE: restored}
    if blocks := middle_blocks(classifier, classified[0][0][:1].to(given.device)):
        ways[FEATURES] = [Way(*each) for each in product(NUM_STEPS, MOVES, (0.0,), blocks)]
    ways[ENTROPY] = [Way(rate=rate) for rate in RATES]
    chosen = choose(restorer, *classified[0], ways, settings.seed)
    LOGGER.info("adaptation: %s", "; ".join(f"{name}: {way}" for name, way in chosen.items()))
    return adaptation_rows(restorer, chosen, *classified[1], settings.seed)


class Way(NamedTuple):
    """How images are classified; by default as they are."""

    num_steps: int = 0
    step_size: float = 0.0
    guide: float = 0.0
    block: int = 0  # what descends: the image, or the feature map behind so many blocks
    rate: float = 0.0  # of adapting the norms by entropy
    threshold: float = -math.inf  # images of no higher energy, or of none, stay as they are


AS_THEY_ARE = Way()


class Restorer(NamedTuple):
    """A classifier of normalised images and the energy that may restore them, both on a device."""

    energy: EnergyFn
    classifier: Callable[[Tensor], Tensor]
    statistics: ChannelStatistics
    device: torch.device

    def attempts(
        self, images: Tensor, labels: Tensor, ways: Iterable[Way]
    ) -> tuple[Values, Callable[[Way], NDArray[np.bool_]]]:
        """Energies (images,), and in each of these ways, or as they are, which images are right."""
        ways = dict.fromkeys(way._replace(threshold=-math.inf) for way in ways)
        descents: dict[Way, list[Way]] = {}  # those that differ in the number of steps alone
        for way in ways:
            if way.num_steps:
                descents.setdefault(way._replace(num_steps=0), []).append(way)
        parts, found = [], defaultdict[Way, list[Tensor]](list)
        with eval_mode(self.classifier), eval_mode(self.energy), torch.no_grad():
            for batch in images.to(self.device).split(BATCH_SIZE):
                guess = self.classifier(batch).argmax(dim=1)
                found[AS_THEY_ARE].append(guess)
                parts.append(self.energy(batch).cpu().double())
                for common, group in descents.items():
                    energy, start, read = self.descent(batch, guess, common)
                    most = max(way.num_steps for way in group)
                    result = restore(energy, start, most, common.step_size)
                    for way in group:
                        found[way].append(read(settled(result, way.num_steps)).argmax(dim=1))
        for way in ways:
            if way.rate:
                found[way] = [by_entropy(self.classifier, images.to(self.device), way.rate)]
        energies = torch.cat(parts).numpy()
        right = {way: (torch.cat(each).cpu() == labels).numpy() for way, each in found.items()}

        def right_in(way: Way) -> NDArray[np.bool_]:
            everywhere = right[way._replace(threshold=-math.inf)]
            return np.where(energies > way.threshold, everywhere, right[AS_THEY_ARE])

        return energies, right_in

    def descent(self, batch: Tensor, guess: Tensor, way: Way) -> Descent:
        """That of a batch, whose classes were guessed as it is."""
        if way.block:
            return _behind(self.classifier, way.block, batch)
        if not way.guide:
            return self.energy, batch, self.classifier

        def guided(points: Tensor) -> Tensor:
            doubt = F.cross_entropy(self.classifier(points), guess, reduction="none")
            return self.energy(points) + way.guide * doubt

        return guided, batch, self.classifier


def settled(result: RestorationResult, num_steps: int) -> Tensor:
    """Each image after so many steps, or before the first at which its energy does not fall."""
    falls = result.energies[1 : num_steps + 1] < result.energies[:num_steps]
    last = falls.long().cumprod(dim=0).sum(dim=0)
    return result.trajectory[last, torch.arange(len(last), device=last.device)]


def middle_blocks(classifier: Any, batch: Tensor) -> list[int]:
    """Behind how many blocks features may descend: half and all but one, if they give a tensor."""
    count = len(_blocks(classifier))
    numbers = sorted({count // 2, count - 1} - {0, -1})
    with eval_mode(classifier), torch.no_grad():
        return [n for n in numbers if isinstance(_output(classifier, n, batch), Tensor)]


def _blocks(classifier: Any) -> list[nn.Module]:
    """What timm's families keep under one of these names, lowest first; none of other modules."""
    backbone = classifier.backbone
    for name in ("blocks", "stages", "layers"):
        if isinstance(found := getattr(backbone, name, None), nn.Module):
            return list(found.children())
    return [part for name, part in backbone.named_children() if name.startswith("layer")]


def _output(classifier: Any, block: int, batch: Tensor) -> Any:
    """What so many blocks give; None where the last does not run once."""
    seen: list[Any] = []
    module = _blocks(classifier)[block - 1]
    with module.register_forward_hook(lambda _, __, output: seen.append(output)):
        classifier(batch)
    return seen[0] if len(seen) == 1 else None


def _behind(classifier: Any, block: int, batch: Tensor) -> Descent:
    """That of the feature map behind a block, as (batch, 1, 1, numbers)."""
    features = _output(classifier, block, batch)
    start = features.flatten(1)[:, None, None]

    def read(points: Tensor) -> Tensor:
        own = points.view_as(features)
        with _blocks(classifier)[block - 1].register_forward_hook(lambda *_: own):
            logits: Tensor = classifier(batch)
        return logits

    _, gradient = energy_gradient(lambda points: -read(points).logsumexp(dim=1), start)
    # A step of size 1 moves the features by as much as they are.
    scale = (start.square().mean() / gradient.square().mean().clamp(min=1e-30)).sqrt()
    return lambda points: -scale * read(points).logsumexp(dim=1), start, read


def by_entropy(classifier: Any, images: Tensor, rate: float) -> Tensor:
    """Classes predicted while norms adapt, int64 on the CPU (Tent; Wang et al., ICLR 2021).

    After each batch the norms' weights take a step that lowers the predictions' entropy.
    """
    adapted = copy.deepcopy(classifier).eval().requires_grad_(False)
    kinds = (nn.LayerNorm, nn.GroupNorm)
    norms = [*(m for m in adapted.modules() if isinstance(m, kinds)), *batch_norms(adapted)]
    for norm in batch_norms(adapted):
        norm.train()  # on the batch's own statistics
    weights = [weight.requires_grad_() for norm in norms for weight in norm.parameters()]
    optimizer, predicted = torch.optim.Adam(weights, lr=rate), []
    # Images may come class by class, and batches of one class alone would mislead it.
    order = torch.randperm(len(images), generator=Generator().manual_seed(0))
    for chosen in order.tensor_split(math.ceil(len(images) / ENTROPY_BATCH)):
        logits = adapted(images[chosen.to(images.device)])
        entropy = -(logits.softmax(dim=1) * logits.log_softmax(dim=1)).sum(dim=1).mean()
        optimizer.zero_grad()
        entropy.backward()
        optimizer.step()
        predicted.append(logits.argmax(dim=1).cpu())
    return torch.cat(predicted)[order.argsort()]


def choose(
    restorer: Restorer, images: Tensor, labels: Tensor, ways: dict[str, list[Way]], seed: int
) -> dict[str, Way]:
    """For each contender the way of the highest mean accuracy on corrupted validation images.

    That is at severity 3 and above. Only those count that lose no more than `ALLOWED_CLEAN_LOSS` on
    the clean ones; between equals the first wins, and to leave images as they are is first.
    """
    every = [way for each in ways.values() for way in each]
    energies, clean = restorer.attempts(images, labels, every)
    if not np.isfinite(energies).all():
        raise UserError(
            "energies of clean validation images are not finite; train with a lower learning rate, "
            "or take an earlier checkpoint"
        )
    hard = []
    for name, severity in product(corruption_names(images.shape[1]), HARD_SEVERITIES):
        corrupted = corrupt_images(images, name, severity, restorer.statistics, seed)
        hard.append(restorer.attempts(corrupted, labels, every)[1])
    thresholds = [-math.inf, *np.quantile(energies, QUANTILES).tolist()]
    above = [way._replace(threshold=each) for way, each in product(ways[IMPLAUSIBLE], thresholds)]
    lowest_clean = clean(AS_THEY_ARE).mean() - ALLOWED_CLEAN_LOSS
    chosen = {}
    for contender, tried in {**ways, IMPLAUSIBLE: above}.items():
        allowed = [AS_THEY_ARE, *(way for way in tried if clean(way).mean() >= lowest_clean)]
        chosen[contender] = max(
            allowed, key=lambda way: float(np.mean([right(way) for right in hard]))
        )
    return chosen


def adaptation_rows(
    restorer: Restorer, chosen: dict[str, Way], images: Tensor, labels: Tensor, seed: int
) -> list[Row]:
    """Accuracy on clean and on corrupted test images, as they are and in each contender's way.

    The mean is that of all images, the spread that of bootstrap samples, the same for all rows.
    """
    samples = np.random.default_rng(seed).integers(len(images), size=(RESAMPLES, len(images)))
    ways, implausible = {UNCHANGED: AS_THEY_ARE, **chosen}, chosen[IMPLAUSIBLE]

    def compared(images: Tensor) -> dict[tuple[str, str], Values]:
        """Of each image, in percent, by contender and metric."""
        energies, right = restorer.attempts(images, labels, chosen.values())
        restored = (energies > implausible.threshold) & (implausible != AS_THEY_ARE)
        found = {(name, ACCURACY): 100.0 * right(way) for name, way in ways.items()}
        return found | {(IMPLAUSIBLE, SHARE): 100.0 * restored}

    found, hard = {CLEAN: compared(images)}, []
    for name, severity in product(corruption_names(images.shape[1]), SEVERITIES):
        each = compared(corrupt_images(images, name, severity, restorer.statistics, seed))
        found[severity_case(name, severity)] = each
        hard += [each] if severity in HARD_SEVERITIES else []
    found[HARD] = {key: np.mean([each[key] for each in hard], axis=0) for key in hard[0]}
    rows = []
    for case, table in found.items():
        for name in chosen:
            gap = table[name, ACCURACY] - table[UNCHANGED, ACCURACY]
            table[f"{name}{OVER}{UNCHANGED}", ACCURACY] = gap
        for (contender, metric), values in table.items():
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
