"""Training without a second derivative: its gradient as a central difference.

With restored images r = x - s g(x), where g = dE/dx, and v = dL/dr, the gradient of the training
loss is the change of the energy's own, first-order gradient in one direction of the images:

    dL/dtheta = -s d/dtheta (v . g(x)) = -s d/deps [dE/dtheta (x + eps v)] at eps = 0
              ~ -s sum_i [dE/dtheta (x_i + h_i v_i) - dE/dtheta (x_i - h_i v_i)] / (2 h_i).

Three ordinary passes replace one forward pass, its gradient and the gradient of both. Fused
attention, checkpointing and sharding work, in the memory of one ordinary pass.

Each h_i displaces the pixels where the loss counts by `DISPLACEMENT` in root mean square. Taken
over these, the best value depends less on the share of hidden pixels than over the whole image.
Rounding falls with the displacement, curvature grows with its square; `best_displacement` measures
where they meet, and `docs/method.md` has measured distances. Two cases are beyond any displacement
and refused by that measurement: kinks, at which a difference is no derivative (ResNet-18: distances
of 2 to 50), and layer norms over constant patches, which are too sharp (untrained ConvNeXt, masking
with fill "zero": 0.9 and more).
"""

import functools
import math
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager

import torch
from torch import Tensor, nn
from torch.utils.checkpoint import get_device_states, set_device_states

from backfold.errors import UserError
from backfold.restoration import EnergyFn, energy_gradient, restoration_loss, training_step

DISPLACEMENT = 1e-3
DISPLACEMENTS = (1e-4, 3e-4, 1e-3, 3e-3, 1e-2)
TOLERANCE = 0.01


def check_precision(energy_fn: EnergyFn, images: Tensor) -> None:
    """Raise UserError where rounding would be larger than the difference.

    It would be in half precision, of a module's parameters or of images, and in TF32. Parameters of
    a module that is bound by `functools.partial` are looked at, too.
    """
    while isinstance(energy_fn, functools.partial):
        energy_fn = energy_fn.func
    module = energy_fn if isinstance(energy_fn, nn.Module) else nn.Module()
    used = {f"parameter {name}": value.dtype for name, value in module.named_parameters()}
    if torch.is_autocast_enabled(images.device.type):
        used["autocast"] = torch.get_autocast_dtype(images.device.type)
    for name, dtype in {"images": images.dtype, **used}.items():
        if dtype.is_floating_point and dtype.itemsize < 4:
            raise UserError(
                f"{name}: {dtype}, and a finite difference needs float32, since rounding would be "
                "larger than the difference; use precision 32-true"
            )
    on_cuda = images.device.type == "cuda" and torch.backends.cudnn.allow_tf32
    if on_cuda or torch.get_float32_matmul_precision() != "highest":
        raise UserError(
            "float32 products may be rounded to TF32 or bf16 here, by more than a finite "
            "difference measures; take the step, backward included, within "
            "backfold.finite_difference.full_float32()"
        )


@contextmanager
def full_float32() -> Iterator[None]:
    """Products and convolutions of float32 keep all its digits within, on every device.

    Convolutions on CUDA use TF32 unless told otherwise. Backward passes belong inside, too.
    """
    matmul, convolution = torch.get_float32_matmul_precision(), torch.backends.cudnn.allow_tf32
    torch.set_float32_matmul_precision("highest")
    torch.backends.cudnn.allow_tf32 = False
    try:
        yield
    finally:
        torch.set_float32_matmul_precision(matmul)
        torch.backends.cudnn.allow_tf32 = convolution


