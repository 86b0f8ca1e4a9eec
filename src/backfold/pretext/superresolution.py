"""Super-resolution: images lose their fine detail, to be restored."""

import math
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor
from torch.nn import functional as F

from backfold.errors import UserError
from backfold.pretext.corruption import (
    Corruption,
    check_images,
    host_random,
    loss_everywhere,
)

LARGEST_FACTOR_STEP = 0.25


@dataclass(frozen=True)
class SuperResolution:
    """Scales images down and up again, both bicubic; the loss counts everywhere.

    Each image's factor is drawn from evenly spaced values, at most a quarter apart, from the
    smallest factor to the largest, both included. A factor of 1 leaves the image as it is.

    Args:
        min_factor: smallest factor by which height and width shrink, 1 or more (default: 2.0).
        max_factor: largest factor, min_factor or more (default: 4.0).

    Raises:
        UserError: a field out of its range.
    """

    min_factor: float = 2.0
    max_factor: float = 4.0

    def __post_init__(self) -> None:
        if not 1 <= self.min_factor <= self.max_factor < math.inf:
            raise UserError(
                f"min_factor is {self.min_factor} and max_factor {self.max_factor}; "
                "give 1 <= min_factor <= max_factor"
            )

    @property
    def factors(self) -> tuple[float, ...]:
        """The factors that are drawn from, in rising order."""
        span = self.max_factor - self.min_factor
        steps = math.ceil(span / LARGEST_FACTOR_STEP)
        return tuple(self.min_factor + span * step / max(steps, 1) for step in range(steps + 1))

    def __call__(self, clean: Tensor, generator: torch.Generator) -> Corruption:
        """Blur normalised images (batch, channels, height, width)."""
        check_images(clean)
        factors = self.factors
        drawn = host_random(generator).integers(len(factors), size=len(clean))
        corrupted = clean.clone()
        for index in np.unique(drawn).tolist():
            images = torch.from_numpy(np.flatnonzero(drawn == index)).to(clean.device)
            corrupted[images] = down_and_up(clean[images], factors[index])
        return Corruption(corrupted, loss_everywhere(clean))


def down_and_up(images: Tensor, factor: float) -> Tensor:
    """Shrink height and width by a factor of 1 or more, to whole pixels, and enlarge again.

    Both ways bicubic with antialiasing, as Pillow does it.
    """
    size = images.shape[-2:]
    small_size = [max(1, round(side / factor)) for side in size]
    try:
        small = F.interpolate(images, small_size, mode="bicubic", antialias=True)
        return F.interpolate(small, size, mode="bicubic", antialias=True)
    except NotImplementedError:  # not every device has it
        if images.device.type == "cpu":
            raise
        return down_and_up(images.cpu(), factor).to(images.device)
