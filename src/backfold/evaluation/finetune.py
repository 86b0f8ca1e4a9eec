"""Fine-tuning a backbone with a linear head, and training the same from scratch.

Both go through the same function: the same recipe, the same trials of learning rates, the same
choice between once and three times the steps, all on the same validation images.
"""

import logging
import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from types import SimpleNamespace
from typing import TYPE_CHECKING, Any, Literal, cast

import torch
from timm.models import group_parameters
from timm.optim import param_groups_layer_decay, param_groups_weight_decay
from timm.scheduler import CosineLRScheduler
from timm.utils import ModelEmaV3
from torch import Tensor, nn
from torch.optim import AdamW

from backfold.backbone import feature_map
from backfold.data.statistics import ChannelStatistics
from backfold.errors import UserError
from backfold.evaluation.batch_augmentation import Mixing, crop_and_flip
from backfold.evaluation.images import Images, label_case
from backfold.evaluation.results import BEFORE, PRETRAINED, SCRATCH, Row, accuracy_rows
from backfold.evaluation.seeding import seeded
from backfold.restoration import eval_mode

if TYPE_CHECKING:
    from backfold.evaluation.evaluate import Evaluation

LOGGER = logging.getLogger("backfold")
LEARNING_RATE_FACTORS = (0.3, 1.0, 3.0)
SHARES = ("warmup_share", "random_erasing", "label_smoothing", "drop_path", "ema_decay")
HEAD_STD = 0.01
BACKBONE = "backbone."
BATCH_SIZE = 256


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
        for name in SHARES:
            if not 0.0 <= getattr(self, name) < 1.0:
                raise UserError(
                    f"fine-tuning: {name} is {getattr(self, name):g}; give 0 or more, below 1"
                )
        if not 0.0 < self.crop_scale <= 1.0:
            raise UserError(
                f"fine-tuning: crop_scale is {self.crop_scale:g}; give a number above 0, at most 1"
            )
        if self.longer < 1:
            raise UserError(f"fine-tuning: longer is {self.longer}; give 1 or more")
        for name in ("epochs", "min_steps", "weight_decay", "mixup", "cutmix", "seed"):
            if not 0 <= getattr(self, name) < math.inf:
                raise UserError(f"fine-tuning: {name} is {getattr(self, name):g}; give 0 or more")
        if not 0 < self.base_lr < math.inf or not 0 < self.layer_decay <= 1:
            raise UserError(
                f"fine-tuning: base_lr is {self.base_lr:g} and layer_decay {self.layer_decay:g}; "
                "give positive numbers, layer_decay at most 1"
            )
        if self.batch_size < 2 or (self.batch_size % 2 and (self.mixup or self.cutmix)):
            raise UserError(
                f"fine-tuning: batch_size is {self.batch_size}; give an even number, as images are "
                "mixed in pairs"
            )
        if self.precision not in ("32-true", "bf16-mixed"):
            raise UserError(
                f"fine-tuning: precision is {self.precision!r}; choose from 32-true, bf16-mixed"
            )

    def num_steps(self, num_images: int) -> int:
        """Optimizer steps on so many labelled images: 1 or more."""
        return max(1, self.min_steps, math.ceil(self.epochs * num_images / self.batch_size))

    def times(self, factor: int) -> "FineTuning":
        """The same with so many times the steps."""
        return replace(self, epochs=self.epochs * factor, min_steps=self.min_steps * factor)

    def from_scratch(self) -> "FineTuning":
        """The same without layer-wise decay: fresh lower layers have everything to learn."""
        return replace(self, layer_decay=1.0)


