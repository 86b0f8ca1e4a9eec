"""Attentive probe: attention pooling and a linear classifier on frozen feature maps."""

import itertools
import math
from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
import torch
from sklearn.model_selection import StratifiedKFold
from torch import Tensor, nn
from torch.nn import functional as F
from torch.optim import AdamW
from torch.optim.lr_scheduler import CosineAnnealingLR

from backfold.backbone import feature_map
from backfold.data.statistics import ChannelStatistics
from backfold.errors import UserError
from backfold.evaluation.seeding import seeded
from backfold.restoration import eval_mode

FOLDS = 5


@dataclass(frozen=True)
class AttentiveProbe:
    """How the probe is trained: AdamW with a cosine down to 0.

    Args:
        num_heads: queries, each with its own weights over the positions.
        epochs: passes over the training part.
        min_steps: optimizer steps at least, where epochs of few images would be fewer.
        batch_size: feature maps in a step; all where there are fewer.
        learning_rates: tried on held-out images.
        weight_decays: tried with each of them.
    """

    num_heads: int = 8
    epochs: int = 20
    min_steps: int = 200
    batch_size: int = 256
    learning_rates: tuple[float, ...] = (3e-4, 1e-3, 4e-3)
    weight_decays: tuple[float, ...] = (0.01, 10.0)


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


def feature_maps(
    backbone: nn.Module,
    images: Tensor,
    statistics: ChannelStatistics,
    device: torch.device,
    batch_size: int = 256,
    extract: Callable[[nn.Module, Tensor], Tensor] = feature_map,
) -> Tensor:
    """Feature maps (images, positions, features) of a frozen backbone, float32 on the CPU.

    Args:
        backbone: on the device; it runs in eval mode, and gets its modes back.
        images: uint8 or float in [0, 1], (images, channels, height, width).
        statistics: normalise them.
        device: where to compute.
        batch_size: images at once.
        extract: gives (batch, positions, features) from the backbone and normalised images.

    Raises:
        UserError: no images.
    """
    if not len(images):
        raise UserError("there are no images to take features of; give a data set with images")
    with eval_mode(backbone), torch.inference_mode():
        parts = [
            extract(backbone, statistics.normalize(batch.to(device))).float().cpu()
            for batch in images.split(batch_size)
        ]
    return torch.cat(parts).clone()


def attentive_probe_accuracy(
    train_features: Tensor,
    train_labels: Tensor,
    test_features: Tensor,
    test_labels: Tensor,
    seed: int = 0,
    probe: AttentiveProbe | None = None,
) -> float:
    """Test accuracy, from 0 to 1, of attention pooling and a linear classifier.

    Features are standardised to the training part, over images and positions. Learning rate and
    weight decay are those with the lowest log loss on a fifth of the training part (more of it
    where a class has fewer than 5 images); the probe is then trained on all of it.

    Args:
        train_features: (training images, positions, features); the probe trains on their device.
        train_labels: (training images,), whole numbers.
        test_features: (test images, positions, features).
        test_labels: (test images,), whole numbers.
        seed: of the held-out part, the probe's weights and the order of the images.
        probe: how it is trained.

    Raises:
        UserError: features that are not finite, a single class, or a class with a single image.
    """
    probe = probe or AttentiveProbe()
    features, labels = _checked(train_features), train_labels.to(train_features.device)
    classes, targets = torch.unique(labels, return_inverse=True)
    smallest = int(targets.bincount().min())
    if len(classes) < 2 or smallest < 2:
        raise UserError(
            f"the attentive probe needs two classes and two images of each; there are "
            f"{len(classes)} classes, the smallest with {smallest}; label more images"
        )
    mean, std = _moments(features)
    features = (features - mean) / std
    with seeded(seed, features.device):
        rate, decay = _choose(features, targets, probe, smallest, seed)
    with seeded(seed, features.device):
        model = _train(features, targets, len(classes), probe, rate, decay)
    logits = _logits(model, (_checked(test_features).to(features.device) - mean) / std, probe)
    predicted = classes[logits.argmax(dim=1)]
    return float((predicted == test_labels.to(predicted.device)).double().mean())


def _choose(
    features: Tensor, targets: Tensor, probe: AttentiveProbe, smallest_class: int, seed: int
) -> tuple[float, float]:
    """Learning rate and weight decay with the lowest log loss on held-out images."""
    grid = list(itertools.product(probe.learning_rates, probe.weight_decays))
    array = targets.cpu().numpy()
    folds = StratifiedKFold(min(FOLDS, smallest_class), shuffle=True, random_state=seed)
    fit, held_out = (
        torch.from_numpy(part).to(features.device) for part in next(folds.split(array, array))
    )
    losses = []
    for rate, decay in grid:
        num_classes = int(targets.max()) + 1
        model = _train(features[fit], targets[fit], num_classes, probe, rate, decay)
        loss = F.cross_entropy(_logits(model, features[held_out], probe), targets[held_out])
        losses.append(float(loss) if torch.isfinite(loss) else math.inf)
    return grid[int(np.argmin(losses))]


def _train(
    features: Tensor,
    targets: Tensor,
    num_classes: int,
    probe: AttentiveProbe,
    rate: float,
    weight_decay: float,
) -> AttentionPooling:
    count, batch_size = len(features), min(probe.batch_size, len(features))
    steps = max(probe.min_steps, math.ceil(probe.epochs * count / batch_size))
    model = AttentionPooling(features.shape[2], num_classes, probe.num_heads).to(features.device)
    optimizer = AdamW(model.parameters(), lr=rate, weight_decay=weight_decay)
    schedule = CosineAnnealingLR(optimizer, steps)
    order = torch.cat([torch.randperm(count) for _ in range(math.ceil(steps * batch_size / count))])
    for indices in order[: steps * batch_size].view(steps, batch_size).to(features.device):
        optimizer.zero_grad(set_to_none=True)
        F.cross_entropy(model(features[indices]), targets[indices]).backward()
        optimizer.step()
        schedule.step()
    return model


@torch.no_grad()
def _logits(model: AttentionPooling, features: Tensor, probe: AttentiveProbe) -> Tensor:
    return torch.cat([model(part) for part in features.split(probe.batch_size)])


def _moments(features: Tensor) -> tuple[Tensor, Tensor]:
    """Mean and deviation of each feature; 1 where it does not vary."""
    std, mean = torch.std_mean(features, dim=(0, 1), correction=0)
    varies = std > torch.finfo(std.dtype).eps * mean.abs()
    return mean, torch.where(varies, std, torch.ones_like(std))


def _checked(features: Tensor) -> Tensor:
    features = features.detach().float()
    finite = torch.isfinite(features).flatten(1).all(dim=1)
    if not finite.all():
        raise UserError(
            f"{int((~finite).sum())} of {len(features)} feature maps are not finite; the backbone "
            "diverged: pretrain it with a lower base_lr"
        )
    return features
