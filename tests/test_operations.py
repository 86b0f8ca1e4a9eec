"""Counted operations against counts by hand, and the bars for what a training step costs."""

from functools import partial

import pytest
import timm
import torch
from torch import nn
from torch.nn import functional as F
from torch.nn.attention import SDPBackend, sdpa_kernel

from backfold.backbone import feature_map, use_plain_attention
from backfold.conditional import hidden, visible
from backfold.energy import EnergyModel, LinearHead
from backfold.pretext.masking import Masking
from backfold.restoration import training_step
from backfold.sparse import running_tokens
from step_cost.operations import count_operations


def double_backward(module, inputs):
    """A restoration step's shape: gradient with respect to the inputs, then to the parameters."""
    energy = module(inputs).square().sum()
    (gradient,) = torch.autograd.grad(energy, inputs, create_graph=True)
    gradient.square().sum().backward(inputs=list(module.parameters()))


@pytest.mark.parametrize(("groups", "stride"), [(1, 1), (2, 2), (4, 1)])
def test_convolution_forward_backward_and_double_backward(groups, stride):
    channels, side, batch = 4, 7, 2
    side_after = (side - 1) // stride + 1
    layer = nn.Conv2d(channels, 2 * channels, 3, stride=stride, padding=1, groups=groups)
    inputs = torch.randn(batch, channels, side, side)
    weights_of_an_output = 9 * channels // groups
    product = 2 * batch * side_after**2 * 2 * channels * weights_of_an_output
    assert count_operations(lambda: layer(inputs)) == product
    assert count_operations(lambda: layer(inputs).sum().backward()) == 2 * product
    inputs.requires_grad_()
    assert count_operations(lambda: layer(inputs).sum().backward()) == 3 * product
    assert count_operations(lambda: double_backward(layer, inputs)) == 5 * product


# The fused kernel computes the scores again in its backward pass.
@pytest.mark.parametrize(
    ("backend", "factor"), [(SDPBackend.MATH, 6), (SDPBackend.FLASH_ATTENTION, 7)]
)
def test_plain_and_fused_attention(backend, factor):
    batch, heads, tokens, width = 2, 3, 6, 8
    inputs = torch.randn(3, batch, heads, tokens, width).requires_grad_()
    product = 2 * batch * heads * tokens**2 * width
    with sdpa_kernel(backend):
        forward = partial(F.scaled_dot_product_attention, *inputs)
        assert count_operations(forward) == 2 * product
        assert count_operations(lambda: forward().sum().backward()) == factor * product


VIT_TINY = {64: (32, {"patch_size": 4, "depth": 6}), 196: (224, {"patch_size": 16, "depth": 6})}
"""timm's vit_tiny widths: tokens -> image size and options."""


def on_meta(tokens):
    """The energy, and images, on the meta device: shapes without numbers."""
    side, options = VIT_TINY[tokens]
    energy = EnergyModel("vit_tiny_patch16_224", image_size=side, backbone_options=options)
    return energy.to("meta"), torch.empty(2, 3, side, side, device="meta")


def ordinary_step(energy, images):
    with sdpa_kernel(SDPBackend.MATH):
        feature_map(energy.backbone, images).mean(dim=1).square().mean().backward()


def exact_step(energy, images, mask):
    training_step(energy, images, images, mask)[0].backward()


@pytest.mark.parametrize(("tokens", "bar"), [(64, 2.10), (196, 2.20)])
def test_a_dense_step_costs_twice_an_ordinary_step_and_a_sparse_one_as_much(tokens, bar):
    energy, images = on_meta(tokens)
    ordinary = count_operations(lambda: ordinary_step(energy, images))
    forward = count_operations(lambda: energy(images))
    assert ordinary == pytest.approx(3 * forward, rel=0.02)
    everywhere = torch.ones_like(images[:, :1], dtype=torch.bool)
    assert 2.0 < count_operations(lambda: exact_step(energy, images, everywhere)) / ordinary <= bar

    patch = VIT_TINY[tokens][1]["patch_size"]
    task = Masking(mask_ratio=0.75, mask_patch_size=patch, hidden_share=1 / 3)
    corruption = task(torch.randn(images.shape), torch.Generator().manual_seed(0))
    running = running_tokens(corruption.running, energy.backbone, images.shape[2:]).tokens
    assert running.shape == (len(images), tokens // 2)
    sparse, mask = partial(energy, tokens=running.to("meta")), corruption.loss_mask.to("meta")
    assert 0.95 < count_operations(lambda: exact_step(sparse, images, mask)) / ordinary <= 1.10


def test_a_conditional_step_costs_less_than_a_masked_autoencoder_s():
    """ViT-B, 224 pixels, 75 % hidden: 0.69 of transformers' MAE; 0.57 where half of that runs."""
    transformers = pytest.importorskip("transformers")
    with torch.device("meta"):
        rival = transformers.ViTMAEForPreTraining(
            transformers.ViTMAEConfig(attn_implementation="eager")
        )
        backbone, head = timm.create_model("vit_base_patch16_224", num_classes=0), LinearHead(768)
        images, everywhere = torch.empty(2, 3, 224, 224), torch.ones(2, 1, 224, 224).bool()
        seen, tokens = torch.zeros(2, 49).long(), torch.zeros(2, 147).long()
    use_plain_attention(backbone)

    def step(count):
        context = visible(backbone, images, seen)
        energy = lambda points: head(hidden(backbone, points, tokens[:, :count], context))  # noqa: E731
        training_step(energy, images, images, everywhere)[0].backward()

    rivals = count_operations(lambda: rival(images).loss.backward())  # noqa: PLW0108
    assert 0.5 < count_operations(lambda: step(74)) / rivals < 0.6
    assert 0.6 < count_operations(lambda: step(147)) / rivals <= 0.7
