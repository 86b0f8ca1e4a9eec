"""What is found out on one batch before training: how much fits, and what to compile.

Nothing of it is left behind but the decisions: weights, gradients and random numbers are as before.
"""

import gc
import logging
import math
import time
from collections.abc import Callable, Mapping
from contextlib import ExitStack, nullcontext
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from backfold.memory import out_of_memory
from backfold.restoration import eval_mode
from backfold.training.devices import has_fast_kernels, largest
from backfold.training.step import CompiledStep, Found, Part, Stepper

LOGGER = logging.getLogger("backfold")
COMPILE_PAYS_SECONDS = 600.0  # it takes half a minute to two, and saves a tenth to a third
MOST_UNROLLED_GROUPS = 256
TIMED_ON_CPU = 16  # images: throughput hardly depends on the batch there
MOMENTS = 2  # of AdamW, a copy of the trainable parameters each
CUDA_MARGIN = 0.05  # of the memory, for fragments and workspaces that libraries take late
# A parameter whose gradient is off by more than this share is wrong, and not a matter of rounding.
GRADIENT_TOLERANCE = {torch.float32: 1e-3, torch.bfloat16: 0.05}
SMALLEST_SHARE = 0.05  # of the largest gradient; what is smaller is compared with this


def warm_up(stepper: Stepper, images: Tensor, steps_left: int, decisions: dict[str, Any]) -> None:
    """Set the stepper's micro-batch and compile its step, as its settings ask.

    ``images`` are a batch as this device will get it. What ``decisions`` lack is decided and added:
    a resumed run does not depend on how fast the machine is this time.
    """
    device = stepper.fabric.device
    drawing = [device] if device.type == "cuda" else []
    with torch.random.fork_rng(devices=drawing), ExitStack() as end:
        end.callback(stepper.optimizer.zero_grad, set_to_none=True)
        if stepper.config.micro_batch == "auto":
            if "micro_batch" not in decisions:
                # Not tried on a CPU: the system kills the process that takes too much.
                fits = len(images) if device.type == "cpu" else find_micro_batch(stepper, images)
                decisions["micro_batch"] = fits
                LOGGER.info("micro-batches of %d images", fits)
            stepper.micro_batch = decisions["micro_batch"]
        if "compiled" not in decisions:
            wanted = _wants_compiling(stepper, images, steps_left)
            # Processes must go the same way.
            decisions["compiled"] = not largest(stepper.fabric, int(not wanted))[0]
        if decisions["compiled"]:
            start = time.perf_counter()
            decisions["compiled"] = _compile(stepper, images)
            if decisions["compiled"]:
                LOGGER.info("compiled the step in %.0f s", time.perf_counter() - start)


def _wants_compiling(stepper: Stepper, images: Tensor, steps_left: int) -> bool:
    if stepper.config.compile != "auto":
        return stepper.config.compile
    # The compiler unrolls the second derivative of grouped convolutions group by group: thousands
    # of operations in a ConvNeXt, which take it more than minutes.
    layers = (layer for layer in stepper.energy.modules() if isinstance(layer, nn.Conv2d))
    if sum(layer.groups for layer in layers if layer.groups > 1) > MOST_UNROLLED_GROUPS:
        return False
    timed = images[:TIMED_ON_CPU] if images.device.type == "cpu" else images
    seconds = _seconds(stepper, timed) * len(images) / len(timed)
    return seconds * steps_left > COMPILE_PAYS_SECONDS


