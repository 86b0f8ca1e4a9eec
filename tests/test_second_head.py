"""The second head: masked images restored to normalised squares, in training alone."""

import copy
import math
from functools import partial

import pytest
import torch
from lightning.fabric import Fabric
from torch._dynamo.utils import counters

from backfold.backbone import feature_map
from backfold.data.statistics import ChannelStatistics
from backfold.energy import EnergyModel
from backfold.errors import UserError
from backfold.pretext import Denoising, Masking, Mixture
from backfold.pretext.masking import FLAT, normalise_squares
from backfold.restoration import energy_gradient, eval_mode, training_step
from backfold.training.autotune import gradient_distance
from backfold.training.config import PretrainConfig, TaskSettings, doubtful_settings, watched_tasks
from backfold.training.optimizer import OptimizerSettings
from backfold.training.step import CompiledStep, RestorationTraining, Stepper, step_seed

OPTIONS = {"patch_size": 4, "embed_dim": 12, "depth": 1, "num_heads": 2}
HALF = Masking(mask_patch_size=4, normalised_share=0.5)


def vit(second_head=True):
    torch.manual_seed(0)
    name, options = "vit_tiny_patch16_224", OPTIONS
    return EnergyModel(name, image_size=8, backbone_options=options, second_head=second_head)


def generator(seed=0):
    return torch.Generator().manual_seed(seed)


def test_squares_are_normalised_one_by_one():
    images = torch.randn(3, 2, 7, 10, dtype=torch.float64) * 3 + 1
    expected = torch.empty_like(images)
    for top in (0, 4):
        for left in (0, 4, 8):
            square = images[:, :, top : top + 4, left : left + 4]
            variance, mean = torch.var_mean(square, dim=(1, 2, 3), correction=0, keepdim=True)
            part = (square - mean) / (variance + FLAT) ** 0.5
            expected[:, :, top : top + 4, left : left + 4] = part
    torch.testing.assert_close(normalise_squares(images, 4), expected)


@pytest.mark.parametrize(("share", "count"), [(0.5, 8), (0.8, 12), (0.01, 0)])
def test_its_share_of_a_batch_is_spread_over_it(share, count):
    clean = torch.randn(16, 3, 8, 8)
    plain = Masking(mask_patch_size=4)(clean, generator())
    corruption = Masking(mask_patch_size=4, normalised_share=share)(clean, generator())
    assert torch.equal(corruption.corrupted, plain.corrupted)
    assert torch.equal(corruption.loss_mask, plain.loss_mask)
    chosen, target = corruption.second.chosen, corruption.second.target
    assert chosen.sum() == count
    assert abs(chosen[:8].sum() - chosen[8:].sum()) <= 1
    assert torch.equal(target[~chosen], clean[~chosen])
    assert torch.equal(target[chosen], normalise_squares(clean, 4)[chosen])
    assert plain.second is None


def test_a_mixture_keeps_it_for_masked_images():
    clean = torch.randn(64, 3, 8, 8)
    corruption = Mixture((HALF, Denoising()), (1.0, 1.0))(clean, generator())
    is_masked = ~corruption.loss_mask.flatten(1).all(dim=1)
    chosen = corruption.second.chosen
    assert chosen.sum() == is_masked.sum() // 2
    assert not (chosen & ~is_masked).any()
    expected = torch.where(chosen[:, None, None, None], normalise_squares(clean, 4), clean)
    assert torch.equal(corruption.second.target, expected)


def test_both_heads_are_calibrated_and_the_first_is_as_without():
    energy, images = vit(), torch.randn(16, 3, 8, 8)
    energy.calibrate(images)
    for second in (None, torch.ones(16, dtype=torch.bool)):
        with eval_mode(energy):
            _, gradient = energy_gradient(partial(energy, second=second), images)
        assert gradient.square().mean().sqrt().item() == pytest.approx(1.0, rel=1e-4)
    assert not torch.equal(energy.head.weight, energy.second_head.weight)
    plain, both = vit(second_head=False), vit()
    assert plain.second_head is None
    assert all(torch.equal(v, both.state_dict()[k]) for k, v in plain.state_dict().items())


