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


@pytest.fixture(autouse=True)
def _seed():
    torch.manual_seed(0)


def vit(side=32, **arguments):
    name = "vit_tiny_patch16_224"
    return EnergyModel(name, image_size=side, backbone_options=VIT, **arguments)


class ConvNet(nn.Module):
    """A user's own backbone: a feature map of 5 features at half the resolution."""

    def __init__(self, channels=3):
        super().__init__()
        self.layers = nn.Sequential(
            nn.Conv2d(channels, 8, 3, stride=2, padding=1),
            nn.BatchNorm2d(8),
            nn.Dropout(0.3),
            nn.GELU(),
            nn.Conv2d(8, 5, 3, padding=1),
        )

    def forward(self, images):
        return self.layers(images)


def test_the_energy_is_the_sum_over_positions():
    model = vit().eval().double()
    images = torch.randn(3, 3, 32, 32, dtype=torch.float64)
    tokens = model.backbone.forward_features(images)[:, 1:]
    weight = model.head.weight
    assert tokens.shape == (3, 16, 24)
    expected = [sum((weight * feature).sum() for feature in image) for image in tokens]
    torch.testing.assert_close(model(images), torch.stack(expected))


def test_the_head_sums_in_float32_at_least():
    head = LinearHead(4)
    features = torch.randn(2, 3, 4).bfloat16()
    assert head(features).dtype == torch.float32
    torch.testing.assert_close(head(features), head(features.float()))
    assert head.double()(features.double()).dtype == torch.float64


@pytest.mark.parametrize(
    ("name", "side", "options", "other_side"),
    [
        ("vit_tiny_patch16_224", 32, VIT, None),
        ("vit_tiny_patch16_224", 96, VIT, None),
        ("swin_tiny_patch4_window7_224", 32, SWIN, None),
        ("swin_tiny_patch4_window7_224", 112, SWIN, None),
        ("convnext_atto", 64, {"depths": (1, 1, 2, 1)}, 224),
        ("resnet10t", 64, {}, 224),
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
    model.backbone.layers[2].eval()  # the dropout
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
    assert first.keys() == same.keys()
    assert all(torch.equal(first[key], same[key]) for key in first)
    assert not torch.equal(first["head.weight"], other["head.weight"])
    # The first calibration's images also set how loud the positions are.
    seeded = {"head.weight", "backbone.pos_embed"}
    assert all(torch.equal(first[key], other[key]) for key in first.keys() - seeded)
    ratio = first["backbone.pos_embed"] / other["backbone.pos_embed"]
    torch.testing.assert_close(ratio, torch.ones_like(ratio) * ratio.mean())


def test_building_draws_from_no_global_generator_but_for_the_backbones_weights(monkeypatch):
    seeded_on_cuda = []
    monkeypatch.setattr(torch.cuda, "manual_seed_all", seeded_on_cuda.append)
    backbone, state = ConvNet(), torch.get_rng_state()
    EnergyModel(backbone, image_size=16)
    assert torch.equal(torch.get_rng_state(), state)
    timm.create_model("test_resnet", num_classes=0)
    expected = torch.get_rng_state()
    torch.set_rng_state(state)
    EnergyModel("test_resnet", image_size=32)
    assert torch.equal(torch.get_rng_state(), expected)
    assert seeded_on_cuda == []


def test_a_users_module_is_used_as_it_is():
    backbone = ConvNet()
    before = {key: value.clone() for key, value in backbone.state_dict().items()}
    model = EnergyModel(backbone, image_size=(16, 24))
    assert model.backbone is backbone
    after = backbone.state_dict()
    assert all(torch.equal(after[key], before[key]) for key in before)
    assert all(parameter.grad is None for parameter in model.parameters())
    images = torch.randn(2, 3, 16, 24)
    expected = torch.einsum("bfyx,f->b", model.eval().backbone(images), model.head.weight)
    torch.testing.assert_close(model(images), expected)
    assert restore(model, images, num_steps=2).status.ok


def test_a_users_module_keeps_its_dtype_and_may_have_no_parameters():
    model = EnergyModel(ConvNet().double(), image_size=16)
    assert model.head.weight.dtype == torch.float64
    assert model(torch.randn(2, 3, 16, 16, dtype=torch.float64)).dtype == torch.float64
    fixed = EnergyModel(nn.AvgPool2d(4), image_size=16)
    images = torch.randn(2, 3, 16, 16)
    _, gradient = energy_gradient(fixed, images)
    # Each pixel's gradient is its channel's weight over the 16 pixels that are averaged.
    torch.testing.assert_close(
        gradient, fixed.head.weight.detach().view(1, 3, 1, 1).expand(2, 3, 16, 16) / 16
    )


def test_channels_and_sizes_that_are_not_square():
    model = EnergyModel("test_vit", image_size=(32, 48), channels=1)
    assert model(torch.randn(2, 1, 32, 48)).shape == (2,)
    default = EnergyModel("vit_tiny_patch16_224", backbone_options={**VIT, "patch_size": 32})
    assert default(torch.randn(1, 3, 224, 224)).shape == (1,)


@pytest.mark.parametrize("name", ["test_vit", "test_resnet", "test_convnext"])
def test_weights_carry_timms_own_names(name):
    model = EnergyModel(name, image_size=64)
    size = {"img_size": 64} if name == "test_vit" else {}
    plain = timm.create_model(name, num_classes=0, **size)
    keys = [f"backbone.{key}" for key in plain.state_dict()]
    assert list(model.state_dict()) == [*keys, "head.weight"]
    plain.load_state_dict(model.backbone.state_dict(), strict=True)
    for key, value in plain.state_dict().items():
        assert torch.equal(value, model.backbone.state_dict()[key])


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (
            {"backbone": "resnet5O"},
            r"^unknown backbone 'resnet5O'; nearest: .*resnet50.*; `timm.list_models\(\)` lists",
        ),
        (
            {"backbone": "qqqqqqq"},
            r"^unknown backbone 'qqqqqqq'; `timm.list_models\(\)` lists all$",
        ),
        ({"backbone": "test_vit", "image_size": 40}, "40x40 is no multiple of the 16x16 patches"),
        ({"backbone": "test_vit", "image_size": 0}, "can't be built for 0x0 pixels"),
        ({"backbone": "test_resnet", "image_size": -32}, "-32x-32 is not a height and a width"),
        ({"backbone": "test_resnet", "image_size": (32, 32, 3)}, "32x32x3 is not a height and a"),
        ({"backbone": "test_convnext", "image_size": 8}, "can't take images of 3 x 8x8"),
        ({"backbone": ConvNet(), "image_size": 16, "channels": 4}, "'ConvNet' can't take images"),
        ({"backbone": nn.Flatten(0), "image_size": 8}, "Flatten gives a tensor of shape"),
    ],
)
def test_mistakes_are_named_in_one_line(arguments, message):
    with pytest.raises(UserError, match=message) as caught:
        EnergyModel(**{"image_size": 32, **arguments})
    assert "\n" not in str(caught.value)
