"""Batches of augmented images, the same bits on every run and after every resumption.

Which images a training step sees, and how each is cropped and flipped, depends on the seed, the
step and the image alone: not on worker processes, nor on what was loaded before.
"""

from collections.abc import Iterable, Sequence
from dataclasses import dataclass

import joblib
import numpy as np
import torch
from torch import Tensor
from torch.utils.data import DataLoader, Dataset

from backfold.data.augmentation import Augmentation, Augmenter, ImageSize, cover
from backfold.data.decode import as_float, to_channels
from backfold.data.sampling import InOrderSampler, Key, StepSampler
from backfold.data.source import ImageSource
from backfold.errors import BrokenImage, UserError

MAX_REPLACEMENTS = 100


@dataclass
class Batch:
    """Images and where they come from.

    Attributes:
        images: (batch, channels, height, width), uint8 in 0..255, or float32 (see `as_float`)
            where one of them has more than 8 bits. `ChannelStatistics.normalize` takes both:
            converting on the device spares workers and their shared memory four times the bytes.
        indices: int64 (batch,), the images' indices in the source.
        broken: a line for every file that could not be read; the next readable took its place.
    """

    images: Tensor
    indices: Tensor
    broken: list[str]

    def pin_memory(self) -> "Batch":
        """The batch in page-locked memory; DataLoader calls this."""
        return Batch(self.images.pin_memory(), self.indices.pin_memory(), self.broken)


