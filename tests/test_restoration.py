"""Restoration against closed forms: descent, divergence, the loss, and what stays as it was."""

import pytest
import torch
from torch import Tensor, nn

from backfold.energy import EnergyModel
from backfold.restoration import (
    energy_gradient,
    eval_mode,
    restoration_loss,
    restoration_step,
    restore,
)

SHAPE = (3, 4, 4)
VIT = {"patch_size": 8, "embed_dim": 12, "depth": 2, "num_heads": 2}


@pytest.fixture(autouse=True)
def _seed():
    torch.manual_seed(0)


def vit(**options):
    options = {**VIT, **options}
    return EnergyModel("vit_tiny_patch16_224", image_size=16, backbone_options=options)


def resnet():
    return EnergyModel("test_resnet", image_size=32)


class Quadratic(nn.Module):
    """E = 1/2 sum a (x - mu)^2, whose descent contracts each pixel by 1 - step_size a."""

    def __init__(self):
        super().__init__()
        self.curvature = nn.Parameter(torch.rand(SHAPE, dtype=torch.float64) + 0.5)
        self.minimum = nn.Parameter(torch.randn(SHAPE, dtype=torch.float64))
        self.dropout = nn.Dropout(0.5)

    def forward(self, images):
        distance = self.dropout(images) - self.minimum
        return (self.curvature * distance.square()).sum(dim=(1, 2, 3)) / 2


def bowl(curvature):
    """E = 1/2 a |x|^2 with one curvature an image; a plain function."""
    curvature = torch.tensor(curvature)

    def energy(images):
        return curvature * images.square().sum(dim=(1, 2, 3)) / 2

    return energy


@pytest.mark.parametrize("step_size", [0.3, 1.0])
def test_descent_of_a_quadratic_is_its_closed_form(step_size):
    energy = Quadratic()
    start = torch.randn(5, *SHAPE, dtype=torch.float64)
    result = restore(energy, start, num_steps=6, step_size=step_size)
    curvature, minimum = energy.curvature.detach(), energy.minimum.detach()
    for step in range(7):
        expected = minimum + (1 - step_size * curvature) ** step * (start - minimum)
        torch.testing.assert_close(result.trajectory[step], expected, rtol=1e-12, atol=1e-12)
        expected_energy = (curvature * (expected - minimum) ** 2).flatten(1).sum(dim=1) / 2
        torch.testing.assert_close(result.energies[step], expected_energy, rtol=1e-12, atol=1e-12)
    assert torch.equal(result.restored, result.trajectory[-1])
    assert result.status.ok
    assert result.status.message == "ok"
    assert result.trajectory.shape == (7, 5, *SHAPE)
    assert result.energies.shape == (7, 5)
    assert not result.restored.requires_grad
    assert not result.energies.requires_grad


@pytest.mark.parametrize(("num_steps", "step_size"), [(0, 1.0), (3, 0.0)])
def test_no_steps_and_no_step_size_return_the_input(num_steps, step_size):
    start = torch.randn(4, 3, 16, 16)
    result = restore(vit(), start, num_steps, step_size)
    assert torch.equal(result.restored, start)
    assert torch.equal(result.trajectory, start.expand(num_steps + 1, *start.shape))


@pytest.mark.parametrize(("build", "side"), [(vit, 16), (resnet, 32)])
@pytest.mark.parametrize("mode", [torch.no_grad, torch.inference_mode])
def test_gradients_switched_off_outside_change_nothing(build, side, mode):
    model, start = build(), torch.randn(2, 3, side, side)
    expected = restore(model, start, num_steps=3)
    with mode():
        assert torch.equal(restore(model, start, num_steps=3).trajectory, expected.trajectory)
        inside = start * 1.0
        assert inside.is_inference() == (mode is torch.inference_mode)
        result = restore(model, inside, num_steps=3)
    assert torch.equal(result.trajectory, expected.trajectory)
    assert torch.equal(result.energies, expected.energies)
    assert torch.equal(inside, start)


def test_parameter_gradients_are_left_alone():
    model, images = vit(), torch.randn(2, 3, 16, 16)
    kept = model.head.weight
    kept.grad = torch.full_like(kept, 3.0)
    restore(model, images, num_steps=2)
    assert torch.equal(kept.grad, torch.full_like(kept, 3.0))
    assert all(p.grad is None for p in model.parameters() if p is not kept)
    assert all(p.requires_grad for p in model.parameters())
    assert not images.requires_grad


