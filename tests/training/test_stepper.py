"""What a step computes, and what is decided before the first one."""

import logging
import re

import pytest
import torch
from lightning.fabric import Fabric
from torch.nn.attention import SDPBackend, sdpa_kernel

from backfold.data.open import open_source
from backfold.data.statistics import ChannelStatistics
from backfold.energy import EnergyModel
from backfold.pretext import Denoising, Identity, Masking, Mixture
from backfold.training import autotune as module
from backfold.training.autotune import find_micro_batch, warm_up
from backfold.training.config import OptimizerSettings, PretrainConfig, TaskSettings
from backfold.training.optimizer import freeze_unreachable
from backfold.training.step import CompiledStep, Stepper, step_seed

STATISTICS = ChannelStatistics((0.3,), (0.35,))
MASKING = Masking(mask_patch_size=7)
EXHAUSTED = torch.OutOfMemoryError("CUDA out of memory")
OPTIONS = {"patch_size": 7, "embed_dim": 16, "depth": 2, "num_heads": 2}


def make(task=MASKING, options=(), **changes):
    """A stepper on a tiny ViT for grey images of 28 x 28 pixels."""
    torch.manual_seed(0)
    energy = EnergyModel(
        "vit_tiny_patch16_224",
        image_size=28,
        channels=1,
        backbone_options={**OPTIONS, **dict(options)},
    )
    freeze_unreachable(energy, torch.randn(2, 1, 28, 28))
    fabric = Fabric(accelerator="cpu", devices=1, precision="32-true")
    settings = {"optimizer": OptimizerSettings(max_gradient_norm=0.0), **changes}
    config = PretrainConfig(batch_size=16, **settings)
    return energy, Stepper(config, energy, task, STATISTICS, fabric, 100, 10)


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


def test_parts_of_a_batch_are_as_equal_as_possible_and_give_its_gradient(pictures):
    whole, step_whole = make(num_steps=2)
    parts, step_parts = make(num_steps=2, micro_batch=7)
    assert [len(part.clean) for part in step_parts.parts(pictures, 0)] == [6, 5, 5]
    loss_whole, norm_whole, _ = step_whole(pictures, 0)
    loss_parts, norm_parts, last = step_parts(pictures, 0)
    assert float(loss_parts) == pytest.approx(float(loss_whole), rel=1e-5)
    assert float(norm_parts) == pytest.approx(float(norm_whole), rel=1e-4)
    assert_close(gradients(whole), gradients(parts), 1e-4)
    assert len(last.clean) == 5


def test_contrast_counts_in_the_last_epochs_alone(pictures):
    """Of 100 steps, ten an epoch: the plausibility of corrupted images from step 80 on."""
    task = Mixture((MASKING, Identity()), (1.0, 1.0))
    tasks = TaskSettings(mixture={"masking": 1.0, "identity": 1.0})
    options = {"task": task, "pretext": "mixture", "tasks": tasks}
    for step, weight in ((79, 0.0), (80, 0.5)):
        found = []
        for changes in (
            {"plausibility_weight": 0.5, "contrast_epochs": 2.0}, {"plausibility_weight": weight}
        ):  # fmt: skip
            energy, stepper = make(**options, **changes)
            stepper(pictures, step)
            found.append(gradients(energy))
        assert_close(*found, 0.0)
        energy, stepper = make(**options, plausibility_weight=0.5 - weight)
        stepper(pictures, step)
        with pytest.raises(AssertionError):
            assert_close(gradients(energy), found[0], 0.01)


def reference(energy, clean, corrupted, mask, num_steps, step_size):
    """The mean over the steps of each image's masked mean, and the restored images, written out."""
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
    return total, points.detach()


