"""Feature maps in every layout, and backbones that are built or refused."""

import pytest
import timm
import torch
from torch import nn
from torch.nn import functional as F

from backfold.backbone import (
    DEFAULT_IMAGE_SIZE,
    as_positions,
    balance_positions,
    check_image_size,
    check_options,
    create_backbone,
    default_image_size,
    feature_map,
    make_twice_differentiable,
)
from backfold.errors import UserError

VIT = {"patch_size": 8, "embed_dim": 24, "depth": 1, "num_heads": 2}
SWIN = {"depths": (1, 1), "num_heads": (1, 2), "embed_dim": 8}


@pytest.fixture(autouse=True)
def _seed():
    torch.manual_seed(0)


class Returns(nn.Module):
    """A backbone that returns what it was given to return."""

    def __init__(self, features, **attributes):
        super().__init__()
        self.features = features
        for name, value in attributes.items():
            setattr(self, name, value)

    def forward(self, _):
        return self.features


def positions_of(features, **attributes):
    return feature_map(Returns(features, **attributes), torch.zeros(2, 3, 8, 8))


def test_nchw_maps_are_read_row_by_row():
    features = torch.randn(2, 5, 3, 4)
    positions = positions_of(features)
    assert positions.shape == (2, 12, 5)
    for y in range(3):
        for x in range(4):
            assert torch.equal(positions[:, 4 * y + x], features[:, :, y, x])


def test_nhwc_maps_are_read_row_by_row():
    features = torch.randn(2, 3, 4, 5)
    positions = positions_of(features, output_fmt="NHWC")
    assert positions.shape == (2, 12, 5)
    for y in range(3):
        for x in range(4):
            assert torch.equal(positions[:, 4 * y + x], features[:, y, x])


def test_a_vector_an_image_is_one_position():
    features = torch.randn(2, 5)
    assert torch.equal(positions_of(features), features[:, None])


def test_prefix_tokens_are_left_out():
    tokens = torch.randn(2, 9, 5)
    assert torch.equal(positions_of(tokens), tokens)
    assert torch.equal(positions_of(tokens, num_prefix_tokens=3), tokens[:, 3:])
    class_tokens = nn.Parameter(torch.zeros(1, 2, 5))
    assert torch.equal(positions_of(tokens, cls_token=class_tokens), tokens[:, 2:])
    only_prefix = torch.randn(2, 1, 5)
    assert torch.equal(positions_of(only_prefix, num_prefix_tokens=1), only_prefix)


def test_of_a_list_of_feature_maps_the_last_counts():
    first, last = torch.randn(2, 5, 4, 4), torch.randn(2, 7, 2, 2)
    assert torch.equal(positions_of([first, last]), positions_of(last))


@pytest.mark.parametrize("key", ["x_norm_patchtokens", "patch_features"])
def test_dictionaries_give_their_patch_tokens(key):
    tokens = torch.randn(2, 4, 5)
    assert torch.equal(positions_of({"other": tokens + 1, key: tokens}), tokens)


def test_parallel_branches_are_joined_with_features_of_their_own():
    wide, narrow = torch.randn(2, 3, 5), torch.randn(2, 4, 2)
    joined = positions_of([wide, narrow])
    assert joined.shape == (2, 7, 7)
    head = torch.randn(7)
    expected = (wide @ head[:5]).sum(dim=1) + (narrow @ head[5:]).sum(dim=1)
    torch.testing.assert_close((joined @ head).sum(dim=1), expected)


@pytest.mark.parametrize(
    ("features", "layout"),
    [
        (torch.zeros(2), r"a tensor of shape \(2,\)"),
        (torch.zeros(2, 3, 4, 5, 6), r"a tensor of shape \(2, 3, 4, 5, 6\)"),
        ({"logits": torch.zeros(2, 3)}, "NoneType"),
        ([], "list"),
        ("features", "str"),
    ],
)
def test_what_is_no_feature_map_is_refused(features, layout):
    with pytest.raises(UserError, match=f"^the backbone Returns gives {layout}, no feature map; "):
        positions_of(features)


def test_a_vits_positions_are_its_patch_tokens():
    backbone = create_backbone("vit_tiny_patch16_224", (16, 24), options=VIT).eval()
    images = torch.randn(2, 3, 16, 24)
    positions = feature_map(backbone, images)
    assert positions.shape == (2, 2 * 3, 24)
    assert torch.equal(positions, backbone.forward_features(images)[:, 1:])


