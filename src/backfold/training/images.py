"""The images of a run: opened, split, counted, measured; and those that watch it."""

import logging
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from backfold.backbone import ImageSize
from backfold.data.loading import evaluation_batches
from backfold.data.open import open_source, open_stream
from backfold.data.source import (
    LARGEST_HELD_OUT_SHARE,
    BrokenFiles,
    ImageSource,
    SubsetSource,
    split_held_out,
)
from backfold.data.statistics import ChannelStatistics, count_channels
from backfold.data.stream import Stream
from backfold.data.survey import survey
from backfold.errors import UserError
from backfold.training.config import PretrainConfig

LOGGER = logging.getLogger("backfold")
SURVEYED_IMAGES = 1000
KNN_IMAGES = 2000
WATCHED_BYTES = 2**28  # of held-out and of labelled images each, kept on the device


@dataclass(frozen=True)
class Images:
    """The training images, and what was found out about them.

    Of a stream, ``training`` and ``held_out`` are its first images, on which nothing is trained.
    ``reading_workers`` read the held-out images.
    """

    training: ImageSource
    held_out: ImageSource
    statistics: ChannelStatistics
    count: int
    stream: Stream | None = None
    reading_workers: int = 0

    @property
    def channels(self) -> int:
        """That all images are brought to."""
        return len(self.statistics.mean)


@dataclass(frozen=True)
class HeldOut:
    """The images that watch a run: normalised, on the device, (images, channels, height, width)."""

    images: Tensor
    labels: Tensor | None
    knn_images: Tensor | None = None
    knn_labels: Tensor | None = None


def open_images(
    config: PretrainConfig,
    known: ChannelStatistics | None = None,
    source: ImageSource | None = None,
) -> Images:
    """Open the data, split off the held-out images, count channels and measure statistics.

    With ``known`` statistics, which a resumed run measured when it began, nothing is measured
    again; a ``source`` has the images in place of the settings' data.

    Raises:
        UserError: no data, too few images, or too many unreadable ones.
    """
    # One process, so that a decoder that crashes or hangs does not end the run; 0 if asked for.
    workers = 0 if config.num_workers == 0 else 1
    stream = None
    if source is None and config.frames is None:
        stream = open_stream(config.data, config.stream_images, config.max_pixels)
    if stream is not None:
        kept = min(config.held_out, max(1, int(LARGEST_HELD_OUT_SHARE * stream.count)))
        head, stream = stream.hold_out(kept)
        statistics = known or _measure(config, head, workers)
        images = Images(head, head, statistics, stream.count, stream, workers)
        return _described(stream.name, images)
    if source is None:
        source = open_source(
            config.data, "train", config.watch_labels, config.max_pixels, config.frames
        )
    if len(source) < 2:
        raise UserError(f"{source.name} holds {len(source)} image; give at least 2")
    training, held_out = (
        SubsetSource(source, places)
        for places in split_held_out(source, config.held_out, config.seed)
    )
    statistics = known or _measure(config, source, workers)
    images = Images(training, held_out, statistics, len(training), reading_workers=workers)
    _described(source.name, images)
    if source.labels is not None:
        LOGGER.info(
            "labels of %d classes are there: used to watch kNN, never to train",
            len(source.class_names) or len(np.unique(source.labels)),
        )
    return images


def _measure(config: PretrainConfig, source: ImageSource, workers: int) -> ChannelStatistics:
    """Mean and deviation of some images; says what is done to them in reading."""
    channels = config.channels or count_channels(source, apart=workers > 0)
    found = survey(source, channels, SURVEYED_IMAGES, config.seed, workers)
    for line in found.notes():
        LOGGER.info("%s", line)
    return found.statistics


def _described(name: str, images: Images) -> Images:
    mean, deviation = (
        "[" + ", ".join(f"{value:.3f}" for value in values) + "]"
        for values in (images.statistics.mean, images.statistics.std)
    )
    LOGGER.info(
        f"{name}: {images.count} images to train, {len(images.held_out)} held out, "
        f"{images.channels} channel(s), mean {mean}, deviation {deviation}"
    )
    return images


def load_held_out(
    images: Images, image_size: ImageSize, device: torch.device, broken: BrokenFiles
) -> HeldOut:
    """The held-out images, and labelled training images for kNN where there are labels."""
    watched, labels = _load(images.held_out, image_size, images, len(images.held_out), broken)
    if labels is None:
        return HeldOut(watched.to(device), None)
    bank, bank_labels = _load(images.training, image_size, images, KNN_IMAGES, broken)
    return HeldOut(watched.to(device), labels, bank.to(device), bank_labels)


def _load(
    source: ImageSource, image_size: ImageSize, images: Images, count: int, broken: BrokenFiles
) -> tuple[Tensor, Tensor | None]:
    """Up to ``count`` images spread over the source, normalised, and their labels if any."""
    bytes_each = 4 * images.channels * image_size[0] * image_size[1]
    count = max(1, min(count, len(source), WATCHED_BYTES // bytes_each))
    indices = np.linspace(0, len(source) - 1, count).round().astype(int).tolist()
    parts, positions = [], []
    for batch in evaluation_batches(
        source, image_size, images.channels, 64, images.reading_workers, indices
    ):
        for line in broken.add(batch.broken):
            LOGGER.warning("skipped: %s", line)
        parts.append(images.statistics.normalize(batch.images))
        positions.append(batch.indices)
    labels = source.labels
    chosen = None if labels is None else torch.from_numpy(labels[torch.cat(positions).numpy()])
    return torch.cat(parts), chosen
