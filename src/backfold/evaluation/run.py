"""Evaluating a run: its frozen backbone beside the same backbone untrained."""

import logging
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor, nn

from backfold.batch_norm import measure_batch_norm
from backfold.data.broken import BrokenFiles
from backfold.data.loading import evaluation_loader
from backfold.data.source import (
    ImageSource,
    NoTestSplit,
    SubsetSource,
    open_source,
    stratified_split,
)
from backfold.embedding import EmbeddingChoice, embed_batches
from backfold.errors import UserError
from backfold.evaluation.protocol import (
    BackboneName,
    EvaluationRow,
    ProtocolName,
    evaluate_embeddings,
)
from backfold.training.pretrained import Pretrained
from backfold.training.setup import build_energy

LOGGER = logging.getLogger("backfold")
TEST_SHARE = 0.2
BATCH_NORM_IMAGES = 256


@dataclass(frozen=True)
class LabelledImages:
    """A labelled training part and a test part."""

    train: ImageSource
    test: ImageSource


def open_labelled(data: str | Path | None, seed: int = 0) -> LabelledImages:
    """Open labelled data; where they have no test split, a fifth of each class is set apart.

    Raises:
        UserError: no data or no labels.
    """
    train = open_source(data, "train", labelled=True)
    if train.labels is None:
        raise UserError(
            f"{train.name} has no labels; give a folder with one sub-folder a class, or parquet "
            "files with a label column"
        )
    try:
        return LabelledImages(train, open_source(data, "test", labelled=True))
    except NoTestSplit:
        LOGGER.info(f"{train.name} has no test split: {TEST_SHARE:.0%} of each class is set apart")
        training, test = stratified_split(train.labels, TEST_SHARE, seed)
        return LabelledImages(SubsetSource(train, training), SubsetSource(train, test))


def evaluate_run(
    run: Pretrained,
    images: LabelledImages,
    protocols: Sequence[ProtocolName],
    choice: EmbeddingChoice,
    *,
    labels_per_class: Sequence[int | None] = (None, 10),
    draws: int = 5,
    seed: int = 0,
    batch_size: int = 256,
    num_workers: int = 0,
    device: torch.device,
) -> list[EvaluationRow]:
    """Rows for the untrained and the pretrained backbone, on the same images and draws.

    The untrained backbone has the run's own random weights, before training; its batch norms are
    measured on training images.

    Raises:
        UserError: what loading, embedding or the probes raise.
    """
    untrained = build_energy(run.config, run.channels).backbone.eval().to(device)
    loader = _Batches(run, batch_size, num_workers)
    first = torch.cat(
        list(loader.of(images.train, range(min(BATCH_NORM_IMAGES, len(images.train)))))
    )
    measure_batch_norm(untrained, first.to(device))
    backbones: dict[BackboneName, nn.Module] = {
        "untrained": untrained,
        "pretrained": run.energy.backbone.to(device),
    }
    train_labels, test_labels = _labels(images.train), _labels(images.test)
    rows: list[EvaluationRow] = []
    for name, backbone in backbones.items():
        LOGGER.info(f"embedding {len(images.train) + len(images.test)} images, {name} backbone")
        rows += evaluate_embeddings(
            embed_batches(backbone, loader.of(images.train), choice, device),
            train_labels,
            embed_batches(backbone, loader.of(images.test), choice, device),
            test_labels,
            protocols,
            name,
            labels_per_class,
            draws,
            seed,
        )
    return rows


class _Batches:
    """Normalised batches of a source, as the run saw its images but without augmentation."""

    def __init__(self, run: Pretrained, batch_size: int, num_workers: int) -> None:
        self._run, self._batch_size, self._num_workers = run, batch_size, num_workers

    def of(self, source: ImageSource, indices: Sequence[int] | None = None) -> Iterator[Tensor]:
        run = self._run
        broken = BrokenFiles.for_source(source, run.config.max_broken_share)
        loader = evaluation_loader(
            source, run.image_size, run.channels, self._batch_size, self._num_workers, indices
        )
        for batch in loader:
            for line in broken.add(batch.broken):
                LOGGER.warning(f"skipped: {line}")
            yield run.statistics.normalize(batch.images)


def _labels(source: ImageSource) -> Tensor:
    if source.labels is None:
        raise UserError(f"{source.name} has no labels, and the training images have; add them")
    return torch.from_numpy(source.labels)
