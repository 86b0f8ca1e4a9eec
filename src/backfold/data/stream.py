"""Images that can only be read one after the other: in tar shards elsewhere, or compressed ones.

``datasets`` shuffles the shards and, through a buffer, the images, and shares them among ranks and
worker processes; ``torchdata``'s StatefulDataLoader knows how far each worker is, so that a run can
go on there. Both are imported where they are needed, as that takes seconds.
"""

import itertools
import json
import logging
import tarfile
import warnings
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from numpy.typing import NDArray
from torch import Tensor
from torch.utils.data import IterableDataset

from backfold.data.augmentation import Augmentation, Augmenter, ImageSize
from backfold.data.decode import MAX_PIXELS
from backfold.data.formats import first_and_more, image_samples, regular_members
from backfold.data.isolation import IMAGE_SECONDS, Expendable
from backfold.data.loading import (
    MAX_REPLACEMENTS,
    Batch,
    load_image,
    none_readable,
    stack_images,
    watched,
)
from backfold.data.source import EncodedSource
from backfold.errors import BrokenImage, UserError

LOGGER = logging.getLogger("backfold")
LARGEST_MEMBER = 2**30  # bytes; a compressed tar can promise any size
SHARD_FACTOR = 2**32  # `Batch.indices` of a stream: shard number x this + position in the shard
Row = dict[str, Any]  # "place", "content" (or how it is broken), and "index" in `Batch.indices`


@dataclass(frozen=True)
class Stream:
    """WebDataset shards (see `TarSource`), each read from its beginning; no count is a `UserError`.

    They may be compressed, and lie wherever ``fsspec`` can open them.
    """

    shards: Sequence[str]  # addresses or paths
    count: int  # of all images, at least roughly: it decides how long an epoch is
    max_pixels: int = MAX_PIXELS
    first: int = 0  # the index of the first image that is trained on

    def __post_init__(self) -> None:
        if self.count < 1:
            raise UserError(
                f"{self.name} is a stream that does not say its length; give the image count"
            )

    @property
    def name(self) -> str:
        """For logs and messages."""
        return first_and_more(self.shards)

    def rows(self, shards: Sequence[int]) -> Iterator[Row]:
        """The images of these shards; one that ends too early has a last row without an image."""
        for shard in shards:
            index = shard * SHARD_FACTOR
            try:
                for place, content in _read(self.shards[shard]):
                    if index >= self.first:
                        yield {"place": place, "content": content, "index": index}
                    index += 1
            except UserError:
                raise
            except Exception as error:  # of the network, the format, or ``datasets`` itself
                reason = " ".join(f"the shard ends here ({type(error).__name__} {error})".split())
                content = BrokenImage(reason)
                yield {"place": self.shards[shard], "content": content, "index": index}

    def hold_out(self, count: int) -> tuple["StreamHead", "Stream"]:
        """The first images, in memory, and the stream without them, which must hold some."""
        rows = list(itertools.islice(self.rows(range(len(self.shards))), count + 1))
        if len(rows) <= count:
            raise UserError(
                f"{self.name} holds {len(rows)} images, and {count} are held out; hold out fewer"
            )
        rest = replace(self, count=max(1, self.count - count), first=rows.pop()["index"])
        return StreamHead(f"{self.name}, first images", rows, self.max_pixels), rest


@dataclass
class StreamHead(EncodedSource):
    """A stream's first images, in memory."""

    name: str
    rows: list[Row]
    max_pixels: int

    def __len__(self) -> int:
        return len(self.rows)

    def content(self, index: int) -> bytes:
        """See `EncodedSource.content`."""
        content: bytes | BrokenImage = self.rows[index]["content"]
        if isinstance(content, BrokenImage):
            raise content
        return content

    def describe(self, index: int) -> str:
        """Where the image was read."""
        return str(self.rows[index]["place"])


def _read(shard: str) -> Iterator[tuple[str, bytes | BrokenImage]]:
    """Where each image is, and what."""
    from datasets.utils.file_utils import xopen  # tries again where a connection fails

    def content(tar: tarfile.TarFile, member: tarfile.TarInfo) -> bytes | BrokenImage:
        file = tar.extractfile(member) if member.size <= LARGEST_MEMBER else None
        return BrokenImage(f"more than {LARGEST_MEMBER} bytes") if file is None else file.read()

    with xopen(shard, "rb") as file, tarfile.open(fileobj=file, mode="r|*") as tar:
        members = ((member.name, content(tar, member)) for member in regular_members(tar))
        for name, found, _ in image_samples(members, shard):
            yield f"{shard} member {name}", found


