"""Fine-tuning a backbone with a linear head, and training the same from scratch.

Both go through the same function: the same recipe, the same trials of learning rates, the same
choice between once and three times the steps, all on the same validation images.
"""

import logging
import math
from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import partial
from types import SimpleNamespace
from typing import TYPE_CHECKING, Any, Literal

import torch
from timm.models import group_parameters
from timm.optim import param_groups_layer_decay, param_groups_weight_decay
from timm.scheduler import CosineLRScheduler
from timm.utils import ModelEmaV3
from torch import Tensor, nn
from torch.nn import functional as F
from torch.optim import AdamW
from torchvision.transforms import v2

from backfold.backbone import feature_map
from backfold.errors import UserError
from backfold.evaluation.images import Images, label_case
from backfold.evaluation.results import BEFORE, PRETRAINED, SCRATCH, Row, accuracy_rows
from backfold.evaluation.seeding import seeded
from backfold.restoration import eval_mode

if TYPE_CHECKING:
    from backfold.evaluation.evaluate import Evaluation

LOGGER = logging.getLogger("backfold")
LEARNING_RATE_FACTORS = (0.3, 1.0, 3.0)
SHARES = "warmup_share random_erasing label_smoothing drop_path ema_decay"
RANGES: tuple[tuple[str, Callable[[Any], bool], str], ...] = (
    ("epochs min_steps weight_decay mixup cutmix seed", lambda v: 0 <= v < math.inf, "0 or more"),
    (SHARES, lambda v: 0 <= v < 1, "0 or more, below 1"),
    ("crop_scale layer_decay", lambda v: 0 < v <= 1, "a number above 0, at most 1"),
    ("base_lr", lambda v: 0 < v < math.inf, "a number above 0"),
    ("longer", lambda v: v >= 1, "1 or more"),
    ("batch_size", lambda v: v >= 2, "2 or more"),
    ("precision", lambda v: v in ("32-true", "bf16-mixed"), "32-true or bf16-mixed"),
)
HEAD_STD = 0.01
BACKBONE = "backbone."
BATCH_SIZE = 256
CROP_RATIO = (3 / 4, 4 / 3)


class DivergedError(UserError):
    """The loss of a fine-tuning is not finite."""


@dataclass(frozen=True)
class FineTuning:
    """AdamW with a linear warm-up and a cosine down to 0, and timm's regularisers.

    Args:
        epochs: passes over the labelled images.
        min_steps: optimizer steps at least, where epochs of few images would be fewer.
        longer: times the steps that is tried, too, at the best learning rate; 1 is off.
        batch_size: images in a step, always: few images come several times, each time augmented
            anew.
        base_lr: the head's learning rate for a batch of 256; lr = base_lr x batch_size / 256.
        layer_decay: factor of the learning rate from each layer to the one below; 1 is off.
        weight_decay: of all weights but norms and biases.
        warmup_share: of the steps.
        crop_scale: smallest area of a random part that is scaled to the image size, as a share of
            the image's; 1 is off.
        horizontal_flip: mirror half of the images.
        random_erasing: share of the images in which a rectangle becomes noise; 0 is off.
        mixup: parameter of the beta distribution of the weights; 0 is off.
        cutmix: parameter of the beta distribution of the areas; 0 is off.
        label_smoothing: share of the label that is spread over all classes; 0 is off.
        drop_path: highest rate at which residual branches are left out; 0 is off.
        ema_decay: of the moving average of the weights, which is then what is returned; it rises to
            this as 1 - (1 + step)^(-2/3). 0 is off.
        precision: "32-true" or "bf16-mixed".
        seed: of fresh weights, the head, the order, augmentation and drop path.

    Raises:
        UserError: a value outside its range.
    """

    epochs: float = 20.0
    min_steps: int = 200
    longer: int = 3
    batch_size: int = 64
    base_lr: float = 4e-3
    layer_decay: float = 0.75
    weight_decay: float = 0.05
    warmup_share: float = 0.1
    crop_scale: float = 0.5
    horizontal_flip: bool = True
    random_erasing: float = 0.1
    mixup: float = 0.2
    cutmix: float = 0.0
    label_smoothing: float = 0.1
    drop_path: float = 0.1
    ema_decay: float = 0.999
    precision: Literal["32-true", "bf16-mixed"] = "32-true"
    seed: int = 0

    def __post_init__(self) -> None:
        for names, is_valid, wanted in RANGES:
            for name in names.split():
                value = getattr(self, name)
                if not is_valid(value):
                    raise UserError(f"fine-tuning: {name} is {value!r}; give {wanted}")

    def num_steps(self, num_images: int) -> int:
        """Optimizer steps on so many labelled images: 1 or more."""
        return max(1, self.min_steps, math.ceil(self.epochs * num_images / self.batch_size))


