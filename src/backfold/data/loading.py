"""Batches of augmented images, the same bits on every run and after every resumption.

Which images a training step sees, and how each is changed, depends on the seed, the
step and the image alone: not on worker processes, nor on what was loaded before. A worker process
lets another decode (see `Expendable`), as a damaged file can crash decoders or keep them for ever.
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
from torch.utils.data import DataLoader, Dataset

from backfold.data.augmentation import UNCHANGED, Augmentation, Augmenter, ImageSize
from backfold.data.decode import as_float, to_channels
from backfold.data.isolation import IMAGE_SECONDS, Expendable, FatalImage
from backfold.data.source import ImageSource
from backfold.errors import BrokenImage, UserError, first_line

MAX_REPLACEMENTS = 100
Key = tuple[int, int]  # (epoch, index)
Wanted = tuple[int, int, int]  # (index to read, and the key that it is read for)
Item = TypeVar("Item")


@dataclass
class Batch:
    """Images and where they come from."""

    # (batch, channels, height, width), uint8 in 0..255, or float32 (see `as_float`) where one has
    # more than 8 bits. `ChannelStatistics.normalize` takes both: converting on the device spares
    # workers and their shared memory four times the bytes.
    images: Tensor
    indices: Tensor  # int64 (batch,), in the source
    broken: list[str]  # a line for every file that could not be read, which the next replaced

    def pin_memory(self) -> "Batch":
        """The batch in page-locked memory; DataLoader calls this."""
        return Batch(self.images.pin_memory(), self.indices.pin_memory(), self.broken)


def default_workers(processes: int = 1) -> int:
    """Processes that load for each of ``processes`` on this machine: 1 to 8, one core left to it.

    A process's affinity and a container's limit count, not only what the machine has. One at least,
    so that a decoder that crashes does not take the caller along.
    """
    return min(8, max(1, int(joblib.cpu_count()) // processes - 1))


class DeadWorker(UserError, RuntimeError):  # noqa: N818 - torch's own is a RuntimeError too
    """A process that loads images is gone: killed, most often because memory ran out."""


@dataclass(eq=False)
class BatchDataset(Dataset[Batch]):
    """Maps a list of (epoch, index) keys, which alone decide on augmentations, to a `Batch`.

    The next image replaces a broken one. An image of an unfit channel count, or too many broken
    files in a row raise `UserError`.
    """

    source: ImageSource
    image_size: ImageSize
    channels: int
    augmentation: Augmentation = UNCHANGED
    seed: int = 0

    def __post_init__(self) -> None:
        self._augmenter = Augmenter(self.augmentation, self.image_size)
        self._apart = Expendable(self._load, IMAGE_SECONDS)
        self._fatal: dict[int, FatalImage] = {}  # which are not tried again

    def __getitem__(self, keys: Sequence[Key]) -> Batch:
        broken: list[str] = []
        images, indices, count = [], [], len(self.source)
        # torchvision draws from the global generator: lend it, once a batch as that takes long.
        with torch.random.fork_rng(devices=[]):
            first = self._load_each([(index, epoch, index) for epoch, index in keys])
            for (epoch, index), outcome in zip(keys, first, strict=True):
                image, found, tries = outcome, index, 1
                while isinstance(image, BrokenImage):
                    broken.append(f"{self.source.describe(found)}: {image}")
                    if tries == min(count, MAX_REPLACEMENTS):
                        raise none_readable(self.source.name, tries, broken[-1])
                    found, tries = (found + 1) % count, tries + 1
                    (image,) = self._load_each([(found, epoch, index)])
                images.append(torch.from_numpy(image))
                indices.append(found)
        return Batch(stack_images(images), torch.tensor(indices), broken)

    def _load_each(self, wanted: Sequence[Wanted]) -> list[NDArray[Any] | BrokenImage]:
        tried = [one for one in wanted if one[0] not in self._fatal]
        loaded = iter(self._apart.each_in_worker(tried))
        outcomes = [self._fatal.get(index) or next(loaded) for index, *_ in wanted]
        for (index, *_), outcome in zip(wanted, outcomes, strict=True):
            if isinstance(outcome, FatalImage):
                self._fatal[index] = outcome
        return outcomes

    def _load(self, wanted: Wanted) -> NDArray[Any]:
        index, *key = wanted
        return load_image(self.source, index, self.channels, self._augmenter, (self.seed, *key))


def load_image(
    source: ImageSource, index: int, channels: int, augmenter: Augmenter, seed: Sequence[int]
) -> NDArray[Any]:
    """An image as batches hold it; errors name it."""
    try:
        image = to_channels(source.read(index, augmenter.min_side), channels)
    except UserError as error:
        raise UserError(f"{source.describe(index)}: {error}") from None
    return augmenter.seeded(image, *seed).numpy()


def none_readable(name: str, tries: int, last: str) -> UserError:
    """What ends loading after so many broken images; the line of the last."""
    return UserError(
        f"{name}: {tries} images in a row can't be read, the last is {last}; mend or remove them"
    )


def stack_images(images: Sequence[Tensor]) -> Tensor:
    """One batch: uint8 where all are, else float32; see `Batch.images`."""
    if any(image.dtype != torch.uint8 for image in images):
        images = [as_float(image) for image in images]
    return torch.stack(list(images)).contiguous()


def step_keys(
    count: int,
    batch_size: int,
    seed: int,
    start_step: int,
    total_steps: int,
    rank: int = 0,
    world_size: int = 1,
    views: int = 1,
) -> Iterator[list[Key]]:
    """For each optimizer step, this rank's keys; see `training_loader`.

    Every epoch is a permutation of all ``count`` images that depends on (seed, epoch) only; images
    that do not fill a last global batch sit that epoch out. With several ``views`` each image comes
    so often in a row, changed anew, and a batch holds fewer different ones.
    """
    different = batch_size // views
    steps = steps_per_epoch(count, different * world_size)
    for step in range(start_step, total_steps):
        epoch, step_in_epoch = divmod(step, steps)
        if step_in_epoch == 0 or step == start_step:
            order = np.random.default_rng([seed, epoch]).permutation(count)
        start = (step_in_epoch * world_size + rank) * different
        chosen = order[start : start + different].tolist()
        yield [(views * epoch + view, index) for index in chosen for view in range(views)]


def steps_per_epoch(count: int, global_batch_size: int) -> int:
    """Full global batches in ``count`` images; none is a `UserError`."""
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
    views: int = 1,
) -> "DataLoader[Batch]":
    """The batches of the steps that are left, as an unbroken run would see them; iterate once.

    Each has ``batch_size`` images of ``image_size`` (height, width) for this one of ``world_size``
    processes, with as many ``channels`` (see `to_channels`). ``num_workers`` processes load,
    ``prefetch`` batches ahead each; 0 loads in this one, unprotected. ``pin_memory`` puts batches
    where a GPU copies them faster from. For ``views`` see `step_keys`.

    Raises:
        UserError: while iterating, fewer images than one global batch, or what `BatchDataset`
            raises.
    """
    keys = step_keys(
        len(source), batch_size, seed, start_step, total_steps, rank, world_size, views
    )
    dataset = BatchDataset(source, image_size, channels, augmentation, seed)
    return batch_loader(dataset, keys, num_workers, prefetch, pin_memory)


def evaluation_batches(
    source: ImageSource,
    image_size: ImageSize,
    channels: int,
    batches: int | Sequence[Sequence[int]],
    num_workers: int = 0,
) -> Iterator[Batch]:
    """All images once, in order, in batches of one size, or the images of these batches' indices.

    None is augmented. For what is not said here, errors too, see `training_loader` and `watched`.
    """
    if isinstance(batches, int):
        every = range(len(source))
        batches = [every[start : start + batches] for start in every[::batches]]
    keys = [[(0, index) for index in batch] for batch in batches]
    return watched(batch_loader(BatchDataset(source, image_size, channels), keys, num_workers))


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
        pin_memory=pin_memory,
        # The loader's own draw (its workers' seeds, unused here) leaves the global generator alone.
        generator=torch.Generator(),
    )


def watched(loader: Iterable[Item]) -> Iterator[Item]:
    """What a DataLoader gives; a process of it that is gone is a `DeadWorker`, seconds later."""
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
        reason = first_line(error).strip(" .")
        raise DeadWorker(
            f"a process that loads images died ({reason}); free memory, or lower --num-workers"
        ) from None
