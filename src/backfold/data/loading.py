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

from backfold.data.augmentation import UNCHANGED, Augmentation, Augmenter, ImageSize
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


@dataclass(eq=False)
class BatchDataset(Dataset[Batch]):
    """Maps a list of (epoch, position) keys to a `Batch`.

    The next image replaces a broken one. An image of an unfit channel count, or too many broken
    files in a row raise `LoadingError`.
    The seed, an image's epoch and its position alone decide its augmentation. Positions count in
    ``indices``, the source's images to use; all by default.
    """

    source: ImageSource
    image_size: ImageSize
    channels: int
    augmentation: Augmentation = UNCHANGED
    seed: int = 0
    indices: Sequence[int] | None = None

    def __post_init__(self) -> None:
        self._augmenter = Augmenter(self.augmentation, self.image_size)
        every: Sequence[int] = range(len(self.source))
        self._indices = every if self.indices is None else [int(index) for index in self.indices]
        self._apart = Expendable(self._load, IMAGE_SECONDS)
        self._fatal: dict[int, FatalImage] = {}  # which are not tried again

    def __len__(self) -> int:
        return len(self._indices)

    def __getitem__(self, keys: Sequence[Key]) -> Batch:
        broken: list[str] = []
        images, indices, tries = [], [], min(len(self), MAX_REPLACEMENTS)
        # torchvision draws from the global generator: lend it, once a batch as that takes long.
        with torch.random.fork_rng(devices=[]):
            first = self._load_each([self._wanted(*key) for key in keys])
            for key, outcome in zip(keys, first, strict=True):
                for offset in range(tries):
                    wanted = self._wanted(*key, offset)
                    image = self._load_each([wanted])[0] if offset else outcome
                    if not isinstance(image, BrokenImage):
                        images.append(torch.from_numpy(image))
                        indices.append(wanted[0])
                        break
                    broken.append(f"{self.source.describe(wanted[0])}: {image}")
                else:
                    raise none_readable(self.source.name, tries, broken[-1])
        return Batch(stack_images(images), torch.tensor(indices), broken)

    def _wanted(self, epoch: int, position: int, offset: int = 0) -> Wanted:
        return self._indices[(position + offset) % len(self._indices)], epoch, position

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
            image = self.source.read(index, self._augmenter.min_side)
            image = to_channels(image, self.channels)
        except UserError as error:
            raise LoadingError(f"{self.source.describe(index)}: {error}") from None
        return self._augmenter.seeded(image, self.seed, *seeds).numpy()


def none_readable(name: str, tries: int, last: str) -> LoadingError:
    """What ends loading after so many broken images; ``last`` is the line of the last."""
    return LoadingError(
        f"{name}: {tries} images in a row can't be read, the last is {last}; mend or remove them"
    )


def stack_images(images: list[Tensor]) -> Tensor:
    """One batch: uint8 where all are, else float32; see `Batch.images`."""
    if all(image.dtype == torch.uint8 for image in images):
        return torch.stack(images).contiguous()
    return torch.stack([as_float(image) for image in images]).contiguous()


@dataclass(eq=False)
class StepSampler(Sampler[list[Key]]):
    """For each optimizer step, this rank's (epoch, index) keys; see `training_loader`.

    Every epoch is a permutation of all ``count`` images that depends on (seed, epoch) only; images
    that do not fill a last global batch sit that epoch out. With several ``views`` each image comes
    so often in a row, changed anew, and a batch holds fewer different ones.

    Raises:
        UserError: fewer images than one global batch, or a negative seed.
    """

    count: int
    batch_size: int
    seed: int
    start_step: int
    total_steps: int
    rank: int = 0
    world_size: int = 1
    views: int = 1

    def __post_init__(self) -> None:
        if self.seed < 0:
            raise UserError(f"seed is {self.seed}; give 0 or more")
        self.different = self.batch_size // self.views
        self.steps_per_epoch = steps_per_epoch(self.count, self.different * self.world_size)

    def __len__(self) -> int:
        return max(0, self.total_steps - self.start_step)

    def __iter__(self) -> Iterator[list[Key]]:
        for step in range(self.start_step, self.total_steps):
            epoch, step_in_epoch = divmod(step, self.steps_per_epoch)
            if step_in_epoch == 0 or step == self.start_step:
                order = np.random.default_rng([self.seed, epoch]).permutation(self.count)
            start = (step_in_epoch * self.world_size + self.rank) * self.different
            chosen = order[start : start + self.different].tolist()
            views = range(self.views * epoch, self.views * (epoch + 1))
            yield [(view, index) for index in chosen for view in views]


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
        rank: this process, from 0, of ``world_size``.
        world_size: number of processes.
        num_workers: processes that load; 0 loads in this one, unprotected.
        prefetch: batches that each of these processes has loaded or is loading ahead, 1 or more.
        pin_memory: put batches into page-locked memory, from which a GPU copies faster.
        views: how often each image comes in a row, changed anew; see `StepSampler`.

    Raises:
        UserError: fewer images than one global batch, or a negative seed; while iterating, what
            `BatchDataset` raises.
    """
    sampler = StepSampler(
        len(source), batch_size, seed, start_step, total_steps, rank, world_size, views
    )
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

    A broken one is replaced from these only, and the last batch may be smaller. For what is not
    said here see `training_loader`.

    Raises:
        UserError: while iterating, what `BatchDataset` and `watched` raise.
    """
    places = range(len(source) if indices is None else len(indices))
    batches = [places[start : start + batch_size] for start in places[::batch_size]]
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
        reason = (str(error).strip() or type(error).__name__).splitlines()[0].strip(" .")
        raise DeadWorker(
            f"a process that loads images died ({reason}); free memory, or lower --num-workers"
        ) from None
