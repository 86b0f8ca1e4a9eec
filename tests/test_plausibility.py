"""The loss on the energy itself, and the clean images that it needs."""

import math

import pytest
import torch

from backfold.errors import UserError
from backfold.pretext import Identity
from backfold.restoration import plausibility_loss
from backfold.training.config import PretrainConfig, TaskSettings
from backfold.training.optimizer import freeze_unreachable
from tiny_run import tiny_energy


def test_values_by_hand():
    clean = torch.zeros(3, 1, 2, 2)
    images = clean.clone()
    images[1, 0, 0, 1] = 0.5
    energies = torch.tensor([1.0, 3.0, -2.0])  # of 4 pixels: divided by 2
    expected = (
        math.log(1 + math.exp(0.5)) + math.log(1 + math.exp(-1.5)) + math.log(1 + math.exp(-1.0))
    ) / 3
    assert plausibility_loss(energies, images, clean).item() == pytest.approx(expected)


def test_the_last_bias_is_trained_with_it_only():
    images = torch.randn(2, 3, 14, 14)
    assert freeze_unreachable(tiny_energy(14), images) == ["backbone.norm.bias"]
    assert freeze_unreachable(tiny_energy(14), images, plausibility_weight=1.0) == []


def test_identity_leaves_images_as_they_are_and_counts_everywhere():
    clean = torch.randn(2, 3, 8, 8)
    corruption = Identity()(clean, torch.Generator())
    assert torch.equal(corruption.corrupted, clean)
    assert corruption.corrupted.data_ptr() != clean.data_ptr()
    assert corruption.loss_mask.shape == (2, 1, 8, 8)
    assert corruption.loss_mask.all()


MIXED = {
    "pretext": "mixture",
    "tasks": TaskSettings(mixture={"masking": 3.0, "identity": 1.0}),
    "plausibility_weight": 0.1,
    "energy": "dense",
}


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"plausibility_weight": -1.0}, "plausibility_weight is -1; give 0 or more"),
        ({"plausibility_weight": 0.5}, "plausibility_weight is 0.5, which needs clean images"),
        ({"pretext": "identity"}, "unknown pretext task 'identity'"),
        (
            {"pretext": "mixture", "tasks": TaskSettings(mixture={"identity": 1.0})},
            "the mixture holds identity alone",
        ),
        # Clean images leave their place in the first step, and would then count as corrupted.
        (MIXED | {"num_steps": 2}, r"^plausibility_weight is 0\.1 and num_steps 2; it tells"),
    ],
)
def test_settings_that_can_t_work_are_refused(settings, message):
    with pytest.raises(UserError, match=message):
        PretrainConfig(**settings)