@pytest.mark.parametrize(
    ("name", "size", "options"),
    [
        ("swin_tiny_patch4_window7_224", (32, 64), SWIN),
        ("test_resnet", (64, 96), {}),
        ("test_convnext", (64, 96), {}),
    ],
)
def test_hierarchical_backbones_agree_with_timms_own_feature_map(name, size, options):
    backbone = create_backbone(name, size, options=options).eval()
    images = torch.randn(2, 3, *size)
    (last,) = backbone.forward_intermediates(
        images, indices=[-1], norm=True, intermediates_only=True, output_fmt="NCHW"
    )
    torch.testing.assert_close(feature_map(backbone, images), last.flatten(2).mT)


def test_one_image_alone_has_the_gradient_that_it_has_in_a_batch():
    # On the CPU batch normalisation's backward pass gets this wrong without the image repeated.
    backbone = create_backbone("levit_128s", (64, 64)).eval().double()
    images = torch.randn(2, 3, 64, 64, dtype=torch.float64, requires_grad=True)
    weight = torch.randn(feature_map(backbone, images).shape[1:], dtype=torch.float64)
    (together,) = torch.autograd.grad((feature_map(backbone, images) * weight).sum(), images)
    (alone,) = torch.autograd.grad((feature_map(backbone, images[:1]) * weight).sum(), images)
    torch.testing.assert_close(alone[0], together[0])
    assert not alone[1].any()


def test_a_built_backbone_is_timms_with_timms_weights():
    torch.manual_seed(3)
    expected = timm.create_model("test_vit", num_classes=0, in_chans=1, img_size=(32, 48))
    torch.manual_seed(3)
    backbone = create_backbone("test_vit", (32, 48), channels=1)
    assert backbone.state_dict().keys() == expected.state_dict().keys()
    for key, value in expected.state_dict().items():
        assert torch.equal(backbone.state_dict()[key], value)
    assert backbone.training


def test_positions_become_as_loud_as_the_patches_and_nothing_else_changes():
    backbone = create_backbone("vit_tiny_patch16_224", (16, 24), options=VIT)
    before = {key: value.clone() for key, value in backbone.state_dict().items()}
    images = torch.randn(4, 3, 16, 24)
    balance_positions(backbone, images)
    patches = F.conv2d(images, *backbone.patch_embed.proj.parameters(), stride=8)
    loudness = backbone.pos_embed.square().mean().sqrt()
    torch.testing.assert_close(loudness, patches.square().mean().sqrt())
    ratio = backbone.pos_embed / before["pos_embed"]
    torch.testing.assert_close(ratio, torch.ones_like(ratio) * ratio.mean())
    assert ratio.mean() > 5
    changed = {k for k, value in backbone.state_dict().items() if not torch.equal(value, before[k])}
    assert changed == {"pos_embed"}


@pytest.mark.parametrize("name", ["test_resnet", "swin_tiny_patch4_window7_224"])
def test_backbones_without_learned_absolute_positions_are_left_alone(name):
    backbone = create_backbone(name, (32, 32), options=SWIN if name.startswith("swin") else {})
    before = {key: value.clone() for key, value in backbone.state_dict().items()}
    balance_positions(backbone, torch.randn(2, 3, 32, 32))
    assert all(torch.equal(value, before[key]) for key, value in backbone.state_dict().items())


def test_the_size_defaults_to_the_one_the_model_was_designed_for():
    assert default_image_size(timm.get_pretrained_cfg("test_vit")) == (160, 160)
    assert default_image_size({"input_size": (3, 48, 64)}) == (48, 64)
    assert default_image_size({}) == default_image_size(None) == DEFAULT_IMAGE_SIZE == (224, 224)
    backbone = create_backbone("test_vit").eval()
    assert feature_map(backbone, torch.zeros(1, 3, 160, 160)).shape == (1, 100, 64)


