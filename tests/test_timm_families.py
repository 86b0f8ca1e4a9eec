"""The compatibility check passes for eight timm families, and fails where it must."""

import re

import pytest
import torch
from torch import nn
from torch.autograd.function import once_differentiable

from backfold.energy import EnergyModel
from compatibility import check_compatibility

SMALL_SWIN = {"depths": (1, 1, 2), "num_heads": (1, 2, 4), "embed_dim": 16}
FAMILIES = {
    "ViT": ("test_vit", 32, {}),
    "EVA-02, rotary": ("eva02_tiny_patch14_224", 28, {"depth": 2}),
    "Swin": ("swin_tiny_patch4_window7_224", 32, SMALL_SWIN),
    "ConvNeXt": ("test_convnext", 64, {}),
    "ResNet": ("test_resnet", 48, {}),
    "EfficientNet": ("test_efficientnet", 48, {}),
    "LeViT, batch norm of tokens": ("levit_128s", 64, {}),
    "MobileNet V3, hard sigmoids": ("lcnet_035", 48, {}),
}


@pytest.mark.parametrize("family", FAMILIES)
def test_family_is_an_energy_function(family):
    name, side, options = FAMILIES[family]
    torch.manual_seed(0)
    model = EnergyModel(name, image_size=side, backbone_options=options)
    result = check_compatibility(model, (side, side))
    assert result.reason == ""
    if family == "ViT":
        assert result.without_gradient == ("norm.bias",)


class Toy(nn.Module):
    """Two convolutions, and between them what is given as a function of (toy, features)."""

    def __init__(self, between=lambda t, x: x.tanh() * t.log_scale.exp(), residual=False):
        super().__init__()
        torch.manual_seed(0)
        self.first = nn.Conv2d(3, 8, 3, padding=1)
        self.last = nn.Conv2d(8, 8, 3, padding=1)
        self.log_scale = nn.Parameter(torch.zeros(1))
        self.between, self.residual = between, residual

    def forward(self, images):
        features = self.first(images)
        return self.residual * features + self.last(self.between(self, features))


class _OnceDifferentiable(torch.autograd.Function):
    @staticmethod
    def forward(ctx, inputs):
        ctx.save_for_backward(inputs)
        return inputs.sin()

    @staticmethod
    @once_differentiable
    def backward(ctx, gradient):
        return gradient * ctx.saved_tensors[0].cos()


class _WrongSecondDerivative(_OnceDifferentiable):
    @staticmethod
    def backward(ctx, gradient):
        return gradient * ctx.saved_tensors[0].detach().cos()


class _WrongFirstDerivative(_OnceDifferentiable):
    @staticmethod
    def backward(ctx, gradient):
        return gradient * ctx.saved_tensors[0].sin()


def scaled(function):
    return lambda toy, features: function.apply(features) * toy.log_scale.exp()


def check(toy):
    return check_compatibility(EnergyModel(toy, image_size=8), (8, 8))


@pytest.mark.parametrize(
    ("between", "failed", "reason"),
    [
        (lambda t, x: x.exp() + x.mean(dim=0) * t.log_scale.exp(), "independent", "of its batch"),
        (lambda t, x: x.tanh() * t.log_scale.detach().exp(), "second_order", "though the energy's"),
        (scaled(_OnceDifferentiable), "second_order", "once_differentiable"),
        (scaled(_WrongSecondDerivative), "second_order", "off its finite difference|no gradient"),
        (scaled(_WrongFirstDerivative), "finite_gradient", "gradient is off its finite diff"),
        (lambda t, x: x.tanh() * t.log_scale * torch.nan, "finite_energies", "^an energy is not"),
    ],
)
def test_what_is_wrong_is_found_and_named(between, failed, reason):
    result = check(Toy(between))
    assert re.search(reason, result.reason)
    checks = ("finite_energies", "finite_gradient", "second_order", "independent")
    wrong = {name for name in checks if not getattr(result, name)}
    assert failed in wrong
    if failed in ("independent", "second_order"):  # what the others do not depend on
        assert wrong == {failed}


def test_sound_toys_pass_and_parameters_that_start_at_zero_hide_no_others():
    result = check(Toy())
    assert result.ok
    assert result.without_gradient == ("last.bias",)
    assert result.derivative_error < 1e-5
    toy = Toy(residual=True)
    nn.init.zeros_(toy.last.weight)  # the scale's gradient is zero until it moves
    result = check(toy)
    assert result.ok
    assert "log_scale" not in result.without_gradient
