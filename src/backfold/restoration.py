"""Restoring images by descending an energy, and the loss that trains the energy to do so.

The energy-inspired pretraining of Wang et al. (ICLR 2023, arXiv 2302.01384): the forward pass gives
an image's energy, the backward pass restores it,

    x_{k+1} = x_k - step_size * dE/dx (x_k),

and training asks that each x_{k+1} be close to the clean image. Every function takes any callable
``images -> energies`` of shapes ``(batch, channels, height, width) -> (batch,)``.
"""

import math
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.nn.attention import SDPBackend, sdpa_kernel

EnergyFn = Callable[[Tensor], Tensor]
LossFn = Callable[[Tensor, Tensor, Tensor], Tensor]

DIVERGENCE_FACTOR = 100.0


def energy_gradient(
    energy_fn: EnergyFn, images: Tensor, create_graph: bool = False
) -> tuple[Tensor, Tensor]:
    """Energies ``(batch,)`` and their gradient with respect to the images, shaped as the images.

    With ``create_graph`` the gradient can itself be differentiated with respect to the energy's
    parameters; fused attention kernels have no second derivative, so plain ones run there. As
    `torch.compile` can't differentiate its graphs twice, the gradient is a part of them there.
    """
    if not create_graph:
        with torch.inference_mode(False), torch.enable_grad():
            images = (images.clone() if images.is_inference() else images.detach()).requires_grad_()
            energies = energy_fn(images)
            (gradient,) = torch.autograd.grad(energies.sum(), images)
        return energies.detach(), gradient
    with sdpa_kernel(SDPBackend.MATH):
        if torch.compiler.is_compiling():
            return _traced_gradient(energy_fn, images)
        images = images.detach().requires_grad_()
        energies = energy_fn(images)
        (gradient,) = torch.autograd.grad(energies.sum(), images, create_graph=True)
    return energies, gradient


def _traced_gradient(energy_fn: EnergyFn, images: Tensor) -> tuple[Tensor, Tensor]:
    def total(points: Tensor) -> tuple[Tensor, Tensor]:
        energies = energy_fn(points)
        return energies.sum(), energies

    gradient, energies = torch.func.grad(total, has_aux=True)(images.detach())
    return energies, gradient


def restoration_step(
    energy_fn: EnergyFn, images: Tensor, step_size: float = 1.0, create_graph: bool = False
) -> tuple[Tensor, Tensor]:
    """One descent step from the images, detached; returns restored images, and energies before."""
    energies, gradient = energy_gradient(energy_fn, images, create_graph)
    return images.detach() - step_size * gradient, energies


@dataclass(frozen=True)
class RestorationStatus:
    """Whether a restoration went well: ``diverged`` is a bool for each image, ``(batch,)``."""

    diverged: Tensor
    step_size: float

    @property
    def ok(self) -> bool:
        """Whether no image diverged."""
        return not bool(self.diverged.any())

    @property
    def message(self) -> str:
        """What happened, and what to do about it; "ok" where nothing is to be done."""
        if self.ok:
            return "ok"
        return (
            f"{int(self.diverged.sum())} of {len(self.diverged)} images diverged and kept their "
            f"last finite state; lower step_size (now {self.step_size:g}), take fewer steps, or "
            "train the energy longer"
        )


@dataclass(frozen=True)
class RestorationResult:
    """What `restore` returns. The trajectory starts with the corrupted images.

    ``restored``: (batch, channels, height, width); ``trajectory``: (num_steps + 1, batch, channels,
    height, width); ``energies``: (num_steps + 1, batch), one for each point of the trajectory.
    """

    restored: Tensor
    trajectory: Tensor
    energies: Tensor
    status: RestorationStatus


def restore(
    energy_fn: EnergyFn, corrupted: Tensor, num_steps: int = 1, step_size: float = 1.0
) -> RestorationResult:
    """Restore images by ``num_steps`` descent steps on their energy.

    An image whose next point is not finite, or lies beyond `DIVERGENCE_FACTOR` times the corrupted
    image's root mean square (or 1, if larger), stays where it was and is marked in the status; the
    other images go on. A module runs in eval mode and gets its mode back; parameter gradients are
    not touched. Works under ``torch.no_grad`` and ``torch.inference_mode``.

    Args:
        energy_fn: any callable, images -> energies.
        corrupted: (batch, channels, height, width), in the units that the energy was trained with.
        num_steps: how many steps; 0 returns the input.
        step_size: the gradient's factor; 1 is what `EnergyModel` is calibrated for.

    Raises:
        ValueError: a negative ``num_steps``, or images that are not four-dimensional floats.
    """
    if num_steps < 0:
        raise ValueError(f"num_steps is {num_steps}; give 0 or more")
    if corrupted.ndim != 4 or not corrupted.is_floating_point():
        raise ValueError(
            f"images are {tuple(corrupted.shape)} of {corrupted.dtype}; "
            "give floats of shape (batch, channels, height, width)"
        )
    images = corrupted.detach()
    limit = DIVERGENCE_FACTOR * _rms(images).clamp(min=1.0)
    diverged = ~torch.isfinite(_rms(images))
    trajectory, energies = [images], []
    with eval_mode(energy_fn):
        for _ in range(num_steps):
            proposed, energy = restoration_step(energy_fn, images, step_size)
            diverged = diverged | ~(torch.isfinite(energy) & (_rms(proposed) <= limit))
            images = torch.where(diverged[:, None, None, None], images, proposed)
            trajectory.append(images)
            energies.append(energy)
        with torch.no_grad():
            energies.append(energy_fn(images))
    status = RestorationStatus(diverged | ~torch.isfinite(energies[-1]), step_size)
    return RestorationResult(images, torch.stack(trajectory), torch.stack(energies), status)


