"""What every pretext task takes and gives."""

import hashlib
from dataclasses import dataclass
from typing import Protocol

import numpy as np
import torch
from torch import Tensor

from backfold.errors import UserError


@dataclass(frozen=True)
class RunningSquares:
    """The squares of each image that the backbone runs on, as many in every image.

    Args:
        indices: int64, (batch, count), rising; squares are counted row by row over the image.
        square_size: side in pixels; height and width of the images are multiples of it.
    """

    indices: Tensor
    square_size: int


@dataclass(frozen=True)
class SecondTarget:
    """What a second head restores some of the images to, in training alone.

    Args:
        chosen: bool, (batch,); the images that are restored by the second head.
        target: shape of the clean images, which it equals where an image is not chosen.
    """

    chosen: Tensor
    target: Tensor


@dataclass(frozen=True)
class Corruption:
    """Corrupted images, where the loss counts, and what of them the backbone runs on.

    Args:
        corrupted: shape, type and device of the clean images.
        loss_mask: bool, (batch, 1, height, width); True where the loss counts.
        running: squares that the backbone runs on; None runs it on whole images.
        second: of the images that are not restored to the clean ones; None if all are.
    """

    corrupted: Tensor
    loss_mask: Tensor
    running: RunningSquares | None = None
    second: SecondTarget | None = None


class PretextTask(Protocol):
    """Corrupts a batch of clean images; each image's corruption is drawn on its own."""

    def __call__(self, clean: Tensor, generator: torch.Generator) -> Corruption:
        """Corrupt the images; the input stays as it is.

        Args:
            clean: floats (batch, channels, height, width), normalised to zero mean and unit
                deviation per channel over the data set.
            generator: the only source of randomness, on the images' device. The same state gives
                the same bits.

        Raises:
            UserError: images that this task can't corrupt.
        """
        ...


def host_random(generator: torch.Generator) -> np.random.Generator:
    """NumPy's generator in a state that follows from torch's, which goes on by one number.

    For what the host must know, such as how many images a task gets: read back from the device, it
    would make the host wait there in every step. A generator's state lies on the host.
    """
    state = generator.get_state().numpy().tobytes()
    torch.rand((), generator=generator, device=generator.device)
    return np.random.default_rng(list(hashlib.sha256(state).digest()))


def check_images(images: Tensor) -> None:
    """Raise UserError unless the images are floats of shape (batch, channels, height, width)."""
    if images.ndim != 4 or not images.is_floating_point():
        raise UserError(
            f"images are {tuple(images.shape)} of {images.dtype}; "
            "give floats of shape (batch, channels, height, width)"
        )


def loss_everywhere(clean: Tensor) -> Tensor:
    """A loss mask, (batch, 1, height, width), that is True at every pixel."""
    return torch.ones_like(clean[:, :1], dtype=torch.bool)
