"""What a step computes, and what is decided before the first one."""

import logging
import re

import pytest
import torch
from lightning.fabric import Fabric
from torch.nn.attention import SDPBackend, sdpa_kernel

from backfold.data.open import open_source
from backfold.data.statistics import ChannelStatistics
from backfold.pretext import Denoising, Identity, Masking, Mixture
from backfold.training import autotune as module
from backfold.training.autotune import find_micro_batch, warm_up
from backfold.training.config import OptimizerSettings, PretrainConfig, TaskSettings
from backfold.training.optimizer import freeze_unreachable
from backfold.training.step import CompiledStep, Stepper, step_seed
from tiny_run import tiny_energy

STATISTICS = ChannelStatistics((0.3,), (0.35,))
MASKING = Masking(mask_patch_size=7)
EXHAUSTED = torch.OutOfMemoryError("CUDA out of memory")


def make(task=MASKING, options=(), **changes):
    """A stepper on a tiny ViT for grey images of 28 x 28 pixels."""
    energy = tiny_energy(28, 1, depth=2, **dict(options))
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


def test_contrast_counts_in_the_last_epochs_alone(pictures):
    """Of 100 steps, ten an epoch: the plausibility of corrupted images from step 80 on."""
    task = Mixture((MASKING, Identity()), (1.0, 1.0))
    tasks = TaskSettings(mixture={"masking": 1.0, "identity": 1.0})

    def after(step, **changes):
        energy, stepper = make(task, pretext="mixture", tasks=tasks, **changes)
        stepper(pictures, step)
        return gradients(energy)

    for step, weight in ((79, 0.0), (80, 0.5)):
        found = after(step, plausibility_weight=0.5, contrast_epochs=2.0)
        assert_close(found, after(step, plausibility_weight=weight), 0.0)
        with pytest.raises(AssertionError):
            assert_close(found, after(step, plausibility_weight=0.5 - weight), 0.01)


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


@pytest.mark.parametrize(
    ("task", "micro_batch", "sizes", "largest"),
    [
        (MASKING, None, [16], 0.0),
        (Mixture((MASKING, Denoising()), (1.0, 2.0)), None, [16], 0.01),
        (MASKING, 7, [6, 5, 5], 0.0),  # as equal as possible
    ],
)
def test_loss_and_gradient_equal_a_written_out_reference(
    pictures, task, micro_batch, sizes, largest
):
    settings = {
        "micro_batch": micro_batch,
        "optimizer": OptimizerSettings(max_gradient_norm=largest),
    }
    energy, step = make(task, num_steps=3, step_size=0.4, seed=5, **settings)
    twin, _ = make(task)
    assert [len(part.clean) for part in step.parts(pictures, 7)] == sizes
    loss, norm, last = step(pictures, 7)
    clean = (pictures - 0.3) / 0.35
    corruption = task(clean, torch.Generator().manual_seed(step_seed(5, 7, 0)))
    given = (clean, corruption.corrupted, corruption.loss_mask)
    expected, restored = reference(twin, *given, num_steps=3, step_size=0.4)
    expected.backward()
    assert float(loss) == pytest.approx(expected.item(), rel=1e-5)
    length = sum(float(gradient.square().sum()) for gradient in gradients(twin).values()) ** 0.5
    assert float(norm) == pytest.approx(length, rel=1e-4)
    scaled = {name: g * (largest or length) / length for name, g in gradients(twin).items()}
    assert_close(scaled, gradients(energy), 1e-3)
    corrupted, clean, restored = (t[-sizes[-1] :] for t in (corruption.corrupted, clean, restored))
    assert torch.equal(last.corruption.corrupted, corrupted)
    torch.testing.assert_close(last.restored, restored, rtol=1e-4, atol=1e-5)
    assert not last.restored.requires_grad
    with torch.no_grad():
        gap = float((energy(corrupted) - energy(clean)).mean())
    assert last.energy_gap(energy) == pytest.approx(gap, rel=1e-4)


@pytest.fixture
def quick_compiler(monkeypatch):
    """Traces as always, but makes no C++."""
    torch._dynamo.reset()
    monkeypatch.setattr(
        "backfold.training.autotune.CompiledStep",
        lambda step, **_: CompiledStep(step, backend="aot_eager"),
    )
    yield
    torch._dynamo.reset()


@pytest.mark.parametrize(
    ("compile_", "steps_left", "decisions", "compiled"),
    [
        ("auto", 70, {}, False),
        ("auto", 80, {}, True),
        (False, 80, {}, False),
        ("auto", 1, {"micro_batch": 5, "compiled": True}, True),
    ],
)
@pytest.mark.usefixtures("quick_compiler")
def test_auto_compiles_long_runs_only_and_what_was_decided_is_not_measured_again(
    pictures, monkeypatch, compile_, steps_left, decisions, compiled
):
    monkeypatch.setattr(module, "_seconds", lambda _, images: 0.5 * len(images))
    _, stepper = make(compile=compile_, micro_batch="auto")
    warm_up(stepper, pictures, steps_left, decisions)  # of 8 seconds each
    assert (stepper.restoration.compiled is not None) == compiled
    assert stepper.micro_batch == decisions["micro_batch"] == (5 if steps_left == 1 else 16)


@pytest.mark.parametrize("is_wrong", [False, True])
@pytest.mark.parametrize("dropout", [0.0, 0.5])  # the comparison is made without
@pytest.mark.usefixtures("quick_compiler")
def test_a_compiled_step_with_another_gradient_is_not_used(
    pictures, monkeypatch, caplog, is_wrong, dropout
):
    energy, stepper = make(compile=True, options={"proj_drop_rate": dropout})
    energy.train()
    weights = {name: value.clone() for name, value in energy.state_dict().items()}
    state = torch.get_rng_state()
    if is_wrong:
        plain = stepper.restoration.restore
        made = CompiledStep(plain, backend="aot_eager")
        made.compiled = lambda *given: (1.01 * plain(*given)[0], *plain(*given)[1:])
        monkeypatch.setattr(module, "CompiledStep", lambda *_, **__: made)
    with caplog.at_level(logging.INFO, logger="backfold"):
        warm_up(stepper, pictures, steps_left=10, decisions={})
    (message,) = (line for line in caplog.messages if "the step" in line)
    refused = re.search(r"its gradient of backbone\S+ is 0.01 from the eager one", message)
    assert bool(refused) == is_wrong
    assert message.startswith("compiled the step") != is_wrong
    assert stepper.restoration.compiled.is_compiled != is_wrong
    # Nothing else is left behind.
    assert energy.backbone.blocks[0].training
    assert torch.equal(torch.get_rng_state(), state)
    assert all(parameter.grad is None for parameter in energy.parameters())
    assert all(torch.equal(value, weights[name]) for name, value in energy.state_dict().items())


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
