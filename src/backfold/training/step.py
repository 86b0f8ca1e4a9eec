"""One optimizer step: corrupt, restore K times with a backward pass after each, update."""

import logging
import math
from collections.abc import Callable, Iterator
from contextlib import nullcontext
from dataclasses import dataclass
from functools import partial

import numpy as np
import torch
import torch._functorch.config
from lightning.fabric import Fabric
from torch import Tensor, nn
from torch.optim import Optimizer

from backfold.backbone import use_plain_attention
from backfold.data.statistics import ChannelStatistics
from backfold.energy import EnergyModel
from backfold.finite_difference import DISPLACEMENT, finite_difference_losses, full_float32
from backfold.invariance import of_all_processes, vicreg_loss
from backfold.metrics import energy_gap, psnr_db
from backfold.pretext.corruption import Corruption, PretextTask
from backfold.restoration import restoration_losses, training_step
from backfold.sparse import RunningTokens, running_tokens
from backfold.training.config import PretrainConfig
from backfold.training.devices import has_fast_kernels, shard_optimizer
from backfold.training.optimizer import build_optimizer, build_schedule

LOGGER = logging.getLogger("backfold")
GAP_IMAGES = 64

Found = tuple[Tensor, ...]  # loss, restored images, energies; embeddings where they shall agree


class CompiledStep:
    """A step that is compiled at its first call; eager from then on if that fails, said once.

    Shapes are static: each new shape of the arguments is compiled once, and a training run has one
    or two. With ``graphs`` each step is replayed as one CUDA graph, which frees the host.
    """

    def __init__(
        self, step: Callable[..., Found], backend: str = "inductor", graphs: bool = False
    ) -> None:
        self.eager, self.graphs, self.is_compiled = step, graphs, True
        mode = "reduce-overhead" if graphs else None
        self.compiled = torch.compile(
            step, fullgraph=True, dynamic=False, backend=backend, mode=mode
        )

    def __call__(self, *given: Tensor | None) -> Found:
        """See `RestorationTraining.restore`."""
        if not self.is_compiled:
            return self.eager(*given)
        try:
            # DistributedDataParallel would cut the graph into one for each bucket of gradients.
            # Cheap work is repeated in the backward pass, not kept: 2 % more time, 10 % less memory
            # on a CPU.
            with (
                torch._dynamo.config.patch(optimize_ddp=False),
                torch._functorch.config.patch(aggressive_recomputation=True),
            ):
                found = self.compiled(*given)
            # A graph writes over its results when it is replayed.
            return tuple(each.clone() for each in found) if self.graphs else found
        except torch.OutOfMemoryError:
            raise
        except Exception as error:
            cause: BaseException = error
            while cause.__cause__ is not None:
                cause = cause.__cause__
            # The compiler tells first that it failed, and then why.
            lines = [line.strip() for line in str(cause).splitlines() if line.strip()][:2]
            self.fall_back(f"{type(cause).__name__}: {' '.join(lines) or 'no message'}")
            return self.eager(*given)

    def fall_back(self, cause: str) -> None:
        """Go on without compiling, and say why."""
        self.is_compiled = False
        LOGGER.warning(
            "the step can't be compiled and runs eagerly, which is slower: %s; "
            "--compile false silences this",
            cause,
        )


