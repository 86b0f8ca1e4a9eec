"""Attentive probe: attention pooling and a linear classifier on frozen feature maps.

All learning rates and weight decays are trained at once, on the same maps: the backbone runs once
for all of them, and where the maps are too large to be kept, it runs anew in every pass.
"""

import copy
import itertools
import math
from collections.abc import Iterator, Sequence
from typing import TYPE_CHECKING, cast

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.optim import AdamW
from torch.optim.lr_scheduler import CosineAnnealingLR

from backfold.backbone import feature_map
from backfold.errors import UserError
from backfold.evaluation import images as data
from backfold.evaluation.results import Row

if TYPE_CHECKING:
    from backfold.evaluation.evaluate import Evaluation

NUM_HEADS, EPOCHS, MIN_STEPS, BATCH_SIZE = 8, 20, 200, 256
LEARNING_RATES, WEIGHT_DECAYS = (3e-4, 1e-3, 4e-3), (0.01, 10.0)
KEPT_BYTES = 2**30  # of the feature maps of one part, in half precision


class AttentionPooling(nn.Module):
    """Multi-head attention with a learned query a head, and a linear classifier on all heads.

    The key projection is part of the query, and the value projection of the classifier.
    """

    def __init__(self, num_features: int, num_classes: int, num_heads: int) -> None:
        super().__init__()
        self.queries = nn.Parameter(torch.empty(num_heads, num_features))
        nn.init.trunc_normal_(self.queries, std=num_features**-0.5)
        self.head = nn.Linear(num_heads * num_features, num_classes)
        for parameter in self.head.parameters():
            nn.init.zeros_(parameter)

    def forward(self, features: Tensor) -> Tensor:
        """(batch, positions, features) -> logits (batch, classes)."""
        weights = F.linear(features, self.queries).softmax(dim=1)
        return cast(Tensor, self.head((weights.transpose(1, 2) @ features).flatten(1)))


def attentive(given: "Evaluation") -> list[Row]:
    """The attentive probe with all labels and with few.

    Learning rate and weight decay have the lowest log loss on the validation images, over all
    draws; where all labels count, the probe then learns from the validation images, too.
    """
    parts = given.parts
    probes = {name: Probes(given, backbone) for name, backbone in given.backbones.items()}
    grid = list(itertools.product(LEARNING_RATES, WEIGHT_DECAYS))

    def learn(name: str, _: str, draws: data.Places, learned: data.Places) -> data.Learned:
        own = probes[name]
        losses = [own.train(places, grid).log_loss(parts.validation) for places in draws]
        best = grid[int(torch.stack(losses).mean(dim=0).argmin())]
        predicted = [own.train(places, [best]).predict(parts.test) for places in learned]
        return f"learning rate {best[0]:g}, weight decay {best[1]:g}", predicted

    return data.rows_by_labels(given, "attentive", probes, learn)


class Probes:
    """Probes of several learning rates and weight decays on a frozen backbone's feature maps."""

    def __init__(self, given: "Evaluation", backbone: nn.Module) -> None:
        self._given, self._images, self._backbone = given, given.parts.train, backbone
        self._kept: dict[int, Tensor] = {}
        images, _ = self._images.load(BATCH_SIZE, given.settings.seed)
        maps = feature_map(backbone, given.statistics.normalize(images.to(given.device))).float()
        std, self._mean = torch.std_mean(maps, dim=(0, 1), correction=0)
        varies = std > torch.finfo(std.dtype).eps * self._mean.abs()
        self._std = torch.where(varies, std, torch.ones_like(std))
        self._width, self._bytes = maps.shape[2], 2 * maps[0].numel()

    def features(self, images: data.Images, parts: Sequence[Tensor]) -> Iterator[Tensor]:
        """Standardised maps (batch, positions, features) of these places, on the device."""
        if len(images) * self._bytes > KEPT_BYTES:
            yield from self._standardised(images, parts)
            return
        if id(images) not in self._kept:
            # Half precision holds no large numbers: standardised features are small.
            every = self._standardised(images, torch.arange(len(images)))
            self._kept[id(images)] = torch.cat([batch.half().cpu() for batch in every])
        for part in parts:
            yield self._kept[id(images)][part].to(self._given.device, torch.float32)

    def _standardised(
        self, images: data.Images, places: Tensor | Sequence[Tensor]
    ) -> Iterator[Tensor]:
        for batch, _ in data.normalised(self._given, images, places):
            maps = (feature_map(self._backbone, batch).float() - self._mean) / self._std
            if not maps.isfinite().all():
                raise UserError("feature maps are not finite; pretrain with a lower base_lr")
            yield maps

    def train(self, places: Tensor, grid: Sequence[tuple[float, float]]) -> "Probes":
        """Train a new probe for each (learning rate, weight decay); returns self."""
        self._classes: Tensor = self._images.labels[places].unique()
        if len(self._classes) < 2:
            raise UserError("the attentive probe needs two classes and there is 1; label more")
        count, batch_size = len(places), min(BATCH_SIZE, len(places))
        steps = max(MIN_STEPS, math.ceil(EPOCHS * count / batch_size))
        device = self._given.device
        with data.seeded(self._given.settings.seed, device):
            first = AttentionPooling(self._width, len(self._classes), NUM_HEADS)
            order = list(places[data.batch_indices(count, batch_size, steps)])
        self._models = [copy.deepcopy(first).to(device) for _ in grid]
        optimizer = AdamW(
            {"params": list(model.parameters()), "lr": rate, "weight_decay": decay}
            for model, (rate, decay) in zip(self._models, grid, strict=True)
        )
        schedule = CosineAnnealingLR(optimizer, steps)
        for part, maps in zip(order, self.features(self._images, order), strict=True):
            truth = self._targets(self._images.labels[part]).to(device)
            # Each probe's gradient is its own: the sum of their losses trains all of them.
            loss = torch.stack([F.cross_entropy(model(maps), truth) for model in self._models])
            optimizer.zero_grad()
            loss.sum().backward()
            optimizer.step()
            schedule.step()
        return self

    def log_loss(self, places: Tensor) -> Tensor:
        """(probes,): the mean log loss on these images; infinite where it is not finite.

        An image of a class that the probe has not seen counts as one of chance.
        """
        logits, labels = self._logits(self._images, places), self._images.labels[places]
        targets = self._targets(labels)
        every = targets.expand(len(logits), -1)
        losses = F.cross_entropy(logits.transpose(1, 2), every, reduction="none")
        losses[:, self._classes[targets] != labels] = math.log(len(self._classes))
        return losses.mean(dim=1).nan_to_num(math.inf, math.inf)

    def predict(self, images: data.Images) -> Tensor:
        """Labels of all images by the first probe, int64 on the CPU."""
        return self._classes[self._logits(images, torch.arange(len(images)))[0].argmax(dim=1)]

    def _targets(self, labels: Tensor) -> Tensor:
        """Which logit each label's is; any one where no image learned from had it."""
        return torch.searchsorted(self._classes, labels).clamp(max=len(self._classes) - 1)

    @torch.inference_mode()
    def _logits(self, images: data.Images, places: Tensor) -> Tensor:
        """(probes, images, classes), on the CPU."""
        loaded = self.features(images, places.split(BATCH_SIZE))
        parts = [torch.stack([model(maps) for model in self._models]).cpu() for maps in loaded]
        return torch.cat(parts, dim=1)
