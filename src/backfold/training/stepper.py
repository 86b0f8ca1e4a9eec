"""One optimizer step: corrupt, restore K times with a backward pass after each, update."""

import math
from collections.abc import Iterator

import numpy as np
import torch
from lightning.fabric import Fabric
from torch import Tensor, nn
from torch.optim import AdamW

from backfold.data.statistics import ChannelStatistics
from backfold.energy import EnergyModel
from backfold.pretext import Corruption, PretextTask
from backfold.restoration import restoration_losses, training_step
from backfold.training.config import PretrainConfig
from backfold.training.meter import Restored
from backfold.training.optimizer import build_optimizer, build_schedule


class RestorationTraining(nn.Module):
    """One restoration step with its loss, as one forward: what DistributedDataParallel may wrap."""

    def __init__(self, energy: EnergyModel, step_size: float) -> None:
        super().__init__()
        self.energy = energy
        self.step_size = step_size

    def forward(
        self, images: Tensor, clean: Tensor, loss_mask: Tensor
    ) -> tuple[Tensor, Tensor, Tensor]:
        """See `backfold.restoration.training_step`."""
        return training_step(self.energy, images, clean, loss_mask, self.step_size)


class Stepper:
    """Takes optimizer steps on an energy.

    Args:
        config: settings; those of the optimizer, K, step size, parts and seed count here.
        energy: on the device, its unreachable parameters frozen.
        task: corrupts the images.
        statistics: normalise the images.
        fabric: devices and precision.
        total_steps: of the whole run.
        steps_per_epoch: for the warm-up.
    """

    def __init__(
        self,
        config: PretrainConfig,
        energy: EnergyModel,
        task: PretextTask,
        statistics: ChannelStatistics,
        fabric: Fabric,
        total_steps: int,
        steps_per_epoch: int,
    ) -> None:
        self.config, self.task, self.statistics, self.fabric = config, task, statistics, fabric
        optimizer: AdamW = build_optimizer(energy, config.optimizer, config.batch_size)
        self.schedule = build_schedule(optimizer, config.optimizer, total_steps, steps_per_epoch)
        training = RestorationTraining(energy, config.step_size)
        self.training, self.optimizer = fabric.setup(training, optimizer)

    def __call__(self, images: Tensor, step: int) -> tuple[Tensor, Tensor, Restored]:
        """One optimizer step; returns the mean loss, the gradient's norm and the last part."""
        seed = step_seed(self.config.seed, step, self.fabric.global_rank)
        torch.manual_seed(seed)  # dropout and drop path
        clean = self.statistics.normalize(images)
        corruption = self.task(clean, torch.Generator(clean.device).manual_seed(seed))
        self.schedule.step_update(step)
        self.optimizer.zero_grad(set_to_none=True)
        total = torch.zeros((), device=clean.device)
        parts = list(_split(clean, corruption, self.config.accumulate))
        for number, part in enumerate(parts):
            loss, restored = self._restore_part(part, last_part=number == len(parts) - 1)
            total += loss
        norm = self.fabric.clip_gradients(
            self.training,
            self.optimizer,
            max_norm=self.config.optimizer.max_gradient_norm or math.inf,
            error_if_nonfinite=False,
        )
        assert norm is not None
        self.optimizer.step()
        return total, norm, restored

    def _restore_part(
        self, part: tuple[Tensor, Corruption], last_part: bool
    ) -> tuple[Tensor, Restored]:
        """K restoration steps on one part of the batch, a backward pass after each."""
        clean, corruption = part
        total = torch.zeros((), device=clean.device)
        first_energies: Tensor | None = None
        final = corruption.corrupted
        num_steps = self.config.num_steps
        number = 0

        def step(points: Tensor) -> tuple[Tensor, Tensor, Tensor]:
            result: tuple[Tensor, Tensor, Tensor] = self.training(
                points, clean, corruption.loss_mask
            )
            return result

        steps = restoration_losses(step, corruption.corrupted, num_steps)
        for number in range(1, num_steps + 1):
            reduces = last_part and number == num_steps
            with self.fabric.no_backward_sync(self.training, enabled=not reduces):
                loss, final, energies = next(steps)
                scaled = loss / self.config.accumulate
                self.fabric.backward(scaled)
            total += scaled.detach()
            first_energies = energies if first_energies is None else first_energies
        assert first_energies is not None
        return total, Restored(clean, corruption, final, first_energies)


def step_seed(seed: int, step: int, rank: int) -> int:
    """The seed of all that is random in one step on one process, apart from loading."""
    return int(np.random.SeedSequence((seed, step, rank)).generate_state(1, np.uint64)[0] >> 1)


def _split(
    clean: Tensor, corruption: Corruption, parts: int
) -> Iterator[tuple[Tensor, Corruption]]:
    pieces = zip(
        clean.chunk(parts),
        corruption.corrupted.chunk(parts),
        corruption.loss_mask.chunk(parts),
        strict=True,
    )
    for piece, corrupted, mask in pieces:
        yield piece, Corruption(corrupted, mask)