def _rms(images: Tensor) -> Tensor:
    return at_least_float32(images).square().mean(dim=(1, 2, 3)).sqrt()


@contextmanager
def eval_mode(energy_fn: EnergyFn) -> Iterator[None]:
    """Eval mode within, of a module or of those that a partial or method has.

    Afterwards each part of a module has its own mode again.
    """
    roots = _modules_behind(energy_fn)
    modules = [module for root in roots for module in root.modules()]
    modes = [module.training for module in modules]
    try:
        for root in roots:
            root.eval()  # in which timm's LeViT and others drop what they cached of older weights
        yield
    finally:
        for module, mode in zip(modules, modes, strict=True):
            module.training = mode


def _modules_behind(function: object) -> list[nn.Module]:
    if isinstance(function, nn.Module):
        return [function]
    if isinstance(function, partial):
        bound = (function.func, *function.args, *function.keywords.values())
        return [module for each in bound for module in _modules_behind(each)]
    owner = getattr(function, "__self__", None)
    return [owner] if isinstance(owner, nn.Module) else []


def restoration_loss(restored: Tensor, clean: Tensor, loss_mask: Tensor) -> Tensor:
    """Smooth L1 distance where ``loss_mask`` is true, averaged in each image, then over images.

    The mask is bool, (batch, 1, height, width) or broadcastable to the images.
    """
    restored, clean = at_least_float32(restored), at_least_float32(clean)
    distance = F.smooth_l1_loss(restored, clean, reduction="none")
    mask = loss_mask.to(distance.dtype).expand_as(distance)
    per_image = (distance * mask).sum(dim=(1, 2, 3)) / mask.sum(dim=(1, 2, 3)).clamp(min=1.0)
    return per_image.mean()


def plausibility_loss(energies: Tensor, images: Tensor, clean: Tensor) -> Tensor:
    """Logistic loss of telling corrupted images from clean ones by the sign of their energy.

    The restoration loss sees the energy's gradient alone, which says nothing of how the levels of
    two images compare. Energies are sums over pixels: divided by the root of the pixels' number
    (channels counted), they are of the order of one for images of any size. That clean data and
    noise be told apart by logistic regression is noise-contrastive estimation (Gutmann and
    Hyvarinen, AISTATS 2010); here corrupted images are the noise. Not a part of Wang et al.

    Images that equal their clean ones are clean. The mean over the images is returned:
    log(1 + exp(E / sqrt(n))) of clean ones, with -E of corrupted.
    """
    is_corrupted = (images != clean).flatten(1).any(dim=1)
    logits = at_least_float32(energies) / math.sqrt(images[0].numel())
    return F.softplus(torch.where(is_corrupted, -logits, logits)).mean()


def at_least_float32(values: Tensor) -> Tensor:
    """Half precision as float32, all else as it is: sums of many bf16 values keep two digits."""
    return values.float() if values.dtype in (torch.bfloat16, torch.float16) else values


def training_step(
    energy_fn: EnergyFn,
    images: Tensor,
    clean: Tensor,
    loss_mask: Tensor,
    step_size: float = 1.0,
    plausibility_weight: float = 0.0,
    loss: LossFn = restoration_loss,
) -> tuple[Tensor, Tensor, Tensor]:
    """One restoration step with its loss: (loss, restored images, energies of the images given).

    The ``loss`` is that of (restored, clean, loss_mask), a scalar; `restoration_loss` by default.
    With a ``plausibility_weight`` so much `plausibility_loss` is added to the loss,
    for which some of the images must be clean, some corrupted. Only the loss carries a graph. Under
    DistributedDataParallel this whole function belongs inside the wrapped module's forward
    (pytorch #63812).
    """
    restored, energies = restoration_step(energy_fn, images, step_size, create_graph=True)
    total = loss(restored, clean, loss_mask)
    if plausibility_weight:
        total = total + plausibility_weight * plausibility_loss(energies, images, clean)
    return total, restored.detach(), energies.detach()


def restoration_losses(
    step: Callable[[Tensor], tuple[Tensor, Tensor, Tensor]], corrupted: Tensor, num_steps: int
) -> Iterator[tuple[Tensor, Tensor, Tensor]]:
    """The training loss over K detached steps, one step at a time.

    Yields (loss / num_steps, restored, energies) for each step, which is `training_step` with all
    but the images bound. Call backward on each loss before asking for the next: then only one
    step's graph is alive, and memory does not grow with K.
    """
    images = corrupted
    for _ in range(num_steps):
        loss, images, energies = step(images)
        yield loss / num_steps, images, energies
        del loss