@pytest.mark.parametrize(
    ("name", "arguments", "message"),
    [
        ("resnet18x", {}, "^unknown backbone 'resnet18x'; nearest: .*resnet18"),
        ("test_vit", {"image_size": (32, 33)}, "image size 32x33 is no multiple of the 16x16"),
        ("test_vit", {"options": {"colour": 3}}, "can't be built for 160x160 pixels with .*colour"),
        ("test_resnet", {"channels": 0}, "'test_resnet' can't be built|can't take images of 0 x"),
        ("test_resnet", {"image_size": (0, 32)}, "0x32 is not a height and a width in pixels"),
        ("test_convnext", {"image_size": (64, 8)}, "can't take images of 3 x 64x8: "),
    ],
)
def test_backbones_that_cannot_be_built_are_refused_in_one_line(name, arguments, message):
    with pytest.raises(UserError, match=message) as caught:
        create_backbone(name, **arguments)
    assert "\n" not in str(caught.value)


def test_overlapping_and_padded_patches_need_not_tile_the_image():
    overlapping = nn.Module()
    overlapping.proj = nn.Conv2d(3, 4, 7, stride=4, padding=3)
    overlapping.patch_size = (7, 7)
    backbone = Returns(torch.zeros(2, 4, 3, 3), patch_embed=overlapping)
    check_image_size(backbone, (10, 10), 3, "overlapping")
    overlapping.proj.stride = (7, 7)
    with pytest.raises(UserError, match="10x10 is no multiple of the 7x7 patches of 'tiling'"):
        check_image_size(backbone, (10, 10), 3, "tiling")
    overlapping.dynamic_img_pad = True
    check_image_size(backbone, (10, 10), 3, "padded")


@pytest.mark.parametrize("training", [True, False])
def test_checking_a_size_changes_nothing(training):
    backbone = timm.create_model("test_resnet", num_classes=0).train(training)
    before = {key: value.clone() for key, value in backbone.state_dict().items()}
    check_image_size(backbone, (32, 32), 3, "test_resnet")
    assert {module.training for module in backbone.modules()} == {training}
    assert all(torch.equal(value, before[key]) for key, value in backbone.state_dict().items())


def test_hard_sigmoids_become_twice_differentiable_and_keep_their_values():
    layers = nn.Sequential(nn.Sequential(nn.Hardsigmoid()), nn.Hardsigmoid())
    values = torch.linspace(-5, 5, 41, dtype=torch.float64, requires_grad=True)
    expected = F.hardsigmoid(F.hardsigmoid(values))
    make_twice_differentiable(layers)
    torch.testing.assert_close(layers(values), expected)
    inside = torch.tensor([-1.3, 0.4, 2.0], dtype=torch.float64, requires_grad=True)
    assert torch.autograd.gradgradcheck(lambda x: layers(x * x), inside)
    assert torch.equal(as_positions(layers, values[:, None]), values[:, None, None])


@pytest.mark.parametrize(
    "options",
    [
        {"pretrained": True},
        {"pretrained_cfg": {"url": "http://127.0.0.1:9/weights.pth"}},
        {"pretrained_cfg_overlay": {"file": "weights.pth"}},
        {"checkpoint_path": "weights.pth"},
        {"cache_dir": "elsewhere"},
        {"scriptable": True},
        {"features_only": True},
        {"depth": "http://127.0.0.1:9/"},
        {"mlp_ratio": {"a": ["/etc/passwd"]}},
        {"norm_layer": print},
    ],
)
def test_options_that_are_no_architecture_are_refused(options):
    with pytest.raises(UserError, match=next(iter(options))):
        create_backbone("vit_tiny_patch16_224", options=options)


def test_architectures_of_every_family_have_their_options():
    """What timm's own entry points set by name passes, as far as its values are plain."""
    check_options("vit_tiny_patch16_224", {"patch_size": 7, "reg_tokens": 4, "weight_init": "jax"})
    check_options("eva02_tiny_patch14_224", {"use_rot_pos_emb": True, "swiglu_mlp": False})
    check_options("convnext_atto", {"dims": (8, 16), "depths": [1, 1], "ls_init_value": None})
    check_options("swin_tiny_patch4_window7_224", {"window_size": 4, "embed_dim": 12})
    check_options("resnet18", {"stem_width": 32, "stem_type": "deep", "layers": [1, 1, 1, 1]})
    check_options("regnetx_002", {"output_stride": 16})
    check_options("mobilenetv3_small_100", {"drop_rate": 0.1})
