"""What a data set's channels look like: how many there are, their means and deviations."""

from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from backfold.data.decode import BrokenImage, as_float, count_without_alpha, to_channels
from backfold.data.source import ImageSource
from backfold.errors import UserError

# One grey level of 8 bits: a constant channel is divided by this instead of by zero.
STD_FLOOR = 1.0 / 255.0


@dataclass(frozen=True)
class ChannelStatistics:
    """Mean and standard deviation of each channel, of pixels in [0, 1]."""

    mean: tuple[float, ...]
    std: tuple[float, ...]

    def normalize(self, images: Tensor) -> Tensor:
        """From [0, 1] to zero mean and unit deviation; (batch, channels, height, width)."""
        return (images - _per_channel(self.mean, images)) / _per_channel(self.std, images)

    def denormalize(self, images: Tensor) -> Tensor:
        """The inverse of `normalize`; not clamped."""
        return images * _per_channel(self.std, images) + _per_channel(self.mean, images)


def _per_channel(values: tuple[float, ...], images: Tensor) -> Tensor:
    return images.new_tensor(values).view(-1, 1, 1)


def measure_statistics(
    source: ImageSource, channels: int, max_images: int = 1000, seed: int = 0
) -> ChannelStatistics:
    """Channel means and deviations over a random sample of the source's readable images.

    Every image weighs the same whatever its size, as all are scaled to one size later. Deviations
    are at least `STD_FLOOR`.

    Args:
        source: the images.
        channels: the channel count that they are brought to.
        max_images: the sample's size; a smaller source is read wholly.
        seed: of the sample.

    Raises:
        UserError: no image of the sample can be read.
    """
    order = np.random.default_rng(seed).permutation(len(source))[:max_images]
    count = 0
    means = torch.zeros(channels, dtype=torch.float64)
    squares = torch.zeros(channels, dtype=torch.float64)
    for image in _readable(source, order.tolist()):
        pixels = as_float(to_channels(image, channels)).double()
        means += pixels.mean(dim=(1, 2))
        squares += pixels.square().mean(dim=(1, 2))
        count += 1
    mean = means / count
    std = (squares / count - mean.square()).clamp(min=0.0).sqrt().clamp(min=STD_FLOOR)
    return ChannelStatistics(tuple(mean.tolist()), tuple(std.tolist()))


def count_channels(source: ImageSource, sample: int = 16) -> int:
    """The most common channel count, alpha left out, of readable images spread over the source.

    Where two counts are equally common the larger one wins: grey can be repeated without loss.

    Raises:
        UserError: none of the sampled images can be read.
    """
    indices = np.linspace(0, len(source) - 1, min(sample, len(source))).round().astype(int)
    counts = Counter(
        count_without_alpha(image.shape[0]) for image in _readable(source, indices.tolist())
    )
    return max(counts, key=lambda channels: (counts[channels], channels))


def _readable(source: ImageSource, indices: list[int]) -> Iterator[Tensor]:
    reasons = []
    for index in indices:
        try:
            yield source.read(index)
        except BrokenImage as error:
            reasons.append(f"{source.describe(index)}: {error}")
    if len(reasons) == len(indices):
        first = f" ({reasons[0]})" if reasons else ""
        raise UserError(
            f"{source.name}: none of {len(indices)} sampled images can be read{first}; "
            "check the files, or give another --data"
        )
