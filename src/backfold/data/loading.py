"""Batches of augmented images, the same bits on every run and after every resumption.

Which images a training step sees, and how each is cropped and flipped, depends on the seed, the
step and the image alone: not on worker processes, nor on what was loaded before.

Images are decoded by C libraries, which a damaged file can crash or keep busy for ever. So every
worker process reads them in a process beside it (see `Expendable`), and such a file is a broken
one. Without worker processes there is no such protection.
"""

import signal
import threading
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any, TypeVar

import joblib
import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor
from torch.utils.data import DataLoader, Dataset, Sampler

from backfold.data.augmentation import Augmentation, Augmenter, ImageSize, cover
from backfold.data.decode import as_float, to_channels
from backfold.data.isolation import IMAGE_SECONDS, Expendable, FatalImage
from backfold.data.source import ImageSource
from backfold.errors import BrokenImage, UserError

MAX_REPLACEMENTS = 100
Key = tuple[int, int]  # (epoch, position)
Wanted = tuple[int, int, int]  # (index in the source, epoch, position)
Item = TypeVar("Item")


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


class DeadWorker(LoadingError, RuntimeError):  # noqa: N818 - torch's own is a RuntimeError too
    """A process that loads images is gone: killed, most often because memory ran out."""


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
        self._apart = Expendable(self._load, IMAGE_SECONDS)
        self._fatal: dict[int, FatalImage] = {}  # which are not tried again

    def __len__(self) -> int:
        return len(self._indices)

    def __getitem__(self, keys: Sequence[Key]) -> Batch:
        """Load, augment and stack; the next readable image takes a broken one's place.

        Raises:
            LoadingError: an image of an unfit channel count, or too many broken files in a row.
        """
        broken: list[str] = []
        images, indices = [], []
        # torchvision draws from the global generator: lend it, once a batch as that takes long.
        with torch.random.fork_rng(devices=[]):
            first = self._load_each([self._wanted(*key) for key in keys])
            for key, outcome in zip(keys, first, strict=True):
                index, image = self._replace(key, outcome, broken)
                images.append(torch.from_numpy(image))
                indices.append(index)
        return Batch(stack_images(images), torch.tensor(indices), broken)

    def _wanted(self, epoch: int, position: int, offset: int = 0) -> Wanted:
        return self._indices[(position + offset) % len(self._indices)], epoch, position

    def _replace(
        self, key: Key, outcome: NDArray[Any] | BrokenImage, broken: list[str]
    ) -> tuple[int, NDArray[Any]]:
        tries = min(len(self._indices), MAX_REPLACEMENTS)
        for offset in range(tries):
            wanted = self._wanted(*key, offset)
            if offset:
                (outcome,) = self._load_each([wanted])
            if not isinstance(outcome, BrokenImage):
                return wanted[0], outcome
            broken.append(f"{self._source.describe(wanted[0])}: {outcome}")
        raise LoadingError(
            f"{self._source.name}: {tries} images in a row can't be read, the last is "
            f"{broken[-1]}; mend or remove them"
        )

    def _load_each(self, wanted: Sequence[Wanted]) -> list[NDArray[Any] | BrokenImage]:
        tried = [one for one in wanted if one[0] not in self._fatal]
        outcomes = dict(zip(tried, self._apart.each_in_worker(tried), strict=True))
        self._fatal |= {
            one[0]: outcome for one, outcome in outcomes.items() if isinstance(outcome, FatalImage)
        }
        return [outcomes[one] if one in outcomes else self._fatal[one[0]] for one in wanted]

    def _load(self, wanted: Wanted) -> NDArray[Any]:
        index, *seeds = wanted
        try:
            image = to_channels(self._source.read(index, self._min_side), self._channels)
        except UserError as error:
            raise LoadingError(f"{self._source.describe(index)}: {error}") from None
        if self._augmenter is None:
            return cover(image, self._image_size).numpy()
        seed = np.random.SeedSequence((self._seed, *seeds)).generate_state(1, np.uint64)
        torch.default_generator.manual_seed(int(seed[0]))
        return self._augmenter(image).numpy()


def stack_images(images: list[Tensor]) -> Tensor:
    """One batch: uint8 where all are, else float32; see `Batch.images`."""
    if all(image.dtype == torch.uint8 for image in images):
        return torch.stack(images).contiguous()
    return torch.stack([as_float(image) for image in images]).contiguous()


