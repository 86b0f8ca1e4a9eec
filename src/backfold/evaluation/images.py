"""A source's images in memory, as the run saw them but without augmentation."""

import logging
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from backfold.data.broken import BrokenFiles
from backfold.data.decode import as_float
from backfold.data.guarded_loading import evaluation_batches
from backfold.data.source import ImageSource
from backfold.errors import UserError
from backfold.training.pretrained import Pretrained

LOGGER = logging.getLogger("backfold")


@dataclass(frozen=True)
class LoadedImages:
    """Images and their labels.

    Args:
        images: (images, channels, height, width).
        labels: int64, (images,), as the source counts its classes; None where it has none.
        indices: int64, (images,), each image's place in the source.
    """

    images: Tensor
    labels: Tensor | None
    indices: Tensor


def load_images(
    source: ImageSource,
    run: Pretrained,
    limit: int | None = None,
    seed: int = 0,
    *,
    normalised: bool = True,
    batch_size: int = 256,
    num_workers: int = 0,
) -> LoadedImages:
    """Decode the source's images, or some of them, in the source's order.

    Each is given the run's channels, scaled to cover the run's image size and cut to its centre. A
    file that can't be read is replaced by the next one, label and all.

    Args:
        source: where the images are.
        run: its channels, image size, statistics and allowed share of broken files count.
        limit: this many images are drawn without replacement, 1 or more; a source of fewer, or
            None, is taken whole.
        seed: of the draw.
        normalised: float32 with the run's mean and deviation; else as decoded, in a quarter of the
            memory: uint8 where all images are, or float32 (see `as_float`).
        batch_size: images that are decoded at once.
        num_workers: processes that decode.

    Raises:
        UserError: a limit below 1, no images, or too many files that can't be read.
    """
    indices = _draw(source, limit, seed)
    broken = BrokenFiles.for_source(source, run.config.max_broken_share)
    loader = evaluation_batches(
        source, run.image_size, run.channels, batch_size, num_workers, indices
    )
    parts, places = [], []
    for batch in loader:
        for line in broken.add(batch.broken):
            LOGGER.warning(f"skipped: {line}")
        parts.append(run.statistics.normalize(batch.images) if normalised else batch.images)
        places.append(batch.indices)
    if any(part.is_floating_point() for part in parts):
        parts = [as_float(part) for part in parts]
    order = torch.cat(places)
    labels = None if source.labels is None else torch.from_numpy(source.labels[order.numpy()])
    return LoadedImages(torch.cat(parts), labels, order)


def _draw(source: ImageSource, limit: int | None, seed: int) -> Sequence[int]:
    if limit is not None and limit < 1:
        raise UserError(f"limit is {limit} images; give 1 or more, or none for all")
    if len(source) == 0:
        raise UserError(f"{source.name} holds no images; give data with images")
    if limit is None or limit >= len(source):
        return range(len(source))
    drawn = np.random.default_rng(seed).choice(len(source), limit, replace=False)
    chosen: list[int] = np.sort(drawn).tolist()
    return chosen
