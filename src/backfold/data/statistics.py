"""Means and deviations of a data set's channels; `survey` measures them."""

from dataclasses import dataclass
from functools import lru_cache

import torch
from torch import Tensor

from backfold.data.decode import as_float


@dataclass(frozen=True)
class ChannelStatistics:
    """Mean and standard deviation of each channel, on the scale of `as_float`."""

    mean: tuple[float, ...]
    std: tuple[float, ...]

    @property
    def in_unit_range(self) -> bool:
        """Whether pixels seem to lie in [0, 1], as of all files but those of other numbers."""
        return min(self.mean) >= 0 and max(self.mean) <= 1 and max(self.std) < 0.5

    def normalize(self, images: Tensor) -> Tensor:
        """To zero mean and unit deviation; float32 in [0, 1] or uint8, (batch, channels, h, w)."""
        images = as_float(images)
        return (images - _per_channel(self.mean, images)) / _per_channel(self.std, images)

    def denormalize(self, images: Tensor) -> Tensor:
        """The inverse of `normalize`; not clamped."""
        return images * _per_channel(self.std, images) + _per_channel(self.mean, images)


def _per_channel(values: tuple[float, ...], images: Tensor) -> Tensor:
    return _on_device(tuple(values), images.device, images.dtype)  # lists may be given


@lru_cache(maxsize=16)  # copying them each time would make the host wait for the device
def _on_device(values: tuple[float, ...], device: torch.device, dtype: torch.dtype) -> Tensor:
    with torch.inference_mode(False):  # or later gradients could not pass by it
        return torch.tensor(values, device=device, dtype=dtype).view(-1, 1, 1)