@pytest.mark.parametrize("task", [MASKING, Mixture((MASKING, Denoising()), (1.0, 2.0))])
def test_loss_and_gradient_equal_a_written_out_reference(pictures, task):
    energy, step = make(task, num_steps=3, step_size=0.4, seed=5)
    twin, _ = make(task)
    twin.load_state_dict(energy.state_dict())
    loss, norm, last = step(pictures, 7)
    clean = (pictures - 0.3) / 0.35
    seed = step_seed(5, 7, 0)
    corruption = task(clean, torch.Generator().manual_seed(seed))
    given = (clean, corruption.corrupted, corruption.loss_mask)
    expected, restored = reference(twin, *given, num_steps=3, step_size=0.4)
    expected.backward()
    assert float(loss) == pytest.approx(expected.item(), rel=1e-5)
    assert_close(gradients(twin), gradients(energy), 1e-4)
    squares = sum(float(p.grad.square().sum()) for p in twin.parameters() if p.grad is not None)
    assert float(norm) == pytest.approx(squares**0.5, rel=1e-4)
    assert torch.equal(last.corruption.corrupted, corruption.corrupted)
    torch.testing.assert_close(last.restored, restored, rtol=1e-4, atol=1e-5)
    assert not last.restored.requires_grad
    with torch.no_grad():
        gap = float((energy(corruption.corrupted) - energy(clean)).mean())
    assert last.energy_gap(energy) == pytest.approx(gap, rel=1e-4)


def test_gradients_are_scaled_down_to_the_norm_asked_for(pictures):
    free, step_free = make()
    bound, step_bound = make(optimizer=OptimizerSettings(max_gradient_norm=0.01))
    _, norm, _ = step_free(pictures, 0)
    _, norm_before, _ = step_bound(pictures, 0)
    assert float(norm) == pytest.approx(float(norm_before), rel=1e-5)
    scaled = {name: g * 0.01 / float(norm) for name, g in gradients(free).items()}
    assert_close(scaled, gradients(bound), 1e-3)


@pytest.fixture
def quick_compiler(monkeypatch):
    """Traces as always, but makes no C++."""
    torch._dynamo.reset()
    monkeypatch.setattr(
        "backfold.training.step.CompiledStep",
        lambda step, **_: CompiledStep(step, backend="aot_eager"),
    )
    yield
    torch._dynamo.reset()


@pytest.mark.usefixtures("quick_compiler")
def test_weights_gradients_and_random_numbers_stay_as_they_are(pictures):
    energy, stepper = make(compile=True, micro_batch="auto", options={"proj_drop_rate": 0.3})
    weights = {name: value.clone() for name, value in energy.state_dict().items()}
    state = torch.get_rng_state()
    warm_up(stepper, pictures, steps_left=10, decisions={})
    assert torch.equal(torch.get_rng_state(), state)
    assert all(parameter.grad is None for parameter in energy.parameters())
    for name, value in energy.state_dict().items():
        assert torch.equal(value, weights[name]), name
    assert stepper.micro_batch == 16


@pytest.mark.usefixtures("quick_compiler")
def test_auto_compiles_long_runs_only(pictures, monkeypatch):
    monkeypatch.setattr(module, "_seconds", lambda _, images: 0.5 * len(images))
    for steps_left, compile_, compiled in (
        (70, "auto", False),
        (80, "auto", True),
        (80, False, False),
    ):
        _, stepper = make(compile=compile_)
        warm_up(stepper, pictures, steps_left, {})  # of 8 seconds each
        assert (stepper.restoration.compiled is not None) == compiled


@pytest.mark.usefixtures("quick_compiler")
def test_what_was_decided_before_is_not_measured_again(pictures, monkeypatch):
    monkeypatch.setattr(module, "find_micro_batch", lambda *_: pytest.fail("measured"))
    decisions = {"micro_batch": 5, "compiled": True}
    _, stepper = make(micro_batch="auto")
    warm_up(stepper, pictures, steps_left=1, decisions=decisions)
    assert stepper.micro_batch == 5
    assert stepper.restoration.compiled.is_compiled
    assert decisions == {"micro_batch": 5, "compiled": True}


