"""What is decided before the first step, and the steps that follow from it."""

import logging

import pytest
import torch
from lightning.fabric import Fabric

from backfold.data.source import open_source
from backfold.data.statistics import ChannelStatistics
from backfold.energy import EnergyModel
from backfold.errors import UserError
from backfold.pretext import Masking
from backfold.training import warm_up as module
from backfold.training.compiled import CompiledStep
from backfold.training.config import PretrainConfig
from backfold.training.optimizer import OptimizerSettings, freeze_unreachable
from backfold.training.stepper import Stepper
from backfold.training.warm_up import compiles_soon, warm_up

STATISTICS = ChannelStatistics((0.3,), (0.35,))
OPTIONS = {"patch_size": 7, "embed_dim": 16, "depth": 2, "num_heads": 2}


def make(task=None, options=(), **changes):
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
    task = task or Masking(mask_patch_size=7)
    return energy, Stepper(config, energy, task, STATISTICS, fabric, 100, 10)


@pytest.fixture(scope="module")
def pictures():
    """Sixteen embedded images, (16, 1, 28, 28) in [0, 1]."""
    source = open_source(None, "train")
    return torch.stack([source.read(index) for index in range(16)]).float() / 255


@pytest.fixture
def quick_compiler(monkeypatch):
    """Traces as always, but makes no C++."""
    torch._dynamo.reset()
    monkeypatch.setattr(
        "backfold.training.stepper.CompiledStep",
        lambda step: CompiledStep(step, backend="aot_eager"),
    )
    yield
    torch._dynamo.reset()


def gradients(energy):
    return torch.cat([p.grad.flatten() for p in energy.parameters() if p.grad is not None])


@pytest.mark.usefixtures("quick_compiler")
def test_weights_gradients_and_random_numbers_stay_as_they_are(pictures):
    energy, stepper = make(compile=True, micro_batch="auto", options={"proj_drop_rate": 0.3})
    weights = {name: value.clone() for name, value in energy.state_dict().items()}
    state = torch.get_rng_state()
    assert warm_up(stepper, pictures, steps_left=10, decisions={}) > 0
    assert torch.equal(torch.get_rng_state(), state)
    assert all(parameter.grad is None for parameter in energy.parameters())
    for name, value in energy.state_dict().items():
        assert torch.equal(value, weights[name]), name
    assert stepper.micro_batch == 16  # a few kilobytes fit into any memory


@pytest.mark.usefixtures("quick_compiler")
def test_auto_compiles_long_runs_only(pictures, monkeypatch):
    monkeypatch.setattr(module, "_seconds", lambda _, images: 0.5 * len(images))
    for steps_left, compiled in ((70, False), (80, True)):  # of 8 seconds each
        _, stepper = make()
        warm_up(stepper, pictures, steps_left, {})
        assert (stepper.restoration.compiled is not None) == compiled
    _, stepper = make(compile=False)
    warm_up(stepper, pictures, 10_000, {})
    assert stepper.restoration.compiled is None


@pytest.mark.usefixtures("quick_compiler")
def test_what_was_decided_before_is_not_measured_again(pictures, monkeypatch):
    monkeypatch.setattr(module, "find_micro_batch", lambda *_: pytest.fail("measured"))
    decisions = {"micro_batch": 5, "compiled": True}
    _, stepper = make(micro_batch="auto")
    warm_up(stepper, pictures, steps_left=1, decisions=decisions)
    assert stepper.micro_batch == 5
    assert stepper.restoration.compiled.is_compiled
    assert decisions == {"micro_batch": 5, "compiled": True}


def test_a_compiled_step_with_another_gradient_is_not_used(pictures, monkeypatch, caplog):
    energy, stepper = make(compile=True)

    def wrong(step):
        compiled = CompiledStep(step, backend="aot_eager")

        def scaled(*arguments):
            loss, restored, energies = step(*arguments)
            return 1.01 * loss, restored, energies

        compiled.compiled = scaled
        return compiled

    monkeypatch.setattr("backfold.training.stepper.CompiledStep", wrong)
    with caplog.at_level(logging.WARNING, logger="backfold"):
        warm_up(stepper, pictures, steps_left=10, decisions={})
    (record,) = caplog.records
    assert "its gradient is 0.01 from the eager one" in record.message
    assert not stepper.restoration.compiled.is_compiled
    _, plain = make(compile=False)
    stepper(pictures, 0)
    plain(pictures, 0)
    torch.testing.assert_close(gradients(energy), gradients(plain.energy))


def test_backbones_with_many_groups_would_compile_for_long():
    assert compiles_soon(
        EnergyModel("vit_tiny_patch16_224", image_size=28, backbone_options=OPTIONS)
    )
    narrow = {"depths": (1, 0, 0, 0), "dims": (8, 8, 8, 8)}
    assert compiles_soon(EnergyModel("convnext_atto", image_size=32, backbone_options=narrow))
    assert not compiles_soon(EnergyModel("convnext_atto", image_size=32))


@pytest.mark.usefixtures("quick_compiler")
def test_dropout_is_compiled_without_comparing(pictures, caplog):
    _, stepper = make(compile=True, options={"proj_drop_rate": 0.5})
    with caplog.at_level(logging.INFO, logger="backfold"):
        warm_up(stepper, pictures, steps_left=10, decisions={})
    assert stepper.restoration.compiled.is_compiled
    assert any("compiled the step" in record.message for record in caplog.records)


@pytest.mark.parametrize("num_steps", [1, 3])
@pytest.mark.parametrize("micro_batch", [None, 6])
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
    distance = (gradients(other) - gradients(exact)).norm() / gradients(exact).norm()
    assert distance < 1e-3
    torch.testing.assert_close(restored_other.restored, restored.restored, rtol=1e-4, atol=1e-4)


def test_sparse_steps_change_what_runs_only(pictures):
    task = Masking(mask_ratio=0.75, mask_patch_size=7, hidden_share=1 / 3)
    energy, stepper = make(task)
    part = stepper.parts(pictures, 0)[0]
    assert part.tokens.shape == (16, 8)  # 4 visible and 4 of 12 hidden
    hidden = part.corruption.loss_mask
    assert int(hidden.sum()) == 16 * 4 * 49
    _, _, last = stepper(pictures, 0)
    still = last.restored == last.corruption.corrupted
    # What does not run is not restored: 8 of 16 patches of each image.
    assert int(still.sum()) == 16 * 8 * 49
    clean = energy(part.clean, part.tokens).detach()
    expected = float((last.corrupted_energies - clean).mean())
    assert last.energy_gap(energy) == pytest.approx(expected, rel=1e-5)


def test_running_out_of_memory_says_what_to_set(pictures, monkeypatch):
    _, stepper = make(micro_batch=8)

    def exhausted(*_, **__):
        raise torch.OutOfMemoryError("CUDA out of memory")

    monkeypatch.setattr(stepper, "restore_part", exhausted)
    with pytest.raises(UserError, match="--micro-batch auto") as caught:
        stepper(pictures, 0)
    assert "8 images at once" in str(caught.value)
    assert "\n" not in str(caught.value)


def test_other_errors_are_not_taken_for_a_lack_of_memory(pictures, monkeypatch):
    _, stepper = make()

    def broken(*_, **__):
        raise RuntimeError("something else")

    monkeypatch.setattr(stepper, "restore_part", broken)
    with pytest.raises(RuntimeError, match="something else"):
        stepper(pictures, 0)
