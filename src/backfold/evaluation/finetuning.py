"""Fine-tuning a backbone with a linear head on labelled images that lie in memory.

A pretrained backbone and a fresh one go through the same function with the same number of steps, so
that training from scratch is as careful as fine-tuning is.
"""

import math
from dataclasses import dataclass, replace
from typing import Literal

import torch
from timm.scheduler import CosineLRScheduler
from timm.utils import ModelEmaV3
from torch import Tensor
from torch.optim import AdamW

from backfold.data.statistics import ChannelStatistics
from backfold.errors import UserError
from backfold.evaluation.batch_augmentation import Mixing, crop_and_flip
from backfold.evaluation.classifier import (
    Classifier,
    MakeBackbone,
    classify,
    parameter_groups,
)
from backfold.evaluation.seeding import seeded

SHARES = ("warmup_share", "random_erasing", "label_smoothing", "drop_path", "ema_decay")


class DivergedError(UserError):
    """The loss of a fine-tuning is not finite."""


@dataclass(frozen=True)
class FineTuning:
    """AdamW with a linear warm-up and a cosine down to 0, and timm's regularisers.

    Args:
        epochs: passes over the labelled images.
        min_steps: optimizer steps at least, where epochs of few images would be fewer.
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

    def from_scratch(self) -> "FineTuning":
        """The same without layer-wise decay: fresh lower layers have everything to learn."""
        return replace(self, layer_decay=1.0)


def fine_tune(
    make_backbone: MakeBackbone,
    train_images: Tensor,
    train_labels: Tensor,
    statistics: ChannelStatistics,
    settings: FineTuning,
    device: torch.device,
) -> Classifier:
    """Train a new backbone with a new head; returns it in eval mode on the device.

    Nothing but the arguments decides the result; on one CPU it is the same bit for bit. The global
    random generators are left as they were.

    Args:
        make_backbone: gives the backbone, pretrained or fresh; see `backbone_maker`.
        train_images: uint8 or float in [0, 1], (images, channels, height, width), on any device.
        train_labels: (images,), whole numbers.
        statistics: normalise the images.
        settings: the recipe.
        device: where to train.

    Raises:
        UserError: no images, or images and labels of different numbers.
        DivergedError: the loss is not finite.
    """
    if len(train_images) != len(train_labels) or len(train_images) == 0:
        raise UserError(
            f"fine-tuning: {len(train_images)} images and {len(train_labels)} labels; give as many "
            "of both, one or more"
        )
    classes, targets = torch.unique(train_labels, return_inverse=True)
    channels, height, width = train_images.shape[1:]
    with seeded(settings.seed, device):
        backbone = make_backbone(settings.drop_path).cpu()
        classifier = Classifier(backbone, classes.cpu(), (channels, height, width))
        loop = _Loop(classifier.to(device), settings, settings.num_steps(len(targets)), device)
        return loop.run(train_images, targets, statistics).eval()


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

    def run(self, images: Tensor, targets: Tensor, statistics: ChannelStatistics) -> Classifier:
        """Train; the moving average, or the classifier where there is none."""
        loss = torch.zeros(())
        for step, indices in enumerate(batch_indices(len(images), self.settings, self.steps)):
            rows = indices.to(images.device)
            batch = statistics.normalize(images[rows].to(self.device, non_blocking=True))
            loss = self.step(batch, targets[rows.to(targets.device)].to(self.device), step)
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


def accuracy(
    classifier: Classifier,
    images: Tensor,
    labels: Tensor,
    statistics: ChannelStatistics,
    device: torch.device,
    batch_size: int = 512,
) -> float:
    """Share, from 0 to 1, of the images whose largest logit stands for their label.

    Args:
        classifier: see `classify`, and so are the other arguments.
        images: see there.
        labels: (images,), whole numbers; those that the classifier does not know count as missed.
        statistics: see there.
        device: see there.
        batch_size: images at once.
    """
    logits = classify(classifier, images, statistics, device, batch_size)
    predicted = classifier.classes.cpu()[logits.argmax(dim=1)]
    return float((predicted == labels.cpu()).double().mean())
