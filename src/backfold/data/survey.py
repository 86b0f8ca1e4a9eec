"""What a data set looks like: sizes, formats, channels, duplicates, broken files, statistics."""

import hashlib
from array import array
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field

import numpy as np
from torch.utils.data import Dataset

from backfold.data.decode import Decoded, as_float, examine, to_channels
from backfold.data.isolation import IMAGE_SECONDS, Expendable
from backfold.data.loading import batch_loader, watched
from backfold.data.source import EncodedSource, ImageSource
from backfold.data.statistics import ChannelStatistics, ChannelSums, Moments, count_channels
from backfold.errors import BrokenImage, UserError

LISTED = 100  # broken files, and groups of duplicates, by name
BATCH = 16  # images that a worker looks at before it tells of them
DIGEST_BYTES = 16


@dataclass(frozen=True)
class Survey:
    """What was found in a data set.

    Attributes:
        name: of the data.
        images: how many there are.
        looked_at: how many of these were read, or tried.
        broken_count: how many of these can't be read.
        broken: where and why, the first `LISTED` of them.
        unfit_count: images whose channels can't be made ``channels``.
        formats: images by file format.
        kinds: images by the type of their values, as "uint16".
        channel_counts: images by number of channels, alpha left out.
        conversions: images by what was done to them in reading, as "alpha composited on black".
        height: smallest, median and largest, in pixels.
        width: smallest, median and largest, in pixels.
        lowest: smallest value, on the scale of `as_float`.
        highest: largest value.
        duplicate_count: images whose content another image has too, but for one of each such group.
        duplicates: where they are, the first `LISTED` groups.
        channels: that the mean and the deviation are of.
        mean: of each channel, every image weighing the same.
        std: as `ChannelStatistics`.
    """

    name: str
    images: int
    looked_at: int
    broken_count: int
    broken: list[str]
    unfit_count: int
    formats: dict[str, int]
    kinds: dict[str, int]
    channel_counts: dict[str, int]
    conversions: dict[str, int]
    height: list[int]
    width: list[int]
    lowest: float
    highest: float
    duplicate_count: int
    duplicates: list[list[str]]
    channels: int
    mean: list[float]
    std: list[float]

    @property
    def statistics(self) -> ChannelStatistics:
        """What normalises the images."""
        return ChannelStatistics(tuple(self.mean), tuple(self.std))

    def notes(self) -> list[str]:
        """What a run should say once about how images are read."""
        return [
            f"{count} of {self.looked_at} images: {conversion}"
            for conversion, count in self.conversions.items()
        ]


@dataclass(frozen=True)
class Look:
    """What was found out about one image, in plain numbers that can leave a process.

    Attributes:
        format: of the file; see `Decoded`.
        kind: see `Decoded`.
        conversions: see `Decoded`.
        size: channels, height and width.
        digest: of the content.
        extremes: lowest and highest value, on the scale of `as_float`.
        moments: None where the image can't be given the channels asked for.
    """

    format: str
    kind: str
    conversions: tuple[str, ...]
    size: tuple[int, int, int]
    digest: bytes
    extremes: tuple[float, float]
    moments: Moments | None


class Looks(Dataset[list[Look | BrokenImage]]):
    """Maps indices of a source's images to looks, or to how the images are broken.

    Args:
        source: the images.
        channels: that the moments are of.
    """

    def __init__(self, source: ImageSource, channels: int) -> None:
        self._source, self._channels = source, channels
        self._apart = Expendable(self._look, IMAGE_SECONDS)

    def __getitem__(self, indices: Sequence[int]) -> list[Look | BrokenImage]:
        """Look at these images."""
        return self._apart.each_in_worker(indices)

    def _look(self, index: int) -> Look:
        if isinstance(self._source, EncodedSource):
            content = self._source.content(index)
            found = examine(content, max_pixels=self._source.max_pixels)
        else:
            image = self._source.read(index)
            found = Decoded(image, "Python", str(image.dtype).removeprefix("torch."))
            shape = repr((tuple(image.shape), image.dtype)).encode()
            content = shape + image.contiguous().numpy().tobytes()
        floats = as_float(found.image)
        try:
            moments = Moments.of(to_channels(found.image, self._channels))
        except UserError:
            moments = None
        count, height, width = found.image.shape
        return Look(
            found.format,
            found.kind,
            found.conversions,
            (count, height, width),
            hashlib.blake2b(content, digest_size=DIGEST_BYTES).digest(),
            (float(floats.min()), float(floats.max())),
            moments,
        )


