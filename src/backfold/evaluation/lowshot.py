"""Fine-tuning with all labels and with few, and linear probes with very few."""

import logging
from collections.abc import Sequence
from dataclasses import dataclass, replace

import torch
from sklearn.linear_model import LogisticRegression
from sklearn.pipeline import make_pipeline
from sklearn.preprocessing import StandardScaler
from torch import Tensor

from backfold.data.statistics import ChannelStatistics
from backfold.errors import UserError
from backfold.evaluation.classifier import MakeBackbone
from backfold.evaluation.finetuning import FineTuning, accuracy, fine_tune
from backfold.evaluation.learning_rate_choice import LEARNING_RATE_FACTORS, choose_learning_rate
from backfold.evaluation.probes import linear_probe_accuracy
from backfold.evaluation.protocol import (
    BackboneName,
    EvaluationRow,
    accuracy_row,
    label_text,
    labelled_subsets,
)

LOGGER = logging.getLogger("backfold")
LOWSHOT_LABELS: tuple[int | float, ...] = (1, 5, 10, 25, 0.01, 0.1)
ONE_LABEL_REGULARISATION = 1.0


@dataclass(frozen=True)
class LabelledTensors:
    """Labelled images in memory.

    Args:
        train_images: uint8 or float in [0, 1], (images, channels, height, width).
        train_labels: (images,), whole numbers.
        test_images: as ``train_images``.
        test_labels: as ``train_labels``.
        statistics: normalise the images.
    """

    train_images: Tensor
    train_labels: Tensor
    test_images: Tensor
    test_labels: Tensor
    statistics: ChannelStatistics


@dataclass(frozen=True)
class Contender:
    """A backbone that is fine-tuned, and how.

    Args:
        name: goes into the rows.
        make_backbone: see `backfold.evaluation.classifier.backbone_maker`.
        settings: from scratch, those of `FineTuning.from_scratch`.
    """

    name: BackboneName
    make_backbone: MakeBackbone
    settings: FineTuning


def lowshot_rows(
    contender: Contender,
    data: LabelledTensors,
    train_embeddings: Tensor,
    test_embeddings: Tensor,
    device: torch.device,
    labels_per_class: Sequence[int | float] = LOWSHOT_LABELS,
    draws: int = 5,
    seed: int = 0,
    factors: Sequence[float] = LEARNING_RATE_FACTORS,
) -> list[EvaluationRow]:
    """Rows of the linear probe and of fine-tuning, both on the same few labels.

    Args:
        contender: the backbone.
        data: the images.
        train_embeddings: (training images, features) of the same backbone, frozen.
        test_embeddings: (test images, features).
        device: where to fine-tune.
        labels_per_class: how many of each class, or which share; see `labelled_subsets`.
        draws: how often labels are drawn; the same for every contender.
        seed: of the draws.
        factors: see `fine_tuned_rows`.

    Raises:
        UserError: what the probe and fine-tuning raise, or a class with too few images.
    """
    return [
        *linear_rows(
            train_embeddings,
            data.train_labels,
            test_embeddings,
            data.test_labels,
            contender.name,
            labels_per_class,
            draws,
            seed,
        ),
        *fine_tuned_rows(contender, data, device, labels_per_class, draws, seed, factors),
    ]


def linear_rows(
    train_embeddings: Tensor,
    train_labels: Tensor,
    test_embeddings: Tensor,
    test_labels: Tensor,
    backbone_name: BackboneName,
    labels_per_class: Sequence[int | float | None] = LOWSHOT_LABELS,
    draws: int = 5,
    seed: int = 0,
) -> list[EvaluationRow]:
    """As `evaluate_embeddings` with the linear probe, down to one label a class.

    Where a drawn class has a single image no penalty can be chosen on held-out ones, and C is 1.

    Args:
        train_embeddings: (training images, features).
        train_labels: (training images,), whole numbers.
        test_embeddings: (test images, features).
        test_labels: (test images,), whole numbers.
        backbone_name: goes into the rows.
        labels_per_class: see `labelled_subsets`.
        draws: how often labels are drawn.
        seed: of the draws and the probe's folds.

    Raises:
        UserError: a single class, a class with too few images, or embeddings that are not finite.
    """
    rows = []
    for count in labels_per_class:
        accuracies = [
            few_labels_probe_accuracy(
                train_embeddings[i], train_labels[i], test_embeddings, test_labels, seed
            )
            for i in labelled_subsets(train_labels, count, draws, seed)
        ]
        rows.append(accuracy_row("linear", count, backbone_name, accuracies))
    return rows


