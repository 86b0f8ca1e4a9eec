"""Sparse restoration with any task: it is given a random part of each image's squares."""

import math
from dataclasses import dataclass

import torch
from torch import Tensor

from backfold.errors import UserError
from backfold.pretext.corruption import (
    Corruption,
    PretextTask,
    RunningSquares,
    SecondTarget,
    check_images,
)
from backfold.pretext.denoising import Denoising
from backfold.pretext.masking import Masking
from backfold.pretext.mixture import Mixture
from backfold.pretext.patches import patchify, random_order, unpatchify
from backfold.pretext.sorting import Sorting
from backfold.pretext.superresolution import SuperResolution


@dataclass(frozen=True)
class ExcerptSettings:
    """How much of each image training runs on.

    Args:
        share: of each image's squares, drawn at random for each image, that the task corrupts and
            the backbone runs on, above 0 and at most 1. The others are left out, which saves their
            part of the computation; 1 runs on whole images (default: 1.0).
        excerpt_patch_size: side of the squares in pixels, a multiple of the backbone's patches; the
            image's sides must be multiples of it (default: 16).

    Raises:
        UserError: a field out of its range.
    """

    share: float = 1.0
    excerpt_patch_size: int = 16

    def __post_init__(self) -> None:
        if not 0 < self.share <= 1:
            raise UserError(
                f"tasks.excerpt.share is {self.share}; give a share above 0 and at most 1, "
                "such as 0.5; 1 runs on whole images"
            )
        if self.excerpt_patch_size < 1:
            raise UserError(
                f"tasks.excerpt.excerpt_patch_size is {self.excerpt_patch_size}; "
                "give 1 pixel or more"
            )


@dataclass(frozen=True)
class Excerpt:
    """Gives a task exactly max(2, round(share * squares)) random squares of each image.

    The task sees them as an image of their own: one below the other, in the order in which they lie
    in the whole image, row by row. What it hides, moves or adds stays within them. Then they go
    back to their places, and the backbone runs on them alone, with the loss where the task has it.

    Args:
        task: that treats squares of this side, or whole parts of them, or single pixels.
        settings: share and side of the squares.

    Raises:
        UserError: a task of Backfold's that looks beyond the squares' edges or is sparse itself or,
            when called, squares that do not tile the image, fewer than two of them, or what the
            task refuses.
    """

    task: PretextTask
    settings: ExcerptSettings

    def __post_init__(self) -> None:
        _check_task(self.task, self.settings)

    def __call__(self, clean: Tensor, generator: torch.Generator) -> Corruption:
        """Corrupt a part of normalised images (batch, channels, height, width)."""
        check_images(clean)
        size = self.settings.excerpt_patch_size
        rows, columns = self._grid(clean)
        count = min(rows * columns, max(2, round(self.settings.share * rows * columns)))
        order = random_order(len(clean), rows * columns, generator)
        chosen = order[:, :count].sort(dim=1).values
        images = torch.arange(len(clean), device=clean.device)[:, None]

        def part_of(whole: Tensor) -> Tensor:
            return unpatchify(patchify(whole, size)[images, chosen], count)

        def put_back(part: Tensor, whole: Tensor) -> Tensor:
            squares = patchify(whole, size).clone()
            squares[images, chosen] = patchify(part, size)
            return unpatchify(squares, rows)

        part = self.task(part_of(clean), generator)
        second = part.second and SecondTarget(
            part.second.chosen, put_back(part.second.target, clean)
        )
        nowhere = torch.zeros_like(clean[:, :1], dtype=torch.bool)
        return Corruption(
            put_back(part.corrupted, clean),
            put_back(part.loss_mask, nowhere),
            RunningSquares(chosen, size),
            second,
        )

    def _grid(self, clean: Tensor) -> tuple[int, int]:
        """Rows and columns of squares."""
        size, (height, width) = self.settings.excerpt_patch_size, clean.shape[2:]
        if height % size or width % size or height * width < 2 * size**2:
            common = math.gcd(height, width)
            fitting = (
                side for side in range(min(common, size), 0, -1)
                if common % side == 0 and height * width >= 2 * side**2
            )  # fmt: skip
            raise UserError(
                f"tasks.excerpt.excerpt_patch_size is {size} and images are {height}x{width} "
                "pixels; give a number that divides both sides into two squares or more, "
                f"such as {next(fitting, 1)}"
            )
        return height // size, width // size


def _check_task(task: PretextTask, settings: ExcerptSettings) -> None:
    """Raise UserError if the task would treat squares otherwise than within the whole image."""
    if isinstance(task, Mixture):
        for drawn in task.drawn:
            _check_task(drawn, settings)
    given, side = f"tasks.excerpt.share is {settings.share:g}", settings.excerpt_patch_size
    if isinstance(task, SuperResolution):
        raise UserError(
            f"{given}, and superresolution blurs across the edges of the squares that it draws; "
            "set the share to 1, or leave superresolution out"
        )
    if isinstance(task, Masking) and (task.hidden_share < 1 or task.blocks):
        raise UserError(
            f"{given}, for which tasks.masking.hidden_share must be 1 and tasks.masking.blocks "
            "false; set one of them back"
        )
    part = 1
    match task:
        case Masking():
            name, part = "masking.mask_patch_size", task.mask_patch_size
        case Sorting():
            name, part = "sorting.sorting_patch_size", task.sorting_patch_size
        case Denoising():
            name, part = "denoising.octaves, as pixels,", 2 ** (task.octaves - 1)
    if side % part:
        raise UserError(
            f"tasks.excerpt.excerpt_patch_size is {side} and tasks.{name} is {part}; "
            f"give the former a multiple of the latter, such as {part}"
        )
