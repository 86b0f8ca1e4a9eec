"""Data sets on the Hugging Face hub, read without downloading them."""

from collections.abc import Iterator
from typing import Any

from backfold.data.arrays import MAX_PIXELS
from backfold.data.hugging_face import image_bytes, image_column, undecoded
from backfold.data.stream import StreamItem, StreamSource
from backfold.errors import BrokenImage, UserError


class HuggingFaceStream(StreamSource):
    """A streaming data set of ``datasets``; its shards are files of the data set.

    Args:
        dataset: a ``datasets.IterableDataset``.
        name: for logs and messages.
        count: of its images.
        max_pixels: larger images are broken.

    Raises:
        UserError: no single image column, or a count that is not positive.
    """

    def __init__(self, dataset: Any, name: str, count: int, max_pixels: int = MAX_PIXELS) -> None:
        if count < 1:
            raise UserError(f"{name} has count {count}; give the number of images in it")
        self.name, self.count, self.max_pixels = name, count, max_pixels
        features = dataset.features
        if features is None:  # not said: the first row tells
            features = dataset._resolve_features().features
        self._column = image_column(features, name)
        self._dataset = undecoded(dataset, self._column).select_columns([self._column])

    @property
    def shards(self) -> int:
        """How many shards there are."""
        return int(self._dataset.num_shards)

    def open_shard(self, shard: int) -> Iterator[StreamItem]:
        """See `StreamSource.open_shard`."""
        rows = iter(self._dataset.shard(self.shards, shard))
        position = 0
        while True:
            place = f"{self.name} shard {shard} row {position}"
            try:
                row = next(rows, None)
                if row is None:
                    return
                yield StreamItem(shard, position, place, image_bytes(row[self._column]))
            except BrokenImage as error:
                yield StreamItem(shard, position, place, None, str(error))
            except Exception as error:  # of the network, the file's format, or datasets itself
                reason = " ".join(f"{type(error).__name__} {error}".split())
                yield StreamItem(shard, position, place, None, f"the shard ends here ({reason})")
                return
            position += 1
