"""Whether a backbone can be an energy function: a check against finite differences.

Meant for a model that is thrown away afterwards: the check makes it float64 and perturbs it, as a
parameter that starts at zero (the last scale of a residual branch) hides the ones behind it.
"""

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from timm.layers.drop import DropPath
from torch import Tensor
from torch.nn import functional as F
from torch.nn.modules.dropout import _DropoutNd
from torch.overrides import TorchFunctionMode
from torch.utils._pytree import tree_map

from backfold.backbone import ImageSize
from backfold.energy import EnergyModel
from backfold.restoration import energy_gradient, restoration_step, training_step

INDEPENDENCE_TOLERANCE = 1e-4
INFLUENCE_TOLERANCE = 1e-3
DERIVATIVE_TOLERANCE = 2e-3
# A kink (ReLU) within the step spoils a finite difference, and deep networks have one within tiny
# steps; rounding spoils the tiniest. The best of these steps counts; they are relative.
STEPS = (1e-8, 1e-10, 1e-12, 1e-6, 1e-5, 1e-4, 1e-3)


class Float64Throughout(TorchFunctionMode):
    """Within, what asks for float32 gets float64: a model that casts keeps its digits too."""

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        """Call the function with float64 for float32 among its arguments."""
        func = torch.Tensor.double if func is torch.Tensor.float else func
        args, kwargs = tree_map(
            lambda value: torch.float64 if value is torch.float32 else value, (args, kwargs or {})
        )
        return func(*args, **kwargs)


class Direction:
    """A random direction in the space of parameters, drawn anew at each use to save its memory.

    Each tensor's part is as large as the tensor (root mean square); 0.2 for one that is all but
    zero.
    """

    def __init__(self, parameters: Sequence[Tensor], seed: int) -> None:
        self.parameters, self.seed = parameters, seed
        sizes = [float(p.detach().square().mean().sqrt()) for p in parameters]
        self.scales = [size if size > 1e-3 else 0.2 for size in sizes]

    def __iter__(self) -> Iterator[tuple[Tensor, Tensor]]:
        generator = torch.Generator().manual_seed(self.seed)
        for parameter, scale in zip(self.parameters, self.scales, strict=True):
            noise = torch.randn(parameter.shape, generator=generator)
            yield parameter, noise.mul_(scale).to(parameter)

    @torch.no_grad()
    def at(self, step: float, function: Callable[[], Any]) -> Any:
        """What the function returns while the parameters are so far along the direction."""
        self.move(step)
        found = function()
        self.move(-step)
        return found

    @torch.no_grad()
    def move(self, step: float) -> None:
        """Add ``step`` times the direction to the parameters, in place."""
        for parameter, noise in self:
            parameter.add_(noise, alpha=step)


def distance_from_difference(derivative: float, function: Callable[[float], float]) -> float:
    """Relative distance of a derivative from a central difference, the first within tolerance.

    From the nearest, if none is.
    """
    best = float("inf")
    for step in STEPS:
        difference = (function(step) - function(-step)) / (2 * step)
        scale = max(abs(derivative), abs(difference))
        best = min(best, abs(derivative - difference) / scale if scale > 0 else 1.0)
        if best < DERIVATIVE_TOLERANCE:
            break
    return best


@dataclass
class Compatibility:
    """What `check_compatibility` found; ``reason`` is one line on the first check that failed.

    ``without_gradient`` names the backbone's parameters that the energy's gradient does not depend
    on. ``derivative_error`` is the relative distance between the loss's derivative along a random
    direction and its finite difference; NaN if not measured.
    """

    finite_energies: bool = False
    finite_gradient: bool = False
    second_order: bool = False
    independent: bool = False
    reason: str = ""
    without_gradient: tuple[str, ...] = ()
    derivative_error: float = float("nan")

    @property
    def ok(self) -> bool:
        """Whether all checks passed."""
        return not self.reason


def check_compatibility(
    model: EnergyModel, image_size: ImageSize, channels: int = 3, seed: int = 0
) -> Compatibility:
    """Check energies, gradients, second-order gradients and the independence of the images.

    Args:
        model: is changed, see above; its dropout is switched off.
        image_size: (height, width) in pixels of the random images used.
        channels: of these images.
        seed: of the images, the perturbation and the directions.
    """
    found = Compatibility()
    with Float64Throughout():
        model.double().train()
        for module in model.modules():  # two passes are then comparable
            if isinstance(module, _DropoutNd):
                module.p = 0.0
            elif isinstance(module, DropPath):
                module.drop_prob = 0.0
        images = _random_images((3, channels, *image_size), seed)
        # Noise of a tenth of each tensor's root mean square.
        Direction(list(model.backbone.parameters()), seed).move(0.1)
        checks: dict[str, Callable[[], str]] = {
            "finite_energies": lambda: check_energies(model, images),
            "finite_gradient": lambda: check_gradient(model, images, seed),
            "second_order": lambda: check_second_order(model, images[:2], seed, found),
            "independent": lambda: check_independence(model, images),
        }
        for name, check in checks.items():
            try:
                complaint = check()
            except Exception as error:
                said = " ".join(str(error).split())[:200] or "no message"
                complaint = f"{type(error).__name__}: {said}"
            setattr(found, name, not complaint)
            found.reason = found.reason or complaint
    return found