def finite_difference_losses(
    energy_fn: EnergyFn,
    images: Tensor,
    clean: Tensor,
    loss_mask: Tensor,
    step_size: float = 1.0,
    displacement: float = DISPLACEMENT,
    displaced: Callable[[Tensor, Tensor], Tensor] | None = None,
) -> Iterator[tuple[Tensor, Tensor, Tensor]]:
    """One restoration step's training loss in two parts; (part, restored, energies) twice.

    Call backward on each part before asking for the next: then the parameters hold the gradient of
    the training loss, and the memory is that of one ordinary step. The parts' values add up to the
    loss. All passes draw the same dropout masks, and the random state is then as after one pass.

    Args:
        energy_fn: images -> energies; under DistributedDataParallel the module inside the wrapper.
        images: float32 or float64, of unit variance; other arguments as for `training_step`.
        clean: as ``images``.
        loss_mask: bool.
        step_size: of the restoration step.
        displacement: root mean square of h v over the pixels where the loss has a slope.
        displaced: (images, weights) -> the sum of weighted energies, as the forward of a module
            that DistributedDataParallel wraps; only the second needs to reduce gradients. None
            calls the energy itself.

    Raises:
        UserError: as `check_precision`.
    """
    check_precision(energy_fn, images)
    part_of = displaced or (lambda points, weights: (weights * energy_fn(points)).sum())
    go_back, images = _random_state(images), images.detach()
    energies, gradient = energy_gradient(energy_fn, images)
    restored = (images - step_size * gradient).requires_grad_()
    with torch.enable_grad():
        loss = restoration_loss(restored, clean, loss_mask)
        (slope,) = torch.autograd.grad(loss, restored)
    moves, weights = _scale(slope, step_size, displacement)
    del gradient, slope
    for sign in (1, -1):
        go_back()
        part = part_of(images + sign * moves, -sign * weights)
        half = part - part.detach() + loss.detach() / 2
        yield half, restored.detach(), energies
        del part, half


def _scale(slope: Tensor, step_size: float, displacement: float) -> tuple[Tensor, Tensor]:
    """The displacement h v, shaped as the slope v, and step_size / (2 h), (batch,)."""
    # In units of the largest value, since a loss's slope can be too small to be squared.
    largest = slope.abs().amax(dim=(1, 2, 3), keepdim=True)
    unit = slope / torch.where(largest > 0, largest, 1.0)
    count = unit.count_nonzero(dim=(1, 2, 3))[:, None, None, None]
    size = (unit.square().sum(dim=(1, 2, 3), keepdim=True) / count.clamp(min=1)).sqrt()
    moves = unit * (displacement / torch.where(largest > 0, size, 1.0))
    return moves, (step_size * largest * size / (2 * displacement)).flatten()


def best_displacement(
    energy_fn: EnergyFn,
    parameters: Sequence[Tensor],
    images: Tensor,
    clean: Tensor,
    loss_mask: Tensor,
    step_size: float = 1.0,
) -> tuple[float, float]:
    """The displacement whose gradient is nearest to the exact one, and its relative distance.

    One exact step and two passes for each of `DISPLACEMENTS`: a few images are enough. Gradients
    and the random state are left as they were. Arguments are those of `finite_difference_losses`,
    and the parameters that train.

    Raises:
        UserError: none comes within `TOLERANCE`, or as `check_precision`.
    """
    go_back = _random_state(images)
    loss, _, _ = training_step(energy_fn, images, clean, loss_mask, step_size)
    exact = _flat_gradient(loss, parameters)
    distances = []
    for displacement in DISPLACEMENTS:
        go_back()
        parts = finite_difference_losses(
            energy_fn, images, clean, loss_mask, step_size, displacement
        )
        found = sum((_flat_gradient(part, parameters) for part, _, _ in parts), 0 * exact)
        length = exact.norm().clamp(min=torch.finfo(exact.dtype).tiny)
        distances.append(float(((found - exact).norm() / length).nan_to_num(math.inf)))
    go_back()
    distance, displacement = min(zip(distances, DISPLACEMENTS, strict=True))
    if distance > TOLERANCE:
        raise UserError(
            f"the first-order step's gradient is {distance:.2g} times the exact one's length away "
            f"from it on the first images (at most {TOLERANCE} would do): the energy has kinks "
            "such as ReLU (take a backbone of smooth activations: GELU, SiLU), or norms over "
            'constant patches (try masking with fill "noise"); or use the exact step'
        )
    return displacement, distance


def _flat_gradient(loss: Tensor, parameters: Sequence[Tensor]) -> Tensor:
    gradients = torch.autograd.grad(loss, parameters, materialize_grads=True)
    return torch.cat([gradient.flatten() for gradient in gradients])


def _random_state(images: Tensor) -> Callable[[], None]:
    """Goes back, when called, to the present random state of the CPU and of the images' device."""
    cpu, (ids, states) = torch.get_rng_state(), get_device_states(images)

    def go_back() -> None:
        torch.set_rng_state(cpu)
        set_device_states(ids, states, device_type=images.device.type)

    return go_back
