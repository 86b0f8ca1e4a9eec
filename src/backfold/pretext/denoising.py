"""Denoising: images under Gaussian noise, to be restored."""

import math
from dataclasses import dataclass

import torch
from torch import Tensor

from backfold.errors import UserError
from backfold.pretext.corruption import Corruption, check_images, loss_everywhere


@dataclass(frozen=True)
class Denoising:
    """Adds Gaussian noise; the loss counts everywhere.

    Each image's noise_std is drawn uniformly from the range.

    Args:
        min_noise_std: smallest standard deviation of the noise, 0 or more, in units of the data
            set's own deviation (default: 0.1).
        max_noise_std: largest standard deviation of the noise, above 0 and min_noise_std or more,
            in the same units (default: 0.8).

    Raises:
        UserError: a field out of its range.
    """

    min_noise_std: float = 0.1
    max_noise_std: float = 0.8

    def __post_init__(self) -> None:
        ordered = 0 <= self.min_noise_std <= self.max_noise_std < math.inf
        if not ordered or self.max_noise_std == 0:
            raise UserError(
                f"min_noise_std is {self.min_noise_std} and max_noise_std {self.max_noise_std}; "
                "give 0 <= min_noise_std <= max_noise_std, the latter above 0"
            )

    def __call__(self, clean: Tensor, generator: torch.Generator) -> Corruption:
        """Add noise to normalised images (batch, channels, height, width)."""
        check_images(clean)
        noise = torch.randn(
            clean.shape, generator=generator, device=clean.device, dtype=clean.dtype
        )
        share = torch.rand(
            len(clean), 1, 1, 1, generator=generator, device=clean.device, dtype=clean.dtype
        )
        noise_std = self.min_noise_std + (self.max_noise_std - self.min_noise_std) * share
        return Corruption(clean + noise_std * noise, loss_everywhere(clean))
