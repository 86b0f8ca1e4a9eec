"""Several pretext tasks in one batch."""

import math
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from backfold.errors import UserError
from backfold.pretext.corruption import (
    Corruption,
    PretextTask,
    SecondTarget,
    check_images,
    host_random,
)
from backfold.pretext.masking import Masking


@dataclass(frozen=True)
class Mixture:
    """Gives each image of a batch one of several pretext tasks, drawn by weight.

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
            share = _hidden_share(task)
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
        """Corrupt normalised images (batch, channels, height, width), each by its own task.

        First `assign` draws, then each task, in order, corrupts its images as one batch.
        """
        check_images(clean)
        assignment = self.assign(len(clean), generator).numpy()
        if len(self.drawn) == 1:
            return self.drawn[0](clean, generator)
        corrupted = torch.empty_like(clean)
        loss_mask = torch.empty_like(clean[:, :1], dtype=torch.bool)
        second: SecondTarget | None = None
        if any(map(_has_second_head, self.drawn)):
            # Even if no image of it is drawn: every process must use the same parameters.
            nobody = torch.zeros(len(clean), dtype=torch.bool, device=clean.device)
            second = SecondTarget(nobody, clean.clone())
        for index in np.unique(assignment).tolist():
            images = torch.from_numpy(np.flatnonzero(assignment == index)).to(clean.device)
            corruption = self.tasks[index](clean.index_select(0, images), generator)
            corrupted.index_copy_(0, images, corruption.corrupted)
            loss_mask.index_copy_(0, images, corruption.loss_mask)
            if corruption.second is not None and second is not None:
                second.chosen.index_copy_(0, images, corruption.second.chosen)
                second.target.index_copy_(0, images, corruption.second.target)
        return Corruption(corrupted, loss_mask, second=second)


def _hidden_share(task: PretextTask) -> float:
    """The smallest hidden_share of a masking that this task is or holds; 1 if there is none."""
    if isinstance(task, Mixture):
        return min(map(_hidden_share, task.tasks))
    return task.hidden_share if isinstance(task, Masking) else 1.0


def _has_second_head(task: PretextTask) -> bool:
    if isinstance(task, Mixture):
        return any(map(_has_second_head, task.drawn))
    return isinstance(task, Masking) and task.normalised_share > 0
