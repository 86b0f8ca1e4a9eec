"""Fine-tuning a backbone with a linear head, and training the same from scratch.

Both go through the same recipe and the same trials, on the same validation images.
"""

import logging
import math
from collections.abc import Callable
from dataclasses import dataclass, replace
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
from backfold.errors import UserError, at_least, check_ranges, not_negative, positive
from backfold.evaluation import images as data
from backfold.evaluation.results import BEFORE, PRETRAINED, SCRATCH, Row
from backfold.restoration import eval_mode

if TYPE_CHECKING:
    from backfold.evaluation.evaluate import Evaluation

LOGGER = logging.getLogger("backfold")
LEARNING_RATE_FACTORS = (0.3, 1.0, 3.0)
SHARES = "warmup_share random_erasing label_smoothing drop_path ema_decay"
RANGES = (
    not_negative("epochs min_steps weight_decay mixup cutmix seed"),
    (SHARES, lambda v: 0 <= v < 1, "0 or more, below 1"),
    ("crop_scale layer_decay", lambda v: 0 < v <= 1, "a number above 0, at most 1"),
    positive("base_lr"),
    at_least(1, "longer"),
    at_least(2, "batch_size"),
    ("precision", lambda v: v in ("32-true", "bf16-mixed"), "32-true or bf16-mixed"),
)
HEAD_STD = 0.01
BACKBONE = "backbone."
CROP_ASPECT = 4 / 3  # a part's at most, by the image's, and at least its inverse


class DivergedError(UserError):
    """The loss of a fine-tuning is not finite."""


