"""Grouped convolutions whose second derivative is a few convolutions, where PyTorch's is a loop.

PyTorch's double backward of a convolution with groups computes the weight's part one group after
another: thousands of tiny convolutions in the restoration step of a ConvNeXt. Nothing in the
mathematics asks for it. With the trilinear form T(g, x, w) = <g, conv(x, w)>,

    conv(x, w) = dT/dg,   input_gradient(g, w) = dT/dx,   weight_gradient(g, x) = dT/dw,

and each of the three has the other two as its derivatives, to any order, all with groups.
`torch.compile` gets PyTorch's own convolution instead: it traced these Functions inside
`torch.func.grad` without a word, and to wrong gradients (torch 2.15).
"""

from typing import Any, NamedTuple, Self, TypeGuard

import torch
from torch import Tensor, nn
from torch.nn import functional as F


class TwiceDifferentiableConv2d(nn.Conv2d):
    """`nn.Conv2d` with groups: (batch, channels, height, width) -> (batch, out_channels, ...)."""

    @classmethod
    def sharing(cls, convolution: nn.Conv2d) -> Self:
        """One with the parameters, hooks and attributes of another: the same objects."""
        made = cls.__new__(cls)
        made.__dict__.update(convolution.__dict__)
        return made

    def forward(self, input: Tensor) -> Tensor:
        """As `nn.Conv2d`."""
        geometry = _geometry(self)
        is_plain = torch.compiler.is_compiling() or not torch.is_grad_enabled()
        if is_plain or geometry is None or input.ndim != 4:
            return super().forward(input)
        return _convolve(*_autocast(input, self.weight, self.bias), geometry)


def is_plain_grouped(module: nn.Module) -> TypeGuard[nn.Conv2d]:
    """Whether this is an `nn.Conv2d` itself, no subclass, that `TwiceDifferentiableConv2d` equals.

    It has groups, and pads with zeros, on both sides alike.
    """
    return type(module) is nn.Conv2d and _geometry(module) is not None


class _Geometry(NamedTuple):
    stride: tuple[int, ...]
    padding: tuple[int, ...]
    dilation: tuple[int, ...]
    groups: int


def _geometry(convolution: nn.Conv2d) -> _Geometry | None:
    """None for what is left to PyTorch."""
    if convolution.groups == 1 or convolution.padding_mode != "zeros":
        return None
    padding = convolution.padding
    if isinstance(padding, str):
        reach = zip(convolution.dilation, convolution.kernel_size, strict=True)
        both = [gap * (kernel - 1) if padding == "same" else 0 for gap, kernel in reach]
        if any(total % 2 for total in both):
            return None
        padding = tuple(total // 2 for total in both)
    return _Geometry(convolution.stride, padding, convolution.dilation, convolution.groups)


def _autocast(
    inputs: Tensor, weight: Tensor, bias: Tensor | None
) -> tuple[Tensor, Tensor, Tensor | None]:
    """In the precision that autocast has for convolutions, which it can't see in a Function."""
    device = inputs.device.type
    if not torch.amp.is_autocast_available(device) or not torch.is_autocast_enabled(device):
        return inputs, weight, bias
    dtype = torch.get_autocast_dtype(device)

    def cast(tensor: Tensor) -> Tensor:
        return tensor if tensor.dtype == torch.float64 else tensor.to(dtype)

    return cast(inputs), cast(weight), None if bias is None else cast(bias)


def _convolve(inputs: Tensor, weight: Tensor, bias: Tensor | None, geometry: _Geometry) -> Tensor:
    if not torch.is_grad_enabled():
        return F.conv2d(inputs, weight, bias, *geometry)
    edges = _Parameters.apply(weight, bias, inputs.detach(), geometry)
    outputs: Tensor = _Convolution.apply(inputs, weight, bias, *edges, geometry)
    return outputs


class _Convolution(torch.autograd.Function):
    """conv(inputs, weight) + bias, whose own backward pass is towards the inputs alone.

    A Function can't know which of its gradients are asked for. So those of the parameters are a
    node of their own, `_Parameters`, to which no path to the images leads.
    """

    generate_vmap_rule = True

    @staticmethod
    def forward(
        inputs: Tensor,
        weight: Tensor,
        bias: Tensor | None,
        output_edge: Tensor,  # noqa: ARG004
        input_edge: Tensor,  # noqa: ARG004
        geometry: _Geometry,
    ) -> Tensor:
        return F.conv2d(inputs, weight, bias, *geometry)

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:  # noqa: ARG004
        ctx.save_for_backward(*inputs[:2])
        ctx.geometry = inputs[-1]

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor | None, ...]:
        inputs, weight = ctx.saved_tensors
        (gradient,) = gradients
        result = None
        if ctx.needs_input_grad[0]:
            result = _InputGradient.apply(gradient, inputs.detach(), weight, ctx.geometry)
        return result, None, None, gradient, inputs, None


