"""Feature maps in every layout, and backbones that are built or refused."""

import pytest
import timm
import torch
from torch import nn
from torch.nn import functional as F

from backfold.backbone import (
    balance_positions,
    check_options,
    create_backbone,
    default_image_size,
    feature_map,
)
from backfold.errors import UserError

VIT = {"patch_size": 8, "embed_dim": 24, "depth": 1, "num_heads": 2}


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


def test_maps_are_read_row_by_row_and_a_vector_is_one_position():
    features = torch.randn(2, 5, 3, 4)
    positions = positions_of(features)
    assert positions.shape == (2, 12, 5)
    for y in range(3):
        for x in range(4):
            assert torch.equal(positions[:, 4 * y + x], features[:, :, y, x])
    last_channels = features.permute(0, 2, 3, 1)
    assert torch.equal(positions_of(last_channels, output_fmt="NHWC"), positions)
    assert torch.equal(positions_of([torch.randn(2, 7, 6, 8), features]), positions)
    assert torch.equal(positions_of(features[:, :, 0, 0]), features[:, None, :, 0, 0])


def test_prefix_tokens_are_left_out():
    tokens = torch.randn(2, 9, 5)
    assert torch.equal(positions_of(tokens), tokens)
    assert torch.equal(positions_of(tokens, num_prefix_tokens=3), tokens[:, 3:])
    class_tokens = nn.Parameter(torch.zeros(1, 2, 5))
    assert torch.equal(positions_of(tokens, cls_token=class_tokens), tokens[:, 2:])
    for key in ("x_norm_patchtokens", "patch_features"):
        assert torch.equal(positions_of({"other": tokens + 1, key: tokens}), tokens)


def test_parallel_branches_are_joined_with_features_of_their_own():
    wide, narrow, head = torch.randn(2, 3, 5), torch.randn(2, 4, 2), torch.randn(7)
    joined = positions_of([wide, narrow])
    assert joined.shape == (2, 7, 7)
    expected = (wide @ head[:5]).sum(dim=1) + (narrow @ head[5:]).sum(dim=1)
    torch.testing.assert_close((joined @ head).sum(dim=1), expected)
    without = positions_of([wide, narrow], cls_token_0=nn.Parameter(torch.zeros(1, 1, 5)))
    assert torch.equal(without, positions_of([wide[:, 1:], narrow[:, 1:]]))
    channels_first = positions_of([wide.mT, narrow.mT], num_features=7)
    assert torch.equal(channels_first, joined)


@pytest.mark.parametrize(
    ("features", "layout"),
    [
        (torch.zeros(2), r"a tensor of shape \(2,\)"),
        ({"logits": torch.zeros(2, 3)}, "NoneType"),
        ("features", "str"),
    ],
)
def test_what_is_no_feature_map_is_refused(features, layout):
    with pytest.raises(UserError, match=f"^the backbone Returns gives {layout}, no feature map; "):
        positions_of(features)


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
    torch.testing.assert_close(backbone.state_dict(), expected.state_dict(), rtol=0, atol=0)
    assert backbone.training


def test_positions_become_as_loud_as_the_patches_and_nothing_else_changes():
    backbone = create_backbone("vit_tiny_patch16_224", (16, 24), options=VIT)
    before = {key: value.clone() for key, value in backbone.state_dict().items()}
    images = torch.randn(4, 3, 16, 24)
    balance_positions(backbone, images)
    patches = F.conv2d(images, *backbone.patch_embed.proj.parameters(), stride=8)
    torch.testing.assert_close(backbone.pos_embed.square().mean(), patches.square().mean())
    ratio = backbone.pos_embed / before["pos_embed"]
    torch.testing.assert_close(ratio, torch.ones_like(ratio) * ratio.mean())
    assert ratio.mean() > 5
    changed = [k for k, value in backbone.state_dict().items() if not torch.equal(value, before[k])]
    assert changed == ["pos_embed"]


def test_the_size_defaults_to_the_one_the_model_was_designed_for():
    assert default_image_size(timm.get_pretrained_cfg("test_vit")) == (160, 160)
    assert default_image_size({"input_size": (3, 48, 64)}) == (48, 64)
    assert default_image_size({}) == default_image_size(None) == (224, 224)
    backbone = create_backbone("test_vit").eval()
    assert feature_map(backbone, torch.zeros(1, 3, 160, 160)).shape == (1, 100, 64)


@pytest.mark.parametrize(
    ("name", "arguments", "message"),
    [
        ("resnet18x", {}, "^unknown backbone 'resnet18x'; nearest: .*resnet18"),
        ("test_vit", {"image_size": (32, 33)}, "image size 32x33 is no multiple of the 16x16"),
        ("test_vit", {"options": {"colour": 3}}, "colour"),
        ("test_resnet", {"image_size": (0, 32)}, "0x32 is not a height and a width in pixels"),
        ("test_convnext", {"image_size": (64, 8)}, "can't take images of 3 x 64x8: "),
    ],
)
def test_backbones_that_cannot_be_built_are_refused_in_one_line(name, arguments, message):
    with pytest.raises(UserError, match=message) as caught:
        create_backbone(name, **arguments)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    "options",
    [
        {"pretrained": True}, {"pretrained_cfg": {"url": "http://127.0.0.1:9/weights.pth"}},
        {"checkpoint_path": "weights.pth"}, {"features_only": True},
        {"depth": "http://127.0.0.1:9/"}, {"mlp_ratio": {"a": ["/etc/passwd"]}},
        {"norm_layer": print},
    ],
)  # fmt: skip
def test_options_that_are_no_architecture_are_refused(options):
    with pytest.raises(UserError, match=next(iter(options))):
        create_backbone("vit_tiny_patch16_224", options=options)


def test_architectures_of_every_family_have_their_options():
    check_options("vit_tiny_patch16_224", {"patch_size": 7, "reg_tokens": 4, "weight_init": "jax"})
    check_options("eva02_tiny_patch14_224", {"use_rot_pos_emb": True, "swiglu_mlp": False})
    check_options("convnext_atto", {"dims": (8, 16), "depths": [1, 1], "ls_init_value": None})
    check_options("swin_tiny_patch4_window7_224", {"window_size": 4, "embed_dim": 12})
