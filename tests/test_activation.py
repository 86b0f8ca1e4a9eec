import pytest
import timm
import torch
from torch import nn
from torch.nn import functional as F

from backfold.activation import TwiceDifferentiableGELU
from backfold.backbone import make_twice_differentiable


def test_first_and_second_derivatives_agree_with_finite_differences():
    gelu = TwiceDifferentiableGELU()
    inputs = torch.randn(3, 7, dtype=torch.float64, requires_grad=True)
    assert torch.autograd.gradcheck(gelu, (inputs,))
    assert torch.autograd.gradgradcheck(gelu, (inputs,))


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16])
def test_all_derivatives_equal_those_of_pytorch(dtype):
    inputs = torch.linspace(-6, 6, 101, dtype=dtype).requires_grad_()
    weight = torch.randn(101, dtype=dtype, requires_grad=True)
    results = []
    for gelu in (TwiceDifferentiableGELU(), F.gelu):
        outputs = gelu(inputs)
        (gradient,) = torch.autograd.grad(outputs, inputs, weight, create_graph=True)
        results.append(
            (outputs, gradient, *torch.autograd.grad(gradient.sin().sum(), [inputs, weight]))
        )
    tolerance = {torch.float64: 1e-12, torch.float32: 1e-5, torch.bfloat16: 0.05}[dtype]
    for ours, expected in zip(*results, strict=True):
        torch.testing.assert_close(ours, expected, rtol=tolerance, atol=tolerance)


def test_functional_transforms_see_through_it():
    inputs = torch.randn(5, dtype=torch.float64)

    def slope(gelu):
        return torch.func.grad(lambda x: torch.func.grad(lambda y: gelu(y).sum())(x).sin().sum())

    torch.testing.assert_close(slope(TwiceDifferentiableGELU())(inputs), slope(F.gelu)(inputs))


def test_only_exact_gelus_are_replaced():
    layers = nn.Sequential(
        nn.GELU(),
        timm.layers.GELU(),
        nn.GELU(approximate="tanh"),
        timm.layers.GELUTanh(),
        nn.SiLU(),
    )
    before = layers(inputs := torch.randn(20))
    make_twice_differentiable(layers)
    kinds = [type(layer) for layer in layers]
    assert kinds[:2] == [TwiceDifferentiableGELU] * 2
    assert kinds[2:] == [nn.GELU, timm.layers.GELUTanh, nn.SiLU]
    assert torch.equal(layers(inputs), before)