@dataclass
class _Tally:
    broken: list[str] = field(default_factory=list)
    broken_count: int = 0
    unfit_count: int = 0
    formats: Counter[str] = field(default_factory=Counter)
    kinds: Counter[str] = field(default_factory=Counter)
    channel_counts: Counter[str] = field(default_factory=Counter)
    conversions: Counter[str] = field(default_factory=Counter)
    heights: "array[int]" = field(default_factory=lambda: array("q"))
    widths: "array[int]" = field(default_factory=lambda: array("q"))
    indices: "array[int]" = field(default_factory=lambda: array("q"))
    digests: bytearray = field(default_factory=bytearray)
    lowest: float = float("inf")
    highest: float = float("-inf")

    def add_broken(self, line: str) -> None:
        self.broken_count += 1
        self.broken += [line][: LISTED - len(self.broken)]

    def add(self, index: int, look: Look, sums: ChannelSums) -> None:
        self.formats[look.format] += 1
        self.kinds[look.kind] += 1
        self.channel_counts[str(look.size[0])] += 1
        self.conversions.update(look.conversions)
        self.heights.append(look.size[1])
        self.widths.append(look.size[2])
        self.indices.append(index)
        self.digests += look.digest
        self.lowest = min(self.lowest, look.extremes[0])
        self.highest = max(self.highest, look.extremes[1])
        if look.moments is None:
            self.unfit_count += 1
        else:
            sums.add(look.moments)

    def duplicates(self) -> list[list[int]]:
        """Groups of images with one content, in the order of their first."""
        digests = np.frombuffer(self.digests, dtype=f"V{DIGEST_BYTES}")
        _, group, count = np.unique(digests, return_inverse=True, return_counts=True)
        groups: dict[int, list[int]] = {}
        for position in np.flatnonzero(count[group] > 1).tolist():
            groups.setdefault(int(group[position]), []).append(self.indices[position])
        return list(groups.values())


def survey(
    source: ImageSource,
    channels: int | None = None,
    max_images: int | None = None,
    seed: int = 0,
    num_workers: int = 0,
    progress: Callable[[int], None] = lambda _: None,
) -> Survey:
    """Look at every image of a source, or at a random sample.

    Args:
        source: the images.
        channels: that mean and deviation are of; the most common count by default.
        max_images: size of the sample; all by default.
        seed: of the sample.
        num_workers: processes that read; 0 reads in this one, without protection from decoders that
            crash or hang (see `Expendable`).
        progress: called with the number of images done, again and again.

    Raises:
        UserError: no image can be read.
    """
    order = np.random.default_rng(seed).permutation(len(source))[:max_images]
    indices = np.sort(order).tolist()
    channels = channels or count_channels(source, apart=num_workers > 0)
    tally, sums, done = _Tally(), ChannelSums(channels), 0
    batches = [indices[first : first + BATCH] for first in range(0, len(indices), BATCH)]
    loader = batch_loader(Looks(source, channels), batches, num_workers)
    for batch, looks in zip(batches, watched(loader), strict=True):
        for index, look in zip(batch, looks, strict=True):
            if isinstance(look, BrokenImage):
                tally.add_broken(f"{source.describe(index)}: {look}")
            else:
                tally.add(index, look, sums)
        done += len(looks)
        progress(done)
    if not sums.count:
        reason = tally.broken[0] if tally.broken else f"none can be given {channels} channels"
        raise UserError(
            f"{source.name}: none of {len(indices)} images can be used ({reason}); "
            "check the files, or --channels"
        )
    return _summary(source, indices, channels, tally, sums)


def _summary(
    source: ImageSource, indices: list[int], channels: int, tally: _Tally, sums: ChannelSums
) -> Survey:
    statistics = sums.statistics()
    groups = tally.duplicates()
    return Survey(
        name=source.name,
        images=len(source),
        looked_at=len(indices),
        broken_count=tally.broken_count,
        broken=tally.broken,
        unfit_count=tally.unfit_count,
        formats=dict(tally.formats.most_common()),
        kinds=dict(tally.kinds.most_common()),
        channel_counts=dict(tally.channel_counts.most_common()),
        conversions=dict(tally.conversions.most_common()),
        height=_spread(tally.heights),
        width=_spread(tally.widths),
        lowest=tally.lowest,
        highest=tally.highest,
        duplicate_count=sum(len(group) - 1 for group in groups),
        duplicates=[[source.describe(index) for index in group] for group in groups[:LISTED]],
        channels=channels,
        mean=list(statistics.mean),
        std=list(statistics.std),
    )


def _spread(lengths: "array[int]") -> list[int]:
    return [min(lengths), int(np.median(lengths)), max(lengths)]
