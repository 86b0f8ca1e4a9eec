"""Counted operations against counts by hand, and the bars for what a training step costs."""

import pytest
import torch
from torch import nn
from torch.nn import functional as F
from torch.nn.attention import SDPBackend, sdpa_kernel

from backfold.backbone import feature_map
from backfold.energy import EnergyModel
from backfold.pretext.masking import Masking
from backfold.restoration import training_step
from backfold.sparse import running_tokens
from step_cost.operations import count_operations

ROWS, INPUTS, OUTPUTS = 5, 7, 3
PRODUCT = 2 * ROWS * INPUTS * OUTPUTS


@pytest.fixture(autouse=True)
def _seed():
    torch.manual_seed(0)


def double_backward(module, inputs):
    """A restoration step's shape: gradient with respect to the inputs, then to the parameters."""
    energy = module(inputs).square().sum()
    (gradient,) = torch.autograd.grad(energy, inputs, create_graph=True)
    gradient.square().sum().backward(inputs=list(module.parameters()))


@pytest.mark.parametrize("shape", [(ROWS, INPUTS), (1, ROWS, INPUTS)])
def test_linear_forward_with_and_without_autograd(shape):
    layer, inputs = nn.Linear(INPUTS, OUTPUTS), torch.randn(shape)
    assert count_operations(lambda: layer(inputs)) == PRODUCT
    with torch.no_grad():
        assert count_operations(lambda: layer(inputs)) == PRODUCT
    with torch.inference_mode():
        assert count_operations(lambda: layer(inputs)) == PRODUCT


def test_linear_backward_and_double_backward():
    layer, inputs = nn.Linear(INPUTS, OUTPUTS), torch.randn(ROWS, INPUTS)
    assert count_operations(lambda: layer(inputs).sum().backward()) == 2 * PRODUCT
    inputs.requires_grad_()
    assert count_operations(lambda: layer(inputs).sum().backward()) == 3 * PRODUCT
    # forward; dE/dx = g W; from its gradient r: r W^T and r^T g; from the forward pass: (r W^T)^T x
    assert count_operations(lambda: double_backward(layer, inputs)) == 5 * PRODUCT


@pytest.mark.parametrize("groups", [1, 2, 4])
@pytest.mark.parametrize("stride", [1, 2])
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


def test_transposed_convolution():
    layer, inputs = nn.ConvTranspose2d(4, 6, 2, stride=2), torch.randn(2, 4, 5, 5)
    product = 2 * 2 * 5 * 5 * 4 * 6 * 2 * 2
    assert count_operations(lambda: layer(inputs)) == product
    assert count_operations(lambda: layer(inputs).sum().backward()) == 2 * product


def attend(backend, queries, keys, values):
    with sdpa_kernel(backend):
        return F.scaled_dot_product_attention(queries, keys, values)


def attention_inputs(**options):
    batch, heads, tokens, width = 2, 3, 6, 8
    inputs = torch.randn(3, batch, heads, tokens, width, **options).unbind()
    return [tensor.requires_grad_() for tensor in inputs], 2 * batch * heads * tokens**2 * width


def test_plain_attention():
    inputs, product = attention_inputs()
    assert count_operations(lambda: attend(SDPBackend.MATH, *inputs)) == 2 * product
    backward = count_operations(lambda: attend(SDPBackend.MATH, *inputs).sum().backward())
    assert backward == 6 * product
    with torch.inference_mode():
        assert count_operations(lambda: attend(SDPBackend.MATH, *inputs)) == 2 * product


def test_fused_attention_computes_the_scores_again_in_its_backward_pass():
    inputs, product = attention_inputs()
    assert count_operations(lambda: attend(SDPBackend.FLASH_ATTENTION, *inputs)) == 2 * product
    total = count_operations(lambda: attend(SDPBackend.FLASH_ATTENTION, *inputs).sum().backward())
    assert total == 7 * product


