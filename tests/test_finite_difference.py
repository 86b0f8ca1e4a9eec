"""Training without a second derivative, held against the exact step."""

import functools

import pytest
import torch
from torch import nn
from torch.utils.checkpoint import checkpoint

from backfold.energy import EnergyModel
from backfold.errors import UserError
from backfold.finite_difference import (
    DISPLACEMENTS,
    best_displacement,
    displaced_energy,
    finite_difference_losses,
    random_state,
    restoration_direction,
)
from backfold.full_precision import check_first_order, check_precision, full_float32
from backfold.restoration import training_step

SMALL = {
    "ViT": (
        "vit_tiny_patch16_224",
        32,
        {
            "patch_size": 8,
            "embed_dim": 48,
            "depth": 3,
            "num_heads": 3,
            "proj_drop_rate": 0.2,
            "drop_path_rate": 0.3,
        },
    ),
    "Swin": (
        "swin_tiny_patch4_window7_224",
        32,
        {
            "depths": (1, 2),
            "num_heads": (1, 2),
            "embed_dim": 32,
            "window_size": 4,
            "proj_drop_rate": 0.2,
            "drop_path_rate": 0.3,
        },
    ),
    "ConvNeXt": (
        "convnext_atto",
        32,
        {"depths": (1, 1, 2, 1), "dims": (16, 24, 32, 48), "drop_path_rate": 0.3},
    ),
}
EVERYWHERE = torch.ones(1, dtype=torch.bool)


@pytest.fixture(autouse=True)
def _seed():
    torch.manual_seed(0)


def small(family):
    name, side, options = SMALL[family]
    return EnergyModel(name, image_size=side, backbone_options=options)


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

    images = corrupted
    exact_losses = []
    for _ in range(2):
        loss, images, exact_energies = training_step(model, images, clean, mask, 0.7)
        (loss / 2).backward()
        exact_losses.append(loss.item())
    exact, exact_end, exact_images = gradient(model), torch.get_rng_state(), images
    assert not torch.equal(start, exact_end)  # masks were drawn

    torch.set_rng_state(start)
    model.zero_grad()
    images = corrupted
    losses = []
    for _ in range(2):
        value = 0.0
        parts = finite_difference_losses(model, images, clean, mask, 0.7)
        for part, points, found in parts:
            (part / 2).backward()
            value += part.item()
            images, energies = points, found
        losses.append(value)
        assert not images.requires_grad
        assert not energies.requires_grad
    assert relative_distance(gradient(model), exact) < 1e-3
    assert torch.equal(torch.get_rng_state(), exact_end)
    assert losses == pytest.approx(exact_losses, rel=1e-5)
    torch.testing.assert_close(images, exact_images, rtol=1e-4, atol=1e-4)
    torch.testing.assert_close(energies, exact_energies, rtol=1e-4, atol=1e-3)


def test_with_other_masks_in_each_pass_the_gradient_would_be_wrong():
    model = small("ViT")
    corrupted, clean, mask = masked_images()
    start = torch.get_rng_state()
    training_step(model, corrupted, clean, mask)[0].backward()
    exact = gradient(model)
    torch.set_rng_state(start)
    model.zero_grad()
    direction = restoration_direction(model, corrupted, clean, mask)
    for sign in (1, -1):
        moved = corrupted + sign * direction.displacement
        displaced_energy(model, moved, -sign * direction.weights).backward()
    assert relative_distance(gradient(model), exact) > 0.1


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
    parts = finite_difference_losses(
        energy, corrupted, clean, mask, step_size, displacement=displacement
    )
    for part, _, _ in parts:
        part.backward()

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
    for part, _, _ in finite_difference_losses(model, corrupted, clean, mask):
        part.backward()
    with_it = gradient(model)
    model.zero_grad()
    for part, _, _ in finite_difference_losses(model, corrupted[1:], clean[1:], mask[1:]):
        (part / 2).backward()
    assert with_it.isfinite().all()
    assert relative_distance(with_it, gradient(model)) < 1e-3

    model.zero_grad()
    for part, _, _ in finite_difference_losses(model, corrupted, clean, torch.zeros_like(mask)):
        part.backward()
    assert not gradient(model).any()


def test_slopes_too_small_to_be_squared_still_count():
    energy = QuadraticEnergy(48).float()
    with torch.no_grad():
        energy.factor.zero_()
        energy.linear.zero_()
    clean = torch.zeros(1, 3, 4, 4)
    direction = restoration_direction(energy, clean + 1e-25, clean, EVERYWHERE, 2.0)
    rms = direction.displacement.square().mean().sqrt().item()
    assert rms == pytest.approx(1e-3)
    # The loss's slope is 1e-25 / 48 on every pixel, so h is 1e-3 over that.
    assert direction.weights.item() == pytest.approx(2.0 * (1e-25 / 48) / 2e-3)


def test_the_displacement_is_measured_where_the_loss_counts():
    energy = QuadraticEnergy(48)
    corrupted, clean, mask = masked_images(side=4, dtype=torch.float64)
    moves = restoration_direction(energy, corrupted, clean, mask, 1.0, 0.02).displacement
    hidden = mask.expand_as(moves)
    assert not moves[~hidden].any()
    for move, inside in zip(moves, hidden, strict=True):
        assert move[inside].square().mean().sqrt().item() == pytest.approx(0.02)


def test_the_first_pass_keeps_no_graph_and_touches_no_gradient():
    model = small("ViT")
    corrupted, clean, mask = masked_images()
    saved = []
    with torch.autograd.graph.saved_tensors_hooks(lambda t: saved.append(1) or t, lambda t: t):
        direction = restoration_direction(model, corrupted, clean, mask)
    assert saved  # there was one
    for name in ("loss", "restored", "energies", "displacement", "weights"):
        value = getattr(direction, name)
        assert value.grad_fn is None
        assert not value.requires_grad
    assert all(parameter.grad is None for parameter in model.parameters())


