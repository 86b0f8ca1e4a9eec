"""The energy model: its sum by hand, its calibrated gradient, its seed, and what it refuses."""

import pytest
import timm
import torch
from torch import nn

from backfold.energy import EnergyModel, LinearHead
from backfold.errors import UserError
from backfold.restoration import energy_gradient, restore

VIT = {"patch_size": 8, "embed_dim": 24, "depth": 2, "num_heads": 2}
SWIN = {"depths": (1, 2), "num_heads": (1, 2), "embed_dim": 16}


def vit(**arguments):
    return EnergyModel("vit_tiny_patch16_224", image_size=32, backbone_options=VIT, **arguments)


class ConvNet(nn.Sequential):
    """A user's own backbone: a feature map of 5 features at half the resolution."""

    def __init__(self):
        super().__init__(
            nn.Conv2d(3, 8, 3, stride=2, padding=1),
            nn.BatchNorm2d(8),
            nn.Dropout(0.3),
            nn.GELU(),
            nn.Conv2d(8, 5, 3, padding=1),
        )


def test_the_energy_is_the_sum_over_positions():
    model = vit().eval().double()
    images = torch.randn(3, 3, 32, 32, dtype=torch.float64)
    tokens = model.backbone.forward_features(images)[:, 1:]
    weight = model.head.weight
    assert tokens.shape == (3, 16, 24)
    expected = [sum((weight * feature).sum() for feature in image) for image in tokens]
    torch.testing.assert_close(model(images), torch.stack(expected))
    half = LinearHead(24).bfloat16()  # sums in float32 at least
    torch.testing.assert_close(half(tokens.bfloat16()), half.float()(tokens.bfloat16().float()))


@pytest.mark.parametrize(
    ("name", "side", "options", "other_side"),
    [
        ("vit_tiny_patch16_224", 96, VIT, None),
        ("swin_tiny_patch4_window7_224", 32, SWIN, None),
        ("convnext_atto", 64, {"depths": (1, 1, 2, 1)}, 96),
        ("resnet10t", 64, {}, 96),
    ],
)
def test_the_gradient_is_as_large_as_the_pixels(name, side, options, other_side):
    model = EnergyModel(name, image_size=side, backbone_options=options, seed=3)
    for size in filter(None, (side, other_side)):
        energies, gradient = energy_gradient(model.eval(), torch.randn(4, 3, size, size))
        assert energies.shape == (4,)
        assert gradient.isfinite().all()
        assert 0.5 < float(gradient.square().mean().sqrt()) < 2.0


def test_calibrate_gives_a_root_mean_square_of_one_and_keeps_each_modules_mode():
    model = EnergyModel(ConvNet(), image_size=16)
    with torch.no_grad():
        model.head.weight.mul_(70.0)
    model.backbone[2].eval()  # the dropout
    modes = [module.training for module in model.modules()]
    images = 2 * torch.randn(6, 3, 16, 16) + 1
    model.calibrate(images, batch_norm=False)
    _, gradient = energy_gradient(model, images)
    assert float(gradient.square().mean().sqrt()) == pytest.approx(1.0, rel=1e-4)
    assert [module.training for module in model.modules()] == modes
    assert len(set(modes)) == 2


def test_the_same_seed_gives_the_same_bits():
    models = []
    for seed in (5, 5, 6):
        torch.manual_seed(1)
        models.append(vit(seed=seed).state_dict())
    first, same, other = models
    torch.testing.assert_close(first, same, rtol=0, atol=0)
    # The first calibration's images also set how loud the positions are.
    changed = {key for key in first if not torch.equal(first[key], other[key])}
    assert changed == {"head.weight", "backbone.pos_embed"}


def test_building_draws_from_no_global_generator_but_for_the_backbones_weights():
    backbone, state = ConvNet(), torch.get_rng_state()
    EnergyModel(backbone, image_size=16)
    assert torch.equal(torch.get_rng_state(), state)
    timm.create_model("test_resnet", num_classes=0)
    expected = torch.get_rng_state()
    torch.set_rng_state(state)
    EnergyModel("test_resnet", image_size=32)
    assert torch.equal(torch.get_rng_state(), expected)


def test_a_users_module_is_used_as_it_is():
    backbone = ConvNet()
    before = {key: value.clone() for key, value in backbone.state_dict().items()}
    model = EnergyModel(backbone, image_size=(16, 24))
    assert model.backbone is backbone
    torch.testing.assert_close(dict(backbone.state_dict()), before, rtol=0, atol=0)
    assert all(parameter.grad is None for parameter in model.parameters())
    images = torch.randn(2, 3, 16, 24)
    expected = torch.einsum("bfyx,f->b", model.eval().backbone(images), model.head.weight)
    torch.testing.assert_close(model(images), expected)
    assert restore(model, images, num_steps=2).status.ok


def test_a_users_module_may_have_no_parameters():
    assert EnergyModel(ConvNet().double(), image_size=16).head.weight.dtype == torch.float64
    fixed = EnergyModel(nn.AvgPool2d(4), image_size=16)
    images = torch.randn(2, 3, 16, 16)
    _, gradient = energy_gradient(fixed, images)
    # Each pixel's gradient is its channel's weight over the 16 pixels that are averaged.
    torch.testing.assert_close(
        gradient, fixed.head.weight.detach().view(1, 3, 1, 1).expand(2, 3, 16, 16) / 16
    )


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"backbone": "qqqqq"}, r"^unknown backbone 'qqqqq'; `timm.list_models\(\)` lists all$"),
        ({"backbone": "test_vit", "image_size": 0}, "can't be built for 0x0 pixels"),
        ({"backbone": "test_resnet", "image_size": (32, 32, 3)}, "32x32x3 is not a height and a"),
        ({"backbone": ConvNet(), "image_size": 16, "channels": 4}, "'ConvNet' can't take images"),
        ({"backbone": nn.Flatten(0), "image_size": 8}, "Flatten gives a tensor of shape"),
    ],
)
def test_mistakes_are_named_in_one_line(arguments, message):
    with pytest.raises(UserError, match=message) as caught:
        EnergyModel(**{"image_size": 32, **arguments})
    assert "\n" not in str(caught.value)