class Classifier(nn.Module):
    """Averages the backbone's feature map over the positions, norms it and classifies it.

    Args:
        backbone: any module that `backfold.backbone.feature_map` takes.
        classes: (classes,) whole numbers, rising: the labels that the logits stand for.
        image_shape: (channels, height, width).

    Attributes:
        classes: as given.
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
        matcher = getattr(self.backbone, "group_matcher", None)
        layers = {"head": 0}
        if matcher is not None:
            named = {
                **dict(self.backbone.named_parameters()),
                _classifier_name(self.backbone): None,
            }
            listed: Any = SimpleNamespace(named_parameters=lambda: iter(named.items()))
            layers = group_parameters(listed, matcher(coarse=coarse), reverse=True)
        top = max(layers.values())
        of = {BACKBONE + name: layer for name, layer in layers.items()}
        return lambda name: of.get(name, top)

    def no_weight_decay(self) -> set[str]:
        """Names of the parameters that the backbone wants without decay."""
        names: set[str] = getattr(self.backbone, "no_weight_decay", set)()
        return {BACKBONE + name for name in names}


def _classifier_name(backbone: nn.Module) -> str:
    """The name that timm's own classifier's weight would have."""
    known: Mapping[str, Any] = getattr(backbone, "pretrained_cfg", None) or {}
    name = known.get("classifier") or "head"
    return f"{name if isinstance(name, str) else name[0]}.weight"


def parameter_groups(
    classifier: Classifier, weight_decay: float, layer_decay: float
) -> list[dict[str, Any]]:
    """The optimizer's groups, with ``lr_scale``, a factor of the learning rate, where it decays.

    It is 1 for the head and one factor ``layer_decay`` less for each layer below. What counts as a
    layer is what timm's ``group_matcher`` says; a backbone without one has no layers. Norms, biases
    and what the backbone exempts have no weight decay.

    Args:
        classifier: its trainable parameters are grouped.
        weight_decay: 0 or more.
        layer_decay: above 0, at most 1, which switches it off.
    """
    exempt = classifier.no_weight_decay()
    if layer_decay < 1.0 and not hasattr(classifier.backbone, "group_matcher"):
        LOGGER.warning(
            f"layer_decay {layer_decay:g} has no effect: {type(classifier.backbone).__name__} does "
            "not say what its layers are"
        )
        layer_decay = 1.0
    groups = (
        param_groups_weight_decay(classifier, weight_decay, no_weight_decay_list=exempt)
        if layer_decay == 1.0
        else param_groups_layer_decay(
            classifier, weight_decay, no_weight_decay_list=exempt, layer_decay=layer_decay
        )
    )
    return cast("list[dict[str, Any]]", groups)


def fine_tune(
    backbone: nn.Module,
    images: Images,
    places: Tensor,
    settings: FineTuning,
    statistics: ChannelStatistics,
    device: torch.device,
) -> Classifier:
    """Train a backbone with a new head; returns both in eval mode on the device.

    Nothing but the arguments decides the result; on one CPU it is the same bit for bit. The global
    random generators are left as they were.

    Args:
        backbone: pretrained or fresh; it is trained in place.
        images: labelled.
        places: int64, of the images that are learned from.
        settings: the recipe.
        statistics: normalise the images.
        device: where to train.

    Raises:
        UserError: no images, or none with labels.
        DivergedError: the loss is not finite.
    """
    if not len(places):
        raise UserError("fine-tuning: there are 0 images to learn from; give one or more")
    classes = torch.unique(images.labels[places])
    with seeded(settings.seed, device):
        classifier = Classifier(backbone.cpu().train(), classes, images.shape).to(device)
        loop = _Loop(classifier, settings, settings.num_steps(len(places)), device)
        return loop.run(images, places, statistics).eval()


class _Loop:
    def __init__(
        self, classifier: Classifier, settings: FineTuning, steps: int, device: torch.device
    ) -> None:
        self.classifier, self.settings = classifier.train(), settings
        self.steps, self.device = steps, device
        self.optimizer, self.schedule = build_optimizer(classifier, settings, steps)
        self.mixing = Mixing(
            len(classifier.classes),
            settings.random_erasing,
            settings.mixup,
            settings.cutmix,
            settings.label_smoothing,
            device,
        )
        decay = settings.ema_decay
        self.average = ModelEmaV3(classifier, decay, use_warmup=True) if decay else None

    def run(self, images: Images, places: Tensor, statistics: ChannelStatistics) -> Classifier:
        """Train; the moving average, or the classifier where there is none."""
        loss = torch.zeros(())
        batches = places[batch_indices(len(places), self.settings, self.steps)]
        loaded = images.batches(batches.tolist())
        for step, (chosen, (batch, _)) in enumerate(zip(batches, loaded, strict=True)):
            normalised = statistics.normalize(batch.to(self.device, non_blocking=True))
            labels = images.labels[chosen].to(self.device)
            loss = self.step(normalised, torch.searchsorted(self.classifier.classes, labels), step)
        if not torch.isfinite(loss):
            raise DivergedError(
                f"fine-tuning diverged: its last loss is {float(loss):g}; lower base_lr "
                f"({self.settings.base_lr:g})"
            )
        if self.average is None:
            return self.classifier
        averaged: Classifier = self.average.module
        return averaged

    def step(self, images: Tensor, targets: Tensor, step: int) -> Tensor:
        """One optimizer step on normalised images; returns the loss, detached."""
        settings = self.settings
        self.schedule.step_update(step)
        images = crop_and_flip(images, settings.crop_scale, settings.horizontal_flip)
        images, targets = self.mixing(images, targets)
        half = settings.precision == "bf16-mixed"
        with torch.autocast(self.device.type, torch.bfloat16, enabled=half):
            logits = self.classifier(images)
        loss: Tensor = self.mixing.loss(logits.float(), targets)
        self.optimizer.zero_grad(set_to_none=True)
        loss.backward()
        self.optimizer.step()
        if self.average is not None:
            self.average.update(self.classifier, step=step + 1)
        return loss.detach()


def build_optimizer(
    classifier: Classifier, settings: FineTuning, steps: int
) -> tuple[AdamW, CosineLRScheduler]:
    """AdamW in layer-wise groups, and its schedule: ``step_update(step)`` before each step."""
    groups = parameter_groups(classifier, settings.weight_decay, settings.layer_decay)
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


def batch_indices(count: int, settings: FineTuning, steps: int) -> Tensor:
    """Which images each step takes, (steps, batch): every image once before any comes again.

    Args:
        count: of the images.
        settings: the batch size counts.
        steps: how many batches.
    """
    needed = steps * settings.batch_size
    passes = [torch.randperm(count) for _ in range(math.ceil(needed / count))]
    return torch.cat(passes)[:needed].view(steps, settings.batch_size)


def predict(
    classifier: Classifier,
    images: Images,
    places: Tensor,
    statistics: ChannelStatistics,
    device: torch.device,
) -> Tensor:
    """The likeliest label of each image, int64 (places,), on the CPU; in eval mode.

    Args:
        classifier: on the device.
        images: where they are.
        places: which of them.
        statistics: normalise them.
        device: where to compute.
    """
    parts = [part.tolist() for part in places.split(BATCH_SIZE)]
    with eval_mode(classifier), torch.inference_mode():
        logits = [
            classifier(statistics.normalize(batch.to(device, non_blocking=True)))
            .argmax(dim=1)
            .cpu()
            for batch, _ in images.batches(parts)
        ]
    return classifier.classes.cpu()[torch.cat(logits)]


def finetune(given: "Evaluation") -> list[Row]:
    """The whole backbone trained with all labels and with few; beside it the same from scratch.

    The recipe is chosen once for each number of labels, on the first draw. Draw d has the settings'
    seed plus d.
    """
    rows, parts, settings = [], given.parts, given.settings
    truth, tested = parts.test.labels, torch.arange(len(parts.test))
    for count, draws in parts.each(settings.label_counts(), settings.draws, settings.seed):
        correct, notes = {}, {}
        for name, contender in _contenders(given).items():
            recipe = best_recipe(given, contender, draws[0])
            learned = [torch.arange(len(parts.train))] if count is None else draws
            steps = recipe.num_steps(len(learned[0]))
            notes[name] = f"base_lr {recipe.base_lr:g}, {steps} steps"
            LOGGER.info("fine-tuning, %s, %s: %s", name, label_case(count), notes[name])
            correct[name] = [
                _tested(given, contender, places, replace(recipe, seed=recipe.seed + draw), tested)
                == truth
                for draw, places in enumerate(learned)
            ]
        rows += accuracy_rows("finetune", label_case(count), correct, notes)
    return rows


def _contenders(given: "Evaluation") -> dict[str, str]:
    """By the name in the rows, whose weights training starts from."""
    subject = given.subject
    found = {PRETRAINED: PRETRAINED}
    if BEFORE in subject.weights and subject.scratch != BEFORE:
        found[BEFORE] = BEFORE
    if subject.scratch is not None:
        found[SCRATCH] = subject.scratch
    return found


def best_recipe(given: "Evaluation", contender: str, places: Tensor) -> FineTuning:
    """The learning rate, and then the number of steps, that are best on the validation images.

    Args:
        given: settings, images, and the backbones' weights.
        contender: whose weights training starts from; random ones have no layer-wise decay.
        places: the training images that are learned from.

    Raises:
        DivergedError: at every learning rate.
    """
    recipe = given.settings.finetuning
    if contender == given.subject.scratch:
        recipe = recipe.from_scratch()
    factors = given.settings.rate_factors
    if len(factors) == 1 and recipe.longer == 1:
        return replace(recipe, base_lr=recipe.base_lr * factors[0])
    candidates = [replace(recipe, base_lr=recipe.base_lr * factor) for factor in factors]
    scores = [_validated(given, contender, places, each) for each in candidates]
    if max(scores) < 0:
        raise DivergedError(
            f"fine-tuning diverged at every base_lr from {candidates[0].base_lr:g} to "
            f"{candidates[-1].base_lr:g}; lower base_lr"
        )
    best = scores.index(max(scores))
    longer = candidates[best].times(recipe.longer)
    if recipe.longer > 1 and _validated(given, contender, places, longer) > scores[best]:
        return longer
    return candidates[best]


def _validated(given: "Evaluation", contender: str, places: Tensor, recipe: FineTuning) -> float:
    """Accuracy from 0 to 1 on the validation images; below 0 where it diverged."""
    validation = given.parts.validation
    try:
        predicted = _tested(given, contender, places, recipe, validation, of_train=True)
    except DivergedError:
        return -1.0
    return float((predicted == given.parts.train.labels[validation]).double().mean())


def _tested(
    given: "Evaluation",
    contender: str,
    places: Tensor,
    recipe: FineTuning,
    tested: Tensor,
    of_train: bool = False,
) -> Tensor:
    """Labels predicted for some test images, or training images, after fine-tuning."""
    parts, statistics, device = given.parts, given.statistics, given.device
    backbone = given.subject.backbone(contender, recipe.drop_path)
    classifier = fine_tune(backbone, parts.train, places, recipe, statistics, device)
    return predict(classifier, parts.train if of_train else parts.test, tested, statistics, device)