def test_products_with_vectors_and_sums_of_products():
    matrix, batches = torch.randn(4, 5), torch.randn(3, 5, 6)
    vector = torch.randn(5)
    assert count_operations(lambda: matrix @ vector) == 2 * 20
    assert count_operations(lambda: vector @ vector) == 2 * 5
    assert count_operations(lambda: torch.addmv(torch.zeros(4), matrix, vector)) == 2 * 20
    assert count_operations(lambda: torch.zeros(4, 6).addmm_(matrix, batches[0])) == 2 * 120
    left = matrix.expand(3, 4, 5)
    assert count_operations(lambda: torch.baddbmm(torch.zeros(6), left, batches)) == 3 * 240
    assert count_operations(lambda: torch.addbmm(torch.zeros(6), left, batches)) == 3 * 240
    assert count_operations(lambda: torch.einsum("bij,bjk->bik", left, batches)) == 3 * 240


def test_element_wise_work_counts_nothing():
    values = torch.randn(4, 8, requires_grad=True)
    loss = F.layer_norm(values.exp().softmax(1), (8,)).sum()
    assert count_operations(loss.backward) == 0


def test_what_has_no_formula_is_refused_by_name():
    layer = nn.TransformerEncoderLayer(8, 2, batch_first=True).eval()
    with (
        torch.no_grad(),
        pytest.raises(NotImplementedError, match="_transformer_encoder_layer_fwd"),
    ):
        count_operations(lambda: layer(torch.randn(1, 3, 8)))


VIT_TINY = {64: (32, {"patch_size": 4}), 196: (224, {"patch_size": 16})}
"""timm's vit_tiny widths and depth: tokens -> image size and options."""


def on_meta(tokens):
    """The energy, and images, on the meta device: shapes without numbers."""
    side, options = VIT_TINY[tokens]
    energy = EnergyModel("vit_tiny_patch16_224", image_size=side, backbone_options=options)
    return energy.to("meta"), torch.empty(2, 3, side, side, device="meta")


def ordinary_step(energy, images):
    with sdpa_kernel(SDPBackend.MATH):
        feature_map(energy.backbone, images).mean(dim=1).square().mean().backward()


def exact_step(energy, images):
    mask = torch.ones_like(images[:, :1], dtype=torch.bool)
    training_step(energy, images, images, mask)[0].backward()


@pytest.mark.parametrize(("tokens", "bar"), [(64, 2.10), (196, 2.20)])
def test_an_exact_dense_step_costs_little_more_than_twice_an_ordinary_step(tokens, bar):
    energy, images = on_meta(tokens)
    ordinary = count_operations(lambda: ordinary_step(energy, images))
    forward = count_operations(lambda: energy(images))
    assert ordinary == pytest.approx(3 * forward, rel=0.01)
    assert 2.0 < count_operations(lambda: exact_step(energy, images)) / ordinary <= bar


@pytest.mark.parametrize("tokens", VIT_TINY)
def test_a_sparse_step_costs_little_more_than_an_ordinary_dense_step(tokens):
    energy, images = on_meta(tokens)
    patch = VIT_TINY[tokens][1]["patch_size"]
    ordinary = count_operations(lambda: ordinary_step(energy, images))
    task = Masking(mask_ratio=0.75, mask_patch_size=patch, hidden_share=1 / 3)
    corruption = task(torch.randn(images.shape), torch.Generator().manual_seed(0))
    size = (images.shape[2], images.shape[3])
    running = running_tokens(corruption.running, (patch, patch), size).to("meta")
    assert running.shape == (len(images), tokens // 2)

    def sparse_energy(points):
        return energy(points, tokens=running)

    mask = corruption.loss_mask.to("meta")

    def sparse_step():
        training_step(sparse_energy, images, images, mask)[0].backward()

    assert 0.95 < count_operations(sparse_step) / ordinary <= 1.10
