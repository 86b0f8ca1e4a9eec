"""One training step: its second-order gradients, and its attention."""

import pytest
import torch
from torch import nn
from torch.nn import functional as F

from backfold.energy import EnergyModel
from backfold.restoration import (
    plausibility_loss,
    restoration_loss,
    restoration_losses,
    restoration_step,
    restore,
    training_step,
)

SHAPE = (3, 4, 4)
EVERYWHERE = torch.ones(1, dtype=torch.bool)
TINY = {
    "ViT": ("vit_tiny_patch16_224", {"patch_size": 8, "embed_dim": 12, "depth": 2, "num_heads": 2}),
    "Swin": (
        "swin_tiny_patch4_window7_224",
        {"depths": (1, 2), "num_heads": (1, 2), "embed_dim": 8, "drop_path_rate": 0.0},
    ),
    "ConvNeXt": ("convnext_atto", {"depths": (1, 1, 1, 2), "dims": (4, 8, 8, 12)}),
}


def tiny(family):
    name, options = TINY[family]
    return EnergyModel(name, image_size=32, backbone_options=options)


def two_batches(count=2, dtype=torch.float32):
    return torch.randn(2, count, 3, 32, 32, dtype=dtype).unbind()


@pytest.mark.parametrize(("family", "weight"), [*((name, 0.0) for name in TINY), ("ViT", 2.0)])
def test_parameter_gradients_equal_central_differences(family, weight):
    model = tiny(family).double()
    corrupted, clean = two_batches(dtype=torch.float64)
    corrupted[0] = clean[0]
    mask = torch.rand(2, 1, *corrupted.shape[2:]) < 0.7
    loss, _, _ = training_step(model, corrupted, clean, mask, plausibility_weight=weight)
    loss.backward()
    parameters = list(model.parameters())  # those without a gradient must not matter
    reached = [torch.zeros_like(p) if p.grad is None else p.grad for p in parameters]
    gradient, values = (nn.utils.parameters_to_vector(each) for each in (reached, parameters))
    values = values.detach()
    sizes = torch.cat([p.detach().abs().mean().expand(p.numel()) for p in parameters]) + 1e-3

    @torch.no_grad()
    def loss_at(moved):
        nn.utils.vector_to_parameters(moved, parameters)
        restored, energies = restoration_step(model, corrupted)
        plausibility = plausibility_loss(energies, corrupted, clean)
        return (restoration_loss(restored, clean, mask) + weight * plausibility).item()

    assert loss_at(values) == pytest.approx(loss.item())
    for _ in range(3):
        step = 1e-5 * sizes * torch.randn(len(values), dtype=torch.float64)
        change = loss_at(values + step) - loss_at(values - step)
        assert change == pytest.approx(2 * float(gradient @ step), rel=1e-6)
        assert abs(change) > 1e-8


def test_training_uses_plain_attention_only_and_restoring_the_fused_kernels(monkeypatch):
    kernels, attention, cuda = [], F.scaled_dot_product_attention, torch.backends.cuda

    def spy(*args, **kwargs):
        fused = cuda.flash_sdp_enabled(), cuda.mem_efficient_sdp_enabled(), cuda.cudnn_sdp_enabled()
        kernels.append((*fused, cuda.math_sdp_enabled()))
        return attention(*args, **kwargs)

    monkeypatch.setattr(F, "scaled_dot_product_attention", spy)
    model, (corrupted, clean) = tiny("ViT"), two_batches()
    kernels.clear()
    training_step(model, corrupted, clean, EVERYWHERE)[0].backward()
    assert set(kernels) == {(False, False, False, True)}
    kernels.clear()
    restore(model, corrupted)
    assert set(kernels) == {(True, True, True, True)}


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