def few_labels_probe_accuracy(
    train_embeddings: Tensor,
    train_labels: Tensor,
    test_embeddings: Tensor,
    test_labels: Tensor,
    seed: int = 0,
) -> float:
    """`linear_probe_accuracy`, or with the penalty C = 1 where a class has a single image.

    Args:
        train_embeddings: (training images, features).
        train_labels: (training images,), two classes at least.
        test_embeddings: (test images, features).
        test_labels: (test images,).
        seed: of the folds.

    Raises:
        UserError: a single class, or embeddings that are not finite.
    """
    counts = torch.unique(train_labels, return_counts=True)[1]
    if len(counts) < 2 or counts.min() > 1:
        return linear_probe_accuracy(
            train_embeddings, train_labels, test_embeddings, test_labels, seed
        )
    train, test = (part.detach().cpu().double() for part in (train_embeddings, test_embeddings))
    if not (torch.isfinite(train).all() and torch.isfinite(test).all()):
        raise UserError(
            "embeddings are not finite; the backbone diverged: pretrain it with a lower base_lr"
        )
    model = make_pipeline(
        StandardScaler(), LogisticRegression(C=ONE_LABEL_REGULARISATION, max_iter=10_000)
    )
    model.fit(train.numpy(), train_labels.cpu().numpy())
    return float(model.score(test.numpy(), test_labels.cpu().numpy()))


def fine_tuned_rows(
    contender: Contender,
    data: LabelledTensors,
    device: torch.device,
    labels_per_class: Sequence[int | float | None] = (None,),
    draws: int = 5,
    seed: int = 0,
    factors: Sequence[float] = LEARNING_RATE_FACTORS,
) -> list[EvaluationRow]:
    """A row of fine-tuned accuracies for each number of labels.

    The learning rate is chosen once for each number of labels, on the first draw's own labels (see
    `choose_learning_rate`; with one label a class it is the settings'). Fine-tuning draw d has the
    settings' seed plus d.

    Args:
        contender: the backbone and the recipe.
        data: the images.
        device: where to train.
        labels_per_class: see `labelled_subsets`; None is all labels, fine-tuned once.
        draws: how often labels are drawn; the same for every contender.
        seed: of the draws.
        factors: learning rates to try, as factors of the settings' base_lr; a single one is taken
            as it is, without a trial.

    Raises:
        UserError: what fine-tuning raises, or a class with too few images.
    """
    rows = []
    for count in labels_per_class:
        subsets = labelled_subsets(data.train_labels, count, draws, seed)
        settings = _tuned(contender, data, subsets[0], device, factors)
        LOGGER.info(
            f"fine-tuning, {contender.name} backbone, {label_text(count)} labels: "
            f"base_lr {settings.base_lr:g}, {settings.num_steps(len(subsets[0]))} steps"
        )
        accuracies = [
            _fine_tuned_accuracy(
                contender, data, indices, replace(settings, seed=settings.seed + draw), device
            )
            for draw, indices in enumerate(subsets)
        ]
        rows.append(accuracy_row("finetune", count, contender.name, accuracies))
    return rows


def _tuned(
    contender: Contender,
    data: LabelledTensors,
    indices: Tensor,
    device: torch.device,
    factors: Sequence[float],
) -> FineTuning:
    return choose_learning_rate(
        contender.make_backbone,
        data.train_images[indices],
        data.train_labels[indices],
        data.statistics,
        contender.settings,
        device,
        factors,
    )


def _fine_tuned_accuracy(
    contender: Contender,
    data: LabelledTensors,
    indices: Tensor,
    settings: FineTuning,
    device: torch.device,
) -> float:
    classifier = fine_tune(
        contender.make_backbone,
        data.train_images[indices],
        data.train_labels[indices],
        data.statistics,
        settings,
        device,
    )
    return accuracy(classifier, data.test_images, data.test_labels, data.statistics, device)
