"""One optimizer step: corrupt, restore K times with a backward pass after each, update."""

import logging
import math
from collections.abc import Callable
from dataclasses import dataclass
from textwrap import shorten

import numpy as np
import torch
import torch._functorch.config
from lightning.fabric import Fabric
from torch import Tensor, nn
from torch.optim import Optimizer

from backfold.backbone import use_plain_attention
from backfold.data.statistics import ChannelStatistics
from backfold.energy import EnergyModel
from backfold.invariance import of_all_processes, vicreg_loss
from backfold.metrics import energy_gap, psnr_db
from backfold.pretext.corruption import Corruption, PretextTask
from backfold.restoration import restoration_losses, training_step
from backfold.sparse import RunningTokens, running_tokens
from backfold.training.config import PretrainConfig
from backfold.training.devices import shard_optimizer
from backfold.training.optimizer import build_optimizer, build_schedule

LOGGER = logging.getLogger("backfold")
GAP_IMAGES = 64

Found = tuple[Tensor, ...]  # loss, restored images, energies; embeddings where they shall agree


class CompiledStep:
    """A step that is compiled at its first call; eager from then on if that fails, said once.

    Shapes are static: each of a run's one or two is compiled once. With ``graphs`` each step is
    replayed as one CUDA graph, which frees the host.
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
        """As `RestorationTraining.restore`."""
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
            self.fall_back(f"{type(cause).__name__}: {shorten(str(cause), 200)}")
            return self.eager(*given)

    def fall_back(self, cause: str) -> None:
        """Go on without compiling, and say why."""
        self.is_compiled = False
        LOGGER.warning(
            f"the step can't be compiled and runs eagerly, which is slower: {cause}; "
            "--compile false silences this"
        )


class RestorationTraining(nn.Module):
    """One restoration step with its loss, as one forward: what DistributedDataParallel may wrap.

    Attention layers are set to their plain form, which has a second derivative, unless the energy
    is ``conditional``: its hidden patches have an attention of their own. With an ``invariance``,
    each image and the next are views of one, and so much `vicreg_loss` of all processes is added.
    """

    def __init__(
        self,
        energy: EnergyModel,
        step_size: float,
        plausibility_weight: float = 0.0,
        conditional: bool = False,
        invariance: float = 0.0,
    ) -> None:
        super().__init__()
        if not conditional:
            use_plain_attention(energy)
        self.energy, self.step_size = energy, step_size
        self.plausibility_weight, self.invariance = plausibility_weight, invariance
        self.compiled: CompiledStep | None = None

    def restore(
        self, images: Tensor, target: Tensor, loss_mask: Tensor, *tokens: Tensor | None
    ) -> Found:
        """`backfold.restoration.training_step` on some ``tokens``: those of `RunningTokens`."""
        energy = self.energy.given(images, *tokens)
        found = training_step(
            energy, images, target, loss_mask, self.step_size, self.plausibility_weight
        )
        if not self.invariance:
            return found
        context = energy.keywords.get("context")
        return *found, self.energy.projected(images, energy.keywords["tokens"], context)

    def forward(self, *given: Tensor) -> Found:
        """As `restore`, compiled where that is asked for; the loss is the whole one."""
        step: Callable[..., Found] = self.compiled or self.restore
        loss, restored, energies, *embeddings = step(*given)
        if embeddings:
            loss = loss + self.invariance * vicreg_loss(of_all_processes(embeddings[0]))
        return loss, restored, energies


@dataclass(frozen=True)
class Part:
    """A part of a batch on one device, and its weight in the batch's mean."""

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

    @property
    def is_corrupted(self) -> Tensor:
        """Which images are: bool, (batch,); a mixture may leave some clean."""
        return (self.corruption.corrupted != self.clean).flatten(1).any(dim=1)

    def psnr_gain_db(self, std: Tensor) -> float:
        """Mean gain over the corrupted images, where the loss counts; NaN if there are none.

        What a second head restores to something else than the clean pixels does not count.
        """
        chosen, corruption, mask = self.is_corrupted, self.corruption, self.corruption.loss_mask
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
        chosen = self.is_corrupted[:first]
        return energy_gap(clean[chosen], corrupted[chosen])


class Stepper:
    """Takes optimizer steps on an energy, whose unreachable parameters are frozen.

    At most ``micro_batch`` images are handled at once; None takes what a step is given.
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
        whole = build_optimizer(energy, config.optimizer, config.batch_size)
        sharded = config.shard_optimizer and fabric.world_size > 1
        optimizer: Optimizer = shard_optimizer(whole) if sharded else whole
        self.schedule = build_schedule(optimizer, config.optimizer, total_steps, steps_per_epoch)
        self.energy = energy
        contrast = round(config.contrast_epochs * steps_per_epoch)
        self._contrast_from = total_steps - contrast if contrast else 0
        self.restoration = RestorationTraining(
            energy, config.step_size, config.plausibility_weight,
            conditional=config.energy == "conditional", invariance=config.invariance,
        )  # fmt: skip
        self.training, self.optimizer = fabric.setup(self.restoration, optimizer)

    def __call__(self, images: Tensor, step: int) -> tuple[Tensor, Tensor, Restored]:
        """One optimizer step; returns the mean loss, the gradient's norm and the last part."""
        self.schedule.step_update(step)
        # A compiled step is compiled anew where this changes.
        weight = self.config.plausibility_weight if step >= self._contrast_from else 0.0
        self.restoration.plausibility_weight = weight
        self.optimizer.zero_grad(set_to_none=True)
        total, restored = self.accumulate(images, step)
        largest = self.config.optimizer.max_gradient_norm or math.inf
        norm = self.fabric.clip_gradients(
            self.training, self.optimizer, max_norm=largest, error_if_nonfinite=False
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
        groups = clean.unflatten(0, (-1, 2 if self.config.invariance else 1))
        count = -(-len(clean) // (self.micro_batch or len(clean)))
        pieces = [piece.flatten(0, 1) for piece in groups.tensor_split(min(count, len(groups)))]
        size, found = (clean.shape[2], clean.shape[3]), []
        corruptions = corruption.split([len(piece) for piece in pieces])
        for piece, made in zip(pieces, corruptions, strict=True):
            tokens = running_tokens(made.running, self.energy.backbone, size)
            found.append(Part(piece, made, tokens, len(piece) / len(clean)))
        return found

    def restore_part(self, part: Part, last_part: bool) -> tuple[Tensor, Restored]:
        """K restoration steps on one part of the batch, with backward passes after each.

        In the ``last_part`` processes wait for each other and add up their gradients.
        """
        total, num_steps = torch.zeros((), device=part.clean.device), self.config.num_steps
        losses = restoration_losses(
            lambda images: self.training(images, *part.aim), part.corruption.corrupted, num_steps
        )
        for number in range(1, num_steps + 1):
            reduces = last_part and number == num_steps
            with self.fabric.no_backward_sync(self.training, enabled=not reduces):
                loss, final, _ = next(losses)
                scaled = loss * part.weight
                self.fabric.backward(scaled)
            total += scaled.detach()
        return total, Restored(part.clean, part.corruption, final)


def step_seed(seed: int, step: int, rank: int) -> int:
    """The seed of all that is random in one step on one process, apart from loading."""
    return int(np.random.SeedSequence((seed, step, rank)).generate_state(1, np.uint64)[0] >> 1)
