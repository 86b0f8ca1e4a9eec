"""What a data set looks like: sizes, formats, channels, duplicates, broken files, statistics."""

import hashlib
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from itertools import chain
from pathlib import Path

import numpy as np
import torch
from numpy.typing import NDArray
from torch.utils.data import Dataset

from backfold.data.decode import MAX_PIXELS, Decoded, as_float, examine, to_channels
from backfold.data.isolation import IMAGE_SECONDS, Expendable
from backfold.data.loading import batch_loader, watched
from backfold.data.source import EncodedSource, ImageSource, spread
from backfold.data.statistics import ChannelStatistics
from backfold.errors import BrokenImage, UserError, at_least, check_ranges, not_negative

ENOUGH = 1000  # images that tell mean and deviation
LISTED = 100  # broken files, and groups of duplicates, by name
BATCH = 16  # images that a worker looks at before it tells of them, and that tell the channels
# One grey level of 8 bits: a channel of bytes with less deviation holds no more than noise.
STD_FLOOR = 1.0 / 255.0
CONSTANT = 1e-6  # a deviation below this share of the mean is rounding


@dataclass
class StatsSettings:
    """How `backfold stats` looks at a data set.

    Args:
        data: as pretrain takes it; its training split is looked at.
        channels: that mean and deviation are of; none takes the most common count.
        max_images: look at a random sample of this size; none looks at all.
        max_pixels: larger images are broken.
        num_workers: processes that read images; none takes up to 8, one core left free.
        seed: of the sample.
        out: a JSON file for what was found; none writes none.
    """

    data: str | None = None
    channels: int | None = None
    max_images: int | None = None
    max_pixels: int = MAX_PIXELS
    num_workers: int | None = None
    seed: int = 0
    out: Path | None = None

    def __post_init__(self) -> None:
        counts = at_least(1, "channels max_images max_pixels")
        check_ranges(self, (counts, not_negative("seed num_workers")))


@dataclass
class Survey:
    """What was found in a data set, in plain data; values are on the scale of `as_float`."""

    name: str
    images: int  # all of them
    looked_at: int  # that were read, or tried
    broken_count: int = 0
    broken: list[str] = field(default_factory=list)  # where and why, the first `LISTED`
    unfit_count: int = 0  # whose channels can't be made ``channels``
    # Images by file format, type of values (as "uint16"), number of channels but alpha, and what
    # was done to them in reading (as "alpha composited on black").
    formats: dict[str, int] = field(default_factory=dict)
    kinds: dict[str, int] = field(default_factory=dict)
    channel_counts: dict[str, int] = field(default_factory=dict)
    conversions: dict[str, int] = field(default_factory=dict)
    height: list[int] = field(default_factory=list)  # smallest, median and largest, in pixels
    width: list[int] = field(default_factory=list)
    lowest: float = float("inf")
    highest: float = float("-inf")
    duplicate_count: int = 0  # images whose content another has too, but for one of each group
    duplicates: list[list[str]] = field(default_factory=list)  # where, the first `LISTED` groups
    channels: int = 0  # that mean and deviation are of, every image weighing the same
    mean: list[float] = field(default_factory=list)
    std: list[float] = field(default_factory=list)  # as `ChannelStatistics`

    @property
    def statistics(self) -> ChannelStatistics:
        """What normalises the images."""
        return ChannelStatistics(tuple(self.mean), tuple(self.std))


@dataclass(frozen=True)
class Look:
    """What was found out about one image."""

    names: list[tuple[str, str]]  # fields of `Survey` that count, and what of
    shape: tuple[int, ...]  # channels, height and width
    digest: bytes
    extremes: tuple[float, float]  # on the scale of `as_float`
    # Means and mean squares by channel; None where it can't be given the channels asked for. Not a
    # tensor, as one that leaves a worker process costs a file handle.
    moments: NDArray[np.float64] | None
    is_of_bytes: bool


class Looks(Dataset[list[Look | BrokenImage]]):
    """Maps indices of a source's images to looks, or to how the images are broken."""

    def __init__(self, source: ImageSource, channels: int) -> None:
        self._source, self._channels = source, channels
        self._apart = Expendable(self._look, IMAGE_SECONDS)

    def __getitem__(self, indices: Sequence[int]) -> list[Look | BrokenImage]:
        return self._apart.each_in_worker(indices)

    def _look(self, index: int) -> Look:
        if isinstance(self._source, EncodedSource):
            content = self._source.content(index)
            found = examine(content, max_pixels=self._source.max_pixels)
        else:
            image = self._source.read(index)
            found = Decoded(image, "Python", str(image.dtype).removeprefix("torch."))
            kind = repr((tuple(image.shape), image.dtype)).encode()
            content = kind + image.contiguous().numpy().tobytes()
        floats = as_float(found.image)
        try:
            pixels = as_float(to_channels(found.image, self._channels)).double()
            moments = torch.stack([pixels.mean((1, 2)), pixels.square().mean((1, 2))]).numpy()
        except UserError:
            moments = None
        shape = tuple(found.image.shape)
        names = [("conversions", conversion) for conversion in found.conversions]
        names += [("formats", found.format), ("kinds", found.kind)]
        names += [("channel_counts", str(shape[0]))]
        digest = hashlib.blake2b(content, digest_size=16).digest()
        extremes = float(floats.min()), float(floats.max())
        return Look(names, shape, digest, extremes, moments, found.image.dtype == torch.uint8)


