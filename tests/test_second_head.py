"""The second head: masked images restored to normalised squares, in training alone."""

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
from backfold.pretext.patches import FLAT, normalise_squares
from backfold.restoration import energy_gradient, eval_mode, training_step
from backfold.training.compiled import CompiledStep, gradient_distance
from backfold.training.config import (
    PretrainConfig,
    TaskSettings,
    doubtful_settings,
    watched_tasks,
)
from backfold.training.optimizer import OptimizerSettings, freeze_unreachable
from backfold.training.stepper import RestorationTraining, Stepper, step_seed

OPTIONS = {"patch_size": 4, "embed_dim": 12, "depth": 1, "num_heads": 2}
HALF = Masking(mask_patch_size=4, normalised_share=0.5)


def vit(second_head=True):
    torch.manual_seed(0)
    return EnergyModel(
        "vit_tiny_patch16_224",
        image_size=8,
        backbone_options=OPTIONS,
        second_head=second_head,
    )


def generator(seed=0):
    return torch.Generator().manual_seed(seed)


@pytest.mark.parametrize(("height", "width", "size"), [(8, 8, 4), (7, 10, 4), (5, 3, 1), (6, 6, 6)])
def test_squares_are_normalised_one_by_one(height, width, size):
    images = torch.randn(3, 2, height, width, dtype=torch.float64) * 3 + 1
    expected = torch.empty_like(images)
    for top in range(0, height, size):
        for left in range(0, width, size):
            for number in range(3):
                place = number, slice(None), slice(top, top + size), slice(left, left + size)
                square = images[place]
                variance = square.var(correction=0)
                expected[place] = (square - square.mean()) / (variance + FLAT) ** 0.5
    torch.testing.assert_close(normalise_squares(images, size), expected)


@pytest.mark.parametrize(("share", "count"), [(0.5, 8), (0.25, 4), (0.8, 12), (0.01, 0)])
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
    none = Mixture((Masking(mask_patch_size=4), Denoising()), (1.0, 1.0))(clean, generator())
    assert none.second is None


def test_each_image_has_its_head_s_energy():
    energy, images = vit().eval(), torch.randn(5, 3, 8, 8)
    second = torch.tensor([False, True, True, False, True])
    given = energy(images, second=second)
    energy.head, energy.second_head = energy.second_head, energy.head
    swapped = energy(images, second=~second)
    torch.testing.assert_close(given, swapped)
    assert not torch.allclose(given, energy(images, second=second))


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
    for name, value in plain.state_dict().items():
        assert torch.equal(value, both.state_dict()[name]), name


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
    twin = vit()
    twin.load_state_dict(energy.state_dict())
    loss, _, _ = stepper(energy, **changes)(images, 3)
    corruption = HALF(images, generator(step_seed(0, 3, 0)))
    normalised, total = normalise_squares(images, 4), 0.0
    for number in range(8):
        head = twin.second_head if number % 2 else twin.head
        target = normalised if number % 2 else images
        points, one = corruption.corrupted, slice(number, number + 1)
        for _ in range(changes.get("num_steps", 1)):
            more, restored, _ = training_step(
                lambda x, h=head: h(feature_map(twin.backbone, x)),
                points[one] if len(points) > 1 else points,
                target[one],
                corruption.loss_mask[one],
            )
            total, points = total + more / changes.get("num_steps", 1) / 8, restored
    total.backward()
    assert float(loss) == pytest.approx(total.item(), rel=1e-5)
    expected = dict(twin.named_parameters())
    for name, parameter in energy.named_parameters():
        if parameter.grad is not None and expected[name].grad is not None:
            torch.testing.assert_close(
                parameter.grad, expected[name].grad, rtol=1e-3, atol=1e-6, msg=name
            )
    assert energy.second_head.weight.grad.abs().min() > 0
    assert energy.head.weight.grad.abs().min() > 0


def test_gains_count_images_that_are_restored_to_clean_ones():
    energy, images = vit(), torch.randn(8, 3, 8, 8)
    _, _, last = stepper(energy)(images, 0)
    gain = last.psnr_gain_db(torch.ones(3))
    mask, chosen = last.corruption.loss_mask, last.corruption.second.chosen
    assert chosen.tolist() == [False, True] * 4
    gains = []
    for number in range(0, 8, 2):
        hidden = mask[number].expand(3, 8, 8)
        errors = [
            (each[number] - images[number])[hidden].square().sum()
            for each in (last.corruption.corrupted, last.restored)
        ]
        gains.append(10 * torch.log10(errors[0] / errors[1]))
    assert gain == pytest.approx(torch.stack(gains).mean().item(), abs=1e-3)


def test_the_compiled_step_has_the_same_gradients():
    torch._dynamo.reset()
    counters.clear()
    energy = vit()
    training = RestorationTraining(energy, 1.0)
    step = CompiledStep(training.restore, backend="aot_eager")
    for seed in range(2):
        clean = torch.randn(4, 3, 8, 8)
        made = HALF(clean, generator(seed))
        inputs = made.corrupted, made.second.target, made.loss_mask, None, made.second.chosen
        losses = [lambda i=inputs: step(*i)[0], lambda i=inputs: training.restore(*i)[0]]
        assert gradient_distance(dict(energy.named_parameters()), *losses)[0] < 1e-4
    assert step.is_compiled
    assert counters["stats"]["unique_graphs"] == 1
    torch._dynamo.reset()


def test_neither_head_is_frozen():
    assert freeze_unreachable(vit(), torch.randn(2, 3, 8, 8)) == ["backbone.norm.bias"]


@pytest.mark.parametrize("share", [-0.1, 1.0, float("nan")])
def test_a_share_out_of_range_is_refused(share):
    with pytest.raises(UserError, match=f"normalised_share is {share}; give a share of 0 or more"):
        Masking(normalised_share=share)


def config(**changes):
    return PretrainConfig(tasks=TaskSettings(masking=HALF, mixture={"masking": 1.0}), **changes)


def test_what_it_can_t_be_used_with_is_refused():
    message = "normalised_share is 0.5, for which derivative must be exact"
    with pytest.raises(UserError, match=message):
        config(derivative="finite-difference")
    tasks = TaskSettings(masking=HALF, mixture={"masking": 1.0, "identity": 1.0})
    with pytest.raises(UserError, match=r"for which plausibility_weight must be 0\.0"):
        PretrainConfig(pretext="mixture", tasks=tasks, plausibility_weight=0.1)


def test_it_is_said_to_be_idle_without_masking():
    (line,) = doubtful_settings(config(pretext="sorting"))
    assert line == "tasks.masking.normalised_share has no effect without the masking task"
    assert doubtful_settings(config()) == []


def test_held_out_images_are_restored_by_the_first_head():
    assert watched_tasks({"masking": HALF}) == {"masking": Masking(mask_patch_size=4)}
