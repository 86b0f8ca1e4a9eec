"""The compiled step against the eager one."""

import logging

import pytest
import torch
from torch._dynamo.utils import counters

from backfold.energy import EnergyModel
from backfold.training.compiled import CompiledStep, gradient_distance
from backfold.training.stepper import RestorationTraining

VIT = (
    "vit_tiny_patch16_224",
    {"patch_size": 4, "embed_dim": 16, "depth": 1, "num_heads": 2},
    16,
)
SWIN = (
    "swin_tiny_patch4_window7_224",
    {
        "depths": (2,),
        "embed_dim": 16,
        "num_heads": (2,),
        "window_size": 4,
        "drop_path_rate": 0.0,
    },
    32,
)
CONVNEXT = ("convnext_atto", {"depths": (1, 0, 0, 0), "dims": (8, 8, 8, 8)}, 32)


def make(case, seed=0):
    name, options, size = case
    torch.manual_seed(seed)
    return EnergyModel(name, image_size=size, backbone_options=options), size


def draw(count, size, seed):
    generator = torch.Generator().manual_seed(seed)
    images, clean = torch.randn(2, count, 3, size, size, generator=generator)
    return images, clean, torch.rand(count, 1, size, size, generator=generator) > 0.5


@pytest.fixture(autouse=True)
def fresh_compiler():
    torch._dynamo.reset()
    counters.clear()
    yield
    torch._dynamo.reset()


# Turning to the C++ compiler takes half a minute for each.
@pytest.mark.parametrize("case", [VIT, SWIN, CONVNEXT], ids=["vit", "swin", "convnext"])
def test_compiled_gradients_equal_eager_ones(case):
    energy, size = make(case)
    training = RestorationTraining(energy, 1.0, compiled=True)
    parameters = dict(energy.named_parameters())
    for seed in (0, 1, 2):
        inputs = draw(4, size, seed)
        losses = [lambda i=inputs: training(*i)[0], lambda i=inputs: training.restore(*i)[0]]
        assert gradient_distance(parameters, *losses)[0] < 1e-4
        compiled, eager = (step(*inputs) for step in (training, training.restore))
        for ours, expected in zip(compiled, eager, strict=True):
            torch.testing.assert_close(ours, expected, rtol=1e-4, atol=1e-5)
    assert training.compiled.is_compiled
    assert counters["stats"]["unique_graphs"] == 1


def test_nothing_is_compiled_again_after_each_shape_was_seen_once():
    energy, size = make(VIT)
    step = CompiledStep(RestorationTraining(energy, 1.0).restore, backend="aot_eager")
    for epoch in range(3):
        energy.train()
        for count in (6, 6, 4):  # the last micro-batch is smaller
            step(*draw(count, size, epoch), None)[0].backward()
        assert counters["stats"]["unique_graphs"] == 2
        energy.eval()  # as at every look at the held-out images
        with torch.no_grad():
            energy(draw(2, size, epoch)[0])
    assert step.is_compiled


def test_sparse_steps_compile_once():
    energy, size = make(VIT)
    training = RestorationTraining(energy, 1.0)
    step = CompiledStep(training.restore, backend="aot_eager")
    for seed in range(3):
        tokens = torch.rand(4, 16, generator=torch.Generator().manual_seed(seed)).argsort(dim=1)
        inputs = (*draw(4, size, seed), tokens[:, :8].sort(dim=1).values)
        losses = [lambda i=inputs: step(*i)[0], lambda i=inputs: training.restore(*i)[0]]
        assert gradient_distance(dict(energy.named_parameters()), *losses)[0] < 1e-4
    assert counters["stats"]["unique_graphs"] == 1


def test_a_step_that_can_t_be_compiled_runs_eagerly_and_says_why_once(caplog):
    calls = []

    def step(images, clean, loss_mask, tokens, second=None):  # noqa: ARG001
        calls.append(1)
        if float(images.sum()) > 0:  # depends on data: no full graph
            return images.sum(), images, clean
        return clean.sum(), images, clean

    compiled = CompiledStep(step, backend="aot_eager")
    with caplog.at_level(logging.WARNING, logger="backfold"):
        results = [compiled(*draw(2, 8, seed), None)[0] for seed in range(3)]
    for seed, result in enumerate(results):
        assert torch.equal(result, step(*draw(2, 8, seed), None)[0])
    assert not compiled.is_compiled
    (record,) = caplog.records
    assert "can't be compiled and runs eagerly" in record.message
    assert "--compile false" in record.message
    assert "\n" not in record.message


def test_running_out_of_memory_is_no_failure_of_the_compiler():
    def step(images, clean, loss_mask, tokens, second=None):  # noqa: ARG001
        return images.sum(), images, clean

    compiled = CompiledStep(step)

    def exhausted(*_):
        raise torch.OutOfMemoryError("no memory")

    compiled.compiled = exhausted
    with pytest.raises(torch.OutOfMemoryError):
        compiled(*draw(2, 8, 0), None)
    assert compiled.is_compiled


def test_gradient_distance_is_the_worst_parameter_s_and_leaves_no_gradients():
    loud, quiet = (torch.nn.Parameter(torch.tensor(values)) for values in ([3.0, 4.0], [1.0]))
    parameters = {"loud": loud, "quiet": quiet}

    def bent(loud_share, quiet_share):
        return lambda: loud_share * loud.sum() + 0.1 * quiet_share * quiet.sum()

    exact = bent(1.0, 1.0)
    assert gradient_distance(parameters, bent(1.1, 1.0), exact) == (
        pytest.approx(0.1, rel=1e-4), "loud")  # fmt: skip
    assert gradient_distance(parameters, bent(1.0, 1.5), exact) == (
        pytest.approx(0.5, rel=1e-4), "quiet")  # fmt: skip
    assert loud.grad is None
    tiny = {"loud": loud, "quiet": quiet}
    quiet.data.fill_(1.0)
    distance, _ = gradient_distance(
        tiny, lambda: loud.sum() + 2e-6 * quiet.sum(), lambda: loud.sum() + 1e-6 * quiet.sum()
    )
    assert distance < 1e-4  # bf16 would know it no better
    missing = loud.sum
    assert gradient_distance(parameters, missing, exact) == (float("inf"), "quiet")
