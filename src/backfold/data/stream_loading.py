"""Batches of a stream: shuffled by shard and buffer, shared without overlap, resumed exactly.

Which images a step has follows from the seed and the step alone. Every epoch begins anew: the
shards, in an order drawn from (seed, epoch), are dealt to lanes, a few on every rank; each lane
reads its shards through a shuffle buffer, and the steps take their batches from the lanes in turn.
A worker process serves whole lanes, so their number changes nothing. Resumption skips what the
epoch has used up, without decoding it. A lane that ends before the epoch starts over, and what a
longer one has left is not seen in this epoch: shards should be of about one size.

A worker's images are decoded in a process beside it, as starting the worker anew would mean reading
all of the epoch again: an image that crashes or hangs its decoder is a broken one.
"""

import itertools
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch.utils.data import DataLoader, IterableDataset, get_worker_info

from backfold.data.augmentation import Augmentation, Augmenter, ImageSize
from backfold.data.decode import decode, to_channels
from backfold.data.expendable import Expendable, attempt
from backfold.data.guarded import IMAGE_SECONDS
from backfold.data.loading import Batch, LoadingError, stack_images
from backfold.data.stream import StreamHead, StreamItem, StreamSource
from backfold.errors import BrokenImage, UserError

MAX_LANES = 8
SHARDS_A_LANE = 4  # at least, so that a lane's unread end is another one in every epoch
SHARD_FACTOR = 2**32  # `Batch.indices` of a stream: shard number x this + position
# An image in an epoch, its pixels as they are trained on, and what turns some into the others.
Wanted = tuple[StreamItem, int]
Pixels = NDArray[Any]
LoadEach = Callable[[Sequence[Wanted]], list[Pixels | BrokenImage]]


@dataclass(frozen=True)
class StreamPlan:
    """How a stream is shared; it depends on the data and the global batch, not on workers.

    Attributes:
        lanes: on each rank, a power of 2.
        steps_per_epoch: a multiple of ``lanes``.
    """

    lanes: int
    steps_per_epoch: int