@pytest.mark.parametrize("fails", [False, True])
def test_each_module_gets_its_own_mode_back(fails):
    seen = []

    class Watched(Quadratic):
        def forward(self, images):
            seen.append((self.training, self.dropout.training))
            if fails:
                raise RuntimeError("broken energy")
            return super().forward(images)

    energy = Watched()
    energy.training, energy.dropout.training = False, True
    images = torch.randn(2, *SHAPE, dtype=torch.float64)
    if fails:
        with pytest.raises(RuntimeError, match="broken energy"):
            restore(energy, images)
    else:
        assert torch.equal(restore(energy, images).restored, restore(energy, images).restored)
    assert set(seen) == {(False, False)}
    assert (energy.training, energy.dropout.training) == (False, True)


def test_eval_mode_takes_any_callable():
    with eval_mode(lambda images: images.sum(dim=(1, 2, 3))):
        pass


@pytest.mark.parametrize(("build", "side"), [(vit, 16), (resnet, 32)])
def test_an_image_is_restored_alone_as_in_a_batch(build, side):
    model, images = build().double(), torch.randn(3, 3, side, side, dtype=torch.float64)
    together = restore(model, images, num_steps=3)
    for index in range(3):
        alone = restore(model, images[index : index + 1], num_steps=3)
        torch.testing.assert_close(alone.trajectory[:, 0], together.trajectory[:, index])
        torch.testing.assert_close(alone.energies[:, 0], together.energies[:, index])


def test_only_the_diverging_image_stops_at_its_last_finite_state():
    start = torch.randn(4, *SHAPE)
    result = restore(bowl([0.5, 30.0, 1e30, 0.25]), start, num_steps=5)
    assert result.status.diverged.tolist() == [False, True, True, False]
    assert not result.status.ok
    assert result.status.message == (
        "2 of 4 images diverged and kept their last finite state; "
        "lower step_size (now 1), take fewer steps, or train the energy longer"
    )
    # -29 times the start is within the limit of 100 times, 841 times is beyond it.
    torch.testing.assert_close(result.restored[1], -29 * start[1])
    assert torch.equal(result.trajectory[1:, 1], result.restored[1].expand(5, *SHAPE))
    assert torch.equal(result.restored[2], start[2])
    healthy = restore(bowl([0.5, 0.25]), start[[0, 3]], num_steps=5)
    assert torch.equal(result.trajectory[:, [0, 3]], healthy.trajectory)
    assert torch.equal(result.energies[:, [0, 3]], healthy.energies)


def test_an_energy_that_is_not_finite_stops_its_image():
    def energy(images):
        energies = images.square().sum(dim=(1, 2, 3)) / 4
        return torch.stack([energies[0], energies[1] * float("inf")])

    start = torch.randn(2, *SHAPE)
    result = restore(energy, start, num_steps=2)
    assert result.status.diverged.tolist() == [False, True]
    assert torch.equal(result.restored[1], start[1])
    torch.testing.assert_close(result.restored[0], start[0] / 4)


def test_an_energy_that_is_not_finite_at_the_last_point_only_is_reported():
    start = torch.tensor([0.5, 4.0])[:, None, None, None].expand(2, *SHAPE)
    result = restore(lambda images: images.log().sum(dim=(1, 2, 3)), start, num_steps=1)
    # The gradient is 1 / x: 0.5 goes to -1.5, which has no logarithm.
    assert torch.equal(result.restored, torch.tensor([-1.5, 3.75])[:, None, None, None] + 0 * start)
    assert result.energies.isfinite().tolist() == [[True, True], [False, True]]
    assert result.status.diverged.tolist() == [True, False]


def test_images_with_nans_are_marked_and_harm_no_others():
    start = torch.randn(3, *SHAPE)
    start[1, 0, 0, 0] = float("nan")
    result = restore(bowl([0.5, 0.5, 0.5]), start, num_steps=2)
    assert result.status.diverged.tolist() == [False, True, False]
    assert torch.equal(result.restored[[0, 2]], start[[0, 2]] / 4)


