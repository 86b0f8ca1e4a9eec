"""The restoration step under `torch.compile`, with the plain step to fall back on."""

import logging
import math
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager

import torch
import torch._functorch.config
from torch import Tensor

LOGGER = logging.getLogger("backfold")
# A parameter whose gradient is off by more than this share is wrong, and not a matter of rounding.
GRADIENT_TOLERANCE = {torch.float32: 1e-3, torch.bfloat16: 0.05}
# Of the largest gradient: what is smaller is compared with this, as bf16 knows it no better.
SMALLEST_SHARE = 0.05

Step = Callable[
    [Tensor, Tensor, Tensor, Tensor | None, Tensor | None], tuple[Tensor, Tensor, Tensor]
]


class CompiledStep:
    """A step that is compiled at its first call; eager from then on if that fails, said once.

    Shapes are static: each new shape of the arguments is compiled once, and a training run has one
    or two.

    Args:
        step: (images, clean, loss mask, running tokens or None, images of the second head or None)
            -> (loss, restored, energies).
        backend: of `torch.compile`.
        graphs: replay each step as one CUDA graph, which frees the host.
    """

    def __init__(self, step: Step, backend: str = "inductor", graphs: bool = False) -> None:
        self.eager, self.graphs = step, graphs
        mode = "reduce-overhead" if graphs else None
        self.compiled = torch.compile(
            step, fullgraph=True, dynamic=False, backend=backend, mode=mode
        )
        self.is_compiled = True

    def __call__(
        self,
        images: Tensor,
        clean: Tensor,
        loss_mask: Tensor,
        tokens: Tensor | None,
        second: Tensor | None = None,
    ) -> tuple[Tensor, Tensor, Tensor]:
        """See `backfold.restoration.training_step`."""
        if not self.is_compiled:
            return self.eager(images, clean, loss_mask, tokens, second)
        try:
            with _settings():
                found = self.compiled(images, clean, loss_mask, tokens, second)
            # A graph writes over its results when it is replayed.
            return (found[0].clone(), found[1].clone(), found[2].clone()) if self.graphs else found
        except torch.OutOfMemoryError:
            raise
        except Exception as error:
            self.fall_back(_cause(error))
            return self.eager(images, clean, loss_mask, tokens, second)

    def fall_back(self, cause: str) -> None:
        """Go on without compiling, and say why."""
        self.is_compiled = False
        LOGGER.warning(
            "the step can't be compiled and runs eagerly, which is slower: %s; "
            "--compile false silences this",
            cause,
        )


@contextmanager
def _settings() -> Iterator[None]:
    """Settings of the compiler, which count while it compiles."""
    # DistributedDataParallel would cut the graph into one for each bucket of gradients. Cheap work
    # is repeated in the backward pass, not kept: 2 % more time, 10 % less memory on a CPU.
    with (
        torch._dynamo.config.patch(optimize_ddp=False),
        torch._functorch.config.patch(aggressive_recomputation=True),
    ):
        yield


def _cause(error: BaseException) -> str:
    """The innermost error's first line that says something."""
    while error.__cause__ is not None:
        error = error.__cause__
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    return f"{type(error).__name__}: {lines[0] if lines else 'no message'}"


def gradient_distance(
    parameters: Mapping[str, Tensor], one: Callable[[], Tensor], other: Callable[[], Tensor]
) -> tuple[float, str]:
    """How far a parameter's gradients of two losses are apart at most, and which one's.

    Distances are relative to the norm of the second loss's gradient, or to `SMALLEST_SHARE` of the
    largest norm, if that is more; infinite where one of the two has no gradient.

    Args:
        parameters: their ``grad`` is None before and afterwards.
        one: gives a loss.
        other: gives the loss to compare with.
    """
    gradients = []
    for loss in (one, other):
        loss().backward()
        gradients.append({name: parameter.grad for name, parameter in parameters.items()})
        for parameter in parameters.values():
            parameter.grad = None
    norms = {name: float(grad.norm()) for name, grad in gradients[1].items() if grad is not None}
    least = SMALLEST_SHARE * max(norms.values(), default=0.0) or torch.finfo(torch.float32).tiny
    furthest = (0.0, "")
    for name, second in gradients[1].items():
        first = gradients[0][name]
        if first is None and second is None:
            continue
        apart = math.inf
        if first is not None and second is not None:
            apart = float((first - second).float().norm()) / max(norms[name], least)
        furthest = max(furthest, (math.inf if math.isnan(apart) else apart, name))
    return furthest
