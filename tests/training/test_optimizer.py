import math

import pytest
import torch
from torch import nn
from torch.optim import SGD

from backfold.energy import EnergyModel
from backfold.restoration import restore, training_step
from backfold.training.optimizer import (
    OptimizerSettings,
    build_optimizer,
    build_schedule,
    freeze_unreachable,
)

OPTIONS = {"patch_size": 7, "embed_dim": 16, "depth": 2, "num_heads": 2}


def tiny_vit(**options):
    torch.manual_seed(0)
    return EnergyModel(
        "vit_tiny_patch16_224", image_size=14, channels=1, backbone_options=OPTIONS | options
    )


def images(*shape):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(3))


@pytest.mark.parametrize("pooling", ["token", "avg"])
def test_a_parameter_is_frozen_exactly_if_the_restored_image_does_not_depend_on_it(pooling):
    energy = tiny_vit(global_pool=pooling)
    corrupted = images(3, 1, 14, 14)
    frozen = set(freeze_unreachable(energy, corrupted))
    before = restore(energy, corrupted).restored
    generator = torch.Generator().manual_seed(1)
    for name, parameter in energy.named_parameters():
        kept = parameter.detach().clone()
        with torch.no_grad():
            parameter.add_(0.1 * torch.randn(parameter.shape, generator=generator))
        moved = (restore(energy, corrupted).restored - before).abs().max()
        with torch.no_grad():
            parameter.copy_(kept)
        assert (name in frozen) == (moved < 1e-6), (name, moved)
        assert parameter.requires_grad == (name not in frozen)
    assert frozen  # the last norm's bias at least


def test_biases_of_a_piecewise_linear_energy_never_move():
    torch.manual_seed(0)
    backbone = nn.Sequential(nn.Conv2d(1, 4, 3), nn.ReLU(), nn.Conv2d(4, 6, 3))
    energy = EnergyModel(backbone, image_size=8, channels=1)
    before = {name: value.clone() for name, value in energy.state_dict().items()}
    # The first bias has a gradient, of zeros, because ReLU's derivative has one.
    assert "backbone.2.bias" in freeze_unreachable(energy, images(2, 1, 8, 8))
    optimizer = build_optimizer(energy, OptimizerSettings(base_lr=0.1), batch_size=256)
    clean = images(4, 1, 8, 8)
    for _ in range(3):
        optimizer.zero_grad()
        training_step(energy, 2 * clean, clean, torch.ones_like(clean) > 0)[0].backward()
        optimizer.step()
    still = {
        name for name, value in energy.state_dict().items() if torch.equal(value, before[name])
    }
    assert still == {"backbone.0.bias", "backbone.2.bias"}


def test_freezing_leaves_no_gradient_behind():
    energy = tiny_vit()
    freeze_unreachable(energy, images(2, 1, 14, 14))
    assert all(parameter.grad is None for parameter in energy.parameters())


def test_norms_biases_and_positions_do_not_decay():
    energy = tiny_vit()
    energy.backbone.blocks[0].attn.qkv.weight.requires_grad_(False)
    optimizer = build_optimizer(energy, OptimizerSettings(weight_decay=0.3), batch_size=64)
    names = {id(parameter): name for name, parameter in energy.named_parameters()}
    decay = {
        names[id(parameter)]: group["weight_decay"]
        for group in optimizer.param_groups
        for parameter in group["params"]
    }
    trainable = {name for name, p in energy.named_parameters() if p.requires_grad}
    assert set(decay) == trainable
    assert "backbone.blocks.0.attn.qkv.weight" not in decay
    decayed = {name for name, value in decay.items() if value == 0.3}
    assert decayed == {
        name
        for name in trainable
        if name.endswith(("proj.weight", "fc1.weight", "fc2.weight", "qkv.weight"))
    }
    assert {decay[name] for name in trainable - decayed} == {0.0}


@pytest.mark.parametrize(("batch_size", "expected"), [(256, 0.004), (64, 0.001), (1024, 0.016)])
def test_the_learning_rate_grows_with_the_batch(batch_size, expected):
    settings = OptimizerSettings(base_lr=0.004, betas=(0.8, 0.9))
    optimizer = build_optimizer(tiny_vit(), settings, batch_size)
    assert [group["lr"] for group in optimizer.param_groups] == pytest.approx([expected] * 2)
    assert {group["betas"] for group in optimizer.param_groups} == {(0.8, 0.9)}


@pytest.mark.parametrize(
    ("warmup_epochs", "total", "warmup", "final_share"),
    [
        (2.0, 100, 20, 0.0),
        (0.5, 100, 5, 0.1),
        (0.0, 100, 0, 0.0),
        (40.0, 100, 33, 0.0),  # a third of the run at most
        (1.0, 1, 0, 0.0),
    ],
)
def test_warmup_is_linear_and_then_comes_a_cosine(warmup_epochs, total, warmup, final_share):
    settings = OptimizerSettings(warmup_epochs=warmup_epochs, final_lr_share=final_share)
    peak = 0.2
    optimizer = SGD([nn.Parameter(torch.zeros(1))], lr=peak)
    schedule = build_schedule(optimizer, settings, total, steps_per_epoch=10)
    for step in range(total):
        schedule.step_update(step)
        if step < warmup:
            expected = peak * (0.001 + 0.999 * step / warmup)
        else:
            share = (step - warmup) / (total - warmup)
            low = peak * final_share
            expected = low + (peak - low) * (1 + math.cos(math.pi * share)) / 2
        assert optimizer.param_groups[0]["lr"] == pytest.approx(expected, rel=1e-6), step


def test_the_schedule_depends_on_the_step_alone():
    settings = OptimizerSettings(warmup_epochs=1.0)

    def rate(steps):
        optimizer = SGD([nn.Parameter(torch.zeros(1))], lr=1.0)
        schedule = build_schedule(optimizer, settings, 50, steps_per_epoch=10)
        for step in steps:
            schedule.step_update(step)
        return optimizer.param_groups[0]["lr"]

    assert rate([37]) == rate(range(38)) == rate([3, 44, 37])