class Classifier(nn.Module):
    """Averages the backbone's feature map over the positions, norms it and classifies it.

    Args:
        backbone: any module that `backfold.backbone.feature_map` takes.
        classes: (classes,) whole numbers, rising: the labels that the logits stand for.
        image_shape: (channels, height, width).
    """

    classes: Tensor

    def __init__(
        self, backbone: nn.Module, classes: Tensor, image_shape: tuple[int, int, int]
    ) -> None:
        super().__init__()
        self.backbone = backbone
        with eval_mode(backbone), torch.no_grad():
            num_features = feature_map(backbone, torch.zeros(2, *image_shape)).shape[-1]
        self.norm = nn.LayerNorm(num_features)
        self.head = nn.Linear(num_features, len(classes))
        nn.init.trunc_normal_(self.head.weight, std=HEAD_STD)
        nn.init.zeros_(self.head.bias)
        self.register_buffer("classes", classes)

    def forward(self, images: Tensor) -> Tensor:
        """Logits (batch, classes) of normalised images (batch, channels, height, width)."""
        logits: Tensor = self.head(self.norm(feature_map(self.backbone, images).mean(dim=1)))
        return logits

    def group_matcher(self, coarse: bool = False) -> Callable[[str], int]:
        """From a parameter's name to its layer, counted from the images; see timm's models.

        The head is where timm's own classifier would be.
        """
        backbone: Any = self.backbone
        known = getattr(backbone, "pretrained_cfg", None) or {}
        head = known.get("classifier") or "head"
        own_head = f"{head if isinstance(head, str) else head[0]}.weight"
        names = {**dict(backbone.named_parameters()), own_head: None}
        listed: Any = SimpleNamespace(named_parameters=names.items)
        layers = group_parameters(listed, backbone.group_matcher(coarse=coarse), reverse=True)
        of, top = {BACKBONE + name: layers[name] for name in layers}, max(layers.values())
        return lambda name: of.get(name, top)


def fine_tune(
    given: "Evaluation", contender: str, places: Tensor, settings: FineTuning
) -> Classifier:
    """Train a contender's backbone with a new head; returns both in eval mode on the device.

    Nothing but the arguments decides the result; on one CPU it is the same bit for bit. The global
    random generators are left as they were.

    Args:
        given: the training images, how they are normalised, the device, and the weights.
        contender: whose weights training starts from.
        places: int64, of the training images that are learned from.
        settings: the recipe.

    Raises:
        UserError: no images, or none with labels.
        DivergedError: the loss is not finite.
    """
    if not len(places):
        raise UserError("fine-tuning: there are 0 images to learn from; give one or more")
    images, device = given.parts.train, given.device
    classes, steps = torch.unique(images.labels[places]), settings.num_steps(len(places))
    half, decay = settings.precision == "bf16-mixed", settings.ema_decay
    with seeded(settings.seed, device):
        backbone = given.subject.backbone(contender, settings.drop_path).train()
        classifier = Classifier(backbone, classes, images.shape).to(device)
        optimizer, schedule = build_optimizer(classifier, settings, steps)
        average = ModelEmaV3(classifier, decay, use_warmup=True) if decay else None
        batches = places[batch_indices(len(places), settings.batch_size, steps)]
        loaded = images.batches(batches.tolist())
        for step, (chosen, (batch, _)) in enumerate(zip(batches, loaded, strict=True)):
            schedule.step_update(step)
            normalised = given.statistics.normalize(batch.to(device, non_blocking=True))
            labels = torch.searchsorted(classifier.classes, images.labels[chosen].to(device))
            augmented, targets = augment(normalised, labels, len(classes), settings)
            with torch.autocast(device.type, torch.bfloat16, enabled=half):
                logits = classifier(augmented).float()
            loss = F.cross_entropy(logits, targets, label_smoothing=settings.label_smoothing)
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            if average is not None:
                average.update(classifier, step=step + 1)
    if not torch.isfinite(loss):
        raise DivergedError(
            f"fine-tuning diverged: its last loss is {loss.item():g}; lower base_lr "
            f"({settings.base_lr:g})"
        )
    tuned: Classifier = classifier if average is None else average.module
    return tuned.eval()