def stepper(energy, task=HALF, **changes):
    config = PretrainConfig(
        batch_size=8, optimizer=OptimizerSettings(max_gradient_norm=0.0), **changes
    )
    fabric = Fabric(accelerator="cpu", devices=1, precision="32-true")
    statistics = ChannelStatistics((0.0,) * 3, (1.0,) * 3)
    return Stepper(config, energy, task, statistics, fabric, total_steps=9, steps_per_epoch=3)


@pytest.mark.parametrize("changes", [{}, {"num_steps": 2}, {"micro_batch": 2}], ids=str)
def test_a_step_equals_image_by_image_restoration_by_its_head(changes):
    energy, images = vit(), torch.randn(8, 3, 8, 8)
    twin, steps = copy.deepcopy(energy), changes.get("num_steps", 1)
    loss, _, _ = stepper(energy, **changes)(images, 3)
    corruption = HALF(images, generator(step_seed(0, 3, 0)))
    normalised, total = normalise_squares(images, 4), 0.0
    for number in range(8):
        head = twin.second_head if number % 2 else twin.head
        target = normalised if number % 2 else images
        points, one = corruption.corrupted, slice(number, number + 1)
        points = points[one]
        for _ in range(steps):
            more, points, _ = training_step(
                lambda x, h=head: h(feature_map(twin.backbone, x)),
                points, target[one], corruption.loss_mask[one],
            )  # fmt: skip
            total = total + more / steps / 8
    total.backward()
    assert float(loss) == pytest.approx(total.item(), rel=1e-5)
    for own, other in zip(energy.parameters(), twin.parameters(), strict=True):
        if own.grad is not None and other.grad is not None:
            torch.testing.assert_close(own.grad, other.grad, rtol=1e-3, atol=1e-6)
    assert energy.second_head.weight.grad.abs().min() > 0
    assert energy.head.weight.grad.abs().min() > 0


def test_gains_count_images_that_are_restored_to_clean_ones():
    energy, images = vit(), torch.randn(8, 3, 8, 8)
    _, _, last = stepper(energy)(images, 0)
    assert last.corruption.second.chosen.tolist() == [False, True] * 4
    hidden = last.corruption.loss_mask.expand_as(images)
    before, after = (
        [float((each[n] - images[n])[hidden[n]].square().sum()) for n in (0, 2, 4, 6)]
        for each in (last.corruption.corrupted, last.restored)
    )
    expected = [10 * math.log10(old / new) for old, new in zip(before, after, strict=True)]
    assert last.psnr_gain_db(torch.ones(3)) == pytest.approx(sum(expected) / 4, abs=1e-3)


def test_the_compiled_step_has_the_same_gradients():
    torch._dynamo.reset()
    counters.clear()
    energy = vit()
    training = RestorationTraining(energy, 1.0)
    step = CompiledStep(training.restore, backend="eager")
    for seed in range(2):
        clean = torch.randn(4, 3, 8, 8)
        made = HALF(clean, generator(seed))
        inputs = made.corrupted, made.second.target, made.loss_mask, None, made.second.chosen
        losses = [lambda i=inputs: step(*i)[0], lambda i=inputs: training.restore(*i)[0]]
        assert gradient_distance(dict(energy.named_parameters()), *losses)[0] < 1e-4
    assert step.is_compiled
    assert counters["stats"]["unique_graphs"] == 1
    torch._dynamo.reset()


def test_what_it_can_t_be_used_with_is_refused():
    mixed = TaskSettings(masking=HALF, mixture={"masking": 1.0, "identity": 1.0})
    tasks = TaskSettings(masking=HALF)
    with pytest.raises(UserError, match=r"normalised_share is 0\.5, for which derivative must be"):
        PretrainConfig(tasks=tasks, derivative="finite-difference")
    with pytest.raises(UserError, match=r"for which plausibility_weight must be 0\.0"):
        PretrainConfig(pretext="mixture", tasks=mixed, plausibility_weight=0.1)
    with pytest.raises(UserError, match="normalised_share is nan; give a share of 0 or more"):
        Masking(normalised_share=float("nan"))
    (line,) = doubtful_settings(PretrainConfig(pretext="sorting", tasks=tasks))
    assert line == "tasks.masking.normalised_share has no effect without the masking task"
    # Held-out images are restored by the first head.
    assert watched_tasks({"masking": HALF}) == {"masking": Masking(mask_patch_size=4)}
