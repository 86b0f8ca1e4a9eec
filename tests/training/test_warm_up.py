"""What is decided before the first step, and the steps that follow from it."""

import logging
import re

import pytest
import torch
from lightning.fabric import Fabric

from backfold.data.source import open_source
from backfold.data.statistics import ChannelStatistics
from backfold.energy import EnergyModel
from backfold.pretext import Masking
from backfold.training import warm_up as module
from backfold.training.compiled import CompiledStep
from backfold.training.config import PretrainConfig
from backfold.training.optimizer import OptimizerSettings, freeze_unreachable
from backfold.training.stepper import Stepper
from backfold.training.warm_up import compiles_soon, find_micro_batch, warm_up

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
    warm_up(stepper, pictures, steps_left=10, decisions={})
    assert torch.equal(torch.get_rng_state(), state)
    assert all(parameter.grad is None for parameter in energy.parameters())
    for name, value in energy.state_dict().items():
        assert torch.equal(value, weights[name]), name
    assert stepper.micro_batch == 16


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
    assert re.search(r"its gradient of backbone\S+ is 0.01 from the eager one", record.message)
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


@pytest.mark.parametrize("is_wrong", [False, True])
@pytest.mark.usefixtures("quick_compiler")
def test_with_dropout_the_compiled_step_is_compared_without(
    pictures, caplog, monkeypatch, is_wrong
):
    energy, stepper = make(compile=True, options={"proj_drop_rate": 0.5})
    energy.train()
    if is_wrong:
        plain = stepper.restoration.restore
        made = CompiledStep(plain, backend="aot_eager")
        made.compiled = lambda *given: (1.01 * plain(*given)[0], *plain(*given)[1:])
        monkeypatch.setattr("backfold.training.stepper.CompiledStep", lambda _: made)
    with caplog.at_level(logging.INFO, logger="backfold"):
        warm_up(stepper, pictures, steps_left=10, decisions={})
    assert stepper.restoration.compiled.is_compiled != is_wrong
    assert any("compiled the step" in record.message for record in caplog.records) != is_wrong
    assert energy.backbone.blocks[0].training


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
    corrupted = energy(part.corruption.corrupted, part.tokens).detach()
    expected = float((corrupted - energy(part.clean, part.tokens).detach()).mean())
    assert last.energy_gap(energy) == pytest.approx(expected, rel=1e-5)


def runs_out_above(limit, monkeypatch, stepper, error=None):
    """Let restoring more images than this at once fail; returns the sizes that are tried."""
    tried, original = [], stepper.restore_part

    def restore_part(part, last_part):
        tried.append(len(part.clean))
        if len(part.clean) > limit:
            raise error or torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB.")
        return original(part, last_part)

    monkeypatch.setattr(stepper, "restore_part", restore_part)
    return tried


def test_a_micro_batch_is_halved_until_two_steps_fit(pictures, monkeypatch):
    energy, stepper = make(micro_batch="auto")
    tried, reserved, empty = runs_out_above(4, monkeypatch, stepper), [], torch.empty

    def reserve(*size, **options):
        reserved.append(size)
        return empty(*size, **options)

    monkeypatch.setattr(torch, "empty", reserve)
    assert find_micro_batch(stepper, pictures[:15]) == 4
    assert tried == [15, 8, 4, 4]
    trained = sum(p.numel() for p in energy.parameters() if p.requires_grad)
    assert (8 * trained,) in reserved  # AdamW's moments, in float32
    assert all(parameter.grad is None for parameter in energy.parameters())


@pytest.mark.parametrize(
    ("limit", "error"), [(0, torch.OutOfMemoryError("none")), (8, RuntimeError("something else"))]
)
def test_other_errors_and_an_image_that_does_not_fit_end_the_search(
    pictures, monkeypatch, limit, error
):
    _, stepper = make(micro_batch="auto")
    tried = runs_out_above(limit, monkeypatch, stepper, error)
    with pytest.raises(type(error), match=str(error)):
        find_micro_batch(stepper, pictures)
    assert tried[-1] == (16 if limit else 1)
