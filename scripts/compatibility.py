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

    def __torch_function__(
        self,
        func: Callable[..., object],
        types: Sequence[type],
        args: tuple[object, ...] = (),
        kwargs: dict[str, object] | None = None,
    ) -> object:
        """Call the function with float64 for float32 among its arguments."""
        if func is torch.Tensor.float:
            func = torch.Tensor.double
        named = {name: _widened(value) for name, value in (kwargs or {}).items()}
        return func(*map(_widened, args), **named)


def _widened(value: object) -> object:
    return torch.float64 if value is torch.float32 else value


class Direction:
    """A random direction in the space of parameters, drawn anew at each use to save its memory.

    Each tensor's part is as large as the tensor (root mean square); 0.2 for one that is all but
    zero.
    """

    def __init__(self, parameters: Sequence[Tensor], seed: int) -> None:
        self.parameters = parameters
        self.seed = seed
        sizes = [float(p.detach().square().mean().sqrt()) for p in parameters]
        self.scales = [size if size > 1e-3 else 0.2 for size in sizes]

    def __iter__(self) -> Iterator[Tensor]:
        generator = torch.Generator().manual_seed(self.seed)
        for parameter, scale in zip(self.parameters, self.scales, strict=True):
            noise = torch.randn(parameter.shape, generator=generator)
            yield noise.mul_(scale).to(parameter)

    @torch.no_grad()
    def move(self, step: float) -> None:
        """Add ``step`` times the direction to the parameters, in place."""
        for parameter, noise in zip(self.parameters, self, strict=True):
            parameter.add_(noise, alpha=step)

    def times_gradient(self) -> float:
        """The derivative along the direction, by the parameters' ``grad``; a missing one is 0."""
        pairs = zip(self.parameters, self, strict=True)
        return sum(float((p.grad * noise).sum()) for p, noise in pairs if p.grad is not None)


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


@dataclass(frozen=True)
class Compatibility:
    """What `check_compatibility` found; ``reason`` is one line on the first check that failed.

    ``without_gradient`` names the backbone's parameters that the energy's gradient does not depend
    on. ``derivative_error`` is the relative distance between the loss's derivative along a random
    direction and its finite difference; NaN if not measured.
    """

    finite_energies: bool
    finite_gradient: bool
    second_order: bool
    independent: bool
    reason: str
    without_gradient: tuple[str, ...]
    derivative_error: float

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
    with Float64Throughout():
        return _check(model.double().train(), image_size, channels, seed)


def _check(model: EnergyModel, image_size: ImageSize, channels: int, seed: int) -> Compatibility:
    for module in model.modules():  # two passes are then comparable
        if isinstance(module, _DropoutNd):
            module.p = 0.0
        elif isinstance(module, DropPath):
            module.drop_prob = 0.0
    images = _random_images((3, channels, *image_size), seed)
    # Noise of a tenth of each tensor's root mean square.
    Direction(list(model.backbone.parameters()), seed).move(0.1)
    found: dict[str, Any] = {"without_gradient": (), "derivative_error": float("nan")}
    checks: dict[str, Callable[[], str]] = {
        "finite_energies": lambda: check_energies(model, images),
        "finite_gradient": lambda: check_gradient(model, images, seed),
        "second_order": lambda: check_second_order(model, images[:2], seed, found),
        "independent": lambda: check_independence(model, images),
    }
    complaints = {}
    for name, check in checks.items():
        try:
            complaints[name] = check()
        except Exception as error:
            said = " ".join(str(error).split())[:200] or "no message"
            complaints[name] = f"{type(error).__name__}: {said}"
    reason = next(filter(None, complaints.values()), "")
    passed = {name: not complaint for name, complaint in complaints.items()}
    return Compatibility(**passed, reason=reason, **found)


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


def check_gradient(model: EnergyModel, images: Tensor, seed: int = 0) -> str:
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

    @torch.no_grad()
    def energy_at(step: float) -> float:
        return float(model(images + step * direction).sum())

    derivative = float((gradient * direction).sum())
    error = distance_from_difference(derivative, energy_at)
    if error < DERIVATIVE_TOLERANCE:
        return ""
    return f"the energy's gradient is off its finite difference by {error:.0e}"


def check_independence(model: EnergyModel, images: Tensor) -> str:
    """Complains if the first image's energy or gradient changes with the other images."""
    energies, gradient = energy_gradient(model, images)
    energy_alone, gradient_alone = energy_gradient(model, images[:1])
    pairs = {"energy": (energies[:1], energy_alone), "gradient": (gradient[:1], gradient_alone)}
    for name, (together, alone) in pairs.items():
        change = _relative_distance(together, alone)
        if not change < INDEPENDENCE_TOLERANCE:
            return f"an image's {name} changes by {change:.0e} with the other images of its batch"
    return ""


def check_second_order(model: EnergyModel, images: Tensor, seed: int, found: dict[str, Any]) -> str:
    """Check the gradient of a training step's loss with respect to the backbone's parameters.

    Complains unless each parameter's gradient is finite and not zero, or else a change of the
    parameter leaves the energy's gradient as it is, and along a random direction in the space of
    all parameters the loss's derivative equals a central finite difference.

    Args:
        model: in float64; its parameters are moved and put back.
        images: (batch, channels, height, width), float64.
        seed: of the clean images and the directions.
        found: is told "without_gradient" and "derivative_error"; see `Compatibility`.
    """
    clean = _random_images(images.shape, seed + 1)
    model.zero_grad()
    loss, _, _ = training_step(model, images, clean, torch.ones(1, dtype=torch.bool))
    torch.autograd.backward(loss)
    named = {name: p for name, p in model.backbone.named_parameters() if p.requires_grad}
    for name, parameter in named.items():
        if parameter.grad is not None and not bool(parameter.grad.isfinite().all()):
            return f"the second-order gradient of {name} is not finite"
    without = {n: p for n, p in named.items() if p.grad is None or not bool(p.grad.any())}
    found["without_gradient"] = tuple(without)
    if len(without) == len(named):
        return "no parameter gets a second-order gradient"
    influence = _influence(model, images, Direction(list(without.values()), seed))
    direction = Direction(list(named.values()), seed)

    def loss_at(step: float) -> float:
        """By first derivatives only, and without the training loss's cast to float32."""
        direction.move(step)
        restored, _ = restoration_step(model, images)
        direction.move(-step)
        return float(F.smooth_l1_loss(restored, clean))

    error = distance_from_difference(direction.times_gradient(), loss_at)
    found["derivative_error"] = error
    if not influence < INFLUENCE_TOLERANCE:
        return (
            f"{next(iter(without))} or another of {len(without)} parameters gets no gradient, "
            f"though the energy's gradient depends on it (relative slope {influence:.0e})"
        )
    if not error < DERIVATIVE_TOLERANCE:
        return f"the loss's derivative is off its finite difference by {error:.0e}"
    return ""


def _influence(model: EnergyModel, images: Tensor, direction: Direction) -> float:
    """How much the energy's gradient changes along the direction, both relative: a slope."""
    if not direction.parameters:
        return 0.0
    _, before = energy_gradient(model, images)
    slope = float("inf")
    for step in STEPS:
        direction.move(step)
        _, after = energy_gradient(model, images)
        direction.move(-step)
        slope = min(slope, _relative_distance(after, before) / step)
        if slope < INFLUENCE_TOLERANCE:
            break
    return slope


def _relative_distance(value: Tensor, reference: Tensor) -> float:
    return float((value - reference).norm() / reference.norm())