@pytest.mark.parametrize("num_steps", [0, 1, 3])
def test_the_callback_sees_each_point_of_the_trajectory(num_steps):
    calls = []
    result = restore(
        vit(), torch.randn(2, 3, 16, 16), num_steps, callback=lambda *seen: calls.append(seen)
    )
    assert [step for step, _, _ in calls] == list(range(num_steps + 1))
    assert torch.equal(torch.stack([images for _, images, _ in calls]), result.trajectory)
    assert torch.equal(torch.stack([energies for _, _, energies in calls]), result.energies)


@pytest.mark.parametrize(
    ("images", "num_steps", "message"),
    [
        (torch.zeros(1, *SHAPE), -1, "num_steps is -1; give 0 or more"),
        (torch.zeros(SHAPE), 1, r"images are \(3, 4, 4\) of torch.float32; give floats of shape"),
        (torch.zeros(1, *SHAPE, dtype=torch.uint8), 1, "of torch.uint8; give floats of shape"),
    ],
)
def test_bad_input_is_refused(images, num_steps, message):
    with pytest.raises(ValueError, match=message):
        restore(bowl([1.0]), images, num_steps)


def test_the_step_size_scales_a_step_and_energies_are_those_of_the_images_given():
    energy, images = Quadratic().eval(), torch.randn(2, *SHAPE, dtype=torch.float64)
    energies, gradient = energy_gradient(energy, images)
    torch.testing.assert_close(
        gradient, energy.curvature.detach() * (images - energy.minimum.detach())
    )
    restored, same = restoration_step(energy, images, step_size=0.25)
    torch.testing.assert_close(restored, images - 0.25 * gradient)
    assert torch.equal(energies, same)
    assert torch.equal(energies, energy(images).detach())


def smooth_l1_in_plain_python(restored, clean, mask):
    means = []
    for image, target, hidden in zip(restored.tolist(), clean.tolist(), mask.tolist(), strict=True):
        terms = []
        for channel, wanted in zip(image, target, strict=True):
            for y, row in enumerate(channel):
                for x, value in enumerate(row):
                    distance = abs(value - wanted[y][x])
                    if hidden[0][y][x]:
                        terms.append(distance**2 / 2 if distance < 1 else distance - 0.5)
        means.append(sum(terms) / max(len(terms), 1))
    return sum(means) / len(means)


def test_the_loss_is_the_mean_smooth_l1_distance_of_the_masked_pixels():
    restored, clean = (2 * torch.randn(4, *SHAPE, dtype=torch.float64) for _ in range(2))
    mask = torch.rand(4, 1, 4, 4) < torch.tensor([0.2, 0.5, 0.9, -1.0])[:, None, None, None]
    assert not mask[3].any()
    expected = smooth_l1_in_plain_python(restored, clean, mask)
    assert float(restoration_loss(restored, clean, mask)) == pytest.approx(expected, rel=1e-13)
    whole = smooth_l1_in_plain_python(restored, clean, torch.ones(4, 1, 4, 4))
    assert float(
        restoration_loss(restored, clean, torch.ones(1, dtype=torch.bool))
    ) == pytest.approx(whole, rel=1e-13)
    halves = restoration_loss(restored.bfloat16(), clean.bfloat16(), mask)
    assert halves.dtype == torch.float32
    assert float(halves) == pytest.approx(expected, rel=0.02)


class _CachesInEval(nn.Module):
    """As timm's LeViT: eval mode keeps what it computed of the weights until ``train()``."""

    def __init__(self) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.tensor(1.0))
        self.cache: Tensor | None = None

    def train(self, mode: bool = True) -> "_CachesInEval":
        super().train(mode)
        if mode:
            self.cache = None
        return self

    def forward(self, images: Tensor) -> Tensor:
        if self.training:
            return self.weight * images.sum(dim=(1, 2, 3))
        if self.cache is None:
            self.cache = self.weight.detach().clone()
        return self.cache * images.sum(dim=(1, 2, 3))


def test_restoring_after_a_weight_update_uses_the_new_weights():
    energy = _CachesInEval()
    images = torch.ones(1, 1, 2, 2)
    assert restore(energy, images, 0).energies.item() == 4.0
    energy.weight.data.fill_(2.0)
    assert restore(energy, images, 0).energies.item() == 8.0
