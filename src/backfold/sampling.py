"""New images out of noise: descending the energy of an image while less and less noise is left.

The gradient of an energy that restores noisy images points from an image to what the energy takes
for its clean form. So the Euler step of a diffusion's flow (Karras et al., NeurIPS 2022, algorithm
1 and equation 5), from the noise level s to a lower one t, is a descent step of size 1 - t / s:

    x <- x - (1 - t / s) * step_size * dE/dx.

The energy is not told the level and sees it in the image, as the denoiser does whose prior
Kadkhodaie and Simoncelli sample (NeurIPS 2021).
"""

from itertools import pairwise

import numpy as np
import torch
from torch import Tensor

from backfold.restoration import EnergyFn, eval_mode, restoration_step

RHO = 7.0  # Karras et al., section 3.2: how much closer together low levels lie


def noise_levels(count: int, largest: float, smallest: float) -> list[float]:
    """Falling deviations of noise, ``count`` of them, 2 or more, and a last one of 0."""
    roots = np.linspace(largest ** (1 / RHO), smallest ** (1 / RHO), count)
    return [*(roots**RHO).tolist(), 0.0]


def sample(
    energy_fn: EnergyFn,
    noise: Tensor,
    levels: list[float],
    step_size: float = 1.0,
    fresh_noise: float = 0.0,
    generator: torch.Generator | None = None,
) -> Tensor:
    """Images, as the noise: (batch, channels, height, width), normalised.

    A module runs in eval mode and gets its mode back.

    Args:
        energy_fn: images -> energies, trained to restore noisy images.
        noise: Gaussian, of unit deviation.
        levels: see `noise_levels`.
        step_size: that of training.
        fresh_noise: 0 gives each noise one image; up to 1, part of the noise is drawn anew at each
            level, which mends mistakes of earlier ones (eta of Song et al., ICLR 2021, equation 16,
            for noise that is added to images as they are).
        generator: of the fresh noise, on the noise's device; None takes torch's own.
    """
    images = noise * levels[0]
    with eval_mode(energy_fn):
        for level, following in pairwise(levels):
            fresh = fresh_noise * following * max(0.0, 1 - following**2 / level**2) ** 0.5
            kept = max(0.0, following**2 - fresh**2) ** 0.5
            images, _ = restoration_step(energy_fn, images, (1 - kept / level) * step_size)
            if fresh:
                drawn = torch.randn(images.shape, generator=generator, device=images.device)
                images = images + fresh * drawn.to(images)
    return images