def test_parts_may_be_forwards_of_a_wrapped_module():
    class Wrapped(nn.Module):
        def __init__(self, energy):
            super().__init__()
            self.energy = energy
            self.calls = 0

        def forward(self, displaced, weights):
            self.calls += 1
            return displaced_energy(self.energy, displaced, weights)

    model = small("ViT")
    wrapped = Wrapped(model)
    corrupted, clean, mask = masked_images()
    go_back = random_state(corrupted)
    for part, _, _ in finite_difference_losses(model, corrupted, clean, mask):
        part.backward()
    plain = gradient(model)
    model.zero_grad()
    go_back()
    parts = finite_difference_losses(model, corrupted, clean, mask, displaced=wrapped)
    for number, (part, _, _) in enumerate(parts, 1):
        part.backward()
        assert wrapped.calls == number  # one at a time
    torch.testing.assert_close(gradient(model), plain)


def test_checkpointed_blocks_give_the_same_gradient():
    model = small("ViT")
    corrupted, clean, mask = masked_images()
    found = []
    for checkpointed in (False, True):
        torch.manual_seed(1)
        model.zero_grad()
        energy = (
            functools.partial(checkpoint, model, use_reentrant=False) if checkpointed else model
        )
        for part, _, _ in finite_difference_losses(energy, corrupted, clean, mask):
            part.backward()
        found.append(gradient(model))
    torch.testing.assert_close(found[1], found[0], rtol=1e-4, atol=1e-6)


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
        parts = finite_difference_losses(model, corrupted, clean, mask, displacement=displacement)
        for part, _, _ in parts:
            part.backward()
        distances[displacement] = relative_distance(gradient(model), exact)
    assert best == min(distances, key=distances.get)
    assert distance == pytest.approx(distances[best], rel=0.05)
    assert distance < 1e-3


class KinkedEnergy(nn.Module):
    """E = sum_j v_j relu(w_j . x), with so many kinks that every displacement meets some."""

    def __init__(self):
        super().__init__()
        self.inner = nn.Parameter(torch.randn(20_000, 48) / 7)
        self.outer = nn.Parameter(torch.randn(20_000) / 20)

    def forward(self, images):
        return torch.relu(images.flatten(1) @ self.inner.T) @ self.outer


def test_kinks_that_no_layer_shows_are_refused_by_measurement():
    energy = KinkedEnergy()
    corrupted, clean, mask = masked_images(side=4)
    check_first_order(energy, corrupted)
    with pytest.raises(UserError, match=r"kinks such as ReLU.*use the exact step") as refusal:
        best_displacement(energy, list(energy.parameters()), corrupted, clean, mask)
    assert "\n" not in str(refusal.value)


@pytest.mark.parametrize(("name", "layer"), [("resnet18", "ReLU"), ("mobilenetv3_small_050", "H")])
def test_layers_with_kinks_are_refused_by_name(name, layer):
    model = EnergyModel(name, image_size=32)
    with pytest.raises(UserError, match=rf"layer backbone\.\S+ is {layer}\w*, whose slope jumps"):
        check_first_order(model, torch.zeros(1, 3, 32, 32))


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_half_precision_images_and_parameters_are_refused(dtype):
    corrupted, clean, mask = masked_images()
    with pytest.raises(UserError, match=f"images are {dtype}.*32-true"):
        restoration_direction(small("ViT"), corrupted.to(dtype), clean, mask)
    with pytest.raises(UserError, match=rf"parameter backbone\.\S+ is {dtype}.*32-true"):
        restoration_direction(small("ViT").to(dtype), corrupted, clean, mask)


def test_autocast_is_refused_in_every_pass():
    model = small("ViT")
    corrupted, clean, mask = masked_images()
    with torch.autocast("cpu", torch.bfloat16):
        with pytest.raises(UserError, match=r"autocast to torch\.bfloat16 is on.*32-true"):
            restoration_direction(model, corrupted, clean, mask)
        with pytest.raises(UserError, match="autocast"):
            displaced_energy(model, corrupted, torch.ones(4))


def test_rounded_products_are_refused_and_full_float32_mends_it():
    images = torch.zeros(1, 3, 4, 4)
    before = torch.get_float32_matmul_precision(), torch.backends.cudnn.allow_tf32
    try:
        torch.set_float32_matmul_precision("high")
        with pytest.raises(UserError, match=r"full_float32\(\)"):
            check_precision(images)
        with full_float32():
            check_precision(images)
            assert not torch.backends.cudnn.allow_tf32
            assert not torch.backends.cuda.matmul.allow_tf32
        assert torch.get_float32_matmul_precision() == "high"
        assert torch.backends.cudnn.allow_tf32 == before[1]
    finally:
        torch.set_float32_matmul_precision(before[0])


def test_batch_normalisation_in_train_mode_is_refused():
    foreign = nn.Sequential(nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4)).train()
    images = torch.zeros(2, 3, 8, 8)
    for energy in (foreign, functools.partial(foreign)):
        with pytest.raises(UserError, match=r"batch normalisation 1 is in train mode") as refusal:
            check_first_order(energy, images)
        assert "\n" not in str(refusal.value)
    check_first_order(foreign.eval(), images)
    silu = EnergyModel("efficientnet_b0", image_size=32)
    check_first_order(silu.train(), images)
    stateless = nn.BatchNorm2d(3, track_running_stats=False).eval()
    with pytest.raises(UserError, match="batch normalisation"):
        check_first_order(stateless, images)
