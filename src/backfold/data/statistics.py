"""What a data set's channels look like: how many there are, their means and deviations."""

from collections import Counter
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import lru_cache, reduce
from operator import add
from typing import TypeVar

import numpy as np
import torch
from numpy.typing import NDArray
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

    They are brought to this channel count, and every one weighs the same whatever its size, as all
    are scaled to one size later.

    Raises:
        UserError: no image of the sample can be read.
    """
    order = np.random.default_rng(seed).permutation(len(source))[:max_images]
    images = _readable(source, order.tolist(), source.read)
    return reduce(add, (Moments.of(to_channels(image, channels)) for image in images)).statistics()


@dataclass(frozen=True)
class Moments:
    """Sums over images of their mean and their mean square by channel.

    NumPy's arrays, as a tensor that leaves a worker process costs a file handle.
    """

    count: int
    means: NDArray[np.float64]
    squares: NDArray[np.float64]
    of_bytes: bool

    @classmethod
    def of(cls, image: Tensor) -> "Moments":
        """Of a decoded (channels, height, width) image, on the scale of `as_float`."""
        pixels = as_float(image).double()
        means, squares = pixels.mean(dim=(1, 2)), pixels.square().mean(dim=(1, 2))
        return cls(1, means.numpy(), squares.numpy(), image.dtype == torch.uint8)

    def __add__(self, other: "Moments") -> "Moments":
        return Moments(
            self.count + other.count,
            self.means + other.means,
            self.squares + other.squares,
            self.of_bytes and other.of_bytes,
        )

    def statistics(self) -> ChannelStatistics:
        """Deviations of bytes are at least `STD_FLOOR`.

        A constant channel of anything else is divided by its own size, as its scale can't be known.
        """
        mean = self.means / self.count
        std = np.sqrt(np.maximum(self.squares / self.count - mean**2, 0.0))
        if self.of_bytes:
            std = np.maximum(std, STD_FLOOR)
        else:
            std = np.where(std <= CONSTANT * abs(mean), np.where(mean == 0, 1.0, abs(mean)), std)
        return ChannelStatistics(tuple(mean.tolist()), tuple(std.tolist()))


def count_channels(source: ImageSource, sample: int = 16, *, apart: bool = False) -> int:
    """The most common channel count of so many readable images spread over the source.

    Where two counts are equally common the larger one wins: grey can be repeated without loss.
    ``apart`` reads in a forked process, for decoders that crash or hang.

    Raises:
        UserError: none of the sampled images can be read.
    """
    indices = np.linspace(0, len(source) - 1, min(sample, len(source))).round().astype(int).tolist()

    def channels_of(index: int) -> int:
        return source.read(index).shape[0]

    with Expendable(channels_of, IMAGE_SECONDS) as read:
        counts = Counter(_readable(source, indices, read if apart else channels_of))
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
