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
        octaves: how many resolutions the noise has, 1 or more: squares of 1, 2, 4, ... pixels, each
            of one colour, with equal shares in the noise's variance. 1 is noise of single pixels,
            which a backbone can remove without looking at anything coarse (default: 1).

    Raises:
        UserError: a field out of its range or, when called, squares larger than the image.
    """

    min_noise_std: float = 0.1
    max_noise_std: float = 0.8
    octaves: int = 1

    def __post_init__(self) -> None:
        ordered = 0 <= self.min_noise_std <= self.max_noise_std < math.inf
        if not ordered or self.max_noise_std == 0:
            raise UserError(
                f"min_noise_std is {self.min_noise_std} and max_noise_std {self.max_noise_std}; "
                "give 0 <= min_noise_std <= max_noise_std, the latter above 0"
            )
        if self.octaves < 1:
            raise UserError(f"octaves is {self.octaves}; give 1 or more")

    def __call__(self, clean: Tensor, generator: torch.Generator) -> Corruption:
        """Add noise to normalised images (batch, channels, height, width)."""
        check_images(clean)
        noise = self._noise(clean, generator)
        share = torch.rand(
            len(clean), 1, 1, 1, generator=generator, device=clean.device, dtype=clean.dtype
        )
        noise_std = self.min_noise_std + (self.max_noise_std - self.min_noise_std) * share
        return Corruption(clean + noise_std * noise, loss_everywhere(clean))

    def _noise(self, clean: Tensor, generator: torch.Generator) -> Tensor:
        """Of unit deviation at each pixel, shaped as the images."""
        height, width = clean.shape[2:]
        largest = 2 ** (self.octaves - 1)
        if largest > min(height, width):
            raise UserError(
                f"octaves is {self.octaves}, which makes squares of {largest} pixels in a "
                f"{height}x{width} pixel image; give {min(height, width).bit_length()} or less"
            )
        total = torch.zeros_like(clean)
        for side in (2**octave for octave in range(self.octaves)):
            rows, columns = math.ceil(height / side), math.ceil(width / side)
            squares = torch.randn(
                (*clean.shape[:2], rows, columns),
                generator=generator, device=clean.device, dtype=clean.dtype,
            )  # fmt: skip
            pixels = squares.repeat_interleave(side, dim=2).repeat_interleave(side, dim=3)
            total += pixels[:, :, :height, :width]
        return total / math.sqrt(self.octaves)
