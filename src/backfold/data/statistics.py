"""What a data set's channels look like: how many there are, their means and deviations."""

from collections import Counter
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import lru_cache
from typing import TypeVar

import numpy as np
import torch
from torch import Tensor

from backfold.data.decode import as_float, to_channels
from backfold.data.isolation import IMAGE_SECONDS, Expendable
from backfold.data.source import ImageSource
from backfold.errors import BrokenImage, UserError

# One grey level of 8 bits: a channel of bytes with less deviation holds no more than noise.
STD_FLOOR = 1.0 / 255.0
CONSTANT = 1e-6  # a deviation below this share of the mean is rounding
Found = TypeVar("Found")


@dataclass(frozen=True)
class ChannelStatistics:
    """Mean and standard deviation of each channel, on the scale of `as_float`."""

    mean: tuple[float, ...]
    std: tuple[float, ...]

    def normalize(self, images: Tensor) -> Tensor:
        """To zero mean and unit deviation; float32 in [0, 1] or uint8, (batch, channels, h, w)."""
        images = as_float(images)
        return (images - _per_channel(self.mean, images)) / _per_channel(self.std, images)

    def denormalize(self, images: Tensor) -> Tensor:
        """The inverse of `normalize`; not clamped."""
        return images * _per_channel(self.std, images) + _per_channel(self.mean, images)


def _per_channel(values: tuple[float, ...], images: Tensor) -> Tensor:
    return _on_device(tuple(values), images.device, images.dtype)


@lru_cache(maxsize=16)  # copying them each time would make the host wait for the device
def _on_device(values: tuple[float, ...], device: torch.device, dtype: torch.dtype) -> Tensor:
    with torch.inference_mode(False):  # or later gradients could not pass by it
        return torch.tensor(values, device=device, dtype=dtype).view(-1, 1, 1)


def measure_statistics(
    source: ImageSource, channels: int, max_images: int = 1000, seed: int = 0
) -> ChannelStatistics:
    """Channel means and deviations over a random sample of the source's readable images.

    Every image weighs the same whatever its size, as all are scaled to one size later.

    Args:
        source: the images.
        channels: the channel count that they are brought to.
        max_images: the sample's size; a smaller source is read wholly.
        seed: of the sample.

    Raises:
        UserError: no image of the sample can be read.
    """
    order = np.random.default_rng(seed).permutation(len(source))[:max_images]
    sums = ChannelSums(channels)
    for image in _readable(source, order.tolist(), source.read):
        sums.add(Moments.of(to_channels(image, channels)))
    return sums.statistics()


@dataclass(frozen=True)
class Moments:
    """One image's mean and mean square by channel, and whether it is of bytes.

    Plain numbers: a tensor that leaves a worker process costs a file handle.
    """

    means: tuple[float, ...]
    squares: tuple[float, ...]
    of_bytes: bool

    @classmethod
    def of(cls, image: Tensor) -> "Moments":
        """Of a decoded (channels, height, width) image, on the scale of `as_float`."""
        pixels = as_float(image).double()
        means, squares = pixels.mean(dim=(1, 2)), pixels.square().mean(dim=(1, 2))
        return cls(tuple(means.tolist()), tuple(squares.tolist()), image.dtype == torch.uint8)


class ChannelSums:
    """What means and deviations are made of, image by image.

    Args:
        channels: of every image.
    """

    def __init__(self, channels: int) -> None:
        self.count = 0
        self._means = torch.zeros(channels, dtype=torch.float64)
        self._squares = torch.zeros(channels, dtype=torch.float64)
        self._bytes_only = True

    def add(self, moments: Moments) -> None:
        """Count one image."""
        self._means += torch.tensor(moments.means, dtype=torch.float64)
        self._squares += torch.tensor(moments.squares, dtype=torch.float64)
        self._bytes_only &= moments.of_bytes
        self.count += 1

    def statistics(self) -> ChannelStatistics:
        """Of one image or more.

        Deviations of bytes are at least `STD_FLOOR`. A constant channel of anything else is divided
        by its own size, as its scale can't be known.
        """
        assert self.count > 0
        mean = self._means / self.count
        std = (self._squares / self.count - mean.square()).clamp(min=0.0).sqrt()
        if self._bytes_only:
            std = std.clamp(min=STD_FLOOR)
        else:
            size = torch.where(mean == 0, 1.0, mean.abs())
            std = torch.where(std <= CONSTANT * mean.abs(), size, std)
        return ChannelStatistics(tuple(mean.tolist()), tuple(std.tolist()))


def count_channels(source: ImageSource, sample: int = 16, *, apart: bool = False) -> int:
    """The most common channel count of readable images spread over the source.

    Where two counts are equally common the larger one wins: grey can be repeated without loss.

    Args:
        source: the images.
        sample: how many are read.
        apart: read them in a forked process, for decoders that crash or hang.

    Raises:
        UserError: none of the sampled images can be read.
    """
    indices = np.linspace(0, len(source) - 1, min(sample, len(source))).round().astype(int).tolist()

    def channels_of(index: int) -> int:
        return source.read(index).shape[0]

    if apart:
        with Expendable(channels_of, IMAGE_SECONDS) as read:
            counts = Counter(_readable(source, indices, read))
    else:
        counts = Counter(_readable(source, indices, channels_of))
    return max(counts, key=lambda channels: (counts[channels], channels))


def _readable(
    source: ImageSource, indices: list[int], read: Callable[[int], Found]
) -> Iterator[Found]:
    reasons = []
    for index in indices:
        try:
            yield read(index)
        except BrokenImage as error:
            reasons.append(f"{source.describe(index)}: {error}")
    if len(reasons) == len(indices):
        first = f" ({reasons[0]})" if reasons else ""
        raise UserError(
            f"{source.name}: none of {len(indices)} sampled images can be read{first}; "
            "check the files, or give another --data"
        )
