"""One training step: its second-order gradients, its attention and its memory."""

import weakref
from contextlib import contextmanager

import pytest
import timm.layers
import torch
from torch import nn
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils._python_dispatch import TorchDispatchMode

from backfold.energy import EnergyModel
from backfold.restoration import (
    restoration_loss,
    restoration_losses,
    restoration_step,
    restore,
    training_step,
)

SHAPE = (3, 4, 4)
EVERYWHERE = torch.ones(1, dtype=torch.bool)
TINY = {
    "ViT": (
        "vit_tiny_patch16_224",
        16,
        {"patch_size": 8, "embed_dim": 12, "depth": 2, "num_heads": 2},
    ),
    "Swin": (
        "swin_tiny_patch4_window7_224",
        32,
        {"depths": (1, 2), "num_heads": (1, 2), "embed_dim": 8, "drop_path_rate": 0.0},
    ),
    "ConvNeXt": ("convnext_atto", 32, {"depths": (1, 1, 1, 2), "dims": (4, 8, 8, 12)}),
}
# The energy's gradient does not depend on what is only added to the features before a linear head.
# ConvNeXt's last norm belongs to its classifier: `forward_features` leaves it out.
WITHOUT_GRADIENT = {
    "ViT": {"norm.bias"},
    "Swin": {"norm.bias"},
    "ConvNeXt": {"stages.3.blocks.1.mlp.fc2.bias", "head.norm.weight", "head.norm.bias"},
}


@pytest.fixture(autouse=True)
def _seed():
    torch.manual_seed(0)


def tiny(family):
    name, side, options = TINY[family]
    return EnergyModel(name, image_size=side, backbone_options=options)


def images_for(family, count=2, dtype=torch.float32):
    side = TINY[family][1]
    return torch.randn(2, count, 3, side, side, dtype=dtype).unbind()


@pytest.mark.parametrize("family", TINY)
def test_parameter_gradients_equal_central_differences(family):
    model = tiny(family).double()
    corrupted, clean = images_for(family, dtype=torch.float64)
    mask = torch.rand(2, 1, *corrupted.shape[2:]) < 0.7
    training_step(model, corrupted, clean, mask)[0].backward()
    trained = [p for p in model.parameters() if p.grad is not None]
    gradient = torch.cat([p.grad.flatten() for p in trained])
    values = nn.utils.parameters_to_vector(trained).detach()
    sizes = torch.cat([p.detach().abs().mean().expand(p.numel()) for p in trained]) + 1e-3

    @torch.no_grad()
    def loss_at(moved):
        nn.utils.vector_to_parameters(moved, trained)
        return restoration_loss(restoration_step(model, corrupted)[0], clean, mask).item()

    for _ in range(3):
        step = 1e-5 * sizes * torch.randn(len(values), dtype=torch.float64)
        change = loss_at(values + step) - loss_at(values - step)
        assert change == pytest.approx(2 * float(gradient @ step), rel=1e-6)
        assert abs(change) > 1e-8


def test_first_and_second_derivatives_in_the_images_pass_gradcheck():
    options = {"patch_size": 4, "embed_dim": 4, "depth": 1, "num_heads": 1}
    model = EnergyModel(
        "vit_tiny_patch16_224", image_size=8, channels=1, backbone_options=options
    ).double()
    images = torch.randn(1, 1, 8, 8, dtype=torch.float64, requires_grad=True)
    with sdpa_kernel(SDPBackend.MATH):
        assert torch.autograd.gradcheck(model, images)
        assert torch.autograd.gradgradcheck(model, images)


def parameters_without_gradient(model):
    return {
        name
        for name, parameter in model.named_parameters()
        if parameter.grad is None or not parameter.grad.any()
    }


@pytest.mark.parametrize("family", TINY)
def test_all_parameters_but_the_known_few_get_a_gradient(family):
    model = tiny(family)
    corrupted, clean = images_for(family, 4)
    corrupted.requires_grad_()
    loss, restored, energies = training_step(model, corrupted, clean, EVERYWHERE)
    assert not restored.requires_grad
    assert not energies.requires_grad
    loss.backward()
    assert parameters_without_gradient(model) == {f"backbone.{n}" for n in WITHOUT_GRADIENT[family]}
    assert all(p.grad.isfinite().all() for p in model.parameters() if p.grad is not None)
    assert corrupted.grad is None


def test_without_a_graph_of_the_gradient_nothing_but_the_step_size_would_train():
    model, (corrupted, clean) = tiny("ViT"), images_for("ViT")
    step_size = torch.ones((), requires_grad=True)
    restored, _ = restoration_step(model, corrupted, step_size, create_graph=False)
    restoration_loss(restored, clean, EVERYWHERE).backward()
    assert step_size.grad != 0
    assert parameters_without_gradient(model) == {name for name, _ in model.named_parameters()}


@contextmanager
def attention_built(fused):
    before = timm.layers.use_fused_attn(), timm.layers.use_fused_attn(experimental=True)
    timm.layers.set_fused_attn(fused, experimental=fused)
    try:
        yield
    finally:
        timm.layers.set_fused_attn(*before)


