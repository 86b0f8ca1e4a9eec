import math

import pytest
import torch
from lightning.fabric import Fabric
from torch import nn
from torch.nn.attention import SDPBackend, sdpa_kernel

from backfold.data.source import open_source
from backfold.data.statistics import ChannelStatistics
from backfold.energy import EnergyModel
from backfold.pretext import Denoising, Masking, Mixture
from backfold.training.config import PretrainConfig
from backfold.training.optimizer import OptimizerSettings
from backfold.training.stepper import Stepper, split_sizes, step_seed

STATISTICS = ChannelStatistics((0.3,), (0.35,))
MASKING = Masking(mask_patch_size=7)


def make(task=MASKING, energy=None, total_steps=100, **changes):
    """A stepper on a tiny ViT for grey images of 28 x 28 pixels."""
    torch.manual_seed(0)
    options = {"patch_size": 7, "embed_dim": 16, "depth": 2, "num_heads": 2}
    if energy is None:
        energy = EnergyModel(
            "vit_tiny_patch16_224", image_size=28, channels=1, backbone_options=options
        )
    fabric = Fabric(accelerator="cpu", devices=1, precision="32-true")
    settings = {"optimizer": OptimizerSettings(max_gradient_norm=0.0), **changes}
    config = PretrainConfig(batch_size=16, **settings)
    stepper = Stepper(config, energy, task, STATISTICS, fabric, total_steps, steps_per_epoch=10)
    return energy, stepper


@pytest.fixture(scope="module")
def pictures():
    """Sixteen embedded images, (16, 1, 28, 28) in [0, 1]."""
    source = open_source(None, "train")
    return torch.stack([source.read(index) for index in range(16)]).float() / 255


def gradients(energy):
    return {name: p.grad.clone() for name, p in energy.named_parameters() if p.grad is not None}


def assert_close(left, right, tolerance):
    assert left.keys() == right.keys()
    for name in left:
        difference = (left[name] - right[name]).norm()
        assert difference <= tolerance * left[name].norm() + 1e-7, (name, difference)


@pytest.mark.parametrize("local_batch", [1, 2, 7, 33, 256])
def test_parts_are_the_fewest_and_as_equal_as_possible(local_batch):
    for largest in range(1, local_batch + 2):
        sizes = split_sizes(local_batch, largest)
        assert sum(sizes) == local_batch
        assert max(sizes) <= largest
        assert max(sizes) - min(sizes) <= 1
        assert len(sizes) == math.ceil(local_batch / largest)


@pytest.mark.parametrize("num_steps", [1, 2])
def test_parts_of_a_batch_give_the_whole_batch_s_gradient(pictures, num_steps):
    whole, step_whole = make(num_steps=num_steps)
    parts, step_parts = make(num_steps=num_steps, micro_batch=4)
    loss_whole, norm_whole, _ = step_whole(pictures, 0)
    loss_parts, norm_parts, last = step_parts(pictures, 0)
    assert float(loss_parts) == pytest.approx(float(loss_whole), rel=1e-5)
    assert float(norm_parts) == pytest.approx(float(norm_whole), rel=1e-4)
    assert_close(gradients(whole), gradients(parts), 1e-4)
    assert len(last.clean) == 4


def reference_loss(energy, clean, corrupted, mask, num_steps, step_size):
    """Sum over the steps, each masked mean of each image, written out."""
    total, points = 0.0, corrupted
    for _ in range(num_steps):
        points = points.detach().requires_grad_()
        with sdpa_kernel(SDPBackend.MATH):
            (gradient,) = torch.autograd.grad(energy(points).sum(), points, create_graph=True)
        points = points - step_size * gradient
        distance = (points - clean).abs()
        smooth = torch.where(distance < 1, distance**2 / 2, distance - 0.5)
        per_image = [s[m.expand_as(s)].mean() for s, m in zip(smooth, mask, strict=True)]
        total = total + sum(per_image) / len(per_image) / num_steps
    return total


