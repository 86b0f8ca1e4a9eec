"""Attentive probe: attention pooling and a linear classifier on frozen feature maps.

All learning rates and weight decays are trained at once, on the same maps: the backbone runs once
for all of them, and where the maps are too large to be kept, it runs anew in every pass.
"""

import copy
import itertools
import math
from collections.abc import Iterator, Sequence
from typing import TYPE_CHECKING

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.optim import AdamW
from torch.optim.lr_scheduler import CosineAnnealingLR

from backfold.backbone import feature_map
from backfold.errors import UserError
from backfold.evaluation.images import Images, label_case
from backfold.evaluation.results import Row, accuracy_rows
from backfold.evaluation.seeding import seeded

if TYPE_CHECKING:
    from backfold.evaluation.evaluate import Evaluation

NUM_HEADS, EPOCHS, MIN_STEPS, BATCH_SIZE = 8, 20, 200, 256
LEARNING_RATES, WEIGHT_DECAYS = (3e-4, 1e-3, 4e-3), (0.01, 10.0)
KEPT_BYTES = 2**30  # of the feature maps of one part, in half precision


class AttentionPooling(nn.Module):
    """Multi-head attention with a learned query a head, and a linear classifier on all heads.

    A fixed query makes the key projection one vector a head, and pooling comes before the value
    projection, which is part of the classifier: the same functions as with both written out, at a
    share of the cost.

    Args:
        num_features: of the feature maps.
        num_classes: logits.
        num_heads: queries.
    """

    def __init__(self, num_features: int, num_classes: int, num_heads: int) -> None:
        super().__init__()
        self.queries = nn.Parameter(torch.empty(num_heads, num_features))
        nn.init.trunc_normal_(self.queries, std=num_features**-0.5)
        self.head = nn.Linear(num_heads * num_features, num_classes)
        nn.init.zeros_(self.head.weight)
        nn.init.zeros_(self.head.bias)

    def forward(self, features: Tensor) -> Tensor:
        """(batch, positions, features) -> logits (batch, classes)."""
        weights = F.linear(features, self.queries).softmax(dim=1)
        pooled = weights.transpose(1, 2) @ features
        logits: Tensor = self.head(pooled.flatten(1))
        return logits


class FeatureMaps:
    """Standardised feature maps of a frozen backbone, kept where they are small.

    Args:
        given: the images, how they are normalised, and the device.
        backbone: on the device, in eval mode.
    """

    def __init__(self, given: "Evaluation", backbone: nn.Module) -> None:
        self._given, self._backbone = given, backbone
        self._kept: dict[int, Tensor] = {}
        first, _ = given.parts.train.load(BATCH_SIZE, given.settings.seed)
        maps = self._maps(first)
        # Half precision holds no large numbers: standardised features are small.
        std, self.mean = torch.std_mean(maps, dim=(0, 1), correction=0)
        varies = std > torch.finfo(std.dtype).eps * self.mean.abs()
        self.std = torch.where(varies, std, torch.ones_like(std))
        self.width, self._bytes = maps.shape[2], 2 * maps[0].numel()

    def batches(self, images: Images, parts: Sequence[Tensor]) -> Iterator[Tensor]:
        """(batch, positions, features), float32 on the device, of these places.

        Raises:
            UserError: features that are not finite.
        """
        if len(images) * self._bytes <= KEPT_BYTES:
            kept = self._kept.get(id(images))
            if kept is None:
                every = torch.arange(len(images)).split(BATCH_SIZE)
                loaded = images.batches([part.tolist() for part in every])
                kept = torch.cat([self._standard(batch).half().cpu() for batch, _ in loaded])
                self._kept[id(images)] = kept
            for part in parts:
                yield kept[part].to(self._given.device, torch.float32)
            return
        for batch, _ in images.batches([part.tolist() for part in parts]):
            yield self._standard(batch)

    def _standard(self, images: Tensor) -> Tensor:
        maps = (self._maps(images) - self.mean) / self.std
        if not bool(torch.isfinite(maps).all()):
            raise UserError(
                "feature maps are not finite; the backbone diverged: pretrain it with a lower "
                "base_lr"
            )
        return maps

    @torch.inference_mode()
    def _maps(self, images: Tensor) -> Tensor:
        normalised = self._given.statistics.normalize(images.to(self._given.device))
        return feature_map(self._backbone, normalised).float()


