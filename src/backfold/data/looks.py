"""Looking at single images of a source, in worker processes."""

import hashlib
from collections.abc import Sequence
from dataclasses import dataclass

from torch import Tensor
from torch.utils.data import Dataset

from backfold.data.decode import Decoded, as_float, examine, to_channels
from backfold.data.encoded import EncodedSource
from backfold.data.guarded import GuardedSource
from backfold.data.protocol import ImageSource
from backfold.data.statistics import Moments
from backfold.errors import BrokenImage, UserError

BATCH = 16
DIGEST_BYTES = 16


@dataclass(frozen=True)
class Look:
    """What was found out about one image.

    Attributes:
        index: in the source.
        broken: where it is and why it can't be read; then nothing else is known.
        format: of the file; see `Decoded`.
        kind: see `Decoded`.
        conversions: see `Decoded`.
        size: channels, height and width.
        digest: of the content.
        extremes: lowest and highest value, on the scale of `as_float`.
        moments: None where the image can't be given the channels asked for.
    """

    index: int
    broken: str | None = None
    format: str = ""
    kind: str = ""
    conversions: tuple[str, ...] = ()
    size: tuple[int, int, int] = (0, 0, 0)
    digest: bytes = b""
    extremes: tuple[float, float] = (0.0, 0.0)
    moments: Moments | None = None


class Looks(Dataset[list[Look]]):
    """Batches of looks, by number.

    Args:
        source: the images.
        indices: those to look at.
        channels: that the moments are of.
        start: the first batch.
    """

    def __init__(
        self, source: ImageSource, indices: Sequence[int], channels: int, start: int
    ) -> None:
        self._source, self._indices, self._channels = source, indices, channels
        self._start = start

    def __len__(self) -> int:
        return -(-len(self._indices) // BATCH) - self._start

    def __getitem__(self, number: int) -> list[Look]:
        if number >= len(self):
            raise IndexError
        first = (self._start + number) * BATCH
        return [
            _look(self._source, index, self._channels)
            for index in self._indices[first : first + BATCH]
        ]


def _look(source: ImageSource, index: int, channels: int) -> Look:
    try:
        found, digest = _examine(source, index)
    except BrokenImage as error:
        return Look(index, broken=f"{source.describe(index)}: {error}")
    floats = as_float(found.image)
    try:
        moments = Moments.of(to_channels(found.image, channels))
    except UserError:
        moments = None
    count, height, width = found.image.shape
    return Look(
        index,
        None,
        found.format,
        found.kind,
        found.conversions,
        (count, height, width),
        digest,
        (float(floats.min()), float(floats.max())),
        moments,
    )


def _examine(source: ImageSource, index: int) -> tuple[Decoded, bytes]:
    if isinstance(source, GuardedSource):
        source.check(index)
        source = source.source
    if isinstance(source, EncodedSource):
        content = source.content(index)
        return examine(content, max_pixels=source.max_pixels), _digest(content)
    image = source.read(index)
    kind = str(image.dtype).removeprefix("torch.")
    return Decoded(image, "Python", kind), _digest_of_pixels(image)


def _digest(content: bytes) -> bytes:
    return hashlib.blake2b(content, digest_size=DIGEST_BYTES).digest()


def _digest_of_pixels(image: Tensor) -> bytes:
    shape = repr((tuple(image.shape), image.dtype)).encode()
    return _digest(shape + image.contiguous().numpy().tobytes())