@pytest.mark.parametrize("task", [MASKING, Mixture((MASKING, Denoising()), (1.0, 2.0))])
def test_loss_and_gradient_equal_a_written_out_reference(pictures, task):
    energy, step = make(task, num_steps=3, step_size=0.4, seed=5)
    twin, _ = make(task)
    twin.load_state_dict(energy.state_dict())
    loss, norm, last = step(pictures, 7)
    clean = (pictures - 0.3) / 0.35
    seed = step_seed(5, 7, 0)
    corruption = task(clean, torch.Generator().manual_seed(seed))
    expected = reference_loss(twin, clean, corruption.corrupted, corruption.loss_mask, 3, 0.4)
    expected.backward()
    assert float(loss) == pytest.approx(expected.item(), rel=1e-5)
    assert_close(gradients(twin), gradients(energy), 1e-4)
    squares = sum(float(p.grad.square().sum()) for p in twin.parameters() if p.grad is not None)
    assert float(norm) == pytest.approx(squares**0.5, rel=1e-4)
    assert torch.equal(last.corruption.corrupted, corruption.corrupted)
    with torch.no_grad():
        gap = float((energy(corruption.corrupted) - energy(clean)).mean())
    assert last.energy_gap(energy) == pytest.approx(gap, rel=1e-4)


def test_the_restored_images_are_those_of_the_last_step(pictures):
    energy, step = make(num_steps=2, step_size=0.3)
    twin, _ = make()
    twin.load_state_dict(energy.state_dict())
    _, _, last = step(pictures, 0)
    points = last.corruption.corrupted
    for _ in range(2):
        points = points.detach().requires_grad_()
        (gradient,) = torch.autograd.grad(twin(points).sum(), points)
        points = points - 0.3 * gradient
    torch.testing.assert_close(last.restored, points, rtol=1e-4, atol=1e-5)
    assert not last.restored.requires_grad


def test_gradients_are_scaled_down_to_the_norm_asked_for(pictures):
    free, step_free = make()
    bound, step_bound = make(optimizer=OptimizerSettings(max_gradient_norm=0.01))
    _, norm, _ = step_free(pictures, 0)
    _, norm_before, _ = step_bound(pictures, 0)
    assert float(norm) == pytest.approx(float(norm_before), rel=1e-5)
    scaled = {name: g * 0.01 / float(norm) for name, g in gradients(free).items()}
    assert_close(scaled, gradients(bound), 1e-3)


def test_the_rate_is_the_schedule_s_at_that_step(pictures):
    energy, step = make(optimizer=OptimizerSettings(base_lr=0.016, warmup_epochs=1.0))
    peak = 0.016 * 16 / 256
    rates = []
    for number in (0, 5, 10, 55):
        step(pictures, number)
        rates.append(step.optimizer.param_groups[0]["lr"])
    assert rates == pytest.approx([peak * 0.001, peak * 0.5005, peak, peak / 2], rel=1e-6)
    assert energy.training


def test_what_is_random_depends_on_seed_step_and_rank_alone(pictures):
    _, step = make(seed=1)
    first = step(pictures, 4)[2].corruption
    torch.manual_seed(99)
    _, again = make(seed=1)
    assert torch.equal(again(pictures, 4)[2].corruption.loss_mask, first.loss_mask)
    assert not torch.equal(again(pictures, 5)[2].corruption.loss_mask, first.loss_mask)
    _, other = make(seed=2)
    assert not torch.equal(other(pictures, 4)[2].corruption.loss_mask, first.loss_mask)
    seeds = {step_seed(a, b, c) for a in range(4) for b in range(4) for c in range(4)}
    assert len(seeds) == 64
    assert all(0 <= seed < 2**63 for seed in seeds)


def test_dropout_depends_on_the_step_alone(pictures):
    torch.manual_seed(0)
    backbone = nn.Sequential(nn.Conv2d(1, 4, 7, 7), nn.GELU(), nn.Dropout(0.5))
    losses = []
    for before in (1, 2):
        energy = EnergyModel(backbone, image_size=28, channels=1)
        _, step = make(energy=energy, optimizer=OptimizerSettings(base_lr=1e-12))
        torch.manual_seed(before)
        losses.append([float(step(pictures, number)[0]) for number in (3, 4)])
    assert losses[0] == pytest.approx(losses[1], rel=1e-5)


@pytest.mark.parametrize("num_steps", [1, 2])
def test_training_lowers_the_loss_on_a_fixed_set(pictures, num_steps):
    optimizer = OptimizerSettings(base_lr=0.08, warmup_epochs=0.5)
    _, step = make(num_steps=num_steps, optimizer=optimizer, total_steps=60)
    losses = [float(step(pictures, number)[0]) for number in range(60)]
    assert sum(losses[-5:]) < 0.6 * sum(losses[:5])
