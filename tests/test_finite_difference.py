"""Training without a second derivative, held against the exact step."""

import functools

import pytest
import torch
from torch import nn

from backfold.energy import EnergyModel
from backfold.errors import UserError
from backfold.finite_difference import (
    DISPLACEMENTS,
    best_displacement,
    check_precision,
    finite_difference_losses,
    full_float32,
)
from backfold.restoration import training_step

SMALL = {
    "ViT": (
        "vit_tiny_patch16_224",
        {"patch_size": 8, "embed_dim": 48, "depth": 3, "num_heads": 3, "proj_drop_rate": 0.2},
    ),
    "Swin": (
        "swin_tiny_patch4_window7_224",
        {"depths": (1, 2), "num_heads": (1, 2), "embed_dim": 32, "window_size": 4},
    ),
    "ConvNeXt": ("convnext_atto", {"depths": (1, 1, 2, 1), "dims": (16, 24, 32, 48)}),
}


def small(family):
    name, options = SMALL[family]
    return EnergyModel(name, image_size=32, backbone_options={**options, "drop_path_rate": 0.3})


def losses_of(*arguments, **options):
    """The step's losses, backward called on each part; the last part's images and energies."""
    total = 0.0
    for values in finite_difference_losses(*arguments, **options):
        values[0].backward()
        total += values[0].item()
    return total, *values[1:]


def masked_images(side=32, count=4, dtype=torch.float32):
    clean = torch.randn(count, 3, side, side, dtype=dtype)
    mask = torch.rand(count, 1, side, side) < 0.6
    return torch.where(mask, torch.randn_like(clean), clean), clean, mask


def gradient(model):
    parts = [torch.zeros_like(p) if p.grad is None else p.grad for p in model.parameters()]
    return torch.cat([part.flatten() for part in parts])


def relative_distance(found, exact):
    return float((found - exact).norm() / exact.norm())


@pytest.mark.parametrize("family", SMALL)
def test_gradients_of_two_steps_are_within_a_thousandth_of_the_exact_ones(family):
    model = small(family)
    corrupted, clean, mask = masked_images()
    start = torch.get_rng_state()
    found, gradients = [], []
    for is_exact in (True, False):
        torch.set_rng_state(start)
        model.zero_grad()
        images, losses = corrupted, []
        for _ in range(2):
            if is_exact:
                loss, images, energies = training_step(model, images, clean, mask, 0.7)
                loss.backward()
            else:
                loss, images, energies = losses_of(model, images, clean, mask, 0.7)
            losses.append(torch.as_tensor(loss).detach())
            assert not images.requires_grad
        found.append((torch.stack(losses), images, energies, torch.get_rng_state()))
        gradients.append(gradient(model))
    assert relative_distance(gradients[1], gradients[0]) < 1e-3
    assert not torch.equal(start, found[0][-1])  # masks were drawn
    torch.testing.assert_close(*found, rtol=1e-4, atol=1e-3)


class QuadraticEnergy(nn.Module):
    """E = x . A x / 2 + b . x with a symmetric A: a central difference has no error."""

    def __init__(self, size):
        super().__init__()
        self.factor = nn.Parameter(torch.randn(size, size, dtype=torch.float64) / size**0.5)
        self.linear = nn.Parameter(torch.randn(size, dtype=torch.float64))

    def forward(self, images):
        points = images.flatten(1)
        return (points @ self.factor).square().sum(dim=1) / 2 + points @ self.linear


@pytest.mark.parametrize("displacement", [1e-3, 10.0])
def test_a_quadratic_energys_gradient_is_the_closed_form(displacement):
    energy, step_size = QuadraticEnergy(48), 0.3
    corrupted, clean, mask = masked_images(side=4, dtype=torch.float64)
    losses_of(energy, corrupted, clean, mask, step_size, displacement=displacement)
    x, factor, linear = corrupted.flatten(1), energy.factor.detach(), energy.linear.detach()
    restored = x - step_size * (x @ factor @ factor.T + linear)
    difference = restored - clean.flatten(1)
    inside = mask.expand_as(clean).flatten(1)
    slope = difference.clamp(-1, 1) * inside / inside.sum(dim=1, keepdim=True) / len(x)
    of_factor = -step_size * (slope.T @ x + x.T @ slope) @ factor
    torch.testing.assert_close(energy.factor.grad, of_factor, rtol=1e-8, atol=1e-10)
    torch.testing.assert_close(energy.linear.grad, -step_size * slope.sum(dim=0))


