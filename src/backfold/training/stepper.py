"""One optimizer step: corrupt, restore K times with a backward pass after each, update."""

import math
from collections.abc import Iterator
from contextlib import nullcontext
from dataclasses import dataclass
from functools import partial

import numpy as np
import torch
from lightning.fabric import Fabric
from torch import Tensor, nn
from torch.optim import Optimizer

from backfold.backbone import use_plain_attention
from backfold.data.statistics import ChannelStatistics
from backfold.energy import EnergyModel
from backfold.finite_difference import DISPLACEMENT, displaced_energy, finite_difference_losses
from backfold.full_precision import full_float32
from backfold.pretext import Corruption, PretextTask, SecondTarget
from backfold.restoration import restoration_losses, training_step
from backfold.sparse import running_tokens, token_size
from backfold.training.compiled import CompiledStep
from backfold.training.config import PretrainConfig
from backfold.training.distribution import has_fast_kernels, shard_optimizer
from backfold.training.meter import Restored
from backfold.training.optimizer import build_optimizer, build_schedule


class RestorationTraining(nn.Module):
    """One restoration step with its loss, as one forward: what DistributedDataParallel may wrap.

    Args:
        energy: its attention layers are set to their plain form, which has a second derivative.
        step_size: of the restoration step.
        plausibility_weight: of the loss on the energy itself.
        compiled: run under `torch.compile`, where that works.
        graphs: compile into CUDA graphs.
    """

    def __init__(
        self,
        energy: EnergyModel,
        step_size: float,
        plausibility_weight: float = 0.0,
        compiled: bool = False,
        graphs: bool = False,
    ) -> None:
        super().__init__()
        use_plain_attention(energy)
        self.energy = energy
        self.step_size, self.plausibility_weight = step_size, plausibility_weight
        self.graphs = graphs
        self.compiled: CompiledStep | None = None
        if compiled:
            self.compile_step()

    def compile_step(self) -> CompiledStep:
        """Run compiled from now on, where that works; see `CompiledStep`."""
        self.compiled = CompiledStep(self.restore, graphs=self.graphs)
        return self.compiled

    def restore(
        self,
        images: Tensor,
        clean: Tensor,
        loss_mask: Tensor,
        tokens: Tensor | None = None,
        second: Tensor | None = None,
    ) -> tuple[Tensor, Tensor, Tensor]:
        """See `forward`; never compiled."""
        energy = partial(self.energy, tokens=tokens, second=second)
        return training_step(
            energy, images, clean, loss_mask, self.step_size, self.plausibility_weight
        )

    def forward(
        self,
        images: Tensor,
        clean: Tensor,
        loss_mask: Tensor,
        tokens: Tensor | None = None,
        second: Tensor | None = None,
    ) -> tuple[Tensor, Tensor, Tensor]:
        """See `backfold.restoration.training_step`.

        Args:
            images: (batch, channels, height, width).
            clean: as ``images``; what they shall be restored to.
            loss_mask: bool, (batch, 1, height, width).
            tokens: int64, (batch, tokens), the patch tokens that run; None runs all.
            second: bool, (batch,), the images of the second head; None where there is none.
        """
        step = self.compiled or self.restore
        return step(images, clean, loss_mask, tokens, second)


class DisplacedEnergy(nn.Module):
    """One pass of the finite-difference step, as one forward: see `RestorationTraining`."""

    def __init__(self, energy: EnergyModel) -> None:
        super().__init__()
        self.energy = energy

    def forward(self, displaced: Tensor, weights: Tensor, tokens: Tensor | None = None) -> Tensor:
        """See `backfold.finite_difference.displaced_energy`."""
        return displaced_energy(partial(self.energy, tokens=tokens), displaced, weights)


@dataclass(frozen=True)
class Part:
    """A part of a batch on one device, with its weight in the batch's mean."""

    clean: Tensor
    corruption: Corruption
    tokens: Tensor | None
    weight: float

    @property
    def aim(self) -> tuple[Tensor, Tensor, Tensor | None, Tensor | None]:
        """What `RestorationTraining` takes beside the images."""
        second = self.corruption.second
        target = self.clean if second is None else second.target
        chosen = None if second is None else second.chosen
        return target, self.corruption.loss_mask, self.tokens, chosen


