"""Restoration against closed forms: descent, divergence, the loss, and what stays as it was."""

import pytest
import torch
from torch import nn

from backfold.energy import EnergyModel
from backfold.restoration import restoration_loss, restore
from tiny_run import tiny_energy

SHAPE = (3, 4, 4)


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


def bowl(*curvatures):
    """E = 1/2 a |x|^2 with one curvature an image; a plain function."""
    return lambda images: torch.tensor(curvatures) * images.square().sum(dim=(1, 2, 3)) / 2


def test_descent_of_a_quadratic_is_its_closed_form():
    energy, step_size = Quadratic(), 0.3
    start = torch.randn(5, *SHAPE, dtype=torch.float64)
    result = restore(energy, start, num_steps=6, step_size=step_size)
    curvature, minimum = energy.curvature.detach(), energy.minimum.detach()
    for step in range(7):
        expected = minimum + (1 - step_size * curvature) ** step * (start - minimum)
        torch.testing.assert_close(result.trajectory[step], expected, rtol=1e-12, atol=1e-12)
        expected_energy = (curvature * (expected - minimum) ** 2).flatten(1).sum(dim=1) / 2
        torch.testing.assert_close(result.energies[step], expected_energy, rtol=1e-12, atol=1e-12)
    assert torch.equal(result.restored, result.trajectory[-1])
    assert result.status.message == "ok"
    assert len(result.trajectory) == 7
    assert not result.restored.requires_grad
    assert energy.curvature.grad is None


@pytest.mark.parametrize("mode", [torch.no_grad, torch.inference_mode])
def test_gradients_switched_off_outside_change_nothing(mode):
    model, start = tiny_energy(14, depth=2), torch.randn(2, 3, 14, 14)
    expected = restore(model, start, num_steps=3)
    with mode():
        assert torch.equal(restore(model, start, num_steps=3).trajectory, expected.trajectory)
        inside = start * 1.0
        assert inside.is_inference() == (mode is torch.inference_mode)
        result = restore(model, inside, num_steps=3)
    assert torch.equal(result.energies, expected.energies)
    assert torch.equal(inside, start)


def test_each_module_gets_its_own_mode_back():
    energy, seen = Quadratic(), []
    energy.training, energy.dropout.training = False, True
    images = torch.randn(2, *SHAPE, dtype=torch.float64)

    def watch(*_):
        seen.append((energy.training, energy.dropout.training))
        if len(seen) > 4:
            raise RuntimeError("broken energy")

    energy.register_forward_pre_hook(watch)
    assert torch.equal(restore(energy, images).restored, restore(energy, images).restored)
    with pytest.raises(RuntimeError, match="broken energy"):
        restore(energy, images)
    assert set(seen) == {(False, False)}
    assert (energy.training, energy.dropout.training) == (False, True)


@pytest.mark.parametrize("name", ["test_vit", "test_resnet"])
def test_an_image_is_restored_alone_as_in_a_batch(name):
    model = EnergyModel(name, image_size=32).double()
    images = torch.randn(3, 3, 32, 32, dtype=torch.float64)
    together = restore(model, images, num_steps=3)
    for index in range(3):
        alone = restore(model, images[index : index + 1], num_steps=3)
        torch.testing.assert_close(alone.trajectory[:, 0], together.trajectory[:, index])
        torch.testing.assert_close(alone.energies[:, 0], together.energies[:, index])


def test_only_the_diverging_image_stops_at_its_last_finite_state():
    start = torch.randn(4, *SHAPE)
    result = restore(bowl(0.5, 30.0, 1e30, 0.25), start, num_steps=5)
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
    healthy = restore(bowl(0.5, 0.25), start[[0, 3]], num_steps=5)
    assert torch.equal(result.trajectory[:, [0, 3]], healthy.trajectory)
    assert torch.equal(result.energies[:, [0, 3]], healthy.energies)


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
    result = restore(bowl(0.5, 0.5, 0.5), start, num_steps=2)
    assert result.status.diverged.tolist() == [False, True, False]
    assert torch.equal(result.restored[[0, 2]], start[[0, 2]] / 4)
    factors = torch.tensor([0.25, float("inf"), 0.25])  # of an energy that is not finite itself
    result = restore(lambda x: factors * x.square().sum(dim=(1, 2, 3)), start.nan_to_num(), 2)
    assert result.status.diverged.tolist() == [False, True, False]


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
        restore(bowl(1.0), images, num_steps)


def smooth_l1_in_plain_python(restored, clean, mask):
    means = []
    hidden = mask.bool().expand_as(clean)
    for image, target, inside in zip(restored, clean, hidden, strict=True):
        distances = [abs(value) for value in (image - target)[inside].tolist()]
        terms = [d**2 / 2 if d < 1 else d - 0.5 for d in distances]
        means.append(sum(terms) / max(len(terms), 1))
    return sum(means) / len(means)


def test_the_loss_is_the_mean_smooth_l1_distance_of_the_masked_pixels():
    restored, clean = (2 * torch.randn(4, *SHAPE, dtype=torch.float64) for _ in range(2))
    mask = torch.rand(4, 1, 4, 4) < torch.tensor([0.2, 0.5, 0.9, -1.0])[:, None, None, None]
    assert not mask[3].any()
    expected = smooth_l1_in_plain_python(restored, clean, mask)
    assert float(restoration_loss(restored, clean, mask)) == pytest.approx(expected, rel=1e-13)
    everywhere = torch.ones(1, dtype=torch.bool)
    whole = smooth_l1_in_plain_python(restored, clean, torch.ones(4, 1, 4, 4))
    assert float(restoration_loss(restored, clean, everywhere)) == pytest.approx(whole, rel=1e-13)
    halves = restoration_loss(restored.bfloat16(), clean.bfloat16(), mask)
    assert halves.dtype == torch.float32
    assert float(halves) == pytest.approx(expected, rel=0.02)


def test_restoring_after_a_weight_update_uses_the_new_weights():
    energy, images = EnergyModel("levit_128s", image_size=32), torch.randn(2, 3, 32, 32)
    before = restore(energy, images).energies
    for name, parameter in energy.named_parameters():
        if name.endswith("attention_biases"):  # of which LeViT keeps a cache in eval mode
            parameter.data.normal_()
    assert (restore(energy, images).energies != before).all()