def default_workers(processes: int = 1) -> int:
    """Processes that load for each of ``processes`` on this machine: 1 to 8, one core left to it.

    A process's affinity and a container's limit count, not only what the machine has. One at least,
    so that a decoder that crashes does not take the caller along.
    """
    return min(8, max(1, int(joblib.cpu_count()) // processes - 1))


class LoadingError(UserError):
    """A user's mistake found while loading.

    A DataLoader hands a worker's exception on with the whole traceback as its message; only the
    last line, the original message, is kept.
    """

    def __init__(self, message: str) -> None:
        last_line = message.strip().splitlines()[-1]
        super().__init__(last_line.rpartition(f"{type(self).__name__}: ")[2])


class BatchDataset(Dataset[Batch]):
    """Maps a list of (epoch, position) keys to a `Batch`.

    Args:
        source: the images.
        image_size: (height, width) in pixels.
        channels: see `to_channels`.
        augmentation: None scales each image to cover the size and cuts out the centre.
        seed: with an image's epoch and position it alone decides the augmentation.
        indices: the source's images to use, in this order; all by default.
    """

    def __init__(
        self,
        source: ImageSource,
        image_size: ImageSize,
        channels: int,
        augmentation: Augmentation | None = None,
        seed: int = 0,
        indices: Sequence[int] | None = None,
    ) -> None:
        self._source, self._image_size, self._channels = source, image_size, channels
        self._seed = seed
        self._augmenter = Augmenter(augmentation, image_size) if augmentation else None
        self._min_side = self._augmenter.min_side if self._augmenter else max(image_size)
        self._indices = range(len(source)) if indices is None else [int(index) for index in indices]

    def __len__(self) -> int:
        return len(self._indices)

    def __getitem__(self, keys: Sequence[Key]) -> Batch:
        """Load, augment and stack.

        Raises:
            LoadingError: an image of an unfit channel count, or too many broken files in a row.
        """
        broken: list[str] = []
        images, indices = [], []
        # torchvision draws from the global generator: lend it, once a batch as that takes long.
        with torch.random.fork_rng(devices=[]):
            for epoch, position in keys:
                index, image = self._read(position, broken)
                images.append(self._transform(image, epoch, position))
                indices.append(index)
        return Batch(stack_images(images), torch.tensor(indices), broken)

    def _read(self, position: int, broken: list[str]) -> tuple[int, Tensor]:
        tries = min(len(self._indices), MAX_REPLACEMENTS)
        for offset in range(tries):
            index = self._indices[(position + offset) % len(self._indices)]
            try:
                image = self._source.read(index, self._min_side)
                return index, to_channels(image, self._channels)
            except BrokenImage as error:
                broken.append(f"{self._source.describe(index)}: {error}")
            except UserError as error:
                raise LoadingError(f"{self._source.describe(index)}: {error}") from None
        raise LoadingError(
            f"{self._source.name}: {tries} images in a row can't be read, the last is "
            f"{broken[-1]}; mend or remove them"
        )

    def _transform(self, image: Tensor, epoch: int, position: int) -> Tensor:
        if self._augmenter is None:
            return cover(image, self._image_size)
        seed = np.random.SeedSequence((self._seed, epoch, position)).generate_state(1, np.uint64)
        torch.default_generator.manual_seed(int(seed[0]))
        return self._augmenter(image)


def stack_images(images: list[Tensor]) -> Tensor:
    """One batch: uint8 where all are, else float32; see `Batch.images`."""
    if all(image.dtype == torch.uint8 for image in images):
        return torch.stack(images).contiguous()
    return torch.stack([as_float(image) for image in images]).contiguous()


def training_loader(
    source: ImageSource,
    image_size: ImageSize,
    channels: int,
    augmentation: Augmentation,
    batch_size: int,
    seed: int,
    start_step: int,
    total_steps: int,
    rank: int = 0,
    world_size: int = 1,
    num_workers: int = 0,
    prefetch: int = 2,
    timeout: float = 0.0,
) -> "DataLoader[Batch]":
    """One batch for each step from ``start_step`` to ``total_steps``; one loader serves the run.

    Args:
        source: the training images.
        image_size: (height, width) in pixels.
        channels: of the batches; see `to_channels`.
        augmentation: random changes.
        batch_size: images a step on this rank.
        seed: of order and augmentation.
        start_step: steps already done; the batches are those that an unbroken run would see.
        total_steps: of the whole run.
        rank: this process, from 0.
        world_size: number of processes.
        num_workers: processes that load; 0 loads in this one.
        prefetch: batches that each of these processes has loaded or is loading ahead, 1 or more.
        timeout: seconds to wait for a batch before RuntimeError; 0 waits for ever (see `survive`).

    Raises:
        UserError: fewer images than one global batch, or a negative seed; while iterating, what
            `BatchDataset` raises.
    """
    sampler = StepSampler(len(source), batch_size, seed, start_step, total_steps, rank, world_size)
    dataset = BatchDataset(source, image_size, channels, augmentation, seed)
    return batch_loader(dataset, sampler, num_workers, prefetch, timeout)


def evaluation_loader(
    source: ImageSource,
    image_size: ImageSize,
    channels: int,
    batch_size: int,
    num_workers: int = 0,
    indices: Sequence[int] | None = None,
) -> "DataLoader[Batch]":
    """All images, or those of ``indices``, once, in order and without augmentation.

    `Batch.indices` count in the whole source. A broken file is replaced from ``indices`` only.

    Raises:
        UserError: while iterating, what `BatchDataset` raises.
    """
    dataset = BatchDataset(source, image_size, channels, indices=indices)
    return batch_loader(dataset, InOrderSampler(len(dataset), batch_size), num_workers)


def batch_loader(
    dataset: BatchDataset,
    batches: Iterable[Sequence[Key]],
    num_workers: int,
    prefetch: int = 2,
    timeout: float = 0.0,
) -> "DataLoader[Batch]":
    """These batches, in this order; see `training_loader`."""
    return DataLoader(
        dataset,
        batch_size=None,
        sampler=batches,
        num_workers=num_workers,
        prefetch_factor=prefetch if num_workers else None,
        timeout=timeout if num_workers else 0.0,
        collate_fn=_unchanged,
        pin_memory=torch.cuda.is_available(),
        # The loader's own draw (its workers' seeds, unused here) leaves the global generator alone.
        generator=torch.Generator(),
    )


def _unchanged(batch: object) -> object:
    return batch
