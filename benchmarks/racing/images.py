"""The race's images, decoded once into memory, and who may see which of them."""

from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from backfold.data.broken import BrokenFiles
from backfold.data.loading import evaluation_loader
from backfold.data.source import ImageSource, open_source
from backfold.data.split import stratified_split
from backfold.data.statistics import ChannelStatistics, ChannelSums
from backfold.errors import UserError
from racing.sizes import Size

SPLIT_SEED = 0
MEASURED_IMAGES = 1000


@dataclass(frozen=True)
class Labelled:
    """Images and their classes.

    Attributes:
        images: uint8, (images, channels, height, width).
        labels: int64, (images,).
        rows: of these images in their file, int64, (images,).
    """

    images: Tensor
    labels: Tensor
    rows: Tensor

    def first(self, count: int) -> "Labelled":
        """The first images; they are in a random order already."""
        return Labelled(self.images[:count], self.labels[:count], self.rows[:count])


@dataclass(frozen=True)
class RaceImages:
    """What a race runs on.

    Attributes:
        training: what is pretrained on, without a look at the labels.
        labelled: the first of them, with the labels that probes and fine-tuning learn from.
        validation: of the training file, for every choice that is made; on none of them is
            anything trained or reported.
        test: of the test file, for the reported numbers.
        statistics: normalise all of them.
    """

    training: Labelled
    labelled: Labelled
    validation: Labelled
    test: Labelled
    statistics: ChannelStatistics


def load_race_images(data: str | Path, size: Size) -> RaceImages:
    """Decode the images that a size asks for.

    Raises:
        UserError: no labels, no test file, or too few images.
    """
    train = open_source(data, "train", labelled=True)
    test = open_source(data, "test", labelled=True)
    training_rows, validation_rows = _split(_labels(train), size)
    training = _decode(train, training_rows, size.image_size)
    return RaceImages(
        training,
        training.first(size.labelled),
        _decode(train, validation_rows, size.image_size),
        _decode(test, _subset(_labels(test), size.test), size.image_size),
        measure(training.images[:MEASURED_IMAGES]),
    )


def measure(images: Tensor) -> ChannelStatistics:
    """Channel means and deviations of uint8 images (images, channels, height, width)."""
    sums = ChannelSums(images.shape[1])
    for image in images:
        sums.add(image)
    return sums.statistics()


def _labels(source: ImageSource) -> np.ndarray:
    if source.labels is None:
        raise UserError(f"{source.name} has no labels; give data with a label column")
    return source.labels


def _split(labels: np.ndarray, size: Size) -> tuple[np.ndarray, np.ndarray]:
    """Rows to train on and rows for the choices, without one in common, in random orders."""
    needed = size.validation + (size.images or size.labelled)
    if len(labels) < needed:
        raise UserError(
            f"the race of size {size.name!r} needs {needed} training images, and there are "
            f"{len(labels)}; give more images or another --size"
        )
    training, validation = stratified_split(labels, size.validation / len(labels), SPLIT_SEED)
    kept = _subset(labels[training], size.images or len(training))
    return training[kept], _shuffled(validation)


def _subset(labels: np.ndarray, count: int) -> np.ndarray:
    """About ``count`` rows, with the classes' shares kept, in a random order."""
    if count >= len(labels):
        return _shuffled(np.arange(len(labels)))
    _, chosen = stratified_split(labels, count / len(labels), SPLIT_SEED)
    return _shuffled(chosen)


def _shuffled(rows: np.ndarray) -> np.ndarray:
    return np.random.default_rng(SPLIT_SEED).permutation(rows)


def _decode(source: ImageSource, rows: np.ndarray, image_size: int) -> Labelled:
    broken = BrokenFiles(0)
    parts = []
    loader = evaluation_loader(source, (image_size, image_size), 3, 256, indices=rows.tolist())
    for batch in loader:
        broken.add(batch.broken)
        parts.append(batch.images)
    images = torch.cat(parts)
    assert images.dtype == torch.uint8
    return Labelled(images, torch.from_numpy(_labels(source)[rows]), torch.from_numpy(rows))