class Stepper:
    """Takes optimizer steps on an energy.

    Args:
        config: settings; those of the optimizer, K, step size, derivative and seed count here.
        energy: on the device, its unreachable parameters frozen.
        task: corrupts the images.
        statistics: normalise the images.
        fabric: devices and precision.
        total_steps: of the whole run.
        steps_per_epoch: for the learning rate's warm-up.

    Attributes:
        micro_batch: most images that are handled at once; None takes what a step is given.
        restoration: the exact step, without devices and distribution around it; None where the
            derivative is a finite difference.
        displacement: of the finite difference, see `backfold.finite_difference`.
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
        self.micro_batch = config.micro_batch if isinstance(config.micro_batch, int) else None
        fast = has_fast_kernels(config, fabric.device)
        whole = build_optimizer(energy, config.optimizer, config.batch_size, fused=fast)
        sharded = config.shard_optimizer and fabric.world_size > 1
        optimizer: Optimizer = shard_optimizer(whole) if sharded else whole
        self.schedule = build_schedule(optimizer, config.optimizer, total_steps, steps_per_epoch)
        self.energy, self.displacement = energy, DISPLACEMENT
        self.is_exact = config.derivative == "exact"
        self.restoration = (
            RestorationTraining(energy, config.step_size, config.plausibility_weight, graphs=fast)
            if self.is_exact
            else None
        )
        self.training, self.optimizer = fabric.setup(
            self.restoration or DisplacedEnergy(energy), optimizer
        )

    def __call__(self, images: Tensor, step: int) -> tuple[Tensor, Tensor, Restored]:
        """One optimizer step; returns the mean loss, the gradient's norm and the last part."""
        self.schedule.step_update(step)
        self.optimizer.zero_grad(set_to_none=True)
        total, restored = self.accumulate(images, step)
        norm = self.fabric.clip_gradients(
            self.training,
            self.optimizer,
            max_norm=self.config.optimizer.max_gradient_norm or math.inf,
            error_if_nonfinite=False,
        )
        assert norm is not None
        self.optimizer.step()
        return total, norm, restored

    def accumulate(self, images: Tensor, step: int) -> tuple[Tensor, Restored]:
        """Add a batch's gradient to the parameters; returns the mean loss and the last part."""
        total = torch.zeros((), device=images.device)
        parts = self.parts(images, step)
        for number, part in enumerate(parts, start=1):
            loss, restored = self.restore_part(part, last_part=number == len(parts))
            total += loss
        return total, restored

    def parts(self, images: Tensor, step: int) -> list[Part]:
        """A batch normalised, corrupted as this step is, and cut."""
        seed = step_seed(self.config.seed, step, self.fabric.global_rank)
        torch.manual_seed(seed)  # dropout and drop path
        clean = self.statistics.normalize(images)
        corruption = self.task(clean, torch.Generator(clean.device).manual_seed(seed))
        sizes = split_sizes(len(clean), self.micro_batch or len(clean))
        tokens = self._running_tokens(corruption)
        pieces = zip(
            clean.split(sizes),
            corruption.corrupted.split(sizes),
            corruption.loss_mask.split(sizes),
            [None] * len(sizes) if tokens is None else tokens.split(sizes),
            _split_second(corruption.second, sizes),
            strict=True,
        )
        return [
            Part(
                piece,
                Corruption(corrupted, mask, second=second),
                running,
                len(piece) / len(clean),
            )
            for piece, corrupted, mask, running, second in pieces
        ]

    def _running_tokens(self, corruption: Corruption) -> Tensor | None:
        if corruption.running is None:
            return None
        height, width = corruption.corrupted.shape[2:]
        size = token_size(self.energy.backbone)
        return running_tokens(corruption.running, size, (height, width))

    def restore_part(self, part: Part, last_part: bool) -> tuple[Tensor, Restored]:
        """K restoration steps on one part of the batch, with backward passes after each.

        Args:
            part: of the batch.
            last_part: processes wait for each other and add up their gradients.
        """
        total = torch.zeros((), device=part.clean.device)
        final = part.corruption.corrupted
        passes, losses = self._losses(part)
        with nullcontext() if self.is_exact else full_float32():
            for number in range(1, passes + 1):
                reduces = last_part and number == passes
                with self.fabric.no_backward_sync(self.training, enabled=not reduces):
                    loss, final, _ = next(losses)
                    scaled = loss * part.weight
                    self.fabric.backward(scaled)
                total += scaled.detach()
        return total, Restored(part.clean, part.corruption, final, part.tokens)

    def _losses(self, part: Part) -> tuple[int, Iterator[tuple[Tensor, Tensor, Tensor]]]:
        """How many losses a part has, and (loss, restored, energies) for each."""
        num_steps, corruption = self.config.num_steps, part.corruption

        def step(points: Tensor) -> tuple[Tensor, Tensor, Tensor]:
            result: tuple[Tensor, Tensor, Tensor] = self.training(points, *part.aim)
            return result

        if self.is_exact:
            return num_steps, restoration_losses(step, corruption.corrupted, num_steps)
        return 2 * num_steps, self._finite_difference_losses(part)

    def _finite_difference_losses(self, part: Part) -> Iterator[tuple[Tensor, Tensor, Tensor]]:
        points = part.corruption.corrupted
        for _ in range(self.config.num_steps):
            for loss, restored, energies in finite_difference_losses(
                partial(self.energy, tokens=part.tokens),
                points,
                part.clean,
                part.corruption.loss_mask,
                self.config.step_size,
                self.displacement,
                partial(self.training, tokens=part.tokens),
            ):
                yield loss / self.config.num_steps, restored, energies
            points = restored


def split_sizes(local_batch: int, micro_batch: int) -> list[int]:
    """Sizes of the fewest parts of at most ``micro_batch`` images; they differ by at most one.

    So at most two shapes are ever compiled.
    """
    parts = -(-local_batch // micro_batch)
    size, larger = divmod(local_batch, parts)
    return [size + 1] * larger + [size] * (parts - larger)


def _split_second(second: SecondTarget | None, sizes: list[int]) -> list[SecondTarget | None]:
    if second is None:
        return [None] * len(sizes)
    pieces = zip(second.chosen.split(sizes), second.target.split(sizes), strict=True)
    return [SecondTarget(chosen, target) for chosen, target in pieces]


def step_seed(seed: int, step: int, rank: int) -> int:
    """The seed of all that is random in one step on one process, apart from loading."""
    return int(np.random.SeedSequence((seed, step, rank)).generate_state(1, np.uint64)[0] >> 1)