def augment(
    images: Tensor, labels: Tensor, num_classes: int, settings: FineTuning
) -> tuple[Tensor, Tensor]:
    """Crop, flip, erase and mix a batch, as the settings say; the images may be written over.

    Args:
        images: normalised, (batch, channels, height, width).
        labels: int64, (batch,), below ``num_classes``.
        num_classes: the targets, where images are mixed, are (batch, num_classes).
        settings: the recipe; where mixup and cutmix are both on, a batch gets one of them.
    """
    images = crop_and_flip(images, settings.crop_scale, settings.horizontal_flip)
    erase = v2.RandomErasing(p=1.0, value="random")  # type: ignore[arg-type]  # as documented
    for place in (torch.rand(len(images)) < settings.random_erasing).nonzero():
        images[place] = erase(images[place])
    kinds = ((v2.MixUp, settings.mixup), (v2.CutMix, settings.cutmix))
    mixes = [kind(alpha=alpha, num_classes=num_classes) for kind, alpha in kinds if alpha]
    mixed: tuple[Tensor, Tensor] = v2.RandomChoice(mixes or [v2.Identity()])(images, labels)
    return mixed


def crop_and_flip(images: Tensor, smallest_area: float, horizontal_flip: bool) -> Tensor:
    """Enlarge a random part of each of (batch, channels, height, width), and mirror half of them.

    The part's area is uniform in the given share to 1, its aspect log-uniform in 3/4 to 4/3 of the
    image's; a side that would be longer than the image's is as long. A share of 1 leaves images
    whole. Sampling is bilinear. Draws from the generator of the images' device.
    """
    if smallest_area >= 1.0 and not horizontal_flip:
        return images
    uniform = partial(torch.rand, len(images), device=images.device)
    width = height = torch.ones(len(images), device=images.device)
    if smallest_area < 1.0:
        area = smallest_area + (1 - smallest_area) * uniform()
        low, high = map(math.log, CROP_RATIO)
        ratio = torch.exp(low + (high - low) * uniform())
        width, height = ((area * each).sqrt().clamp(max=1.0) for each in (ratio, 1 / ratio))
    if horizontal_flip:
        width = torch.where(uniform() < 0.5, -width, width)
    # In affine_grid's coordinates the image goes from -1 to 1.
    left, top = ((1 - side.abs()) * (2 * uniform() - 1) for side in (width, height))
    zero = torch.zeros_like(width)
    transform = torch.stack([width, zero, left, zero, height, top], dim=1).view(-1, 2, 3)
    grid = F.affine_grid(transform, list(images.shape), align_corners=False)
    return F.grid_sample(images, grid.to(images.dtype), padding_mode="border", align_corners=False)


def build_optimizer(
    classifier: Classifier, settings: FineTuning, steps: int
) -> tuple[AdamW, CosineLRScheduler]:
    """AdamW in groups by layer, and its schedule: ``step_update(step)`` before each step.

    The learning rate is one factor ``layer_decay`` less for each layer below the head. What counts
    as a layer is what timm's ``group_matcher`` says; a backbone without one has no layers. Norms,
    biases and what the backbone exempts have no weight decay.
    """
    backbone, layer_decay = classifier.backbone, settings.layer_decay
    exempt = {BACKBONE + name for name in getattr(backbone, "no_weight_decay", set)()}
    if layer_decay < 1.0 and not hasattr(backbone, "group_matcher"):
        LOGGER.warning(
            f"layer_decay {layer_decay:g} has no effect: {type(backbone).__name__} does not say "
            "what its layers are"
        )
        layer_decay = 1.0
    grouped: Any = param_groups_weight_decay
    if layer_decay < 1.0:
        grouped = partial(param_groups_layer_decay, layer_decay=layer_decay)
    groups = grouped(classifier, settings.weight_decay, no_weight_decay_list=exempt)
    optimizer = AdamW(groups, lr=settings.base_lr * settings.batch_size / 256)
    warmup = min(round(settings.warmup_share * steps), steps - 1)
    schedule = CosineLRScheduler(
        optimizer,
        t_initial=steps - warmup,
        warmup_t=warmup,
        warmup_lr_init=optimizer.defaults["lr"] * 1e-3,
        warmup_prefix=True,
        t_in_epochs=False,
    )
    return optimizer, schedule


