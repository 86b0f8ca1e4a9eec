"""Which images each step sees."""

import math
from collections.abc import Iterator

import numpy as np
from torch.utils.data import Sampler

from backfold.errors import UserError

Key = tuple[int, int]  # (epoch, index)


class StepSampler(Sampler[list[Key]]):
    """For each optimizer step, this rank's (epoch, index) keys.

    Every epoch is a permutation of all images that depends on (seed, epoch) only; images that do
    not fill a last global batch sit that epoch out.

    Args:
        count: number of images.
        batch_size: images a step on this rank; all ranks have the same.
        seed: 0 or more.
        start_step: steps already done.
        total_steps: where to stop.
        rank: this process, from 0.
        world_size: number of processes.

    Raises:
        UserError: fewer images than one global batch, or a negative seed.
    """

    def __init__(
        self,
        count: int,
        batch_size: int,
        seed: int,
        start_step: int,
        total_steps: int,
        rank: int = 0,
        world_size: int = 1,
    ) -> None:
        assert batch_size > 0
        assert start_step >= 0
        assert 0 <= rank < world_size
        if seed < 0:
            raise UserError(f"seed is {seed}; give 0 or more")
        self.steps_per_epoch = steps_per_epoch(count, batch_size * world_size)
        self._count, self._batch_size, self._seed = count, batch_size, seed
        self._start_step, self._total_steps = start_step, total_steps
        self._rank, self._world_size = rank, world_size

    def __len__(self) -> int:
        return max(0, self._total_steps - self._start_step)

    def __iter__(self) -> Iterator[list[Key]]:
        step = self._start_step
        while step < self._total_steps:
            epoch, first = divmod(step, self.steps_per_epoch)
            order = np.random.default_rng([self._seed, epoch]).permutation(self._count)
            last = min(self.steps_per_epoch, first + self._total_steps - step)
            for step_in_epoch in range(first, last):
                start = (step_in_epoch * self._world_size + self._rank) * self._batch_size
                chosen = order[start : start + self._batch_size].tolist()
                yield [(epoch, index) for index in chosen]
            step += last - first


def steps_per_epoch(count: int, global_batch_size: int) -> int:
    """Full global batches in ``count`` images.

    Raises:
        UserError: there is none.
    """
    if count < global_batch_size:
        raise UserError(
            f"{count} images are fewer than one global batch of {global_batch_size}; "
            f"lower --batch-size so that all processes together take at most {count}, or add images"
        )
    return count // global_batch_size


class InOrderSampler(Sampler[list[Key]]):
    """All positions in order, in batches; the last may be smaller. The epoch is 0 throughout."""

    def __init__(self, count: int, batch_size: int) -> None:
        assert batch_size > 0
        self._count, self._batch_size = count, batch_size

    def __len__(self) -> int:
        return math.ceil(self._count / self._batch_size)

    def __iter__(self) -> Iterator[list[Key]]:
        for start in range(0, self._count, self._batch_size):
            stop = min(start + self._batch_size, self._count)
            yield [(0, position) for position in range(start, stop)]
