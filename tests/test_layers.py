"""GELU and grouped convolution, twice differentiable: held against PyTorch's own."""

import copy

import pytest
import timm
import torch
from timm.layers import Conv2dSame
from torch import nn
from torch.nn import functional as F
from torch.utils._python_dispatch import TorchDispatchMode

from backfold.layers import (
    TwiceDifferentiableConv2d,
    TwiceDifferentiableGELU,
    make_twice_differentiable,
)

GEOMETRIES = [
    {"groups": 4, "kernel_size": 2, "stride": 2, "bias": False},
    {"groups": 2, "out_channels": 6, "stride": (2, 1), "padding": (0, 2), "dilation": (1, 2)},
    {"groups": 4, "out_channels": 8, "kernel_size": (1, 3), "padding": (0, 1), "stride": 3},
    {"groups": 2, "padding": "same", "dilation": (2, 1)},
]


def pair(dtype=torch.float64, **geometry):
    """(ours, PyTorch's) with the same parameters."""
    options = {"in_channels": 4, "out_channels": 4, "kernel_size": 3, **geometry}
    plain = nn.Conv2d(**options, dtype=dtype)
    ours = copy.copy(plain)
    make_twice_differentiable(ours)
    return ours, plain


def images(dtype=torch.float64, channels=4):
    return torch.randn(2, channels, 6, 5, dtype=dtype, requires_grad=True)


def all_derivatives(module, inputs):
    """Outputs, their gradients, and the gradients of a function of all those gradients."""
    outputs = module(inputs)
    weights = torch.linspace(-1, 1, outputs.numel(), dtype=outputs.dtype).view_as(outputs)
    weights.requires_grad_()
    wanted = [inputs, *module.parameters()]
    first = torch.autograd.grad(outputs, wanted, weights, create_graph=True)
    second = torch.autograd.grad(
        sum(g.sin().sum() for g in first), [inputs, weights, *wanted[1:]], allow_unused=True
    )
    return outputs, first, second


@pytest.mark.parametrize("geometry", [*GEOMETRIES, {"groups": 4, "padding": "valid"}])
@pytest.mark.parametrize("layout", [torch.contiguous_format, torch.channels_last])
def test_all_derivatives_equal_those_of_pytorch(geometry, layout):
    inputs = images().detach().to(memory_format=layout).requires_grad_()
    ours, expected = (all_derivatives(module, inputs) for module in pair(**geometry))
    torch.testing.assert_close(ours, expected, rtol=1e-12, atol=1e-12)
    assert ours[0].stride() == expected[0].stride()


def test_bf16_autocast_gives_what_it_gives_pytorch():
    inputs = images(torch.float32)
    results = []
    for module in pair(torch.float32, groups=4, padding=1):
        with torch.autocast("cpu", dtype=torch.bfloat16):
            results.append(all_derivatives(module, inputs))
    ours, expected = results
    assert ours[0].dtype == torch.bfloat16
    assert ours[2][0].dtype == torch.float32
    torch.testing.assert_close(ours, expected, rtol=0.02, atol=0.02)


@pytest.mark.parametrize(
    "frozen", [["inputs"], ["weight"], ["bias"], ["weight", "bias"], ["inputs", "weight"]]
)
def test_what_is_frozen_gets_no_gradient_and_all_else_its_own(frozen):
    results = []
    for module in pair(groups=2, padding=1):
        leaves = {"inputs": images().detach().fill_(0.5), **dict(module.named_parameters())}
        for name, leaf in leaves.items():
            leaf.requires_grad_(name not in frozen).grad = None
        outputs = F.silu(module(leaves["inputs"]), inplace=True)  # in place, as in some backbones
        asked = [leaf for leaf in leaves.values() if leaf.requires_grad]
        first = torch.autograd.grad(outputs.sin().sum(), asked, create_graph=True)
        sum(gradient.square().sum() for gradient in first).backward()
        results.append([leaf.grad for leaf in leaves.values()])
    assert [gradient is None for gradient in results[0]] == [name in frozen for name in leaves]
    torch.testing.assert_close(*results)


def test_functional_gradients_see_through_it():
    inputs = images().detach()

    def slopes(module):
        """Derivatives of a function of the energy's gradient with respect to the points."""

        def slope(parameters, points):
            def energy(points):
                return torch.func.functional_call(module, parameters, points).sin().sum()

            return torch.func.grad(energy)(points).sin().sum()

        parameters = {name: value.detach() for name, value in module.named_parameters()}
        return torch.func.grad(slope, argnums=(0, 1))(parameters, inputs)

    ours, plain = pair(groups=2, padding=1)
    torch.testing.assert_close(slopes(ours), slopes(plain))