def attentive(given: "Evaluation") -> list[Row]:
    """The attentive probe with all labels and with few.

    Learning rate and weight decay are those with the lowest log loss on the validation images, for
    few labels the mean over the draws; the probe then learns from the validation images, too, where
    all labels count.
    """
    rows, parts = [], given.parts
    maps = {name: FeatureMaps(given, backbone) for name, backbone in given.backbones.items()}
    counts, settings = given.settings.label_counts(), given.settings
    for count, draws in parts.each(counts, settings.draws, settings.seed):
        learned = [torch.arange(len(parts.train))] if count is None else draws
        correct, notes = {}, {}
        for name, features in maps.items():
            probe = AttentiveProbe(features, parts.train, given.settings.seed, given.device)
            grid = list(itertools.product(LEARNING_RATES, WEIGHT_DECAYS))
            losses = torch.stack(
                [
                    probe.train(places, grid).log_loss(parts.train, parts.validation)
                    for places in draws
                ]
            )
            best = grid[int(losses.mean(dim=0).argmin())]
            notes[name] = f"learning rate {best[0]:g}, weight decay {best[1]:g}"
            correct[name] = [
                probe.train(places, [best]).predict(parts.test) == parts.test.labels
                for places in learned
            ]
        rows += accuracy_rows("attentive", label_case(count), correct, notes)
    return rows


class AttentiveProbe:
    """Probes of several learning rates and weight decays, trained side by side.

    Args:
        features: the frozen backbone's.
        images: the labelled training images.
        seed: of weights and order.
        device: where the probes are.
    """

    def __init__(
        self, features: FeatureMaps, images: Images, seed: int, device: torch.device
    ) -> None:
        self._features, self._images = features, images
        self._seed, self._device = seed, device
        self._models: list[AttentionPooling] = []
        self._classes = torch.empty(0, dtype=torch.int64)

    def train(self, places: Tensor, grid: Sequence[tuple[float, float]]) -> "AttentiveProbe":
        """Train a new probe for each (learning rate, weight decay) on these images; returns self.

        Raises:
            UserError: a single class, or features that are not finite.
        """
        self._classes = torch.unique(self._images.labels[places])
        if len(self._classes) < 2:
            raise UserError("the attentive probe needs two classes and there is 1; label more")
        count, batch_size = len(places), min(BATCH_SIZE, len(places))
        steps = max(MIN_STEPS, math.ceil(EPOCHS * count / batch_size))
        with seeded(self._seed, self._device):
            first = AttentionPooling(self._features.width, len(self._classes), NUM_HEADS)
            passes = [torch.randperm(count) for _ in range(math.ceil(steps * batch_size / count))]
        self._models = [copy.deepcopy(first).to(self._device) for _ in grid]
        groups = [
            {"params": list(model.parameters()), "lr": rate, "weight_decay": decay}
            for model, (rate, decay) in zip(self._models, grid, strict=True)
        ]
        optimizer = AdamW(groups)
        schedule = CosineAnnealingLR(optimizer, steps)
        order = torch.cat(passes)[: steps * batch_size].split(batch_size)
        loaded = self._features.batches(self._images, [places[part] for part in order])
        for part, maps in zip(order, loaded, strict=True):
            truth = self._targets(self._images, places[part])[0].to(self._device)
            # Each probe's gradient is its own: the sum of their losses trains all of them.
            loss = torch.stack([F.cross_entropy(model(maps), truth) for model in self._models])
            optimizer.zero_grad(set_to_none=True)
            loss.sum().backward()
            optimizer.step()
            schedule.step()
        return self

    def log_loss(self, images: Images, places: Tensor) -> Tensor:
        """(probes,): the mean log loss on these images; infinite where it is not finite.

        An image of a class that the probe has not seen counts as one of chance.
        """
        logits = self._logits(images, places)
        targets, known = (each.to(self._device) for each in self._targets(images, places))
        losses = torch.stack([F.cross_entropy(each, targets, reduction="none") for each in logits])
        chance = torch.full_like(losses, math.log(len(self._classes)))
        found = torch.where(known, losses, chance).mean(dim=1).cpu()
        return torch.where(torch.isfinite(found), found, math.inf)

    def predict(self, images: Images) -> Tensor:
        """Labels of all images by the first probe, int64 on the CPU."""
        logits = self._logits(images, torch.arange(len(images)))[0]
        return self._classes[logits.argmax(dim=1).cpu()]

    def _targets(self, images: Images, places: Tensor) -> tuple[Tensor, Tensor]:
        """Which logit each image's is, and whether it is one; ask after the images were loaded."""
        labels = images.labels[places]
        targets = torch.searchsorted(self._classes, labels).clamp(max=len(self._classes) - 1)
        return targets, self._classes[targets] == labels

    @torch.inference_mode()
    def _logits(self, images: Images, places: Tensor) -> list[Tensor]:
        """(images, classes) of each probe."""
        loaded = self._features.batches(images, places.split(BATCH_SIZE))
        parts = [[model(maps) for model in self._models] for maps in loaded]
        return [torch.cat(of_one) for of_one in zip(*parts, strict=True)]
