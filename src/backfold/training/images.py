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
    BrokenFiles,
    ImageSource,
    SubsetSource,
    held_out_count,
    split_held_out,
    spread,
)
from backfold.data.statistics import ChannelStatistics
from backfold.data.stream import Stream
from backfold.data.survey import ENOUGH, survey
from backfold.errors import UserError
from backfold.training.config import PretrainConfig

LOGGER = logging.getLogger("backfold")
KNN_IMAGES = 2000
WATCHED_BYTES = 2**28  # of held-out and of labelled images each, kept on the device


@dataclass(frozen=True)
class Images:
    """The training images, and what was found out about them.

    Of a stream, ``training`` and ``held_out`` are its first images, on which nothing is trained.
    """

    training: ImageSource
    held_out: ImageSource
    statistics: ChannelStatistics
    count: int
    stream: Stream | None = None
    reading_workers: int = 0  # that read the held-out images

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
    """
    # One process, so that a decoder that crashes or hangs does not end the run; 0 if asked for.
    workers = 0 if config.num_workers == 0 else 1
    stream = None
    if source is None and config.frames is None:
        stream = open_stream(config.data, config.stream_images, config.max_pixels)
    if stream is not None:
        source, stream = stream.hold_out(held_out_count(config.held_out, stream.count))
        parts: list[ImageSource] = [source, source]
        name, count = stream.name, stream.count
    else:
        if source is None:
            source = open_source(
                config.data, "train", config.watch_labels, config.max_pixels, config.frames
            )
        if len(source) < 2:
            raise UserError(f"{source.name} holds {len(source)} image; give at least 2")
        places = split_held_out(source, config.held_out, config.seed)
        parts = [SubsetSource(source, part) for part in places]
        name, count = source.name, len(parts[0])
    if known is None:
        found = survey(source, config.channels, ENOUGH, config.seed, workers)
        if found.lowest == found.highest:
            raise UserError(
                f"{source.name}: all pixels of {found.looked_at} images are {found.lowest:g}; give "
                "images that show something"
            )
        for conversion, times in found.conversions.items():
            LOGGER.info("%d of %d images: %s", times, found.looked_at, conversion)
        known = found.statistics
    jitter = config.augmentation.color_jitter
    if jitter and not known.in_unit_range:
        raise UserError(
            f"augmentation.color_jitter is {jitter:g}, and images of {name} have means of "
            f"{min(known.mean):g} to {max(known.mean):g}; it is for values of 0 to 1; set it to 0"
        )
    mean, deviation = (
        ", ".join(f"{value:.3f}" for value in values) for values in (known.mean, known.std)
    )
    LOGGER.info(
        f"{name}: {count} images to train, {len(parts[1])} held out, {len(known.mean)} "
        f"channel(s), mean [{mean}], deviation [{deviation}]"
    )
    if source.labels is not None:
        LOGGER.info(
            "labels of %d classes are there: used to watch kNN, never to train",
            len(source.class_names) or len(np.unique(source.labels)),
        )
    return Images(parts[0], parts[1], known, count, stream, workers)


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
    chosen = spread(source, min(count, max(1, WATCHED_BYTES // bytes_each)))
    parts, places = [], []
    for batch in evaluation_batches(
        chosen, image_size, images.channels, 64, images.reading_workers
    ):
        for line in broken.add(batch.broken):
            LOGGER.warning("skipped: %s", line)
        parts.append(images.statistics.normalize(batch.images))
        places.append(batch.indices)
    labels = None if chosen.labels is None else torch.tensor(chosen.labels)[torch.cat(places)]
    return torch.cat(parts), labels
