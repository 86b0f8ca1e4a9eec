"""Images that can only be read one after the other: elsewhere, compressed, or too many to fetch."""

import tarfile
from abc import ABC, abstractmethod
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from webdataset.gopen import gopen
from webdataset.tariterators import group_by_keys

from backfold.data.arrays import MAX_PIXELS
from backfold.data.encoded import EncodedSource
from backfold.data.tar import image_kind
from backfold.errors import BrokenImage, UserError

LARGEST_MEMBER = 2**30  # bytes; a compressed tar can promise any size


@dataclass(frozen=True)
class StreamItem:
    """One image of a shard.

    Attributes:
        shard: its number.
        position: in the shard, from 0.
        place: for messages.
        content: encoded; None where it could not be read, and ``reason`` says why.
        reason: in one line.
    """

    shard: int
    position: int
    place: str
    content: bytes | None
    reason: str = ""

    def read(self) -> bytes:
        """The content.

        Raises:
            BrokenImage: there is none.
        """
        if self.content is None:
            raise BrokenImage(self.reason)
        return self.content


class StreamSource(ABC):
    """Shards of encoded images, each read from its beginning; it can be pickled.

    Attributes:
        name: for logs and messages.
        count: of all images, at least roughly: it decides how long an epoch is.
        max_pixels: larger images are broken.
    """

    name: str
    count: int
    max_pixels: int

    @property
    @abstractmethod
    def shards(self) -> int:
        """How many shards there are."""

    @abstractmethod
    def open_shard(self, shard: int) -> Iterator[StreamItem]:
        """The shard's images, in the same order each time.

        A shard that ends too early has one last item without content.
        """

    def head(self, count: int) -> "StreamHead":
        """The first images, in memory; `stream_loader` leaves them out where it is told to.

        Raises:
            UserError: there are no images beyond these.
        """
        items: list[StreamItem] = []
        for shard in range(self.shards):
            for item in self.open_shard(shard):
                if len(items) == count:
                    return StreamHead(self, items, (item.shard, item.position))
                items.append(item)
        raise UserError(
            f"{self.name} holds {len(items)} images, and {count} are held out; hold out fewer"
        )


class StreamHead(EncodedSource):
    """A stream's first images, as an `ImageSource` in memory.

    Attributes:
        following: shard and position of the first image that is none of them.
    """

    def __init__(
        self, stream: StreamSource, items: Sequence[StreamItem], following: tuple[int, int]
    ) -> None:
        self.name, self.max_pixels = f"{stream.name}, first images", stream.max_pixels
        self._items, self.following = list(items), following

    def __len__(self) -> int:
        return len(self._items)

    def content(self, index: int) -> bytes:
        """See `EncodedSource.content`."""
        return self._items[index].read()

    def describe(self, index: int) -> str:
        """Where the image was read."""
        return self._items[index].place


class TarStream(StreamSource):
    """WebDataset shards, compressed or not, in files, at addresses, or of commands.

    Opened by webdataset: ``https://``, ``s3://``, ``gs://``, ``hf://`` and ``pipe:COMMAND`` need
    the tools that it calls, as ``curl``. For samples see `TarSource`.

    Args:
        urls: of the shards.
        count: of the images in all of them.
        max_pixels: larger images are broken.

    Raises:
        UserError: a count that is not positive.
    """

    def __init__(self, urls: Sequence[str], count: int, max_pixels: int = MAX_PIXELS) -> None:
        if count < 1:
            raise UserError(f"the stream's count is {count}; give the number of images in it")
        self._urls, self.count, self.max_pixels = list(urls), count, max_pixels
        more = f" and {len(self._urls) - 1} more" if len(self._urls) > 1 else ""
        self.name = f"{self._urls[0]}{more}"

    @property
    def shards(self) -> int:
        """How many shards there are."""
        return len(self._urls)

    def open_shard(self, shard: int) -> Iterator[StreamItem]:
        """See `StreamSource.open_shard`; nothing is extracted, and links are not followed."""
        url = self._urls[shard]
        position = 0
        try:
            for sample in group_by_keys(_members(url)):
                kind = image_kind(sample, url)
                if kind is not None:
                    place = f"{url} member {sample['__key__']}.{kind}"
                    yield StreamItem(shard, position, place, *_content(sample[kind]))
                    position += 1
        except (tarfile.TarError, OSError, EOFError, ValueError) as error:
            if isinstance(error, UserError):
                raise
            reason = str(error.args[0]) if error.args else ""
            reason = " ".join(f"{type(error).__name__} {reason}".split())
            yield StreamItem(shard, position, url, None, f"the shard ends here ({reason})")


def _content(data: bytes | None) -> tuple[bytes | None, str]:
    return (data, "") if data is not None else (None, f"more than {LARGEST_MEMBER} bytes")


def _members(url: str) -> Iterator[dict[str, Any]]:
    """Regular members in the form that webdataset groups; None for what is too large."""
    opened: Any = gopen(url)
    with opened as stream, tarfile.open(fileobj=stream, mode="r|*") as tar:
        for member in tar:
            tar.members = []  # type: ignore[attr-defined]
            if not member.isreg() or member.issparse():
                continue
            file = tar.extractfile(member) if member.size <= LARGEST_MEMBER else None
            data = None if file is None else file.read()
            yield {"fname": member.name, "data": data, "__url__": url}


def is_compressed_tar(path: Path) -> bool:
    """Whether a file's name says so."""
    name = path.name.lower()
    return name.endswith((".tgz", ".tar.gz", ".tar.bz2", ".tar.xz"))
