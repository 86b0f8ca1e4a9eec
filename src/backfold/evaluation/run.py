"""Evaluating a run: its frozen backbone beside the same backbone untrained."""

import logging
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor, nn

from backfold.data.arrays import MAX_PIXELS
from backfold.data.broken import BrokenFiles
from backfold.data.guarded_loading import evaluation_batches
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
from backfold.evaluation.untrained import untrained_backbone
from backfold.training.pretrained import Pretrained

LOGGER = logging.getLogger("backfold")
TEST_SHARE = 0.2
BATCH_NORM_IMAGES = 256


@dataclass(frozen=True)
class LabelledImages:
    """A labelled training part and a test part."""

    train: ImageSource
    test: ImageSource


def open_labelled(
    data: str | Path | None, seed: int = 0, max_pixels: int = MAX_PIXELS
) -> LabelledImages:
    """Open labelled data; where they have no test split, a fifth of each class is set apart.

    Args:
        data: as `open_source` takes it.
        seed: of the images that are set apart.
        max_pixels: larger images are counted as broken.

    Raises:
        UserError: no data or no labels.
    """
    train = open_source(data, "train", labelled=True, max_pixels=max_pixels)
    if train.labels is None:
        raise UserError(
            f"{train.name} has no labels; give a folder with one sub-folder a class, or parquet "
            "files with a label column"
        )
    try:
        own_test = open_source(data, "test", labelled=True, max_pixels=max_pixels)
        return LabelledImages(train, own_test)
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

    The untrained one is that of `untrained_backbone`.

    Raises:
        UserError: what loading, embedding or the probes raise.
    """
    loader = _Batches(run, batch_size, num_workers)
    some = range(min(BATCH_NORM_IMAGES, len(images.train)))
    first = torch.cat([batch for batch, _ in loader.of(images.train, some)])
    backbones: dict[BackboneName, nn.Module] = {
        "untrained": untrained_backbone(run, first, device),
        "pretrained": run.energy.backbone.to(device),
    }
    rows: list[EvaluationRow] = []
    for name, backbone in backbones.items():
        LOGGER.info(f"embedding {len(images.train) + len(images.test)} images, {name} backbone")
        rows += evaluate_embeddings(
            *_embed(backbone, loader, images.train, choice, device),
            *_embed(backbone, loader, images.test, choice, device),
            protocols,
            name,
            labels_per_class,
            draws,
            seed,
        )
    return rows


class _Batches:
    """Normalised batches of a source, as the run saw its images but without augmentation.

    Beside each are the indices of its images: the next image stands in for a broken one.
    """

    def __init__(self, run: Pretrained, batch_size: int, num_workers: int) -> None:
        self._run, self._batch_size, self._num_workers = run, batch_size, num_workers

    def of(
        self, source: ImageSource, indices: Sequence[int] | None = None
    ) -> Iterator[tuple[Tensor, Tensor]]:
        run = self._run
        broken = BrokenFiles.for_source(source, run.config.max_broken_share)
        loader = evaluation_batches(
            source, run.image_size, run.channels, self._batch_size, self._num_workers, indices
        )
        for batch in loader:
            for line in broken.add(batch.broken):
                LOGGER.warning(f"skipped: {line}")
            yield run.statistics.normalize(batch.images), batch.indices


def _embed(
    backbone: nn.Module,
    loader: _Batches,
    source: ImageSource,
    choice: EmbeddingChoice,
    device: torch.device,
) -> tuple[Tensor, Tensor]:
    """(images, features) and (images,): embeddings, and labels of the images that were embedded."""
    labels = _labels(source)
    indices: list[Tensor] = []

    def images() -> Iterator[Tensor]:
        for batch, places in loader.of(source):
            indices.append(places)
            yield batch

    embeddings = embed_batches(backbone, images(), choice, device)
    return embeddings, labels[torch.cat(indices)]


def _labels(source: ImageSource) -> Tensor:
    if source.labels is None:
        raise UserError(f"{source.name} has no labels, and the training images have; add them")
    return torch.from_numpy(source.labels)
