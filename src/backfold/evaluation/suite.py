"""The protocols that end in a classifier's accuracy, one function each, on the same images."""

import logging
from collections.abc import Mapping
from dataclasses import dataclass
from functools import cached_property

import torch
from torch import Tensor, nn

from backfold.embedding import embed_batches
from backfold.errors import UserError
from backfold.evaluation.attentive import attentive_probe_accuracy, feature_maps
from backfold.evaluation.classifier import backbone_maker
from backfold.evaluation.images import load_images
from backfold.evaluation.lowshot import (
    LOWSHOT_LABELS,
    Contender,
    LabelledTensors,
    fine_tuned_rows,
    lowshot_rows,
)
from backfold.evaluation.protocol import (
    BackboneName,
    EvaluationRow,
    ProtocolName,
    accuracy_row,
    labelled_subsets,
)
from backfold.evaluation.run import LabelledImages, evaluate_run
from backfold.evaluation.settings import EvaluateSettings
from backfold.evaluation.untrained import untrained_backbone
from backfold.training.pretrained import Pretrained

LOGGER = logging.getLogger("backfold")
BATCH_SIZE = 256


@dataclass(frozen=True)
class Subject:
    """What is evaluated, and how.

    Args:
        run: its energy is moved to the device.
        weights: the backbone's as exported, under timm's names: where fine-tuning starts.
        settings: of all protocols.
        device: where to compute.
        num_workers: processes that decode images.
    """

    run: Pretrained
    weights: Mapping[str, Tensor]
    settings: EvaluateSettings
    device: torch.device
    num_workers: int = 0


class ClassifierSuite:
    """Rows of the classifiers' protocols; images and backbones are made once, when they are needed.

    Args:
        subject: what is evaluated.
        images: labelled, a training and a test part.
    """

    def __init__(self, subject: Subject, images: LabelledImages) -> None:
        self._subject, self._images = subject, images
        self._settings = subject.settings
        self._labels = (None, self._settings.labels_per_class)

    def rows(self, protocol: str) -> list[EvaluationRow]:
        """Rows of one protocol, untrained and pretrained.

        Raises:
            UserError: what loading, a probe or fine-tuning raises.
        """
        if protocol == "attentive":
            return self._attentive_rows()
        if protocol == "finetune":
            return self._fine_tuned_rows()
        assert protocol == "lowshot"
        return self._lowshot_rows()

    def frozen_rows(self, protocols: list[ProtocolName]) -> list[EvaluationRow]:
        """Rows of "knn" and "linear", which share their embeddings.

        Raises:
            UserError: what loading, embedding or the probes raise.
        """
        return evaluate_run(
            self._subject.run,
            self._images,
            protocols,
            self._settings.embedding,
            labels_per_class=self._labels,
            draws=self._settings.draws,
            seed=self._settings.seed,
            num_workers=self._subject.num_workers,
            device=self._subject.device,
        )

    @cached_property
    def _data(self) -> LabelledTensors:
        return load_labelled(self._subject, self._images)

    @cached_property
    def _backbones(self) -> dict[BackboneName, nn.Module]:
        run, device = self._subject.run, self._subject.device
        first = run.statistics.normalize(self._data.train_images[:BATCH_SIZE].to(device))
        return {
            "untrained": untrained_backbone(run, first, device),
            "pretrained": run.energy.backbone.to(device),
        }

    @cached_property
    def _contenders(self) -> list[Contender]:
        return contenders(self._subject)

    def _attentive_rows(self) -> list[EvaluationRow]:
        data, settings, device = self._data, self._settings, self._subject.device
        rows = []
        for name, backbone in self._backbones.items():
            LOGGER.info(f"attentive probe, {name} backbone")
            train, test = (
                feature_maps(backbone, images, data.statistics, device).to(device)
                for images in (data.train_images, data.test_images)
            )
            for count in self._labels:
                subsets = labelled_subsets(data.train_labels, count, settings.draws, settings.seed)
                accuracies = [
                    attentive_probe_accuracy(
                        train[i], data.train_labels[i], test, data.test_labels, settings.seed
                    )
                    for i in subsets
                ]
                rows.append(accuracy_row("attentive", count, name, accuracies))
        return rows

    def _fine_tuned_rows(self) -> list[EvaluationRow]:
        return [
            row
            for contender in self._contenders
            for row in fine_tuned_rows(
                contender,
                self._data,
                self._subject.device,
                self._labels,
                self._settings.draws,
                self._settings.seed,
                self._settings.rate_factors,
            )
        ]

    def _lowshot_rows(self) -> list[EvaluationRow]:
        labels = _affordable(self._data.train_labels)
        return [
            row
            for contender in self._contenders
            for row in lowshot_rows(
                contender,
                self._data,
                self._embed(self._backbones[contender.name], self._data.train_images),
                self._embed(self._backbones[contender.name], self._data.test_images),
                self._subject.device,
                labels,
                self._settings.draws,
                self._settings.seed,
                self._settings.rate_factors,
            )
        ]

    def _embed(self, backbone: nn.Module, images: Tensor) -> Tensor:
        normalize = self._subject.run.statistics.normalize
        batches = (normalize(batch) for batch in images.split(BATCH_SIZE))
        return embed_batches(backbone, batches, self._settings.embedding, self._subject.device)


def contenders(subject: Subject) -> list[Contender]:
    """From scratch, and from the pretrained weights, with the same recipe."""
    tuning = subject.settings.finetuning
    return [
        Contender("untrained", backbone_maker(subject.run, None), tuning.from_scratch()),
        Contender("pretrained", backbone_maker(subject.run, subject.weights), tuning),
    ]


def load_labelled(subject: Subject, images: LabelledImages) -> LabelledTensors:
    """Both parts in memory, as decoded; ``train_images`` limits the training part.

    Raises:
        UserError: a part without labels, or what loading raises.
    """
    limits = (subject.settings.train_images, None)
    parts = []
    for source, limit in zip((images.train, images.test), limits, strict=True):
        if source.labels is None:
            raise UserError(f"{source.name} has no labels; add them")
        loaded = load_images(
            source,
            subject.run,
            limit,
            subject.settings.seed,
            normalised=False,
            num_workers=subject.num_workers,
        )
        assert loaded.labels is not None
        parts.append((loaded.images, loaded.labels))
    return LabelledTensors(*parts[0], *parts[1], subject.run.statistics)


def _affordable(labels: Tensor) -> list[int | float]:
    """The numbers of labels that every class has; shares it always has."""
    smallest = int(labels.unique(return_counts=True)[1].min())
    chosen = [count for count in LOWSHOT_LABELS if isinstance(count, float) or count <= smallest]
    left_out = [str(count) for count in LOWSHOT_LABELS if count not in chosen]
    if left_out:
        LOGGER.info(
            f"lowshot: {', '.join(left_out)} labels a class are left out, as the smallest class "
            f"has {smallest}"
        )
    return chosen


def merge_rows(old: list[EvaluationRow], new: list[EvaluationRow]) -> list[EvaluationRow]:
    """All new rows after the old ones that no new row replaces.

    A row replaces those of the same protocol and number of labels.
    """
    replaced = {(row.protocol, row.labels) for row in new}
    return [row for row in old if (row.protocol, row.labels) not in replaced] + new
