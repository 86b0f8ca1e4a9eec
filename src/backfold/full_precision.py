"""Where a finite difference of gradients can be trusted: in full float32, one image at a time."""

import functools
from collections.abc import Iterator
from contextlib import contextmanager

import torch
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm

from backfold.errors import UserError
from backfold.restoration import EnergyFn

# Their slope jumps. The exact second derivative leaves jumps out; a finite difference that meets
# one divides it by the step, and is far off.
KINKED = (
    nn.ReLU,
    nn.LeakyReLU,
    nn.PReLU,
    nn.RReLU,
    nn.Hardtanh,
    nn.Hardswish,
    nn.Hardsigmoid,
    nn.MaxPool2d,
    nn.AdaptiveMaxPool2d,
)


def check_first_order(energy_fn: EnergyFn, images: Tensor) -> None:
    """Raise UserError where a finite difference would be wrong.

    In half precision or TF32 rounding is larger than the difference; batch normalisation on a
    batch's own statistics ties its images together; at kinks a difference is no derivative.

    Args:
        energy_fn: parts of a module, or of one bound by `functools.partial`, are looked at.
        images: (batch, channels, height, width).

    Raises:
        UserError: images, parameters or arithmetic of fewer bits than float32, batch
            normalisation that does not use its running statistics, or layers with kinks.
    """
    check_precision(images)
    while isinstance(energy_fn, functools.partial):
        energy_fn = energy_fn.func
    if not isinstance(energy_fn, nn.Module):
        return
    for name, parameter in energy_fn.named_parameters():
        if parameter.is_floating_point() and parameter.itemsize < 4:
            raise UserError(
                f"parameter {name} is {parameter.dtype}: a finite difference needs float32, since "
                "rounding would be larger than the difference; use precision 32-true"
            )
    for name, module in energy_fn.named_modules():
        _check_module(name or "itself", module)


def _check_module(name: str, module: nn.Module) -> None:
    if isinstance(module, KINKED):
        raise UserError(
            f"layer {name} is {type(module).__name__}, whose slope jumps: a finite difference "
            "would be wrong; use the exact step, or a backbone of smooth activations (GELU, SiLU)"
        )
    if isinstance(module, _BatchNorm) and (module.training or module.running_mean is None):
        raise UserError(
            f"batch normalisation {name} is in train mode, which ties a batch's images together: "
            "a finite difference would be wrong; put it in eval mode, as EnergyModel does, or use "
            "the exact step"
        )


def check_precision(images: Tensor) -> None:
    """Raise UserError for images or arithmetic of fewer bits than float32 has."""
    if not images.is_floating_point() or images.itemsize < 4:
        raise UserError(
            f"images are {images.dtype}: a finite difference needs float32, since rounding would "
            "be larger than the difference; use precision 32-true"
        )
    if torch.is_autocast_enabled(images.device.type):
        dtype = torch.get_autocast_dtype(images.device.type)
        raise UserError(
            f"autocast to {dtype} is on: a finite difference needs float32, since rounding would "
            "be larger than the difference; use precision 32-true"
        )
    on_cuda = images.device.type == "cuda" and torch.backends.cudnn.allow_tf32
    if on_cuda or torch.get_float32_matmul_precision() != "highest":
        raise UserError(
            "float32 products may be rounded to TF32 or bf16 here, by more than a finite "
            "difference measures; take the step, backward included, within "
            "backfold.full_precision.full_float32()"
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
