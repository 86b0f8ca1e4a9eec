"""The compatibility check passes for a dozen timm families, and fails where it must."""

import re

import pytest
import torch
from torch import nn
from torch.autograd.function import once_differentiable

from backfold.backbone import as_positions
from backfold.energy import EnergyModel
from compatibility import check_compatibility

SMALL_SWIN = {"depths": (1, 1, 2), "num_heads": (1, 2, 4), "embed_dim": 16}
FAMILIES = {
    "ViT": ("test_vit", 32, {}),
    "DeiT III": ("deit3_small_patch16_224", 32, {"depth": 2}),
    "EVA-02, rotary": ("eva02_tiny_patch14_224", 28, {"depth": 2}),
    "DINOv3, rotary": ("vit_tiny_patch16_dinov3_qkvb", 32, {"depth": 2}),
    "Swin": ("swin_tiny_patch4_window7_224", 32, SMALL_SWIN),
    "Swin V2": ("swinv2_tiny_window8_256", 32, SMALL_SWIN),
    "MaxViT": ("test_maxvit", 64, {}),
    "ConvNeXt": ("test_convnext", 64, {}),
    "ConvNeXt V2": ("convnextv2_atto", 64, {}),
    "ResNet": ("test_resnet", 48, {}),
    "RegNet": ("regnetx_002", 48, {}),
    "EfficientNet": ("test_efficientnet", 48, {}),
    "MobileNet V4": ("mobilenetv4_conv_small_035", 48, {}),
    "LeViT, batch norm of tokens": ("levit_128s", 96, {}),
    "CoaT, parallel branches": ("coat_tiny", 32, {"serial_depths": (1,) * 4, "parallel_depth": 1}),
    "MobileNet V3, hard sigmoids": ("lcnet_035", 48, {}),
}


@pytest.mark.parametrize("family", FAMILIES)
def test_family_is_an_energy_function(family):
    name, side, options = FAMILIES[family]
    torch.manual_seed(0)
    model = EnergyModel(name, image_size=side, backbone_options=options)
    result = check_compatibility(model, (side, side))
    assert result.reason == ""


def test_only_the_last_norms_bias_of_a_vit_gets_no_gradient():
    result = check_compatibility(EnergyModel("test_vit", image_size=32), (32, 32))
    assert result.without_gradient == ("norm.bias",)


class Toy(nn.Module):
    """Two convolutions with a smooth nonlinearity between, which subclasses replace."""

    def __init__(self):
        super().__init__()
        torch.manual_seed(0)
        self.first = nn.Conv2d(3, 8, 3, padding=1)
        self.last = nn.Conv2d(8, 8, 3, padding=1)
        self.log_scale = nn.Parameter(torch.zeros(1))

    def forward(self, images):
        return self.last(self.between(self.first(images)))

    def between(self, features):
        return torch.tanh(features) * self.log_scale.exp()


class BatchStatistics(Toy):
    def between(self, features):
        return super().between(features + features.mean(dim=0))


class DetachedScale(Toy):
    def between(self, features):
        return torch.tanh(features) * self.log_scale.detach().exp()


class NotANumber(Toy):
    def between(self, features):
        return super().between(features) * float("nan")


class HiddenByZero(Toy):
    """The scale's and the first convolution's gradients are zero until the second one moves."""

    def __init__(self):
        super().__init__()
        nn.init.zeros_(self.last.weight)

    def forward(self, images):
        features = self.first(images)
        return features + self.last(self.between(features))


class CastToFloat32(Toy):
    def between(self, features):
        return super().between(features).float().sin().to(features.dtype)


class _OnceDifferentiable(torch.autograd.Function):
    @staticmethod
    def forward(ctx, inputs):
        ctx.save_for_backward(inputs)
        return inputs.sin()

    @staticmethod
    @once_differentiable
    def backward(ctx, gradient):
        (inputs,) = ctx.saved_tensors
        return gradient * inputs.cos()


class _WrongSecondDerivative(_OnceDifferentiable):
    @staticmethod
    def backward(ctx, gradient):
        (inputs,) = ctx.saved_tensors
        return gradient * inputs.detach().cos()