def test_an_image_without_loss_gives_no_gradient_and_no_nan():
    model = small("ViT").eval()
    corrupted, clean, mask = masked_images(count=2)
    mask[0] = False
    found = []
    for images in (slice(0, 2), slice(1, 2), slice(0, 1)):
        model.zero_grad()
        losses_of(model, corrupted[images], clean[images], mask[images])
        found.append(gradient(model))
    assert relative_distance(found[0], found[1] / 2) < 1e-3
    assert not found[2].any()


def test_parts_may_be_forwards_of_a_wrapped_module_at_points_beside_the_images():
    energy, calls = QuadraticEnergy(48), []

    def wrapped(displaced, weights):
        calls.append(displaced)
        return (weights * energy(displaced)).sum()

    corrupted, clean, mask = masked_images(side=4, dtype=torch.float64)
    losses_of(energy, corrupted, clean, mask, displacement=0.02)
    plain = gradient(energy)
    energy.zero_grad()
    given = (energy, corrupted, clean, mask, 1.0, 0.02, wrapped)
    for number, (part, _, _) in enumerate(finite_difference_losses(*given), 1):
        part.backward()
        assert len(calls) == number
    torch.testing.assert_close(gradient(energy), plain)
    # The displacement is measured where the loss counts.
    moves, hidden = calls[0] - corrupted, mask.expand_as(corrupted)
    torch.testing.assert_close(corrupted - calls[1], moves)
    assert not moves[~hidden].any()
    for move, inside in zip(moves, hidden, strict=True):
        assert move[inside].square().mean().sqrt().item() == pytest.approx(0.02)


def test_the_best_displacement_is_the_nearest_to_the_exact_gradient_and_leaves_no_trace():
    model = small("Swin")
    corrupted, clean, mask = masked_images()
    parameters = [p for p in model.parameters() if p.requires_grad]
    before = torch.get_rng_state()
    best, distance = best_displacement(model, parameters, corrupted, clean, mask)
    assert torch.equal(torch.get_rng_state(), before)
    assert all(parameter.grad is None for parameter in parameters)

    training_step(model, corrupted, clean, mask)[0].backward()
    exact, distances = gradient(model), {}
    for displacement in DISPLACEMENTS:
        model.zero_grad()
        torch.set_rng_state(before)
        losses_of(model, corrupted, clean, mask, displacement=displacement)
        distances[displacement] = relative_distance(gradient(model), exact)
    assert best == min(distances, key=distances.get)
    assert distance == pytest.approx(distances[best], rel=0.05)
    assert distance < 1e-3


def test_kinks_are_refused_by_measurement():
    energy = EnergyModel("test_resnet", image_size=32)
    parameters = [parameter for parameter in energy.parameters() if parameter.requires_grad]
    with pytest.raises(UserError, match=r"kinks such as ReLU.*use the exact step") as refusal:
        best_displacement(energy, parameters, *masked_images())
    assert "\n" not in str(refusal.value)


def refused(energy, message, dtype=torch.float32):
    for given in (energy, functools.partial(energy, tokens=None)):
        with pytest.raises(UserError, match=message) as refusal:
            check_precision(given, torch.zeros(2, 3, 32, 32, dtype=dtype))
        assert "\n" not in str(refusal.value)


def test_half_precision_images_parameters_and_autocast_are_refused():
    model = small("ViT")
    refused(model, r"images: torch\.float16.*32-true", torch.float16)
    with torch.autocast("cpu", torch.bfloat16):
        refused(model, r"autocast: torch\.bfloat16.*32-true")
    refused(model.bfloat16(), r"parameter backbone\.\S+: torch\.bfloat16.*32-true")


def test_rounded_products_are_refused_and_full_float32_mends_it():
    model, before = small("ViT"), torch.backends.cudnn.allow_tf32
    torch.set_float32_matmul_precision("high")
    try:
        refused(model, r"full_float32\(\)")
        with full_float32():
            check_precision(model, torch.zeros(1))
            assert not torch.backends.cudnn.allow_tf32
        assert torch.get_float32_matmul_precision() == "high"
        assert torch.backends.cudnn.allow_tf32 == before
    finally:
        torch.set_float32_matmul_precision("highest")
