"""What every pretext task takes and gives, the one that changes nothing, and squares of images."""

import hashlib
from collections.abc import Callable, Sequence
from dataclasses import dataclass, fields, replace
from itertools import accumulate
from operator import itemgetter
from typing import Any, Protocol

import numpy as np
import torch
from torch import Tensor

from backfold.errors import UserError


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
        return [
            self._changed(itemgetter(slice(end - size, end)))
            for end, size in zip(accumulate(sizes), sizes, strict=True)
        ]

    @staticmethod
    def join(parts: "Sequence[Corruption]") -> "Corruption":
        """The inverse of `split`, for parts that run on as many squares of each image."""

        def joined(found: Sequence[Any]) -> Any:
            first = found[0]
            names = [each.name for each in fields(first)]
            columns = {name: [getattr(part, name) for part in found] for name in names}
            return replace(
                first,
                **{n: torch.cat(v) for n, v in columns.items() if isinstance(v[0], Tensor)},
            )

        whole: Corruption = joined(parts)
        running = None if whole.running is None else joined([part.running for part in parts])
        return replace(whole, running=running)

    def to(self, device: torch.device) -> "Corruption":
        """The same on another device."""
        return self._changed(lambda tensor: tensor.to(device))

    def _changed(self, change: Callable[[Tensor], Tensor]) -> "Corruption":
        """With each tensor changed."""

        def changed(part: Any) -> Any:
            values = {each.name: getattr(part, each.name) for each in fields(part)}
            return replace(
                part, **{n: change(v) for n, v in values.items() if isinstance(v, Tensor)}
            )

        whole: Corruption = changed(self)
        return whole if self.running is None else replace(whole, running=changed(self.running))


class PretextTask(Protocol):
    """Corrupts a batch of clean images; each image's corruption is drawn on its own."""

    def __call__(self, clean: Tensor, generator: torch.Generator) -> Corruption:
        """Corrupt the images; the input stays as it is.

        Args:
            clean: floats (batch, channels, height, width), normalised to zero mean and unit
                deviation per channel over the data set.
            generator: the only source of randomness, on the images' device.

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


@dataclass(frozen=True)
class Identity:
    """Leaves images clean; the loss counts everywhere, so that restoring them changes nothing.

    There is nothing to learn from it alone: it belongs in a `Mixture`, where it makes clean images
    points at which the energy is flat, and gives `backfold.restoration.plausibility_loss` its clean
    images. Not one of the paper's tasks (Wang et al., ICLR 2023).
    """

    def __call__(self, clean: Tensor, generator: torch.Generator) -> Corruption:  # noqa: ARG002
        """See `PretextTask`."""
        check_images(clean)
        return Corruption(clean.clone(), loss_everywhere(clean))


def random_order(batch_size: int, length: int, generator: torch.Generator) -> Tensor:
    """A random order of 0 .. length - 1 for each image: int64, (batch_size, length)."""
    scores = torch.rand(batch_size, length, generator=generator, device=generator.device)
    return scores.argsort(dim=1, stable=True)


def patch_mask_to_pixels(mask: Tensor, patch_size: int, height: int, width: int) -> Tensor:
    """A patch mask (batch, rows, columns) as pixels (batch, 1, height, width).

    Patches that reach over the bottom or right edge are cut off there; pixels that no patch covers
    are False.
    """
    pixels = mask.repeat_interleave(patch_size, dim=1).repeat_interleave(patch_size, dim=2)
    pixels = pixels[:, :height, :width]
    covering = mask.new_zeros(len(mask), 1, height, width)
    covering[:, 0, : pixels.shape[1], : pixels.shape[2]] = pixels
    return covering
