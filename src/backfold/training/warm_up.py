"""What is found out on one batch before training: how much fits, and what to compile.

Nothing of it is left behind but the decisions: weights, gradients and random numbers are as before.
"""

import gc
import logging
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, nullcontext
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from backfold.finite_difference import best_displacement
from backfold.full_precision import full_float32
from backfold.memory import out_of_memory
from backfold.restoration import eval_mode
from backfold.training.compiled import GRADIENT_TOLERANCE, CompiledStep, gradient_distance
from backfold.training.distribution import largest
from backfold.training.stepper import Part, Stepper

LOGGER = logging.getLogger("backfold")
# Compiling takes half a minute to two, and saves a tenth to a third of the time.
COMPILE_PAYS_SECONDS = 600.0
MOST_UNROLLED_GROUPS = 256
# Throughput on a CPU hardly depends on the batch.
TIMED_ON_CPU = 16
# Those who need the finite difference may not have the memory for many exact steps at once.
DISPLACED = 4
# AdamW's two moments, a copy of the trainable parameters each.
MOMENTS = 2
# The CUDA allocator loses some memory to fragments, and libraries take workspaces late.
CUDA_MARGIN = 0.05


def warm_up(stepper: Stepper, images: Tensor, steps_left: int, decisions: dict[str, Any]) -> None:
    """Set the stepper's micro-batch and compile its step, as its settings ask.

    Args:
        stepper: new, or about to go on.
        images: a batch as this device will get it, (batch, channels, height, width).
        steps_left: of the run.
        decisions: what was decided before, by name; what is missing is decided and added. So a
            resumed run does not depend on how fast the machine is this time.
    """
    with _unchanged(stepper):
        if stepper.config.micro_batch == "auto":
            if "micro_batch" not in decisions:
                # Not tried on a CPU: the system kills the process that takes too much.
                on_cpu = images.device.type == "cpu"
                decisions["micro_batch"] = (
                    len(images) if on_cpu else find_micro_batch(stepper, images)
                )
                LOGGER.info("micro-batches of %d images", decisions["micro_batch"])
            stepper.micro_batch = decisions["micro_batch"]
        if not stepper.is_exact:
            if "displacement" not in decisions:
                decisions["displacement"] = _best_displacement(stepper, images[:DISPLACED])
            stepper.displacement = decisions["displacement"]
        if "compiled" not in decisions:
            wanted = stepper.is_exact and _wants_compiling(stepper, images, steps_left)
            decisions["compiled"] = _on_every_device(stepper, wanted)
        if decisions["compiled"] and stepper.restoration is not None:
            start = time.perf_counter()
            decisions["compiled"] = _compile(stepper, images)
            if decisions["compiled"]:
                LOGGER.info("compiled the step in %.0f s", time.perf_counter() - start)


def _wants_compiling(stepper: Stepper, images: Tensor, steps_left: int) -> bool:
    if stepper.config.compile != "auto":
        return stepper.config.compile
    if not compiles_soon(stepper.energy):
        return False
    timed = images[:TIMED_ON_CPU] if images.device.type == "cpu" else images
    seconds = _seconds(stepper, timed) * len(images) / len(timed)
    return seconds * steps_left > COMPILE_PAYS_SECONDS


def compiles_soon(energy: nn.Module) -> bool:
    """Whether compiling takes minutes at most.

    The compiler unrolls the second derivative of grouped convolutions group by group: thousands of
    operations in a ConvNeXt.
    """
    groups = (
        module.groups
        for module in energy.modules()
        if isinstance(module, nn.Conv2d) and module.groups > 1
    )
    return sum(groups) <= MOST_UNROLLED_GROUPS


def _on_every_device(stepper: Stepper, wanted: bool) -> bool:
    """Whether all processes want it: they must go the same way."""
    (refused,) = largest(stepper.fabric, int(not wanted))
    return not refused


def _compile(stepper: Stepper, images: Tensor) -> bool:
    """Compile, check, and say whether the step stays compiled, on every device."""
    assert stepper.restoration is not None
    compiled = stepper.restoration.compile_step()
    _check(stepper, compiled, stepper.parts(images, 0))
    if not _on_every_device(stepper, compiled.is_compiled):
        if compiled.is_compiled:
            compiled.fall_back("it does not work on another device")
        return False
    return True


@contextmanager
def _unchanged(stepper: Stepper) -> Iterator[None]:
    device = stepper.fabric.device
    with torch.random.fork_rng(devices=[device] if device.type == "cuda" else []):
        try:
            yield
        finally:
            stepper.optimizer.zero_grad(set_to_none=True)


