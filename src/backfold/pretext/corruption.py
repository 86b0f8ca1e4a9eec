"""What every pretext task takes and gives, the one that changes nothing, and squares of images."""

import hashlib
from collections.abc import Callable, Sequence
from dataclasses import dataclass, fields, is_dataclass, replace
from itertools import accumulate
from operator import itemgetter
from typing import Any, Protocol, TypeVar

import numpy as np
import torch
from torch import Tensor
from torch.nn import functional as F

from backfold.errors import UserError

Part = TypeVar("Part")


@dataclass(frozen=True)
class RunningSquares:
    """The squares of each image that the backbone runs on, as many in every image.

    Where ``visible`` is given, ``indices`` are the hidden squares that run, in any order, and their
    energy is that given the visible ones: see `backfold.conditional`.
    """

    indices: Tensor  # int64, (batch, count); counted row by row over the image
    square_size: int  # side in pixels; height and width of the images are multiples of it
    visible: Tensor | None = None  # int64, (batch, count)
    normalised: Tensor | None = None  # bool, as indices: those that the second head restores


@dataclass(frozen=True)
class Corruption:
    """Corrupted images, where the loss counts, and what of them the backbone runs on."""

    corrupted: Tensor  # of the clean images' shape, type and device
    loss_mask: Tensor  # bool, (batch, 1, height, width); True where the loss counts
    running: RunningSquares | None = None  # None runs the backbone on whole images
    target: Tensor | None = None  # what training restores to, as corrupted; None: the clean images

    def split(self, sizes: Sequence[int]) -> "list[Corruption]":
        """The corruption of each part of the batch, of so many images; they add up to all."""
        parts = (slice(end - size, end) for end, size in zip(accumulate(sizes), sizes, strict=True))
        return [_with_tensors(itemgetter(part), self) for part in parts]

    @staticmethod
    def join(parts: "Sequence[Corruption]") -> "Corruption":
        """The inverse of `split`, for parts that run on as many squares of each image."""
        return _with_tensors(lambda *tensors: torch.cat(tensors), *parts)

    def to(self, device: torch.device) -> "Corruption":
        """The same on another device."""
        return _with_tensors(lambda tensor: tensor.to(device), self)


def _with_tensors(change: Callable[..., Tensor], *parts: Part) -> Part:
    """What ``change`` makes of the parts' tensors, in the place of the first part's."""
    first: Any = parts[0]

    def changed(*values: Any) -> Any:
        if is_dataclass(values[0]):
            return _with_tensors(change, *values)
        return change(*values) if isinstance(values[0], Tensor) else values[0]

    columns = {each.name: [getattr(part, each.name) for part in parts] for each in fields(first)}
    whole: Part = replace(first, **{name: changed(*values) for name, values in columns.items()})
    return whole


class PretextTask(Protocol):
    """Corrupts a batch of clean images; each image's corruption is drawn on its own.

    Images that a task can't corrupt raise a UserError, as do ours made with fields out of range.
    """

    def __call__(self, clean: Tensor, generator: torch.Generator) -> Corruption:
        """Corrupt the images; the input stays as it is.

        Args:
            clean: floats (batch, channels, height, width), normalised to zero mean and unit
                deviation per channel over the data set.
            generator: the only source of randomness, on the images' device.
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


def check_tiling(images: Tensor, name: str, size: int) -> None:
    """Raise UserError unless squares of this size divide images into two or more."""
    height, width = images.shape[2:]

    def fits(side: int) -> bool:
        return not height % side and not width % side and height * width >= 2 * side**2

    if not fits(size):
        fitting = max(filter(fits, range(1, size)), default=1)
        raise UserError(
            f"{name} is {size} and images are {height}x{width} pixels; give a number that divides "
            f"both sides into two squares or more, such as {fitting}"
        )


def loss_everywhere(clean: Tensor) -> Tensor:
    """A loss mask, (batch, 1, height, width), that is True at every pixel."""
    return torch.ones_like(clean[:, :1], dtype=torch.bool)


@dataclass(frozen=True)
class Identity:
    """Leaves images clean; the loss counts everywhere, so that restoring them changes nothing.

    It belongs in a `Mixture`, where it makes clean images points at which the energy is flat, and
    gives `backfold.restoration.plausibility_loss` its clean images. Not one of the paper's tasks.
    """

    def __call__(self, clean: Tensor, generator: torch.Generator) -> Corruption:  # noqa: ARG002
        """See `PretextTask`."""
        check_images(clean)
        return Corruption(clean.clone(), loss_everywhere(clean))


def random_order(batch_size: int, length: int, generator: torch.Generator) -> Tensor:
    """A random order of 0 .. length - 1 for each image: int64, (batch_size, length)."""
    scores = torch.rand(batch_size, length, generator=generator, device=generator.device)
    return scores.argsort(dim=1, stable=True)


def enlarge(squares: Tensor, side: int, height: int, width: int) -> Tensor:
    """Squares (..., rows, columns) as pixels (..., height, width), cut off at the edges.

    Pixels at the bottom and right that no square covers are 0.
    """
    pixels = squares.repeat_interleave(side, dim=-2).repeat_interleave(side, dim=-1)
    return F.pad(pixels, (0, width - pixels.shape[-1], 0, height - pixels.shape[-2]))