class RestorationTraining(nn.Module):
    """One restoration step with its loss, as one forward: what DistributedDataParallel may wrap.

    Args:
        energy: its attention layers are set to their plain form, which has a second derivative,
            unless the energy is ``conditional``, whose hidden patches have an attention of their
            own.
        step_size: of the restoration step.
        plausibility_weight: of the loss on the energy itself.
        conditional: the energy of hidden patches given visible ones.
        invariance: weight of `backfold.invariance.vicreg_loss` between each image and the next,
            which are two views of one, of all processes; needs a ``conditional`` energy.
        compiled: run under `torch.compile`, where that works.
        graphs: compile into CUDA graphs.
    """

    def __init__(
        self,
        energy: EnergyModel,
        step_size: float,
        plausibility_weight: float = 0.0,
        conditional: bool = False,
        invariance: float = 0.0,
        compiled: bool = False,
        graphs: bool = False,
    ) -> None:
        super().__init__()
        if not conditional:  # visible patches are never differentiated twice
            use_plain_attention(energy)
        self.energy, self.graphs = energy, graphs
        self.step_size, self.plausibility_weight = step_size, plausibility_weight
        self.invariance = invariance
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
        target: Tensor,
        loss_mask: Tensor,
        tokens: Tensor | None = None,
        visible: Tensor | None = None,
        normalised: Tensor | None = None,
    ) -> Found:
        """See `backfold.restoration.training_step`; never compiled.

        Args:
            images: (batch, channels, height, width).
            target: as ``images``; what they shall be restored to.
            loss_mask: bool, (batch, 1, height, width).
            tokens: int64, (batch, tokens), the patch tokens that run; None runs all.
            visible: int64, (batch, visible tokens), the context of a conditional energy.
            normalised: bool, as ``tokens``, those of the second head.
        """
        energy = self.energy.given(images, tokens, visible, normalised)
        found = training_step(
            energy, images, target, loss_mask, self.step_size, self.plausibility_weight
        )
        if not self.invariance:
            return found
        return *found, self.energy.projected(energy.keywords["context"])

    def forward(self, *given: Tensor | None) -> Found:
        """As `restore`, compiled where that is asked for; the loss is the whole one."""
        step: Callable[..., Found] = self.compiled or self.restore
        loss, restored, energies, *embeddings = step(*given)
        if embeddings:
            loss = loss + self.invariance * vicreg_loss(of_all_processes(embeddings[0]))
        return loss, restored, energies


class DisplacedEnergy(nn.Module):
    """One pass of the finite-difference step, as one forward: see `RestorationTraining`."""

    def __init__(self, energy: EnergyModel) -> None:
        super().__init__()
        self.energy = energy

    def forward(self, displaced: Tensor, weights: Tensor, tokens: Tensor | None = None) -> Tensor:
        """The sum of weighted energies."""
        energies: Tensor = self.energy(displaced, tokens)
        return (weights * energies).sum()


@dataclass(frozen=True)
class Part:
    """A part of a batch on one device, of which ``tokens`` run; its weight in the batch's mean."""

    clean: Tensor
    corruption: Corruption
    tokens: RunningTokens
    weight: float

    @property
    def aim(self) -> tuple[Tensor | None, ...]:
        """What `RestorationTraining` takes beside the images."""
        target = self.corruption.target
        return self.clean if target is None else target, self.corruption.loss_mask, *self.tokens


@dataclass(frozen=True)
class Restored:
    """A part of a batch after its last restoration step."""

    clean: Tensor
    corruption: Corruption
    restored: Tensor

    def _is_corrupted(self) -> Tensor:
        """Which images are corrupted: bool, (batch,); a mixture may leave some clean."""
        return (self.corruption.corrupted != self.clean).flatten(1).any(dim=1)

    def psnr_gain_db(self, std: Tensor) -> float:
        """Mean gain over the corrupted images, where the loss counts; NaN if there are none.

        What a second head restores to something else than the clean pixels does not count.
        """
        chosen, corruption = self._is_corrupted(), self.corruption
        mask = corruption.loss_mask
        if corruption.target is not None:
            mask = mask & (corruption.target == self.clean).all(dim=1, keepdim=True)
        mask, clean = mask[chosen], self.clean[chosen]
        restored, corrupted = (
            psnr_db(torch.where(mask, images[chosen], clean), clean, std)
            for images in (self.restored.float(), corruption.corrupted)
        )
        return float((restored - corrupted).mean())

    @torch.no_grad()
    def energy_gap(self, energy: EnergyModel) -> float:
        """Mean energy of corrupted minus clean images; NaN if none are corrupted."""
        first = min(GAP_IMAGES, len(self.clean))
        made, _ = self.corruption.split([first, len(self.clean) - first])
        function = energy.of(made)  # by the same weights: those of the step were others
        clean, corrupted = (function(images) for images in (self.clean[:first], made.corrupted))
        chosen = self._is_corrupted()[:first]
        return energy_gap(clean[chosen], corrupted[chosen])