class _Parameters(torch.autograd.Function):
    """Two edges to the parameters: zeros shaped as outputs and inputs, which take no memory.

    What `_Convolution` sends back along them is the outputs' gradient and, to be multiplied with
    it, the inputs. Were the inputs an input of this node, it would lie on a path to the images.
    """

    generate_vmap_rule = True

    @staticmethod
    def forward(
        weight: Tensor, bias: Tensor | None, inputs: Tensor, geometry: _Geometry
    ) -> tuple[Tensor, Tensor]:
        # Of all three: what vmap maps over in one of them, it must map over in the edges.
        zero = inputs.new_zeros(()) + weight.new_zeros(())
        if bias is not None:
            zero = zero + bias.new_zeros(())
        shape = _output_shape(inputs, weight, geometry)
        return zero.expand(shape), zero.expand_as(inputs)

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, Tensor]) -> None:  # noqa: ARG004
        ctx.save_for_backward(inputs[0])
        ctx.geometry = inputs[-1]

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor | None, ...]:
        (weight,) = ctx.saved_tensors
        gradient, inputs = gradients
        for_weight = for_bias = None
        if ctx.needs_input_grad[0]:
            for_weight = _WeightGradient.apply(gradient, inputs, weight.detach(), ctx.geometry)
        if ctx.needs_input_grad[1]:
            for_bias = gradient.sum(dim=(0, 2, 3))
        return for_weight, for_bias, None, None


class _InputGradient(torch.autograd.Function):
    """The gradient of inputs, of which only the shape counts, differentiable in the other two."""

    generate_vmap_rule = True

    @staticmethod
    def forward(gradient: Tensor, inputs: Tensor, weight: Tensor, geometry: _Geometry) -> Tensor:
        return _gradient(0, gradient, inputs, weight, geometry)

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:  # noqa: ARG004
        gradient, _, weight, ctx.geometry = inputs
        ctx.save_for_backward(gradient, weight)

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor | None, ...]:
        gradient, weight = ctx.saved_tensors
        (second,) = gradients
        for_gradient = for_weight = None
        if ctx.needs_input_grad[0]:
            for_gradient = _convolve(second, weight, None, ctx.geometry)
        if ctx.needs_input_grad[2]:
            for_weight = _WeightGradient.apply(gradient, second, weight.detach(), ctx.geometry)
        return for_gradient, None, for_weight, None


class _WeightGradient(torch.autograd.Function):
    """The gradient of a weight, of which only the shape counts, differentiable in the other two."""

    generate_vmap_rule = True

    @staticmethod
    def forward(gradient: Tensor, inputs: Tensor, weight: Tensor, geometry: _Geometry) -> Tensor:
        return _gradient(1, gradient, inputs, weight, geometry)

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:  # noqa: ARG004
        gradient, values, _, ctx.geometry = inputs
        ctx.save_for_backward(gradient, values)

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor | None, ...]:
        gradient, inputs = ctx.saved_tensors
        (second,) = gradients
        for_gradient = for_inputs = None
        if ctx.needs_input_grad[0]:
            for_gradient = _convolve(inputs, second, None, ctx.geometry)
        if ctx.needs_input_grad[1]:
            for_inputs = _InputGradient.apply(gradient, inputs.detach(), second, ctx.geometry)
        return for_gradient, for_inputs, None, None


def _gradient(
    index: int, gradient: Tensor, inputs: Tensor, weight: Tensor, geometry: _Geometry
) -> Tensor:
    """The gradient of the inputs (index 0) or of the weight (1)."""
    stride, padding, dilation, groups = geometry
    asked = [index == 0, index == 1, False]
    options = (None, stride, padding, dilation, False, (0, 0), groups, asked)
    results = torch.ops.aten.convolution_backward(gradient, inputs, weight, *options)
    result: Tensor = results[index]
    return result


def _output_shape(inputs: Tensor, weight: Tensor, geometry: _Geometry) -> tuple[int, ...]:
    stride, padding, dilation, _ = geometry
    sides = (
        (side + 2 * pad - gap * (kernel - 1) - 1) // step + 1
        for side, kernel, step, pad, gap in zip(
            inputs.shape[2:], weight.shape[2:], stride, padding, dilation, strict=True
        )
    )
    return (len(inputs), len(weight), *sides)
