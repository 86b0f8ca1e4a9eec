"""The learning rate of a fine-tuning, chosen on held-out labelled images."""

import math
from collections.abc import Sequence
from dataclasses import replace

import numpy as np
import torch
from sklearn.model_selection import StratifiedKFold
from torch import Tensor
from torch.nn import functional as F

from backfold.data.statistics import ChannelStatistics
from backfold.evaluation.classifier import MakeBackbone, classify
from backfold.evaluation.finetuning import DivergedError, FineTuning, fine_tune

LEARNING_RATE_FACTORS = (0.3, 1.0, 3.0)
NUM_FOLDS = 5


def choose_learning_rate(
    make_backbone: MakeBackbone,
    train_images: Tensor,
    train_labels: Tensor,
    statistics: ChannelStatistics,
    settings: FineTuning,
    device: torch.device,
    factors: Sequence[float] = LEARNING_RATE_FACTORS,
) -> FineTuning:
    """The settings with the base_lr that has the lowest log loss on held-out labelled images.

    A fifth of each class is held out (a larger part where a class has fewer than 5 images). Where a
    class has a single image nothing can be held out, and the settings stay as they are.

    Args:
        make_backbone: as for `fine_tune`, and so are the arguments up to ``device``.
        train_images: see there.
        train_labels: see there.
        statistics: see there.
        settings: whose base_lr is varied.
        device: where to train.
        factors: of ``settings.base_lr``; every contender should get the same.

    Raises:
        UserError: as `fine_tune`, and all learning rates diverged.
    """
    labels = train_labels.cpu().numpy()
    smallest_class = int(np.unique(labels, return_counts=True)[1].min())
    if smallest_class < 2 or len(factors) < 2:
        return settings
    folds = StratifiedKFold(
        min(NUM_FOLDS, smallest_class), shuffle=True, random_state=settings.seed
    )
    fit, held_out = (torch.from_numpy(part) for part in next(folds.split(labels, labels)))
    candidates = [replace(settings, base_lr=settings.base_lr * factor) for factor in factors]
    fit_part, rest = ((train_images[part], train_labels[part]) for part in (fit, held_out))
    losses = [
        _held_out_loss(make_backbone, fit_part, rest, statistics, candidate, device)
        for candidate in candidates
    ]
    if min(losses) == math.inf:
        raise DivergedError(
            f"fine-tuning diverged at every base_lr from {candidates[0].base_lr:g} to "
            f"{candidates[-1].base_lr:g}; lower base_lr"
        )
    return candidates[int(np.argmin(losses))]


def _held_out_loss(
    make_backbone: MakeBackbone,
    fit: tuple[Tensor, Tensor],
    held_out: tuple[Tensor, Tensor],
    statistics: ChannelStatistics,
    settings: FineTuning,
    device: torch.device,
) -> float:
    """Log loss on held-out (images, labels); infinite where fine-tuning diverged."""
    try:
        classifier = fine_tune(make_backbone, *fit, statistics, settings, device)
    except DivergedError:
        return math.inf
    logits = classify(classifier, held_out[0], statistics, device)
    targets = torch.searchsorted(classifier.classes.cpu(), held_out[1].cpu())
    loss = float(F.cross_entropy(logits, targets))
    return loss if math.isfinite(loss) else math.inf
