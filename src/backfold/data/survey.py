"""What a data set looks like: sizes, formats, channels, duplicates, broken files, statistics."""

import hashlib
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from itertools import chain
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray
from torch.utils.data import Dataset

from backfold.data.decode import Decoded, as_float, examine, to_channels
from backfold.data.isolation import IMAGE_SECONDS, Expendable
from backfold.data.loading import batch_loader, watched
from backfold.data.source import EncodedSource, ImageSource
from backfold.data.statistics import ChannelStatistics, Moments, count_channels
from backfold.errors import BrokenImage, UserError

LISTED = 100  # broken files, and groups of duplicates, by name
BATCH = 16  # images that a worker looks at before it tells of them
DIGEST_BYTES = 16


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

    def notes(self) -> list[str]:
        """What a run should say once about how images are read."""
        return [
            f"{count} of {self.looked_at} images: {conversion}"
            for conversion, count in self.conversions.items()
        ]


class Look(NamedTuple):
    """What was found out about one image, in what can leave a process."""

    names: tuple[tuple[str, str], ...]  # fields of `Survey` that count, and what of
    size: tuple[int, int]  # height and width
    digest: bytes
    extremes: tuple[float, float]  # on the scale of `as_float`
    moments: Moments | None  # None where the image can't be given the channels asked for


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
            shape = repr((tuple(image.shape), image.dtype)).encode()
            content = shape + image.contiguous().numpy().tobytes()
        floats = as_float(found.image)
        try:
            moments = Moments.of(to_channels(found.image, self._channels))
        except UserError:
            moments = None
        count, height, width = found.image.shape
        names = [("formats", found.format), ("kinds", found.kind), ("channel_counts", str(count))]
        names += [("conversions", conversion) for conversion in found.conversions]
        digest = hashlib.blake2b(content, digest_size=DIGEST_BYTES).digest()
        extremes = float(floats.min()), float(floats.max())
        return Look(tuple(names), (height, width), digest, extremes, moments)


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
    found = Survey(source.name, len(source), len(indices), channels=channels)
    counts: Counter[tuple[str, str]] = Counter()
    total: Moments | None = None
    kept = [("index", "q"), ("height", "q"), ("width", "q"), ("digest", f"V{DIGEST_BYTES}")]
    known, readable = np.zeros(len(indices), dtype=kept), 0
    batches = [indices[first : first + BATCH] for first in range(0, len(indices), BATCH)]
    looks = chain.from_iterable(
        watched(batch_loader(Looks(source, channels), batches, num_workers))
    )
    for done, (index, look) in enumerate(zip(indices, looks, strict=True), 1):
        progress(done)
        if isinstance(look, BrokenImage):
            found.broken_count += 1
            if len(found.broken) < LISTED:
                found.broken.append(f"{source.describe(index)}: {look}")
            continue
        known[readable] = (index, *look.size, look.digest)
        readable += 1
        counts.update(look.names)
        found.lowest = min(found.lowest, look.extremes[0])
        found.highest = max(found.highest, look.extremes[1])
        if look.moments is None:
            found.unfit_count += 1
        else:
            total = look.moments if total is None else total + look.moments
    if total is None:
        reason = found.broken[0] if found.broken else f"none can be given {channels} channels"
        raise UserError(
            f"{source.name}: none of {len(indices)} images can be used ({reason}); "
            "check the files, or --channels"
        )
    known = known[:readable]
    for (name, key), count in counts.most_common():
        getattr(found, name)[key] = count
    found.height, found.width = (
        [int(measure(known[side])) for measure in (np.min, np.median, np.max)]
        for side in ("height", "width")
    )
    groups = _duplicates(known["index"], known["digest"])
    found.duplicate_count = sum(len(group) - 1 for group in groups)
    found.duplicates = [[source.describe(index) for index in group] for group in groups[:LISTED]]
    statistics = total.statistics()
    found.mean, found.std = list(statistics.mean), list(statistics.std)
    return found


def _duplicates(indices: NDArray[np.int64], digests: NDArray[np.void]) -> list[list[int]]:
    """Groups of images with one content, in the order of their first."""
    _, group, count = np.unique(digests, return_inverse=True, return_counts=True)
    groups: dict[int, list[int]] = {}
    for position in np.flatnonzero(count[group] > 1).tolist():
        groups.setdefault(int(group[position]), []).append(int(indices[position]))
    return list(groups.values())