@pytest.mark.parametrize("family", ["ViT", "Swin"])
def test_training_gradients_equal_those_of_unfused_attention(family):
    # timm counts Swin's fused attention, which has a learnable bias, as experimental.
    with attention_built(fused=True):
        fused = tiny(family)
    with attention_built(fused=False):
        unfused = tiny(family)
    unfused.load_state_dict(fused.state_dict())
    flags = [
        {m.fused_attn for m in model.modules() if hasattr(m, "fused_attn")}
        for model in (fused, unfused)
    ]
    assert flags == [{True}, {False}]
    corrupted, clean = images_for(family)
    for model in (fused, unfused):
        training_step(model, corrupted, clean, EVERYWHERE)[0].backward()
    for name, parameter in fused.named_parameters():
        expected = unfused.get_parameter(name).grad
        torch.testing.assert_close(parameter.grad, expected, rtol=1e-4, atol=1e-6)


class AttentionKernels(TorchDispatchMode):
    """Notes the fused attention kernels that run."""

    def __init__(self):
        super().__init__()
        self.fused = set()

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        if "scaled_dot_product" in func.name():
            self.fused.add(func.name())
        return func(*args, **(kwargs or {}))


@pytest.fixture
def allowed(monkeypatch):
    """For each call of attention: whether (flash, efficient, cuDNN, plain) kernels may run."""
    seen, attention = [], torch.nn.functional.scaled_dot_product_attention

    def spy(*args, **kwargs):
        cuda = torch.backends.cuda
        kernels = cuda.flash_sdp_enabled(), cuda.mem_efficient_sdp_enabled()
        seen.append((*kernels, cuda.cudnn_sdp_enabled(), cuda.math_sdp_enabled()))
        return attention(*args, **kwargs)

    monkeypatch.setattr(torch.nn.functional, "scaled_dot_product_attention", spy)
    return seen


def test_training_uses_plain_attention_only_and_restoring_the_fused_kernels(allowed):
    model, (corrupted, clean) = tiny("ViT"), images_for("ViT")
    allowed.clear()
    with AttentionKernels() as kernels:
        training_step(model, corrupted, clean, EVERYWHERE)[0].backward()
    assert kernels.fused == set()
    assert set(allowed) == {(False, False, False, True)}
    allowed.clear()
    with AttentionKernels() as kernels:
        restore(model, corrupted)
    assert any("flash" in name for name in kernels.fused)
    assert set(allowed) == {(True, True, True, True)}


class TanhEnergy(nn.Module):
    """E = sum_j v_j tanh(w_j . x); its gradient is written out in `descend_by_hand`."""

    def __init__(self):
        super().__init__()
        self.inner = nn.Parameter(torch.randn(6, 48, dtype=torch.float64) / 5)
        self.outer = nn.Parameter(torch.randn(6, dtype=torch.float64))

    def forward(self, images):
        return torch.tanh(images.flatten(1) @ self.inner.T) @ self.outer

    def descend_by_hand(self, images, step_size):
        slope = 1 - torch.tanh(images.flatten(1) @ self.inner.T) ** 2
        return images - step_size * ((slope * self.outer) @ self.inner).view_as(images)


def test_gradients_of_k_training_steps_equal_those_of_descent_written_out():
    num_steps, step_size = 4, 0.7
    energy = TanhEnergy()
    corrupted, clean = (torch.randn(3, *SHAPE, dtype=torch.float64) for _ in range(2))
    mask = torch.rand(3, 1, 4, 4) < 0.6

    losses, points, total = [], [corrupted], 0.0
    for _ in range(num_steps):
        moved = energy.descend_by_hand(points[-1], step_size)
        losses.append(restoration_loss(moved, clean, mask))
        points.append(moved.detach())
        total = total + losses[-1] / num_steps
    expected = torch.autograd.grad(total, list(energy.parameters()))

    def step(images):
        return training_step(energy, images, clean, mask, step_size)

    found = []
    for loss, restored, energies in restoration_losses(step, corrupted, num_steps):
        loss.backward()
        found.append((float(loss.detach()), restored, energies))
        assert not restored.requires_grad
        assert not energies.requires_grad
    assert [loss for loss, _, _ in found] == pytest.approx([x.item() / num_steps for x in losses])
    for index, (_, restored, energies) in enumerate(found):
        torch.testing.assert_close(restored, points[index + 1])
        torch.testing.assert_close(energies, energy(points[index]).detach())
    torch.testing.assert_close([p.grad for p in energy.parameters()], list(expected))


class Saved:
    def __init__(self, tensor):
        self.tensor = tensor


class LiveBytes:
    """Counts the bytes of the tensors that autograd keeps: now, and at most."""

    def __init__(self):
        self.now = self.peak = 0

    def pack(self, tensor):
        saved, size = Saved(tensor), tensor.numel() * tensor.element_size()
        self.now += size
        self.peak = max(self.peak, self.now)
        weakref.finalize(saved, self.release, size)
        return saved

    def release(self, size):
        self.now -= size


def live_bytes(num_steps, backward_at_once=True):
    torch.manual_seed(0)
    model = tiny("ViT")
    corrupted, clean = torch.randn(2, 3, 16, 16), torch.randn(2, 3, 16, 16)

    def step(images):
        return training_step(model, images, clean, EVERYWHERE)

    live, losses = LiveBytes(), []
    with torch.autograd.graph.saved_tensors_hooks(live.pack, lambda saved: saved.tensor):
        for loss, _, _ in restoration_losses(step, corrupted, num_steps):
            if backward_at_once:
                loss.backward()
            else:
                losses.append(loss)
    return live


def test_memory_does_not_grow_with_the_number_of_steps():
    once, four_times = live_bytes(1), live_bytes(4)
    assert once.peak > 0
    assert four_times.peak == once.peak
    assert four_times.now == once.now == 0
    assert live_bytes(4, backward_at_once=False).peak > 3 * once.peak