@pytest.mark.parametrize("is_wrong", [False, True])
@pytest.mark.parametrize("dropout", [0.0, 0.5])  # the comparison is made without
@pytest.mark.usefixtures("quick_compiler")
def test_a_compiled_step_with_another_gradient_is_not_used(
    pictures, monkeypatch, caplog, is_wrong, dropout
):
    energy, stepper = make(compile=True, options={"proj_drop_rate": dropout})
    energy.train()
    if is_wrong:
        plain = stepper.restoration.restore
        made = CompiledStep(plain, backend="aot_eager")
        made.compiled = lambda *given: (1.01 * plain(*given)[0], *plain(*given)[1:])
        monkeypatch.setattr("backfold.training.step.CompiledStep", lambda *_, **__: made)
    with caplog.at_level(logging.INFO, logger="backfold"):
        warm_up(stepper, pictures, steps_left=10, decisions={})
    (message,) = caplog.messages
    refused = re.search(r"its gradient of backbone\S+ is 0.01 from the eager one", message)
    assert bool(refused) == is_wrong
    assert message.startswith("compiled the step") != is_wrong
    assert stepper.restoration.compiled.is_compiled != is_wrong
    assert energy.backbone.blocks[0].training


@pytest.mark.parametrize(("num_steps", "micro_batch"), [(1, None), (3, 6)])
def test_the_finite_difference_step_has_the_exact_step_s_gradient(
    pictures, num_steps, micro_batch, caplog
):
    settings = {"num_steps": num_steps, "micro_batch": micro_batch}
    task = Masking(mask_patch_size=7, fill="noise")
    exact, step_exact = make(task, **settings)
    other, step_other = make(task, derivative="finite-difference", **settings)
    with caplog.at_level(logging.INFO, logger="backfold"):
        warm_up(step_other, pictures, steps_left=10, decisions={})
    assert any("finite-difference step: displacement" in r.message for r in caplog.records)
    loss_exact, norm_exact, restored = step_exact(pictures, 0)
    loss_other, norm_other, restored_other = step_other(pictures, 0)
    assert float(loss_other) == pytest.approx(float(loss_exact), rel=1e-5)
    assert float(norm_other) == pytest.approx(float(norm_exact), rel=1e-3)
    flat = [torch.cat([g.flatten() for g in gradients(e).values()]) for e in (exact, other)]
    assert (flat[1] - flat[0]).norm() < 1e-3 * flat[0].norm()
    torch.testing.assert_close(restored_other.restored, restored.restored, rtol=1e-4, atol=1e-4)


def runs_out_above(limit, monkeypatch, stepper, error):
    """Let restoring more images than this at once fail; returns the sizes that are tried."""
    tried, original = [], stepper.restore_part

    def restore_part(part, last_part):
        tried.append(len(part.clean))
        if len(part.clean) > limit:
            raise error
        return original(part, last_part)

    monkeypatch.setattr(stepper, "restore_part", restore_part)
    return tried


def test_a_micro_batch_is_halved_until_two_steps_fit(pictures, monkeypatch):
    energy, stepper = make(micro_batch="auto")
    tried, reserved, empty = runs_out_above(4, monkeypatch, stepper, EXHAUSTED), [], torch.empty

    def reserve(*size, **options):
        reserved.append(size)
        return empty(*size, **options)

    monkeypatch.setattr(torch, "empty", reserve)
    assert find_micro_batch(stepper, pictures[:15]) == 4
    assert tried == [15, 8, 4, 4]
    trained = sum(p.numel() for p in energy.parameters() if p.requires_grad)
    assert (8 * trained,) in reserved  # AdamW's moments, in float32
    assert all(parameter.grad is None for parameter in energy.parameters())


@pytest.mark.parametrize(("limit", "error"), [(0, EXHAUSTED), (8, RuntimeError("something else"))])
def test_other_errors_and_an_image_that_does_not_fit_end_the_search(
    pictures, monkeypatch, limit, error
):
    _, stepper = make(micro_batch="auto")
    tried = runs_out_above(limit, monkeypatch, stepper, error)
    with pytest.raises(type(error), match=str(error)):
        find_micro_batch(stepper, pictures)
    assert tried[-1] == (16 if limit else 1)