class _WrongFirstDerivative(_OnceDifferentiable):
    @staticmethod
    def backward(ctx, gradient):
        (inputs,) = ctx.saved_tensors
        return gradient * inputs.sin()


def toy_with(function):
    toy = Toy()
    toy.between = lambda features: function.apply(features) * toy.log_scale.exp()
    return toy


def check(toy):
    return check_compatibility(EnergyModel(toy, image_size=8), (8, 8))


def test_toy_passes_and_its_last_bias_gets_no_gradient():
    result = check(Toy())
    assert result.ok
    assert result.without_gradient == ("last.bias",)
    assert result.derivative_error < 1e-5


@pytest.mark.parametrize(
    ("toy", "failed", "reason"),
    [
        (BatchStatistics(), "independent", "with the other images of its batch"),
        (DetachedScale(), "second_order", "though the energy's gradient depends on it"),
        (toy_with(_OnceDifferentiable), "second_order", "once_differentiable"),
        (toy_with(_WrongSecondDerivative), "second_order", "off its finite difference|no gradient"),
        (toy_with(_WrongFirstDerivative), "finite_gradient", "gradient is off its finite diff"),
        (NotANumber(), "finite_energies", "^an energy is not finite$"),
    ],
)
def test_what_is_wrong_is_found_and_named(toy, failed, reason):
    result = check(toy)
    assert re.search(reason, result.reason)
    checks = ("finite_energies", "finite_gradient", "second_order", "independent")
    wrong = {name for name in checks if not getattr(result, name)}
    assert failed in wrong
    if failed in ("independent", "second_order"):  # what the others do not depend on
        assert wrong == {failed}


def test_exception_is_one_line_of_reason():
    toy = Toy()
    model = EnergyModel(toy, image_size=8)
    toy.between = lambda _: torch.zeros(2)[5]
    result = check_compatibility(model, (8, 8))
    assert not result.ok
    assert result.reason.startswith("IndexError: ")
    assert "\n" not in result.reason


def test_parameters_that_start_at_zero_hide_no_others():
    result = check(HiddenByZero())
    assert result.ok
    assert "log_scale" not in result.without_gradient


def test_casts_to_float32_cost_the_check_no_digits():
    result = check(CastToFloat32())
    assert result.ok
    assert result.derivative_error < 1e-6


def test_parameters_are_put_back_after_the_second_order_check():
    models = [EnergyModel("test_vit", image_size=32) for _ in range(2)]
    models[1].load_state_dict(models[0].state_dict())
    for model in models:
        check_compatibility(model, (32, 32), seed=3)
    for one, other in zip(models[0].parameters(), models[1].parameters(), strict=True):
        torch.testing.assert_close(one, other, rtol=1e-9, atol=1e-12)


def test_branches_of_tokens_are_joined_without_their_class_tokens():
    class Branches(nn.Module):
        def __init__(self):
            super().__init__()
            self.cls_token_0 = nn.Parameter(torch.zeros(1, 1, 2))

    fine, coarse = torch.randn(5, 4, 2), torch.randn(5, 2, 3)
    joined = as_positions(Branches(), [fine, coarse])
    assert joined.shape == (5, 3 + 1, 2 + 3)
    torch.testing.assert_close(joined[:, :3, :2], fine[:, 1:])
    torch.testing.assert_close(joined[:, 3:, 2:], coarse[:, 1:])
    assert joined[:, :3, 2:].count_nonzero() == 0
    assert joined[:, 3:, :2].count_nonzero() == 0


def test_channels_first_branches_are_told_by_the_number_of_features():
    branches = [torch.randn(5, 4, 9), torch.randn(5, 6, 1)]
    backbone = nn.Module()
    backbone.num_features = 10
    joined = as_positions(backbone, branches)
    assert joined.shape == (5, 10, 10)
    torch.testing.assert_close(joined[:, :9, :4], branches[0].transpose(1, 2))
    torch.testing.assert_close(joined[:, 9:, 4:], branches[1].transpose(1, 2))
