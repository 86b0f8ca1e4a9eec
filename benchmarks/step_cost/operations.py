"""Counting the matrix products and convolutions that a computation runs, on any device."""

import re
from collections.abc import Callable, Mapping, Sequence
from math import prod
from typing import Any

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_map_only
from torch.utils.flop_counter import (
    flop_registry,
    sdpa_backward_flop_count,
    sdpa_flop_count,
)

Shape = Sequence[int]


def count_operations(function: Callable[[], object]) -> int:
    """Multiplications and additions in the matrix products and convolutions that a call runs.

    A product of (m, k) and (k, n) counts 2mnk, as in `torch.utils.flop_counter`, whose formulas are
    used: forward, backward and double backward, fused attention, any precision. Element-wise work,
    norms and softmax count nothing. The call does its work as it always would; on the ``meta``
    device that is nothing but the counting.

    Give the eager function: PyTorch refuses to run a compiled one (``fullgraph``) while its
    operations are being watched, and what it multiplies is the same.

    Args:
        function: called once, without arguments.

    Raises:
        NotImplementedError: an operation whose name says that it multiplies matrices, and that
            has no formula.
    """
    counter = _Counter()
    with counter:
        function()
    return counter.operations


class _Counter(TorchDispatchMode):
    def __init__(self) -> None:
        super().__init__()
        self.operations = 0

    def __torch_dispatch__(
        self,
        func: Any,
        types: object,
        args: tuple[Any, ...] = (),
        kwargs: Mapping[str, Any] | None = None,
    ) -> Any:
        del types
        kwargs = kwargs or {}
        packet = func.overloadpacket
        if packet not in _FORMULAS and packet not in flop_registry:
            # Under inference_mode composite operations such as linear arrive whole.
            with self:
                result = func.decompose(*args, **kwargs)
            if result is not NotImplemented:
                return result
            _check_countable(packet)
        result = func(*args, **kwargs)
        if packet in _FORMULAS:
            self.operations += _FORMULAS[packet](*tree_map_only(Tensor, _shape, args))
        elif packet in flop_registry:
            self.operations += flop_registry[packet](*args, **kwargs, out_val=result)
        return result


def _shape(tensor: Tensor) -> Shape:
    return tensor.shape


def _matrix_product(left: Shape, right: Shape, *_: Any) -> int:
    """Operations of (..., m, k) times (k,), (k, n) or (..., k, n), or of two vectors."""
    return 2 * prod(left) * (right[-1] if len(right) > 1 else 1)


def _added_product(_added: Shape, left: Shape, right: Shape, *_: Any) -> int:
    return _matrix_product(left, right)


def _convolution_backward(gradient: Shape, inputs: Shape, weight: Shape, *options: Any) -> int:
    """The gradients of the input and of the weight each cost as much as the convolution."""
    transposed, output_mask = options[4], options[7]
    positions = prod((inputs if transposed else gradient)[2:])
    return int(2 * inputs[0] * positions * prod(weight) * sum(output_mask[:2]))


def _attention(query: Shape, key: Shape, value: Shape, *_: Any) -> int:
    return int(sdpa_flop_count(query, key, value))


def _attention_backward(gradient: Shape, query: Shape, key: Shape, value: Shape, *_: Any) -> int:
    return int(sdpa_backward_flop_count(gradient, query, key, value))


aten = torch.ops.aten
_FORMULAS: dict[Any, Callable[..., int]] = {
    # torch's own formula counts the weight's gradient once too often for each group.
    aten.convolution_backward: _convolution_backward,
    # Products that torch's registry lacks, the fused ones on the CPU before torch 2.15.
    aten._scaled_dot_product_flash_attention_for_cpu: _attention,
    aten._scaled_dot_product_flash_attention_for_cpu_backward: _attention_backward,
    aten.mv: _matrix_product,
    aten.dot: _matrix_product,
    aten.vdot: _matrix_product,
    aten.addmv: _added_product,
    aten.addmv_: _added_product,
    aten.addmm_: _added_product,
    aten.addbmm: _added_product,
    aten.addbmm_: _added_product,
    aten.baddbmm_: _added_product,
}
_MULTIPLIES = re.compile(
    r"(?:^|_)(?:\w?\w?\w?\w?b?mm|\w*matmul|conv(?!ert)\w*|convolution|linear|trilinear|attention"
    r"|transformer|rnn|lstm|gru|cdist)(?:_|$)"
)


def _check_countable(packet: Any) -> None:
    if _MULTIPLIES.search(packet.__name__):
        raise NotImplementedError(
            f"the operations of {packet} can't be counted: torch.utils.flop_counter has no formula "
            "for it; run the model without this fused kernel"
        )