@dataclass(frozen=True)
class FineTuning:
    """AdamW with a linear warm-up and a cosine down to 0, and timm's regularisers.

    Args:
        epochs: passes over the labelled images.
        min_steps: optimizer steps at least, where epochs of few images would be fewer.
        longer: times the steps that is tried, too, at the best learning rate; 1 is off.
        batch_size: images in a step; few come several times, each time augmented anew.
        base_lr: the head's learning rate for a batch of 256; lr = base_lr x batch_size / 256.
        layer_decay: factor of the learning rate from each layer to the one below; 1 is off.
        weight_decay: of all weights but norms and biases.
        warmup_share: of the steps.
        crop_scale: smallest share of the image that is cut out and scaled up; 1 is off.
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
        check_ranges(self, RANGES, "fine-tuning: ")

    def num_steps(self, num_images: int) -> int:
        """Optimizer steps on so many labelled images: 1 or more."""
        return max(1, self.min_steps, math.ceil(self.epochs * num_images / self.batch_size))


class Classifier(nn.Module):
    """Averages the backbone's feature map over the positions, norms it and classifies it."""

    classes: Tensor  # (classes,), rising: the labels that the logits stand for

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
        """As timm's: from a parameter's name to its layer; the head is where timm's would be."""
        backbone: Any = self.backbone
        head = (getattr(backbone, "pretrained_cfg", None) or {}).get("classifier") or "head"
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

    Nothing but the arguments decides the result; on one CPU it is the same bit for bit. ``places``
    are those of the training images that are learned from. Raises a `DivergedError`.
    """
    if not len(places):
        raise UserError("fine-tuning: there are 0 images to learn from; give one or more")
    images, device = given.parts.train, given.device
    classes, steps = torch.unique(images.labels[places]), settings.num_steps(len(places))
    half = settings.precision == "bf16-mixed"
    with data.seeded(settings.seed, device):
        backbone = given.subject.backbone(contender, settings.drop_path).train()
        classifier = Classifier(backbone, classes, images.shape).to(device)
        optimizer, schedule = build_optimizer(classifier, settings, steps)
        average = ModelEmaV3(classifier, settings.ema_decay, use_warmup=True)
        order = list(places[data.batch_indices(len(places), settings.batch_size, steps)])
        for step, (batch, chosen) in enumerate(data.normalised(given, images, order)):
            schedule.step_update(step)
            labels = torch.searchsorted(classifier.classes, images.labels[chosen].to(device))
            augmented, targets = augment(batch, labels, len(classes), settings)
            with torch.autocast(device.type, torch.bfloat16, enabled=half):
                logits = classifier(augmented).float()
            loss = F.cross_entropy(logits, targets, label_smoothing=settings.label_smoothing)
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            average.update(classifier, step=step + 1)
    if not torch.isfinite(loss):
        raise DivergedError(
            f"fine-tuning diverged: its last loss is {loss.item():g}; lower base_lr "
            f"({settings.base_lr:g})"
        )
    tuned: Classifier = average.module.eval()
    return tuned


def augment(
    images: Tensor, labels: Tensor, num_classes: int, settings: FineTuning
) -> tuple[Tensor, Tensor]:
    """Crop, flip, erase and mix a normalised batch, which may be written over.

    Mixed, by mixup or cutmix, int64 labels (batch,) become targets (batch, num_classes).
    """
    (height, width), parts = images.shape[-2:], list[nn.Module]()
    if settings.horizontal_flip:
        parts.append(v2.RandomHorizontalFlip())
    if settings.crop_scale < 1.0:
        areas = (settings.crop_scale, 1.0)
        aspects = (width / height / CROP_ASPECT, width / height * CROP_ASPECT)
        parts.append(v2.RandomResizedCrop((height, width), areas, aspects))
    if settings.random_erasing:
        erase: Any = v2.RandomErasing
        parts.append(erase(settings.random_erasing, value="random"))
    if parts:
        each = v2.Compose(parts)
        images = torch.stack([each(image) for image in images])
    kinds = ((v2.MixUp, settings.mixup), (v2.CutMix, settings.cutmix))
    mixes = [kind(alpha=alpha, num_classes=num_classes) for kind, alpha in kinds if alpha]
    mixed: tuple[Tensor, Tensor] = v2.RandomChoice(mixes or [v2.Identity()])(images, labels)
    return mixed


def build_optimizer(
    classifier: Classifier, settings: FineTuning, steps: int
) -> tuple[AdamW, CosineLRScheduler]:
    """AdamW in groups by timm's layers, and its schedule: ``step_update(step)`` before each step.

    Norms, biases and what the backbone exempts have no weight decay.
    """
    backbone, layer_decay = classifier.backbone, settings.layer_decay
    exempt = {BACKBONE + name for name in getattr(backbone, "no_weight_decay", set)()}
    if layer_decay < 1.0 and not hasattr(backbone, "group_matcher"):
        LOGGER.warning(
            f"layer_decay {layer_decay:g} has no effect: {type(backbone).__name__} does not say "
            "what its layers are"
        )
        layer_decay = 1.0
    common: Any = {"weight_decay": settings.weight_decay, "no_weight_decay_list": exempt}
    if layer_decay < 1.0:
        groups = param_groups_layer_decay(classifier, layer_decay=layer_decay, **common)
    else:
        groups = param_groups_weight_decay(classifier, **common)
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


def predict(
    given: "Evaluation", classifier: Classifier, images: data.Images, places: Tensor
) -> Tensor:
    """The likeliest label of the images at these places, int64 (places,), on the CPU."""
    batches = data.normalised(given, images, places)
    with eval_mode(classifier), torch.inference_mode():
        found = torch.cat([classifier(batch).argmax(dim=1) for batch, _ in batches])
    return classifier.classes[found].cpu()


def finetune(given: "Evaluation") -> list[Row]:
    """The whole backbone trained with all labels and with few; beside it the same from scratch.

    The recipe is chosen once for each number of labels, on the first draw. Draw d has the settings'
    seed plus d.
    """
    subject, test = given.subject, given.parts.test
    starts = {PRETRAINED: PRETRAINED}  # names in the rows, and the weights they start from
    if BEFORE in subject.weights and subject.scratch != BEFORE:
        starts[BEFORE] = BEFORE
    if subject.scratch is not None:
        starts[SCRATCH] = subject.scratch

    def learn(name: str, case: str, draws: data.Places, learned: data.Places) -> data.Learned:
        recipe, predicted = best_recipe(given, starts[name], draws[0]), []
        note = f"base_lr {recipe.base_lr:g}, {recipe.num_steps(len(learned[0]))} steps"
        LOGGER.info("fine-tuning, %s, %s: %s", name, case, note)
        for draw, places in enumerate(learned):
            own = replace(recipe, seed=recipe.seed + draw)
            tuned = fine_tune(given, starts[name], places, own)
            predicted.append(predict(given, tuned, test, torch.arange(len(test))))
        return note, predicted

    return data.rows_by_labels(given, "finetune", starts, learn)


def best_recipe(given: "Evaluation", contender: str, places: Tensor) -> FineTuning:
    """The learning rate, and then the number of steps, that are best on the validation images.

    Random weights have no layer-wise decay: their lower layers have everything to learn.
    """
    recipe, factors = given.settings.finetuning, given.settings.rate_factors
    if contender == given.subject.scratch:
        recipe = replace(recipe, layer_decay=1.0)
    candidates = [replace(recipe, base_lr=recipe.base_lr * factor) for factor in factors]
    if len(candidates) == recipe.longer == 1:
        return candidates[0]
    train, validation = given.parts.train, given.parts.validation

    def score(candidate: FineTuning) -> float:
        try:
            tuned = fine_tune(given, contender, places, candidate)
        except DivergedError:
            return -1.0
        predicted = predict(given, tuned, train, validation)
        return float((predicted == train.labels[validation]).double().mean())

    scores = [score(each) for each in candidates]
    if max(scores) < 0:
        raise DivergedError(
            f"fine-tuning diverged at every base_lr from {candidates[0].base_lr:g} to "
            f"{candidates[-1].base_lr:g}; lower base_lr"
        )
    best = candidates[scores.index(max(scores))]
    epochs, min_steps = best.epochs * recipe.longer, best.min_steps * recipe.longer
    longer = replace(best, epochs=epochs, min_steps=min_steps)
    return longer if recipe.longer > 1 and score(longer) > max(scores) else best
