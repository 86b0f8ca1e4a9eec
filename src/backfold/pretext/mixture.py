"""Tasks made of tasks: several in one batch, and one on a part of each image."""

import math
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from backfold.errors import UserError
from backfold.pretext.corruption import (
    Corruption,
    PretextTask,
    RunningSquares,
    check_images,
    host_random,
    random_order,
)
from backfold.pretext.masking import Masking
from backfold.pretext.pixels import Denoising, SuperResolution
from backfold.pretext.sorting import Sorting, patchify, unpatchify


@dataclass(frozen=True)
class Mixture:
    """Gives each image of a batch one of several pretext tasks, drawn by weight.

    First `assign` draws, then each task, in order, corrupts its images as one batch.

    Args:
        tasks: the pretext tasks, one or more.
        weights: one number for each task, 0 or more and not all 0; a task's probability is its
            weight divided by their sum.

    Raises:
        UserError: no tasks, weights that don't fit them, a masking with a hidden_share below 1
            that is not the only task with a weight above 0 or, when called, what a task refuses.
    """

    tasks: tuple[PretextTask, ...]
    weights: tuple[float, ...]

    def __post_init__(self) -> None:
        if not self.tasks:
            raise UserError("tasks is empty; give one pretext task or more")
        if len(self.weights) != len(self.tasks):
            raise UserError(
                f"weights has {len(self.weights)} numbers for {len(self.tasks)} tasks; "
                "give one for each"
            )
        if not (all(0 <= weight < math.inf for weight in self.weights) and any(self.weights)):
            raise UserError(
                f"weights is {tuple(self.weights)}; give numbers of 0 or more that are not all 0"
            )
        for task in self.tasks:
            maskings = (each for each in _simple_tasks(task) if isinstance(each, Masking))
            share = min((masking.hidden_share for masking in maskings), default=1.0)
            if share < 1 and self.drawn != (task,):
                raise UserError(
                    f"hidden_share is {share} in a mixture, whose other tasks need the backbone to "
                    "run on whole images; set it to 1, or give masking the only weight above 0"
                )

    @property
    def drawn(self) -> tuple[PretextTask, ...]:
        """The tasks with a weight above 0."""
        return tuple(task for task, weight in zip(self.tasks, self.weights, strict=True) if weight)

    def assign(self, batch_size: int, generator: torch.Generator) -> Tensor:
        """Each image's task, as an index into `tasks`: int64, (batch_size,), on the host."""
        shares = np.array(self.weights) / sum(self.weights)
        return torch.from_numpy(host_random(generator).choice(len(shares), batch_size, p=shares))

    def __call__(self, clean: Tensor, generator: torch.Generator) -> Corruption:
        """See `PretextTask`."""
        check_images(clean)
        assignment = self.assign(len(clean), generator).numpy()
        if len(self.drawn) == 1:
            return self.drawn[0](clean, generator)
        corrupted = torch.empty_like(clean)
        loss_mask = torch.empty_like(clean[:, :1], dtype=torch.bool)
        for index in np.unique(assignment).tolist():
            images = torch.from_numpy(np.flatnonzero(assignment == index)).to(clean.device)
            corruption = self.tasks[index](clean.index_select(0, images), generator)
            corrupted.index_copy_(0, images, corruption.corrupted)
            loss_mask.index_copy_(0, images, corruption.loss_mask)
        return Corruption(corrupted, loss_mask)


def _simple_tasks(task: PretextTask) -> list[PretextTask]:
    """The task itself or, of a mixture, what it draws from, at any depth."""
    if isinstance(task, Mixture):
        return [simple for drawn in task.drawn for simple in _simple_tasks(drawn)]
    return [task]


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

    Raises:
        UserError: a task of Backfold's that looks beyond the squares' edges or is sparse itself or,
            when called, squares that do not tile the image, fewer than two of them, or what the
            task refuses.
    """

    task: PretextTask
    settings: ExcerptSettings

    def __post_init__(self) -> None:
        for simple in _simple_tasks(self.task):
            _check_within_squares(simple, self.settings)

    def __call__(self, clean: Tensor, generator: torch.Generator) -> Corruption:
        """See `PretextTask`."""
        check_images(clean)
        size = self.settings.excerpt_patch_size
        _check_tiling(clean, size)
        rows, squares = clean.shape[2] // size, clean.shape[2] * clean.shape[3] // size**2
        count = min(squares, max(2, round(self.settings.share * squares)))
        order = random_order(len(clean), squares, generator)
        chosen = order[:, :count].sort(dim=1).values
        images = torch.arange(len(clean), device=clean.device)[:, None]

        def put_back(part: Tensor, whole: Tensor) -> Tensor:
            patches = patchify(whole, size).clone()
            patches[images, chosen] = patchify(part, size)
            return unpatchify(patches, rows)

        part = self.task(unpatchify(patchify(clean, size)[images, chosen], count), generator)
        nowhere = torch.zeros_like(clean[:, :1], dtype=torch.bool)
        return Corruption(
            put_back(part.corrupted, clean),
            put_back(part.loss_mask, nowhere),
            RunningSquares(chosen, size),
        )


def _check_tiling(clean: Tensor, size: int) -> None:
    height, width = clean.shape[2:]
    common = math.gcd(height, width)
    if common % size or height * width < 2 * size**2:
        fitting = (
            side for side in range(min(common, size), 0, -1)
            if common % side == 0 and height * width >= 2 * side**2
        )  # fmt: skip
        raise UserError(
            f"tasks.excerpt.excerpt_patch_size is {size} and images are {height}x{width} pixels; "
            f"give a number that divides both sides into two squares or more, "
            f"such as {next(fitting, 1)}"
        )


def _check_within_squares(task: PretextTask, settings: ExcerptSettings) -> None:
    given, side = f"tasks.excerpt.share is {settings.share:g}", settings.excerpt_patch_size
    match task:
        case SuperResolution():
            raise UserError(
                f"{given}, and superresolution blurs across the edges of the squares that it draws;"
                " set the share to 1, or leave superresolution out"
            )
        case Masking() if task.hidden_share < 1 or task.blocks:
            raise UserError(
                f"{given}, for which tasks.masking.hidden_share must be 1 and tasks.masking.blocks "
                "false; set one of them back"
            )
        case Masking():
            name, part = "masking.mask_patch_size", task.mask_patch_size
        case Sorting():
            name, part = "sorting.sorting_patch_size", task.sorting_patch_size
        case Denoising():
            name, part = "denoising.octaves, as pixels,", 2 ** (task.octaves - 1)
        case _:
            return
    if side % part:
        raise UserError(
            f"tasks.excerpt.excerpt_patch_size is {side} and tasks.{name} is {part}; "
            f"give the former a multiple of the latter, such as {part}"
        )
