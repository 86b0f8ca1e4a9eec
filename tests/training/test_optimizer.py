import math

import pytest
import torch
from torch import nn
from torch.optim import SGD

from backfold.restoration import restore
from backfold.training.config import OptimizerSettings
from backfold.training.optimizer import build_optimizer, build_schedule, freeze_unreachable
from tiny_run import tiny_energy


@pytest.mark.parametrize("pooling", ["token", "avg"])
def test_a_parameter_is_frozen_exactly_if_the_restored_image_does_not_depend_on_it(pooling):
    energy = tiny_energy(14, 1, depth=2, global_pool=pooling)
    corrupted = torch.randn(3, 1, 14, 14)
    frozen = set(freeze_unreachable(energy, corrupted))
    assert frozen  # the last norm's bias at least
    assert all(parameter.grad is None for parameter in energy.parameters())
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


def test_rates_and_betas_and_that_norms_biases_and_positions_do_not_decay():
    energy = tiny_energy(14, 1, depth=2)
    energy.backbone.blocks[0].attn.qkv.weight.requires_grad_(False)
    settings = OptimizerSettings(base_lr=0.004, weight_decay=0.3, betas=(0.8, 0.9))
    groups = build_optimizer(energy, settings, batch_size=64).param_groups
    assert [group["lr"] for group in groups] == pytest.approx([0.001] * 2)  # grows with the batch
    assert {group["betas"] for group in groups} == {(0.8, 0.9)}
    decay = {id(p): group["weight_decay"] for group in groups for p in group["params"]}
    matrices = ("proj.weight", "fc1.weight", "fc2.weight", "qkv.weight")
    assert decay == {
        id(parameter): 0.3 if name.endswith(matrices) else 0.0
        for name, parameter in energy.named_parameters()
        if parameter.requires_grad
    }


@pytest.mark.parametrize(
    ("warmup_epochs", "total", "warmup", "final_share"),
    [
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
    for step in reversed(range(total)):  # it depends on the step alone
        schedule.step_update(step)
        if step < warmup:
            expected = peak * (0.001 + 0.999 * step / warmup)
        else:
            share = (step - warmup) / (total - warmup)
            low = peak * final_share
            expected = low + (peak - low) * (1 + math.cos(math.pi * share)) / 2
        assert optimizer.param_groups[0]["lr"] == pytest.approx(expected, rel=1e-6), step