@dataclass(eq=False)
class StreamBatches(IterableDataset[Batch]):
    """Batches without end, epoch after epoch, of this rank's share of a stream.

    Every epoch has each image of the share once, in another order; what does not fill a batch is
    kept for the next. Broken images are passed over. An augmentation depends on the seed, the epoch
    and the image alone, the order on the numbers of ranks and workers too. What is iterable is for
    the workers. For what is not said here see `training_loader`.
    """

    stream: Stream
    image_size: ImageSize
    channels: int
    augmentation: Augmentation
    batch_size: int
    seed: int
    rank: int = 0
    world_size: int = 1
    num_workers: int = 0  # as many as this rank has shards at most
    prefetch: int = 2
    buffer: int = 500  # encoded images that each worker keeps in memory to draw from
    state: str = ""  # what `where` said where this goes on; empty begins
    pin_memory: bool = False

    def __post_init__(self) -> None:
        import datasets
        from datasets.distributed import split_dataset_by_node

        shards = list(range(self.stream.first // SHARD_FACTOR, len(self.stream.shards)))
        rows = datasets.IterableDataset.from_generator(self.stream.rows, None, {"shards": shards})
        # One shard at a time: with several, `datasets` 5.2 can't go on in a worker.
        rows = rows.shuffle(self.seed, buffer_size=self.buffer, max_buffer_input_shards=1)
        self._rows = split_dataset_by_node(rows, self.rank, self.world_size)
        shares = [self.world_size, min(self.num_workers, self._rows.num_shards)]
        self._place: dict[str, Any] = {"epoch": 0, "shares": shares, "loader": None}
        self._augmenter = Augmenter(self.augmentation, self.image_size)
        self._apart = Expendable(self._load, IMAGE_SECONDS)
        saved = json.loads(self.state) if self.state else self._place
        self._place["epoch"] = saved["epoch"]
        if saved["shares"] == shares:
            self._place = saved
        else:
            LOGGER.warning(
                "the stream's epoch begins anew: it was shared by %d process(es) with %d worker(s) "
                "each, and now is by %d with %d", *saved["shares"], *shares
            )  # fmt: skip

    def where(self) -> str:
        """How far the batches are, in JSON."""
        return json.dumps(self._place)

    def batches(self) -> Iterator[Batch]:
        """See the class; errors as of `BatchDataset`, and an epoch without a readable image."""
        from torchdata.stateful_dataloader import StatefulDataLoader

        workers = self._place["shares"][1]
        rest: list[tuple[Tensor, int]] = []  # of batches that are not full
        broken: list[str] = []
        while True:
            self._rows.set_epoch(self._place["epoch"])
            with warnings.catch_warnings():
                warnings.filterwarnings("ignore", "'set_vital' is deprecated")  # torchdata 0.11
                loader = StatefulDataLoader(
                    self, batch_size=None, num_workers=workers, pin_memory=self.pin_memory,
                    prefetch_factor=self.prefetch if workers else None, generator=torch.Generator(),
                )  # fmt: skip
            is_readable = self._place["loader"] is not None
            if is_readable:
                loader.load_state_dict(self._place["loader"])
                LOGGER.info(
                    "the stream's epoch goes on without what was being shuffled: %d images at most",
                    self.buffer * max(1, workers) + self.batch_size,
                )
            for given in watched(loader):
                batch: Batch = given
                self._place["loader"] = loader.state_dict()
                is_readable = is_readable or len(batch.images) > 0
                broken += batch.broken
                if len(batch.images) < self.batch_size:
                    rest += zip(batch.images, batch.indices.tolist(), strict=True)
                    if len(rest) < self.batch_size:
                        continue
                    batch, rest = _batch(rest[: self.batch_size]), rest[self.batch_size :]
                batch.broken, broken = broken, []
                yield batch
            if not is_readable:
                reason = broken[-1] if broken else "there is none"
                raise UserError(f"{self.stream.name}: no image can be read ({reason})")
            self._place |= {"epoch": self._place["epoch"] + 1, "loader": None}

    def state_dict(self) -> dict[str, Any]:
        """How far a worker is."""
        return dict(self._rows.state_dict())

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Go on there."""
        # It would warn of the buffers' loss, which is told once.
        logging.getLogger("datasets.iterable_dataset").setLevel(logging.ERROR)
        self._rows.load_state_dict(state)

    def __iter__(self) -> Iterator[Batch]:
        """A worker's batches of one epoch, smaller by what is broken; the last may be anyway."""
        rows, in_a_row = iter(self._rows), 0
        while wanted := list(itertools.islice(rows, self.batch_size)):
            found, broken = [], []
            # Without workers, this process's generator is lent.
            with torch.random.fork_rng(devices=[]):
                outcomes = self._apart.each_in_worker(wanted)
            for row, image in zip(wanted, outcomes, strict=True):
                if not isinstance(image, BrokenImage):
                    found.append((torch.from_numpy(image), row["index"]))
                    in_a_row = 0
                    continue
                broken.append(f"{row['place']}: {image}")
                in_a_row += 1
                if in_a_row == MAX_REPLACEMENTS:
                    raise none_readable(self.stream.name, in_a_row, broken[-1])
            yield _batch(found, broken)

    def _load(self, row: Row) -> NDArray[Any]:
        source = StreamHead(self.stream.name, [row], self.stream.max_pixels)
        seed = (self.seed, self._rows.epoch, *divmod(row["index"], SHARD_FACTOR))
        return load_image(source, 0, self.channels, self._augmenter, seed)


def _batch(found: Sequence[tuple[Tensor, int]], broken: Sequence[str] = ()) -> Batch:
    images = stack_images([image for image, _ in found]) if found else torch.empty(0)
    return Batch(images, torch.tensor([index for _, index in found]), list(broken))