class Convolutions(TorchDispatchMode):
    """Counts them, forward and backward."""

    count = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        self.count += "convolution" in func.name()
        return func(*args, **(kwargs or {}))


def test_the_double_backward_does_not_grow_with_the_groups():
    found = []
    for module in pair(torch.float32, in_channels=16, out_channels=16, groups=16):
        inputs = images(torch.float32, 16)
        outputs = module(inputs).sin().sum()
        with Convolutions() as used:
            (gradient,) = torch.autograd.grad(outputs, inputs, create_graph=True)
            gradient.square().sum().backward()
        found.append(used.count)
    ours, plain = found
    assert ours < 6 < 16 < plain


def test_only_plain_grouped_convolutions_are_replaced():
    layers = nn.Sequential(
        nn.Conv2d(4, 4, 3, groups=4),
        nn.Sequential(nn.Conv2d(4, 8, 3, groups=2, padding="same")),
        nn.Conv2d(8, 8, 3),
        nn.Conv2d(8, 8, 3, groups=8, padding=1, padding_mode="reflect"),
        Conv2dSame(8, 8, 3, stride=2, groups=8),
        nn.ConvTranspose2d(8, 8, 3, groups=8),
    )
    layers[0].register_forward_hook(lambda module, _, outputs: outputs * module.factor)
    layers[0].factor = 3.0
    kinds = [type(layer) for layer in layers]
    inputs = torch.randn(2, 4, 12, 12)
    before, state = layers(inputs), dict(layers.state_dict(keep_vars=True))
    make_twice_differentiable(layers)
    assert [type(layer) for layer in layers] == [TwiceDifferentiableConv2d, *kinds[1:]]
    assert type(layers[1][0]) is TwiceDifferentiableConv2d
    after = layers.state_dict(keep_vars=True)
    assert list(after) == list(state)
    assert all(after[key] is value for key, value in state.items())
    for module in (layers, copy.deepcopy(layers)):
        assert torch.equal(module(inputs), before)


def test_a_compiled_or_exported_graph_has_the_plain_convolution():
    ours, plain = pair(torch.float32, groups=4)
    seen = []

    def record(graph, _):
        seen.extend(node.target for node in graph.graph.nodes if node.op == "call_function")
        return graph.forward

    inputs = images(torch.float32)
    compiled = torch.compile(ours, backend=record, fullgraph=True)
    assert torch.equal(compiled(inputs), plain(inputs))
    assert seen == [torch.conv2d]
    exported = torch.export.export(ours, (inputs,)).graph.nodes
    assert [node.target for node in exported].count(torch.ops.aten.conv2d.default) == 1


@pytest.mark.parametrize(
    ("dtype", "tolerance"), [(torch.float64, 1e-12), (torch.float32, 1e-5), (torch.bfloat16, 0.05)]
)
def test_gelus_derivatives_equal_those_of_pytorch(dtype, tolerance):
    inputs = torch.linspace(-6, 6, 101, dtype=dtype).requires_grad_()
    weight = torch.randn(101, dtype=dtype, requires_grad=True)
    results = []
    for gelu in (TwiceDifferentiableGELU(), F.gelu):
        outputs = gelu(inputs)
        (gradient,) = torch.autograd.grad(outputs, inputs, weight, create_graph=True)
        second = torch.autograd.grad(gradient.sin().sum(), [inputs, weight])
        results.append([outputs, gradient, *second])
    torch.testing.assert_close(*results, rtol=tolerance, atol=tolerance)


def test_only_exact_gelus_are_replaced():
    others = nn.GELU(approximate="tanh"), timm.layers.GELUTanh(), nn.SiLU()
    layers = nn.Sequential(nn.GELU(), timm.layers.GELU(), *others)
    kinds = [type(layer) for layer in others]
    make_twice_differentiable(layers)
    assert [type(layer) for layer in layers] == [*[TwiceDifferentiableGELU] * 2, *kinds]


def test_hard_sigmoids_become_twice_differentiable_and_keep_their_values():
    layers = nn.Sequential(nn.Sequential(nn.Hardsigmoid()), nn.Hardsigmoid())
    values = torch.linspace(-5, 5, 41, dtype=torch.float64)
    expected = layers(values)
    make_twice_differentiable(layers)
    torch.testing.assert_close(layers(values), expected)
    inside = torch.tensor([-1.3, 0.4, 2.0], dtype=torch.float64, requires_grad=True)
    assert torch.autograd.gradgradcheck(lambda x: layers(x * x), inside)
