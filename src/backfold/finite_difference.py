"""Derivatives held against finite differences, in any direction of a space of parameters."""

from collections.abc import Callable, Iterator, Sequence

import torch
from torch import Tensor
from torch.overrides import TorchFunctionMode

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


def perturb(parameters: Sequence[Tensor], step: float, seed: int) -> None:
    """Add noise of ``step`` times each tensor's root mean square, in place; see `Direction`."""
    Direction(parameters, seed).move(step)


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
