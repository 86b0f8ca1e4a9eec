"""Real photographs, normalised as the method sees them."""

from collections.abc import Callable

import numpy as np
import pytest
import skimage.data
import torch
from torch import Tensor
from torch.nn import functional as F

HEIGHT, WIDTH = 64, 96


@pytest.fixture(scope="session")
def photographs() -> Tensor:
    """Eight crops of four photographs: (8, 3, 64, 96), zero mean and unit deviation a channel."""
    crops = []
    for name in ("astronaut", "chelsea", "coffee", "rocket"):
        image = torch.from_numpy(np.array(getattr(skimage.data, name)())).permute(2, 0, 1)
        for top, left in ((0, 0), (100, 150)):
            crop = image[None, :, top : top + 200, left : left + 300].float()
            crops.append(F.interpolate(crop, (HEIGHT, WIDTH), mode="bilinear", antialias=True))
    images = torch.cat(crops)
    mean = images.mean(dim=(0, 2, 3), keepdim=True)
    return (images - mean) / images.std(dim=(0, 2, 3), keepdim=True)


@pytest.fixture(scope="session")
def photographs_of(photographs: Tensor) -> Callable[..., Tensor]:
    """Photographs of any channel count and any size up to 64 x 96."""

    def make(channels: int, height: int = HEIGHT, width: int = WIDTH) -> Tensor:
        shifted = [photographs.roll(7 * turn, dims=3) for turn in range(1 + channels // 3)]
        return torch.cat(shifted, dim=1)[:, :channels, :height, :width].contiguous()

    return make
