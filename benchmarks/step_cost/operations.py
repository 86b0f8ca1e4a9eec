"""Counting the matrix products and convolutions that a computation runs, on any device."""

import re
from collections.abc import Callable, Mapping, Sequence
from contextlib import nullcontext
from math import prod
from typing import Any

import torch
from torch.utils.flop_counter import FlopCounterMode, sdpa_backward_flop_count, sdpa_flop_count

Shape = Sequence[int]


def count_operations(function: Callable[[], object]) -> int:
    """Multiplications and additions in the matrix products and convolutions that a call runs.

    A product of (m, k) and (k, n) counts 2mnk, by `torch.utils.flop_counter` with corrected
    formulas: forward, backward and double backward, fused attention, any precision. Element-wise
    work, norms and softmax count nothing. On the ``meta`` device only the counting is done. Give
    the eager function: PyTorch refuses to run a compiled one (``fullgraph``) while it is watched.

    Args:
        function: called once, without arguments.

    Raises:
        NotImplementedError: an operation whose name says that it multiplies matrices, and that
            has no formula.
    """
    with _Counter(display=False, custom_mapping=_FORMULAS) as counter:
        function()
    return counter.get_total_flops()


class _Everything(nullcontext[None]):
    """In place of the tracker of modules, whose hooks break in `torch.autograd.grad`."""

    parents = ("Global",)


class _Counter(FlopCounterMode):
    """Refuses what upstream would silently count as nothing."""

    def __init__(self, **options: Any) -> None:
        super().__init__(**options)
        self.mod_tracker = _Everything()

    def _count_flops(
        self, func_packet: Any, out: Any, args: tuple[Any, ...], kwargs: Mapping[str, Any]
    ) -> Any:
        if func_packet not in self.flop_registry and _MULTIPLIES.search(func_packet.__name__):
            raise NotImplementedError(
                f"the operations of {func_packet} can't be counted: torch.utils.flop_counter has "
                "no formula for it; run the model without this fused kernel"
            )
        return super()._count_flops(func_packet, out, args, kwargs)


def _vector_product(left: Shape, _vector: Shape, **_named: Any) -> int:
    """Operations of (..., k) times (k,)."""
    return 2 * prod(left)


def _convolution_backward(
    gradient: Shape, inputs: Shape, weight: Shape, *options: Any, **_named: Any
) -> int:
    """The gradients of the input and of the weight each cost as much as the convolution."""
    transposed, output_mask = options[4], options[7]
    positions = prod((inputs if transposed else gradient)[2:])
    return int(2 * inputs[0] * positions * prod(weight) * sum(output_mask[:2]))


def _attention(*shapes: Any, **_named: Any) -> int:
    return int(sdpa_flop_count(*shapes[:3]))


def _attention_backward(*shapes: Any, **_named: Any) -> int:
    return int(sdpa_backward_flop_count(*shapes[:4]))


aten = torch.ops.aten
_FORMULAS: dict[Any, Callable[..., int]] = {
    # torch's own formula counts the weight's gradient once too often for each group.
    aten.convolution_backward: _convolution_backward,
    # What torch's registry lacks, the fused ones on the CPU before torch 2.15.
    aten._scaled_dot_product_flash_attention_for_cpu: _attention,
    aten._scaled_dot_product_flash_attention_for_cpu_backward: _attention_backward,
    **dict.fromkeys((aten.mv, aten.dot, aten.vdot), _vector_product),
}
_MULTIPLIES = re.compile(
    r"(?:^|_)(?:\w?\w?\w?\w?b?m[mv]|\w*matmul|conv(?!ert)\w*|convolution|linear|trilinear|attention"
    r"|transformer|rnn|lstm|gru|cdist)(?:_|$)"
)