def survey(
    source: ImageSource,
    channels: int | None = None,
    max_images: int | None = None,
    seed: int = 0,
    num_workers: int = 0,
    progress: Callable[[int], None] = lambda _: None,
) -> Survey:
    """Look at every image of a source, or at a random sample of ``max_images``.

    Mean and deviation are of ``channels``, the most common count by default. Where ``num_workers``
    is 0 this process reads, without protection from decoders that crash or hang. ``progress`` is
    called with the number of images done, again and again.

    Raises:
        UserError: no image can be read, or none can be given these channels.
    """
    channels = channels or _usual_channels(source, num_workers)
    order = np.random.default_rng(seed).permutation(len(source))[:max_images]
    indices = np.sort(order).tolist()
    found = Survey(source.name, len(source), len(indices), channels=channels)
    counts: Counter[tuple[str, str]] = Counter()
    # Arrays, as millions of images may be looked at.
    sizes, digests = np.zeros((len(indices), 2), np.int32), np.zeros((len(indices), 2), np.uint64)
    is_read = np.zeros(len(indices), bool)
    total, are_of_bytes = np.zeros((2, channels)), True
    looks = _looks(source, indices, channels, num_workers)
    for place, (index, look) in enumerate(zip(indices, looks, strict=True)):
        progress(place + 1)
        if isinstance(look, BrokenImage):
            found.broken_count += 1
            if len(found.broken) < LISTED:
                found.broken.append(f"{source.describe(index)}: {look}")
            continue
        counts.update(look.names)
        sizes[place], is_read[place] = look.shape[1:], True
        digests[place] = np.frombuffer(look.digest, np.uint64)
        found.lowest = min(found.lowest, look.extremes[0])
        found.highest = max(found.highest, look.extremes[1])
        if look.moments is None:
            found.unfit_count += 1
        else:
            total += look.moments
            are_of_bytes &= look.is_of_bytes
    read = np.flatnonzero(is_read)
    usable = len(read) - found.unfit_count
    if not usable:
        unfit = f"none can be given {channels} channels"
        raise _unusable(source, len(indices), next(iter(found.broken), unfit))
    for (name, key), count in counts.most_common():
        getattr(found, name)[key] = count
    found.height, found.width = (
        [int(measure(side)) for measure in (np.min, np.median, np.max)] for side in sizes[read].T
    )
    _, first, groups, times = np.unique(
        digests[read], axis=0, return_index=True, return_inverse=True, return_counts=True
    )
    found.duplicate_count = int((times - 1).sum())
    repeated = np.flatnonzero(times > 1)
    found.duplicates = [
        [source.describe(indices[read[place]]) for place in np.flatnonzero(groups == group)]
        for group in repeated[np.argsort(first[repeated])][:LISTED]
    ]
    mean, squares = total / usable
    found.mean, found.std = mean.tolist(), _deviation(mean, squares, are_of_bytes).tolist()
    return found


def _deviation(
    mean: NDArray[np.float64], squares: NDArray[np.float64], are_of_bytes: bool
) -> NDArray[np.float64]:
    std = np.sqrt(np.maximum(squares - mean**2, 0.0))
    if are_of_bytes:
        return np.maximum(std, STD_FLOOR)
    # A constant channel is divided by its own size, as its scale can't be known.
    size = np.where(mean == 0, 1.0, abs(mean))
    return np.where(std <= CONSTANT * abs(mean), size, std)


def _usual_channels(source: ImageSource, num_workers: int) -> int:
    """The most common count of some images, or the largest: grey can be repeated without loss."""
    sample = spread(source, BATCH)
    looks = list(_looks(sample, range(len(sample)), 1, min(1, num_workers)))
    counts = Counter(look.shape[0] for look in looks if isinstance(look, Look))
    if not counts:
        raise _unusable(source, len(looks), f"{sample.describe(0)}: {looks[0]}")
    return max(counts, key=lambda channels: (counts[channels], channels))


def _looks(
    source: ImageSource, indices: Sequence[int], channels: int, num_workers: int
) -> Iterator[Look | BrokenImage]:
    batches = [indices[first : first + BATCH] for first in range(0, len(indices), BATCH)]
    loader = batch_loader(Looks(source, channels), batches, num_workers)
    return chain.from_iterable(watched(loader))


def _unusable(source: ImageSource, count: int, reason: str) -> UserError:
    return UserError(
        f"{source.name}: none of {count} images can be used ({reason}); "
        "check the files, or --channels"
    )