def plan_stream(
    source: StreamSource, batch_size: int, world_size: int, head: StreamHead | None = None
) -> StreamPlan:
    """Lanes and length of an epoch.

    Args:
        source: the images.
        batch_size: on each rank.
        world_size: number of ranks.
        head: images of the stream that are not trained on.

    Raises:
        UserError: fewer images than one global batch.
    """
    count = source.count - (len(head) if head else 0)
    shards = source.shards - (head.following[0] if head else 0)
    steps = count // (batch_size * world_size)
    if steps < 1:
        raise UserError(
            f"{count} images are fewer than one global batch of {batch_size * world_size}; "
            "lower --batch-size, or correct the count"
        )
    lanes = _power_of_two(min(MAX_LANES, shards // (world_size * SHARDS_A_LANE), steps))
    return StreamPlan(lanes, steps // lanes * lanes)


def _power_of_two(limit: int) -> int:
    """The largest at most ``limit``, and at least 1."""
    return 1 << (max(1, limit).bit_length() - 1)


@dataclass(frozen=True)
class StreamBatches(IterableDataset[Batch]):
    """What `stream_loader` hands to workers; its arguments say what each is."""

    source: StreamSource
    plan: StreamPlan
    image_size: ImageSize
    channels: int
    augmentation: Augmentation
    batch_size: int
    seed: int
    start_step: int
    total_steps: int
    rank: int
    world_size: int
    buffer: int
    first: tuple[int, int]

    def __iter__(self) -> Iterator[Batch]:
        worker = get_worker_info()
        load = partial(self._load, Augmenter(self.augmentation, self.image_size))
        if worker is None:
            yield from self._batches(0, 1, lambda wanted: [attempt(load, one) for one in wanted])
            return
        with Expendable(load, IMAGE_SECONDS) as apart:
            yield from self._batches(worker.id, worker.num_workers, apart.each)

    def _batches(self, first: int, stride: int, load_each: LoadEach) -> Iterator[Batch]:
        lanes: dict[tuple[int, int], Iterator[StreamItem]] = {}
        for step in range(self.start_step + first, self.total_steps, stride):
            epoch, number = divmod(step, self.plan.steps_per_epoch)
            lane = epoch, number % self.plan.lanes
            if lane not in lanes:
                lanes = {key: items for key, items in lanes.items() if key[0] == epoch}
                lanes[lane] = self._lane(*lane)
                for _ in range(number // self.plan.lanes * self.batch_size):
                    next(lanes[lane])
            items = [next(lanes[lane]) for _ in range(self.batch_size)]
            yield self._batch(items, epoch, load_each)

    def _lane(self, epoch: int, lane: int) -> Iterator[StreamItem]:
        shards = np.arange(self.first[0], self.source.shards)
        order = np.random.default_rng([self.seed, epoch]).permutation(shards).tolist()
        lanes = self.plan.lanes * self.world_size
        number = lane * self.world_size + self.rank
        random = np.random.default_rng([self.seed, epoch, number])
        # Where there are fewer shards than ranks, each reads all and keeps its share of the images.
        alone = len(order) >= lanes
        mine, share = (order[number::lanes], 1) if alone else (order, self.world_size)
        while True:
            last = None
            for last in _shuffled(self._once(mine, share), random, self.buffer):
                yield last
            if last is None:
                raise LoadingError(f"{self.source.name}: no images in {len(mine)} shard(s)")

    def _once(self, shards: list[int], share: int) -> Iterator[StreamItem]:
        items = itertools.chain.from_iterable(map(self.source.open_shard, shards))
        trained_on = (item for item in items if (item.shard, item.position) >= self.first)
        return itertools.islice(trained_on, self.rank % share, None, share)

    def _batch(self, items: list[StreamItem], epoch: int, load_each: LoadEach) -> Batch:
        # Without workers, this process's generator is lent.
        with torch.random.fork_rng(devices=[]):
            pairs = list(zip(items, load_each([(item, epoch) for item in items]), strict=True))
        broken = [f"{item.place}: {one}" for item, one in pairs if isinstance(one, BrokenImage)]
        if len(broken) == len(items):
            raise LoadingError(
                f"{self.source.name}: {len(items)} images in a row can't be read, the last is "
                f"{broken[-1]}; mend or remove them"
            )
        images, indices = [], []
        for place in range(len(items)):
            # The next readable image takes the place of a broken one.
            following = pairs[place:] + pairs[:place]
            item, image = next(
                (item, one) for item, one in following if not isinstance(one, BrokenImage)
            )
            images.append(torch.from_numpy(image))
            indices.append(item.shard * SHARD_FACTOR + item.position)
        return Batch(stack_images(images), torch.tensor(indices), broken)

    def _load(self, augmenter: Augmenter, wanted: Wanted) -> Pixels:
        item, epoch = wanted
        try:
            image = decode(item.read(), augmenter.min_side, self.source.max_pixels)
            image = to_channels(image, self.channels)
        except UserError as error:
            raise LoadingError(f"{item.place}: {error}") from None
        words = (self.seed, epoch, item.shard, item.position)
        seed = np.random.SeedSequence(words).generate_state(1, np.uint64)
        torch.default_generator.manual_seed(int(seed[0]))
        return augmenter(image).numpy()


def _shuffled(
    items: Iterator[StreamItem], random: np.random.Generator, size: int
) -> Iterator[StreamItem]:
    """Through a buffer, of which each draw takes one at random."""
    buffer = list(itertools.islice(items, size))
    for item in items:
        chosen = int(random.integers(len(buffer)))
        yield buffer[chosen]
        buffer[chosen] = item
    random.shuffle(buffer)
    yield from buffer


def stream_loader(
    source: StreamSource,
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
    buffer: int = 500,
    head: StreamHead | None = None,
) -> "DataLoader[Batch]":
    """As `training_loader`, of a stream.

    Args:
        source: the images.
        image_size: (height, width) in pixels.
        channels: of the batches; see `to_channels`.
        augmentation: random changes.
        batch_size: images a step on this rank.
        seed: of order and augmentation.
        start_step: steps already done; the batches are those that an unbroken run would see.
        total_steps: of the whole run.
        rank: this process, from 0.
        world_size: number of processes.
        num_workers: processes that load, at most; a power of 2 of them is used, up to the lanes.
            0 loads in this one, without protection from decoders that crash or hang.
        prefetch: batches that each of these processes has loaded or is loading ahead, 1 or more.
        timeout: seconds to wait for a batch before RuntimeError; 0 waits for ever.
        buffer: encoded images that each of up to 8 lanes keeps in memory to draw from, 1 or more.
        head: images of the stream that are not trained on.

    Raises:
        UserError: fewer images than one global batch, a negative seed; while iterating, an image of
            an unfit channel count, or a batch without a readable image.
    """
    assert buffer > 0
    if seed < 0:
        raise UserError(f"seed is {seed}; give 0 or more")
    plan = plan_stream(source, batch_size, world_size, head)
    workers = _power_of_two(min(num_workers, plan.lanes)) if num_workers else 0
    return DataLoader(
        StreamBatches(
            source, plan, image_size, channels, augmentation, batch_size, seed, start_step,
            total_steps, rank, world_size, buffer, head.following if head else (0, 0),
        ),
        batch_size=None,
        num_workers=workers,
        prefetch_factor=prefetch if workers else None,
        timeout=timeout if workers else 0.0,
        collate_fn=_unchanged,
        pin_memory=torch.cuda.is_available(),
        generator=torch.Generator(),
    )  # fmt: skip


def _unchanged(batch: object) -> object:
    return batch
