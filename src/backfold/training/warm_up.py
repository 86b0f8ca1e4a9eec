"""What is found out on one batch before training: how much fits, how fast it is, what to compile.

Nothing of it is left behind but the decisions: weights, gradients and random numbers are as before.
"""

import logging
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from backfold.backbone import ImageSize
from backfold.first_order import best_displacement
from backfold.full_precision import full_float32
from backfold.training.compiled import GRADIENT_TOLERANCE, CompiledStep, gradient_distance
from backfold.training.config import PretrainConfig
from backfold.training.distribution import largest
from backfold.training.loading_plan import (
    LoadingPlan,
    LoadTime,
    describe_plan,
    loading_warning,
    measure_loading,
    measure_loading_elsewhere,
    plan_workers,
    usable_cores,
)
from backfold.training.micro_batch import find_micro_batch
from backfold.training.setup import Images
from backfold.training.stepper import Part, Stepper

LOGGER = logging.getLogger("backfold")
# Compiling takes half a minute to two, and saves a tenth to a third of the time.
COMPILE_PAYS_SECONDS = 600.0
MOST_UNROLLED_GROUPS = 256
# Throughput on a CPU hardly depends on the batch.
TIMED_ON_CPU = 16
# Those who need the finite difference may not have the memory for many exact steps at once.
DISPLACED = 4


def warm_up(stepper: Stepper, images: Tensor, steps_left: int, decisions: dict[str, Any]) -> float:
    """Set the stepper's micro-batch and compile its step, as its settings ask; seconds an image.

    Args:
        stepper: new, or about to go on.
        images: a batch as this device will get it, (batch, channels, height, width).
        steps_left: of the run.
        decisions: what was decided before, by name; what is missing is decided and added. So a
            resumed run does not depend on how fast the machine is this time.

    Raises:
        UserError: not even one image fits into memory.
    """
    config = stepper.config
    with _unchanged(stepper):
        if config.micro_batch == "auto":
            if "micro_batch" not in decisions:
                decisions["micro_batch"] = _common_micro_batch(stepper, images)
                LOGGER.info("micro-batches of %d images", decisions["micro_batch"])
            stepper.micro_batch = decisions["micro_batch"]
        if not stepper.is_exact:
            if "displacement" not in decisions:
                decisions["displacement"] = _best_displacement(stepper, images[:DISPLACED])
            stepper.displacement = decisions["displacement"]
        timed = images[:TIMED_ON_CPU] if images.device.type == "cpu" else images
        seconds = _seconds(stepper, timed) / len(timed)
        if "compiled" not in decisions:
            length = seconds * len(images) * steps_left
            pays = config.compile is True
            if config.compile == "auto":
                pays = length > COMPILE_PAYS_SECONDS and compiles_soon(stepper.energy)
            decisions["compiled"] = _on_every_device(stepper, pays and stepper.is_exact)
        if decisions["compiled"] and stepper.restoration is not None:
            start = time.perf_counter()
            decisions["compiled"] = _compile(stepper, images)
            if decisions["compiled"]:
                LOGGER.info("compiled the step in %.0f s", time.perf_counter() - start)
                seconds = _seconds(stepper, images) / len(images)
    return seconds


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


def _common_micro_batch(stepper: Stepper, images: Tensor) -> int:
    """The largest that fits on every device."""

    def attempt(count: int) -> None:
        stepper.micro_batch = count
        stepper.restore_part(stepper.parts(images, 0)[0], last_part=True)

    # Devices may make different numbers of attempts: none may wait for another's.
    with stepper.fabric.no_backward_sync(stepper.training):
        found = find_micro_batch(len(images), attempt, list(stepper.energy.parameters()))
    (smallest,) = largest(stepper.fabric, -found)
    return -smallest


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
    (pytorch #181581).
    """
    precision = (
        torch.float32 if "32" in stepper.fabric.strategy.precision.precision else torch.bfloat16
    )
    limit = GRADIENT_TOLERANCE[precision]
    for part in {len(part.clean): part for part in parts}.values():
        stepper.optimizer.zero_grad(set_to_none=True)
        losses = [_loss(stepper, step, part) for step in (compiled, compiled.eager)]
        if _is_random(losses[1]):
            # Compiled code draws other numbers for dropout: run it once, compare nothing.
            losses[0]().backward()
            continue
        distance = gradient_distance(list(stepper.energy.parameters()), *losses)
        if not distance <= limit:
            compiled.fall_back(f"its gradient is {distance:.2g} from the eager one")
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


def plan_loading(
    config: PretrainConfig,
    images: Images,
    image_size: ImageSize,
    local_batch: int,
    train_seconds: float,
    processes: int,
    device: torch.device,
) -> LoadingPlan:
    """Measure loading, and choose workers and prefetch; says what was found.

    Args:
        config: ``num_workers`` and ``prefetch`` are kept where they are given.
        images: the training images.
        image_size: (height, width) in pixels.
        local_batch: images in a batch on this device.
        train_seconds: what training takes for an image.
        processes: training processes on this machine.
        device: that training runs on.
    """
    cores, on_cpu = usable_cores(processes), device.type == "cpu"
    measure = measure_loading if config.num_workers == 0 else measure_loading_elsewhere
    load = measure(images.training, image_size, images.channels, config.augmentation, config.seed)
    if load is None:
        LOGGER.warning("measuring how images load failed: an image crashed or hung it")
        load = LoadTime(train_seconds, 0.0)
    height, width = image_size
    plan = plan_workers(
        load,
        train_seconds,
        cores,
        on_cpu,
        batch_size=local_batch,
        batch_bytes=local_batch * images.channels * height * width,  # of 8 bits
        workers=config.num_workers,
        prefetch=config.prefetch,
    )
    LOGGER.info("%s", describe_plan(plan, load, train_seconds))
    warning = loading_warning(plan, load, train_seconds, cores, on_cpu)
    if warning:
        LOGGER.warning("%s", warning)
    return plan