class StepSampler(Sampler[list[Key]]):
    """For each optimizer step, this rank's (epoch, index) keys.

    Every epoch is a permutation of all images that depends on (seed, epoch) only; images that do
    not fill a last global batch sit that epoch out.

    Args:
        count: number of images; for the others see `training_loader`.

    Raises:
        UserError: fewer images than one global batch, or a negative seed.
    """

    def __init__(
        self,
        count: int,
        batch_size: int,
        seed: int,
        start_step: int,
        total_steps: int,
        rank: int = 0,
        world_size: int = 1,
    ) -> None:
        assert start_step >= 0
        assert 0 <= rank < world_size
        if seed < 0:
            raise UserError(f"seed is {seed}; give 0 or more")
        self.steps_per_epoch = steps_per_epoch(count, batch_size * world_size)
        self._count, self._batch_size, self._seed = count, batch_size, seed
        self._start_step, self._total_steps = start_step, total_steps
        self._rank, self._world_size = rank, world_size

    def __len__(self) -> int:
        return max(0, self._total_steps - self._start_step)

    def __iter__(self) -> Iterator[list[Key]]:
        step = self._start_step
        while step < self._total_steps:
            epoch, first = divmod(step, self.steps_per_epoch)
            order = np.random.default_rng([self._seed, epoch]).permutation(self._count)
            last = min(self.steps_per_epoch, first + self._total_steps - step)
            for step_in_epoch in range(first, last):
                start = (step_in_epoch * self._world_size + self._rank) * self._batch_size
                chosen = order[start : start + self._batch_size].tolist()
                yield [(epoch, index) for index in chosen]
            step += last - first


def steps_per_epoch(count: int, global_batch_size: int) -> int:
    """Full global batches in ``count`` images.

    Raises:
        UserError: there is none.
    """
    if count < global_batch_size:
        raise UserError(
            f"{count} images are fewer than one global batch of {global_batch_size}; "
            f"lower --batch-size so that all processes together take at most {count}, or add images"
        )
    return count // global_batch_size


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
    pin_memory: bool = False,
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
        num_workers: processes that load; 0 loads in this one, unprotected.
        prefetch: batches that each of these processes has loaded or is loading ahead, 1 or more.
        pin_memory: put batches into page-locked memory, from which a GPU copies faster.

    Raises:
        UserError: fewer images than one global batch, or a negative seed; while iterating, what
            `BatchDataset` raises.
    """
    sampler = StepSampler(len(source), batch_size, seed, start_step, total_steps, rank, world_size)
    dataset = BatchDataset(source, image_size, channels, augmentation, seed)
    return batch_loader(dataset, sampler, num_workers, prefetch, pin_memory)


def evaluation_batches(
    source: ImageSource,
    image_size: ImageSize,
    channels: int,
    batch_size: int,
    num_workers: int = 0,
    indices: Sequence[int] | None = None,
) -> Iterator[Batch]:
    """All images, or those of ``indices``, once, in order and without augmentation.

    Args:
        source: the images.
        image_size: (height, width) in pixels.
        channels: of the batches; see `to_channels`.
        batch_size: images in a batch; the last may be smaller.
        num_workers: processes that load; 0 loads in this one, unprotected.
        indices: the source's images to load, in this order; all by default. A broken one is
            replaced from these only.

    Raises:
        UserError: while iterating, what `BatchDataset` and `watched` raise.
    """
    count = len(source) if indices is None else len(indices)
    positions = range(count)
    batches = [positions[start : start + batch_size] for start in range(0, count, batch_size)]
    return guarded_batches(source, image_size, channels, batches, num_workers, indices)


def guarded_batches(
    source: ImageSource,
    image_size: ImageSize,
    channels: int,
    batches: Sequence[Sequence[int]],
    num_workers: int = 0,
    indices: Sequence[int] | None = None,
) -> Iterator[Batch]:
    """As `evaluation_batches`, with the positions of the images in each batch."""
    dataset = BatchDataset(source, image_size, channels, indices=indices)
    keys = [[(0, position) for position in batch] for batch in batches]
    return watched(batch_loader(dataset, keys, num_workers))


def batch_loader(
    dataset: Dataset[Item],
    batches: Iterable[Any],
    num_workers: int,
    prefetch: int = 2,
    pin_memory: bool = False,
) -> "DataLoader[Item]":
    """The data set's items of these keys, in this order; see `training_loader`."""
    return DataLoader(
        dataset,
        batch_size=None,
        sampler=batches,
        num_workers=num_workers,
        prefetch_factor=prefetch if num_workers else None,
        collate_fn=_unchanged,
        pin_memory=pin_memory,
        # The loader's own draw (its workers' seeds, unused here) leaves the global generator alone.
        generator=torch.Generator(),
    )


def _unchanged(batch: object) -> object:
    return batch


def watched(loader: Iterable[Item]) -> Iterator[Item]:
    """What a DataLoader gives.

    Raises:
        DeadWorker: one of its processes is gone; found at once, or some seconds later.
    """
    handler = signal.getsignal(signal.SIGCHLD) or signal.SIG_DFL
    if str(getattr(handler, "__module__", "")).startswith("torch."):
        handler = signal.SIG_DFL
    try:
        for number, item in enumerate(loader):
            # torch would tell of a death wherever the main thread is: in the midst of a step too.
            if number == 0 and threading.current_thread() is threading.main_thread():
                signal.signal(signal.SIGCHLD, handler)
            yield item
    except (RuntimeError, OSError, EOFError) as error:
        # A worker that dies takes along the batches that lie in its shared memory.
        lost = isinstance(error, (ConnectionError, EOFError, FileNotFoundError))
        if not lost and not str(error).startswith(("DataLoader worker", "Pin memory thread")):
            raise
        reason = (str(error).strip() or type(error).__name__).splitlines()[0].strip(" .")
        raise DeadWorker(
            f"a process that loads images died ({reason}); free memory, or lower --num-workers"
        ) from None