def find_micro_batch(stepper: Stepper, images: Tensor) -> int:
    """The whole batch, halved until a step on so many images fits on every device.

    Raises:
        RuntimeError: not even one image fits; see `backfold.memory.out_of_memory`.
    """
    stepper.micro_batch = len(images)
    # Devices may make different numbers of attempts: none may wait for another's.
    with stepper.fabric.no_backward_sync(stepper.training):
        while not _fits(stepper, images):
            stepper.micro_batch = -(-stepper.micro_batch // 2)
    (smallest,) = largest(stepper.fabric, -stepper.micro_batch)
    return -smallest


def _fits(stepper: Stepper, images: Tensor) -> bool:
    """Whether two steps of a micro-batch run, the second beside gradients.

    There must be room for the optimizer's moments, too. Leaves the parameters without gradients.

    Raises:
        RuntimeError: a single image does not fit.
    """
    _free(stepper)
    trained = [parameter for parameter in stepper.energy.parameters() if parameter.requires_grad]
    room = MOMENTS * sum(parameter.nbytes for parameter in trained)
    if images.device.type == "cuda":
        memory = torch.cuda.get_device_properties(images.device).total_memory
        room += int(CUDA_MARGIN * memory)
    try:
        taken = torch.empty(room, dtype=torch.uint8, device=images.device)
        for _ in range(2):
            stepper.restore_part(stepper.parts(images, 0)[0], last_part=True)
        _synchronize(images.device)
        del taken
    except Exception as error:
        if stepper.micro_batch == 1 or not out_of_memory(error):
            raise
        return False
    finally:
        stepper.optimizer.zero_grad(set_to_none=True)
    return True


def _free(stepper: Stepper) -> None:
    # What an error's frames held is free only now, behind the attempt.
    gc.collect()
    if stepper.fabric.device.type == "cuda":
        torch.cuda.empty_cache()


def _best_displacement(stepper: Stepper, images: Tensor) -> float:
    part = stepper.parts(images, 0)[0]
    with full_float32():
        displacement, distance = best_displacement(
            partial(stepper.energy, tokens=part.tokens),
            [parameter for parameter in stepper.energy.parameters() if parameter.requires_grad],
            part.corruption.corrupted,
            part.clean,
            part.corruption.loss_mask,
            stepper.config.step_size,
        )
    LOGGER.info(
        "finite-difference step: displacement %g, gradient within %.1g of the exact one",
        displacement,
        distance,
    )
    return float(stepper.fabric.broadcast(displacement))


def _seconds(stepper: Stepper, images: Tensor) -> float:
    """Time of one batch's gradient, after one that is not counted."""
    for _ in range(2):
        _synchronize(images.device)
        start = time.perf_counter()
        stepper.accumulate(images, 0)
        _synchronize(images.device)
    return time.perf_counter() - start


def _synchronize(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)


def _check(stepper: Stepper, compiled: CompiledStep, parts: list[Part]) -> None:
    """Compile for each shape, and go on eagerly if the gradient is another than the eager one.

    PyTorch had releases in which compiled second derivatives were wrong and nothing said so
    (pytorch #181581). Dropout draws other numbers when compiled: there the two are compared in eval
    mode, and the step is compiled once more, as it will be trained.
    """
    energy, full = stepper.energy, "32" in stepper.fabric.strategy.precision.precision
    limit = GRADIENT_TOLERANCE[torch.float32 if full else torch.bfloat16]
    for part in {len(part.clean): part for part in parts}.values():
        stepper.optimizer.zero_grad(set_to_none=True)
        losses = [_loss(stepper, step, part) for step in (compiled, compiled.eager)]
        with eval_mode(energy) if _is_random(losses[1]) else nullcontext():
            distance, name = gradient_distance(dict(energy.named_parameters()), *losses)
        if not distance <= limit:
            compiled.fall_back(f"its gradient of {name} is {distance:.2g} from the eager one")
            return


def _loss(
    stepper: Stepper, step: Callable[..., tuple[Tensor, ...]], part: Part
) -> Callable[[], Tensor]:
    def loss() -> Tensor:
        with stepper.fabric.autocast():
            return step(part.corruption.corrupted, *part.aim)[0]

    return loss


def _is_random(loss: Callable[[], Tensor]) -> bool:
    """Whether two random states give two losses, as dropout does."""
    values = []
    for seed in (0, 1):
        torch.manual_seed(seed)
        values.append(loss().detach())
    return not torch.equal(*values)
