"""Tasks made of tasks: several in one batch, and one on a part of each image."""

import math
from dataclasses import dataclass

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from backfold.errors import UserError, at_least, check_ranges, share
from backfold.pretext.corruption import (
    Corruption,
    PretextTask,
    RunningSquares,
    check_images,
    check_tiling,
    host_random,
    loss_everywhere,
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
            weight divided by their sum. A masking with a hidden_share below 1 must have the only
            weight above 0.
    """

    tasks: tuple[PretextTask, ...]
    weights: tuple[float, ...]

    def __post_init__(self) -> None:
        good = all(0 <= weight < math.inf for weight in self.weights) and any(self.weights)
        if not good or len(self.weights) != len(self.tasks):
            raise UserError(
                f"weights is {tuple(self.weights)} for {len(self.tasks)} tasks; "
                "give each a number of 0 or more, not all 0"
            )
        if any(isinstance(task, Mixture) for task in self.tasks):
            raise UserError("a mixture holds another one; give the tasks of both to one")
        for task in self.tasks:
            part = task.hidden_share if isinstance(task, Masking) else 1
            if part < 1 and self.drawn != (task,):
                raise UserError(
                    f"hidden_share is {part} in a mixture, whose other tasks need the backbone to "
                    "run on whole images; set it to 1, or give masking the only weight above 0"
                )

    @property
    def drawn(self) -> tuple[PretextTask, ...]:
        """The tasks with a weight above 0."""
        return tuple(task for task, weight in zip(self.tasks, self.weights, strict=True) if weight)

    def assign(self, batch_size: int, generator: torch.Generator) -> NDArray[np.int64]:
        """Each image's task, as an index into `tasks`: int64, (batch_size,), on the host."""
        shares = np.array(self.weights) / sum(self.weights)
        return host_random(generator).choice(len(shares), batch_size, p=shares)

    def __call__(self, clean: Tensor, generator: torch.Generator) -> Corruption:
        """See `PretextTask`."""
        check_images(clean)
        assignment = self.assign(len(clean), generator)
        if len(self.drawn) == 1:
            return self.drawn[0](clean, generator)
        corrupted, loss_mask = torch.empty_like(clean), loss_everywhere(clean)
        for index in np.unique(assignment).tolist():
            images = torch.from_numpy(np.flatnonzero(assignment == index)).to(clean.device)
            made = self.tasks[index](clean[images], generator)
            corrupted[images], loss_mask[images] = made.corrupted, made.loss_mask
        return Corruption(corrupted, loss_mask)


@dataclass(frozen=True)
class ExcerptSettings:
    """How much of each image training runs on.

    Args:
        share: of each image's squares, drawn at random for each image, that the task corrupts and
            the backbone runs on, above 0 and at most 1. The others are left out, which saves their
            part of the computation; 1 runs on whole images.
        excerpt_patch_size: side of the squares in pixels, a multiple of the backbone's patches; the
            image's sides must be multiples of it.
    """

    share: float = 1.0
    excerpt_patch_size: int = 16

    def __post_init__(self) -> None:
        ranges = share("share"), at_least(1, "excerpt_patch_size")
        check_ranges(self, ranges, "tasks.excerpt.")


@dataclass(frozen=True)
class Excerpt:
    """Gives a task exactly max(2, round(share * squares)) random squares of each image.

    The task sees them as an image of their own: one below the other, in the order in which they lie
    in the whole image, row by row. What it hides, moves or adds stays within them: tasks of ours
    that look beyond the squares' edges, or are sparse themselves, are refused. Then they go back to
    their places, and the backbone runs on them alone, with the loss where the task has it.
    """

    task: PretextTask
    settings: ExcerptSettings

    def __post_init__(self) -> None:
        for task in self.task.drawn if isinstance(self.task, Mixture) else (self.task,):
            _check_within_squares(task, self.settings)

    def __call__(self, clean: Tensor, generator: torch.Generator) -> Corruption:
        """See `PretextTask`."""
        check_images(clean)
        size = self.settings.excerpt_patch_size
        check_tiling(clean, "tasks.excerpt.excerpt_patch_size", size)
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
        return Corruption(
            put_back(part.corrupted, clean),
            put_back(part.loss_mask, ~loss_everywhere(clean)),
            RunningSquares(chosen, size),
        )


def _check_within_squares(task: PretextTask, settings: ExcerptSettings) -> None:
    side, part = settings.excerpt_patch_size, 1.0
    match task:
        case Masking(blocks=False, hidden_share=1.0):
            part = task.mask_patch_size
        case Sorting():
            part = task.sorting_patch_size
        case Denoising():
            part = 2 ** (task.octaves - 1)
        case Masking() | SuperResolution():
            part = math.inf
    if side % part:
        raise UserError(
            f"tasks.excerpt.share is {settings.share:g}, and {task} reaches beyond the edges of "
            f"squares of {side} pixels (tasks.excerpt.excerpt_patch_size); set the share to 1, or "
            "give the task parts that divide the squares, no blocks and no hidden_share"
        )