def batch_indices(count: int, batch_size: int, steps: int) -> Tensor:
    """Which of ``count`` images each step takes, (steps, batch): all once before any come again."""
    needed = steps * batch_size
    passes = [torch.randperm(count) for _ in range(math.ceil(needed / count))]
    return torch.cat(passes)[:needed].view(steps, batch_size)


def predict(given: "Evaluation", classifier: Classifier, images: Images, places: Tensor) -> Tensor:
    """The likeliest label of the images at these places, int64 (places,), on the CPU."""
    parts = [part.tolist() for part in places.split(BATCH_SIZE)]
    with eval_mode(classifier), torch.inference_mode():
        found = [
            classifier(given.statistics.normalize(batch.to(given.device))).argmax(dim=1)
            for batch, _ in images.batches(parts)
        ]
    return classifier.classes[torch.cat(found)].cpu()


def finetune(given: "Evaluation") -> list[Row]:
    """The whole backbone trained with all labels and with few; beside it the same from scratch.

    The recipe is chosen once for each number of labels, on the first draw. Draw d has the settings'
    seed plus d.
    """
    rows, parts, settings, subject = [], given.parts, given.settings, given.subject
    contenders = {PRETRAINED: PRETRAINED}  # names in the rows, and the weights they start from
    if BEFORE in subject.weights and subject.scratch != BEFORE:
        contenders[BEFORE] = BEFORE
    if subject.scratch is not None:
        contenders[SCRATCH] = subject.scratch
    for count, draws in parts.each(settings.label_counts(), settings.draws, settings.seed):
        learned = [torch.arange(len(parts.train))] if count is None else draws
        correct: dict[str, list[Tensor]] = {name: [] for name in contenders}
        notes = {}
        for name, contender in contenders.items():
            recipe = best_recipe(given, contender, draws[0])
            steps = recipe.num_steps(len(learned[0]))
            notes[name] = f"base_lr {recipe.base_lr:g}, {steps} steps"
            LOGGER.info("fine-tuning, %s, %s: %s", name, label_case(count), notes[name])
            for draw, places in enumerate(learned):
                own = replace(recipe, seed=recipe.seed + draw)
                tuned = fine_tune(given, contender, places, own)
                found = predict(given, tuned, parts.test, torch.arange(len(parts.test)))
                correct[name].append(found == parts.test.labels)
        rows += accuracy_rows("finetune", label_case(count), correct, notes)
    return rows


def best_recipe(given: "Evaluation", contender: str, places: Tensor) -> FineTuning:
    """The learning rate, and then the number of steps, that are best on the validation images.

    Random weights have no layer-wise decay: their lower layers have everything to learn. See
    `fine_tune`.

    Raises:
        DivergedError: at every learning rate.
    """
    recipe, factors = given.settings.finetuning, given.settings.rate_factors
    if contender == given.subject.scratch:
        recipe = replace(recipe, layer_decay=1.0)
    candidates = [replace(recipe, base_lr=recipe.base_lr * factor) for factor in factors]
    if len(candidates) == 1 and recipe.longer == 1:
        return candidates[0]
    scores = [_validated(given, contender, places, each) for each in candidates]
    if max(scores) < 0:
        raise DivergedError(
            f"fine-tuning diverged at every base_lr from {candidates[0].base_lr:g} to "
            f"{candidates[-1].base_lr:g}; lower base_lr"
        )
    best = candidates[scores.index(max(scores))]
    epochs, min_steps = best.epochs * recipe.longer, best.min_steps * recipe.longer
    longer = replace(best, epochs=epochs, min_steps=min_steps)
    if recipe.longer > 1 and _validated(given, contender, places, longer) > max(scores):
        return longer
    return best


def _validated(given: "Evaluation", contender: str, places: Tensor, recipe: FineTuning) -> float:
    """Accuracy from 0 to 1 on the validation images; below 0 where it diverged."""
    train, validation = given.parts.train, given.parts.validation
    try:
        tuned = fine_tune(given, contender, places, recipe)
    except DivergedError:
        return -1.0
    predicted = predict(given, tuned, train, validation)
    return float((predicted == train.labels[validation]).double().mean())
