"""Batches of given images, in order and without augmentation, whatever happens to the workers."""

from collections.abc import Iterator, Sequence
from dataclasses import replace

import torch
from torch.utils.data import DataLoader

from backfold.data.augmentation import ImageSize
from backfold.data.guarded import BATCH_SECONDS, IMAGE_SECONDS, LOOK_SECONDS, survive
from backfold.data.loading import Batch, BatchDataset, batch_loader
from backfold.data.protocol import ImageSource, SubsetSource

AHEAD = 2  # batches in the making in each worker


def evaluation_batches(
    source: ImageSource,
    image_size: ImageSize,
    channels: int,
    batch_size: int,
    num_workers: int = 0,
    indices: Sequence[int] | None = None,
) -> Iterator[Batch]:
    """As `evaluation_loader`, and an image that crashes or hangs a worker is a broken one.

    Args:
        source: the images.
        image_size: (height, width) in pixels.
        channels: of the batches; see `to_channels`.
        batch_size: images in a batch; the last may be smaller.
        num_workers: processes that load; 0 loads in this one, without that protection.
        indices: the source's images to load, in this order; all by default. A broken one is
            replaced from these only.

    Raises:
        UserError: while iterating, what `BatchDataset` raises.
    """
    # As a source of its own: who looks for a fatal image looks where replacements come from.
    chosen = source if indices is None else SubsetSource(source, indices)
    places = None if indices is None else torch.as_tensor(indices)
    batches = [
        range(start, min(start + batch_size, len(chosen)))
        for start in range(0, len(chosen), batch_size)
    ]
    for batch in guarded_batches(chosen, image_size, channels, batches, num_workers):
        yield batch if places is None else replace(batch, indices=places[batch.indices])


def guarded_batches(
    source: ImageSource,
    image_size: ImageSize,
    channels: int,
    batches: Sequence[Sequence[int]],
    num_workers: int = 0,
) -> Iterator[Batch]:
    """The batches whose images' indices are given; see `survive`.

    Args:
        source: the images; a broken one is replaced by the next in the source.
        image_size: (height, width) in pixels.
        channels: of the batches; see `to_channels`.
        batches: indices of the images in each.
        num_workers: processes that load; 0 loads in this one, without protection.

    Raises:
        UserError: while iterating, what `BatchDataset` raises.
    """

    def make_loader(guarded: ImageSource, start: int) -> "DataLoader[Batch]":
        dataset = BatchDataset(guarded, image_size, channels)
        keys = [[(0, index) for index in wanted] for wanted in batches[start:]]
        return batch_loader(dataset, keys, num_workers, AHEAD, LOOK_SECONDS)

    ahead = AHEAD * num_workers
    return survive(
        source, make_loader, batches.__getitem__, 0, len(batches), ahead, IMAGE_SECONDS,
        BATCH_SECONDS,
    )  # fmt: skip