def find_micro_batch(stepper: Stepper, images: Tensor) -> int:
    """The whole batch, halved until so many images fit on every device; the error if none does."""
    stepper.micro_batch = len(images)
    # Devices may make different numbers of attempts: none may wait for another's.
    with stepper.fabric.no_backward_sync(stepper.training):
        while not _fits(stepper, images):
            stepper.micro_batch = -(-stepper.micro_batch // 2)
    (smallest,) = largest(stepper.fabric, -stepper.micro_batch)
    return -smallest


def _fits(stepper: Stepper, images: Tensor) -> bool:
    """Whether two steps run beside the optimizer's moments, the second beside gradients too."""
    gc.collect()  # what an error's frames held is free only now, behind the attempt
    trained = [parameter for parameter in stepper.energy.parameters() if parameter.requires_grad]
    room = MOMENTS * sum(parameter.nbytes for parameter in trained)
    if images.is_cuda:
        torch.cuda.empty_cache()
        room += int(CUDA_MARGIN * torch.cuda.get_device_properties(images.device).total_memory)
    try:
        taken = torch.empty(room, dtype=torch.uint8, device=images.device)
        for _ in range(2):
            loss, _ = stepper.restore_part(stepper.parts(images, 0)[0], last_part=True)
        float(loss)  # waits for the device
        del taken
    except Exception as error:
        if stepper.micro_batch == 1 or not out_of_memory(error):
            raise
        return False
    finally:
        stepper.optimizer.zero_grad(set_to_none=True)
    return True


def _seconds(stepper: Stepper, images: Tensor) -> float:
    """Time of one batch's gradient, after one that is not counted."""
    for _ in range(2):
        start = time.perf_counter()
        float(stepper.accumulate(images, 0)[0])  # waits for the device
    return time.perf_counter() - start


def _compile(stepper: Stepper, images: Tensor) -> bool:
    """Compile, check, and say whether the step stays compiled, on every device.

    PyTorch had releases in which compiled second derivatives were wrong and nothing said so
    (pytorch #181581). So for each shape the gradient is compared with the eager one: in eval mode
    where there is dropout, which draws other numbers when compiled.
    """
    graphs = has_fast_kernels(stepper.config, stepper.fabric.device)
    compiled, energy = CompiledStep(stepper.restoration.restore, graphs=graphs), stepper.energy
    stepper.restoration.compiled = compiled
    full = "32" in stepper.fabric.strategy.precision.precision
    limit = GRADIENT_TOLERANCE[torch.float32 if full else torch.bfloat16]
    for part in {len(part.clean): part for part in stepper.parts(images, 0)}.values():
        stepper.optimizer.zero_grad(set_to_none=True)
        losses = [partial(_loss, stepper, step, part) for step in (compiled, compiled.eager)]
        with eval_mode(energy) if _is_random(losses[1]) else nullcontext():
            distance, name = gradient_distance(dict(energy.named_parameters()), *losses)
        if not distance <= limit:
            compiled.fall_back(f"its gradient of {name} is {distance:.2g} from the eager one")
            break
    everywhere = not largest(stepper.fabric, int(not compiled.is_compiled))[0]
    if compiled.is_compiled and not everywhere:
        compiled.fall_back("it does not work on another device")
    return everywhere


def _loss(stepper: Stepper, step: Callable[..., Found], part: Part) -> Tensor:
    with stepper.fabric.autocast():
        return step(part.corruption.corrupted, *part.aim)[0]


def _is_random(loss: Callable[[], Tensor]) -> bool:
    """Whether two random states give two losses, as dropout does."""
    torch.manual_seed(0)
    first = loss().detach()
    torch.manual_seed(1)
    return not torch.equal(first, loss().detach())


def gradient_distance(
    parameters: Mapping[str, Tensor], one: Callable[[], Tensor], other: Callable[[], Tensor]
) -> tuple[float, str]:
    """How far a parameter's gradients of two losses are apart at most, and which one's.

    Distances are relative to the norm of the ``other`` loss's gradient, or to `SMALLEST_SHARE` of
    the largest norm, if that is more; infinite where one of the two has no gradient. The
    parameters' ``grad`` is None before and afterwards.
    """
    gradients: list[dict[str, Tensor]] = []
    for loss in (one, other):
        loss().backward()
        gradients.append({n: p.grad for n, p in parameters.items() if p.grad is not None})
        for parameter in parameters.values():
            parameter.grad = None
    first, second = gradients
    norms = {name: float(gradient.norm()) for name, gradient in second.items()}
    least = SMALLEST_SHARE * max(norms.values(), default=0.0) or torch.finfo(torch.float32).tiny
    furthest = max(((math.inf, name) for name in first.keys() ^ second.keys()), default=(0.0, ""))
    for name in first.keys() & second.keys():
        apart = float((first[name] - second[name]).float().norm()) / max(norms[name], least)
        furthest = max(furthest, (math.inf if math.isnan(apart) else apart, name))
    return furthest
