"""Layers with a cheap second derivative, in place of PyTorch's own: GELU and grouped convolution.

PyTorch differentiates its GELU's gradient by a chain of element-wise operations, each with a new
tensor: a quarter of the whole restoration step of a small ViT on a CPU. Written out,

    gelu(x) = x Phi(x),   gelu'(x) = Phi(x) + x phi(x),   gelu''(x) = (2 - x^2) phi(x),

with the normal distribution Phi and its density phi, it takes two kernels and a few operations in
place.

PyTorch's double backward of a convolution with groups computes the weight's part one group after
another: thousands of tiny convolutions in the restoration step of a ConvNeXt. Nothing in the
mathematics asks for it. With the trilinear form T(g, x, w) = <g, conv(x, w)>,

    conv(x, w) = dT/dg,   input_gradient(g, w) = dT/dx,   weight_gradient(g, x) = dT/dw,

and each of the three has the other two as its derivatives, all with groups.

`torch.compile` gets PyTorch's own layers: it fuses the chain, and it traced these convolutions
inside `torch.func.grad` without a word, and to wrong gradients (torch 2.15).
"""

import math
from typing import Any

import timm.layers
import torch
from torch import Tensor, nn
from torch.nn import functional as F

DENSITY_AT_0 = 1 / math.sqrt(2 * math.pi)

Geometry = tuple[tuple[int, ...], tuple[int, ...], tuple[int, ...], int]
"""Stride, padding, dilation and groups."""


def make_twice_differentiable(backbone: nn.Module) -> None:
    """Make layers, in place, equals of theirs whose second derivative exists, or is cheaper."""
    for module in backbone.modules():
        equal = EQUALS.get(type(module))
        if equal is TwiceDifferentiableConv2d and not _is_plain_grouped(module):
            continue
        if equal is not None and getattr(module, "approximate", "none") == "none":
            module.__class__ = equal


def _takes_plain() -> bool:
    return torch.compiler.is_compiling() or not torch.is_grad_enabled()


class _HardSigmoid(nn.Module):
    """As `nn.Hardsigmoid`, which has no second derivative."""

    def forward(self, inputs: Tensor) -> Tensor:
        return F.relu6(inputs + 3.0) / 6.0


class TwiceDifferentiableGELU(nn.Module):
    """The exact GELU (not its tanh approximation): any shape -> the same shape."""

    def forward(self, inputs: Tensor) -> Tensor:
        """GELU of each element."""
        if _takes_plain():
            return F.gelu(inputs)
        outputs: Tensor = _Gelu.apply(inputs)
        return outputs


class _Gelu(torch.autograd.Function):
    @staticmethod
    def forward(inputs: Tensor) -> Tensor:
        return F.gelu(inputs)

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Tensor], output: Tensor) -> None:  # noqa: ARG004
        ctx.save_for_backward(inputs[0])

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> Tensor:
        (inputs,) = ctx.saved_tensors
        result: Tensor = _GeluGradient.apply(gradients[0], inputs)
        return result


class _GeluGradient(torch.autograd.Function):
    """gradient * gelu'(inputs), itself differentiable in both."""

    @staticmethod
    def forward(gradient: Tensor, inputs: Tensor) -> Tensor:
        product: Tensor = torch.ops.aten.gelu_backward(gradient, inputs)
        return product

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Tensor, Tensor], output: Tensor) -> None:  # noqa: ARG004
        ctx.save_for_backward(*inputs)

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor, Tensor]:
        gradient, inputs = ctx.saved_tensors
        (second,) = gradients
        curvature = inputs.square()
        density = curvature.mul(-0.5).exp_()
        curvature.sub_(2).mul_(density).mul_(-DENSITY_AT_0).mul_(gradient).mul_(second)
        return torch.ops.aten.gelu_backward(second, inputs), curvature


class TwiceDifferentiableConv2d(nn.Conv2d):
    """`nn.Conv2d` with groups: (batch, channels, height, width) -> (batch, out_channels, ...)."""

    def forward(self, input: Tensor) -> Tensor:
        """As `nn.Conv2d`."""
        if _takes_plain() or input.ndim != 4:
            return super().forward(input)
        left, _, top, _ = self._reversed_padding_repeated_twice
        geometry: Geometry = (self.stride, (top, left), self.dilation, self.groups)
        inputs, weight, bias = (_autocast(each) for each in (input, self.weight, self.bias))
        edges = _Parameters.apply(weight, bias, inputs.detach(), geometry)
        outputs: Tensor = _Convolution.apply(*edges, inputs, weight, geometry)
        return outputs