class Stepper:
    """Takes optimizer steps on an energy.

    Args:
        config: settings; those of the optimizer, K, step size, derivative and seed count here.
        energy: on the device, its unreachable parameters frozen.
        task: corrupts the images, which the statistics normalise.
        statistics: of the data.
        fabric: devices and precision.
        total_steps: of the whole run, which with the steps of an epoch make the schedule.
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
        whole = build_optimizer(energy, config.optimizer, config.batch_size)
        sharded = config.shard_optimizer and fabric.world_size > 1
        optimizer: Optimizer = shard_optimizer(whole) if sharded else whole
        self.schedule = build_schedule(optimizer, config.optimizer, total_steps, steps_per_epoch)
        self.energy, self.displacement = energy, DISPLACEMENT
        contrast = round(config.contrast_epochs * steps_per_epoch)
        self._contrast_from = total_steps - contrast if contrast else 0
        self.is_exact = config.derivative == "exact"
        self.restoration: RestorationTraining | None = None
        if self.is_exact:
            self.restoration = RestorationTraining(
                energy, config.step_size, config.plausibility_weight,
                conditional=config.energy == "conditional", invariance=config.invariance,
                graphs=fast,
            )  # fmt: skip
        self.training, self.optimizer = fabric.setup(
            self.restoration or DisplacedEnergy(energy), optimizer
        )

    def __call__(self, images: Tensor, step: int) -> tuple[Tensor, Tensor, Restored]:
        """One optimizer step; returns the mean loss, the gradient's norm and the last part."""
        self.schedule.step_update(step)
        if self.restoration is not None:  # a compiled step is compiled anew where this changes
            weight = self.config.plausibility_weight if step >= self._contrast_from else 0.0
            self.restoration.plausibility_weight = weight
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
        """A batch normalised, corrupted as this step is, and cut into the fewest micro-batches.

        Their sizes differ by at most one, or two views: so at most two shapes are ever compiled.
        """
        seed = step_seed(self.config.seed, step, self.fabric.global_rank)
        torch.manual_seed(seed)  # dropout and drop path
        clean = self.statistics.normalize(images)
        corruption = self.task(clean, torch.Generator(clean.device).manual_seed(seed))
        views = 2 if self.config.invariance else 1
        groups = clean.unflatten(0, (-1, views))
        count = -(-len(clean) // (self.micro_batch or len(clean)))
        pieces = [piece.flatten(0, 1) for piece in groups.tensor_split(min(count, len(groups)))]
        size = (clean.shape[2], clean.shape[3])
        return [
            Part(own, made, running_tokens(made.running, self.energy.backbone, size), share)
            for own, made in zip(pieces, corruption.split([len(p) for p in pieces]), strict=True)
            for share in (len(own) / len(clean),)
        ]

    def restore_part(self, part: Part, last_part: bool) -> tuple[Tensor, Restored]:
        """K restoration steps on one part of the batch, with backward passes after each.

        In the ``last_part`` processes wait for each other and add up their gradients.
        """
        total = torch.zeros((), device=part.clean.device)
        losses = self._losses(part)
        passes = self.config.num_steps * (1 if self.is_exact else 2)
        with nullcontext() if self.is_exact else full_float32():
            for number in range(1, passes + 1):
                reduces = last_part and number == passes
                with self.fabric.no_backward_sync(self.training, enabled=not reduces):
                    loss, final, _ = next(losses)
                    scaled = loss * part.weight
                    self.fabric.backward(scaled)
                total += scaled.detach()
        return total, Restored(part.clean, part.corruption, final)

    def _losses(self, part: Part) -> Iterator[Found]:
        """Shares of a part's loss: one for each exact step, two for each finite difference."""
        num_steps, points = self.config.num_steps, part.corruption.corrupted
        if self.is_exact:
            step = lambda images: self.training(images, *part.aim)  # noqa: E731
            yield from restoration_losses(step, points, num_steps)
            return
        for _ in range(num_steps):
            for loss, restored, energies in finite_difference_losses(
                partial(self.energy, tokens=part.tokens.tokens),
                points,
                part.clean,
                part.corruption.loss_mask,
                self.config.step_size,
                self.displacement,
                partial(self.training, tokens=part.tokens.tokens),
            ):
                yield loss / num_steps, restored, energies
            points = restored


def step_seed(seed: int, step: int, rank: int) -> int:
    """The seed of all that is random in one step on one process, apart from loading."""
    return int(np.random.SeedSequence((seed, step, rank)).generate_state(1, np.uint64)[0] >> 1)