def _random_images(shape: Sequence[int], seed: int) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(shape, generator=generator, dtype=torch.float64)


def check_energies(model: EnergyModel, images: Tensor) -> str:
    """Complains unless there is one finite energy for each image; scales the head first."""
    model.calibrate(images)
    energies = model(images)
    if energies.shape != (len(images),):
        return f"energies have shape {tuple(energies.shape)} for {len(images)} images"
    return "" if bool(energies.isfinite().all()) else "an energy is not finite"


def check_gradient(model: EnergyModel, images: Tensor, seed: int) -> str:
    """Complains unless the energy gradient is finite, not zero, and equal to a finite difference.

    The difference is taken of the summed energies, along one direction, partly random.
    """
    _, gradient = energy_gradient(model, images)
    if not bool(gradient.isfinite().all()):
        return "the energy's gradient is not finite"
    if not bool(gradient.flatten(1).any(dim=1).all()):
        return "the energy's gradient is zero"
    # Part of it along the gradient, so that the derivative is not small by chance.
    noise = _random_images(images.shape, seed + 2)
    direction = noise + gradient / gradient.square().mean().sqrt()
    with torch.no_grad():
        error = distance_from_difference(
            float((gradient * direction).sum()),
            lambda step: float(model(images + step * direction).sum()),
        )
    if error < DERIVATIVE_TOLERANCE:
        return ""
    return f"the energy's gradient is off its finite difference by {error:.0e}"


def check_independence(model: EnergyModel, images: Tensor) -> str:
    """Complains if the first image's energy or gradient changes with the other images."""
    pairs = zip(energy_gradient(model, images), energy_gradient(model, images[:1]), strict=True)
    for name, (together, alone) in zip(("energy", "gradient"), pairs, strict=True):
        change = _relative_distance(together[:1], alone)
        if not change < INDEPENDENCE_TOLERANCE:
            return f"an image's {name} changes by {change:.0e} with the other images of its batch"
    return ""


def check_second_order(model: EnergyModel, images: Tensor, seed: int, found: Compatibility) -> str:
    """Check the gradient of a training step's loss with respect to the backbone's parameters.

    Complains unless each parameter's gradient is finite and not zero, or else a change of the
    parameter leaves the energy's gradient as it is, and along a random direction in the space of
    all parameters the loss's derivative equals a central finite difference. ``found`` is told the
    parameters without a gradient and the distance.
    """
    clean = _random_images(images.shape, seed + 1)
    model.zero_grad()
    loss, _, _ = training_step(model, images, clean, torch.ones(1, dtype=torch.bool))
    torch.autograd.backward(loss)
    named = {name: p for name, p in model.backbone.named_parameters() if p.requires_grad}
    gradients = {name: p.grad for name, p in named.items() if p.grad is not None and p.grad.any()}
    for name, gradient in gradients.items():
        if not bool(gradient.isfinite().all()):
            return f"the second-order gradient of {name} is not finite"
    if not gradients:
        return "no parameter gets a second-order gradient"
    found.without_gradient = tuple(name for name in named if name not in gradients)
    without = Direction([named[name] for name in found.without_gradient], seed)
    influence = _influence(model, images, without)
    direction = Direction(list(named.values()), seed)

    def loss_at(step: float) -> float:
        """By first derivatives only, and without the training loss's cast to float32."""
        restored, _ = direction.at(step, lambda: restoration_step(model, images))
        return float(F.smooth_l1_loss(restored, clean))

    derivative = sum(float((p.grad * noise).sum()) for p, noise in direction if p.grad is not None)
    found.derivative_error = distance_from_difference(derivative, loss_at)
    if not influence < INFLUENCE_TOLERANCE:
        return (
            f"{found.without_gradient[0]} or another of {len(found.without_gradient)} parameters "
            "gets no gradient, though the energy's gradient depends on it (relative slope "
            f"{influence:.0e})"
        )
    if not found.derivative_error < DERIVATIVE_TOLERANCE:
        return f"the loss's derivative is off its finite difference by {found.derivative_error:.0e}"
    return ""


def _influence(model: EnergyModel, images: Tensor, direction: Direction) -> float:
    """How much the energy's gradient changes along the direction, both relative: a slope."""
    _, before = energy_gradient(model, images)
    slope = float("inf") if direction.parameters else 0.0
    for step in STEPS:
        if slope < INFLUENCE_TOLERANCE:
            break
        _, after = direction.at(step, lambda: energy_gradient(model, images))
        slope = min(slope, _relative_distance(after, before) / step)
    return slope


def _relative_distance(value: Tensor, reference: Tensor) -> float:
    return float((value - reference).norm() / reference.norm())