def _is_plain_grouped(module: Any) -> bool:
    """Whether a convolution has groups, and zeros around it, on both sides alike."""
    pads = module._reversed_padding_repeated_twice  # left, right, top, bottom
    return bool(module.groups > 1 and module.padding_mode == "zeros" and pads[::2] == pads[1::2])


def _autocast(tensor: Any) -> Any:
    """In the precision that autocast has for convolutions, which it can't see in a Function."""
    if tensor is None or tensor.dtype == torch.float64:
        return tensor
    device = tensor.device.type
    if not torch.amp.is_autocast_available(device) or not torch.is_autocast_enabled(device):
        return tensor
    return tensor.to(torch.get_autocast_dtype(device))


class _Parameters(torch.autograd.Function):
    """The convolution's outputs, with an edge to the parameters alone; and zeros as the inputs.

    What `_Convolution` sends back along them is the outputs' gradient and, to be multiplied with
    it, the inputs. Were the inputs an input of this node, it would lie on a path to the images.
    """

    @staticmethod
    def forward(
        weight: Tensor, bias: Tensor | None, inputs: Tensor, geometry: Geometry
    ) -> tuple[Tensor, Tensor]:
        outputs = F.conv2d(inputs, weight, bias, *geometry)
        return outputs, inputs.new_zeros(()).expand_as(inputs)  # which takes no memory

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
            for_weight = _Gradient.apply(1, gradient, inputs, weight.detach(), ctx.geometry)
        if ctx.needs_input_grad[1]:
            for_bias = gradient.sum(dim=(0, 2, 3))
        return for_weight, for_bias, None, None


class _Convolution(torch.autograd.Function):
    """The outputs, whose own backward pass is towards the inputs alone.

    A Function can't know which of its gradients are asked for. So those of the parameters are a
    node of their own, `_Parameters`, to which no path to the images leads.
    """

    @staticmethod
    def forward(outputs: Tensor, *_: Any) -> Tensor:
        return outputs.detach()

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:  # noqa: ARG004
        _, _, *tensors, ctx.geometry = inputs
        ctx.save_for_backward(*tensors)

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor | None, ...]:
        inputs, weight = ctx.saved_tensors
        (gradient,) = gradients
        result = None
        if ctx.needs_input_grad[2]:
            result = _Gradient.apply(0, gradient, inputs.detach(), weight, ctx.geometry)
        return gradient, inputs, result, None, None


class _Gradient(torch.autograd.Function):
    """dT/dx (``index`` 0) or dT/dw (1) of the trilinear form, of which x or w gives the shape."""

    @staticmethod
    def forward(
        index: int, gradient: Tensor, inputs: Tensor, weight: Tensor, geometry: Geometry
    ) -> Tensor:
        stride, padding, dilation, groups = geometry
        asked = [index == 0, index == 1, False]
        options = (None, stride, padding, dilation, False, (0, 0), groups, asked)
        results = torch.ops.aten.convolution_backward(gradient, inputs, weight, *options)
        result: Tensor = results[index]
        return result

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:  # noqa: ARG004
        ctx.index, *tensors, ctx.geometry = inputs
        ctx.save_for_backward(*tensors)

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor | None, ...]:
        gradient, *factors = ctx.saved_tensors  # inputs and weight
        (factors[ctx.index],) = gradients
        other = 1 - ctx.index
        results: list[Tensor | None] = [None, None, None]
        if ctx.needs_input_grad[1]:
            results[0] = F.conv2d(factors[0], factors[1], None, *ctx.geometry)
        if ctx.needs_input_grad[2 + other]:
            factors[other] = factors[other].detach()
            results[1 + other] = _Gradient.apply(other, gradient, *factors, ctx.geometry)
        return None, *results, None


EQUALS: dict[type[nn.Module], type[nn.Module]] = {
    nn.Hardsigmoid: _HardSigmoid,
    nn.GELU: TwiceDifferentiableGELU,
    timm.layers.GELU: TwiceDifferentiableGELU,
    nn.Conv2d: TwiceDifferentiableConv2d,
}
