"""The compiled step against the eager one."""

import logging
from unittest.mock import Mock

import pytest
import torch
from torch._dynamo.utils import counters

from backfold.energy import EnergyModel
from backfold.training.autotune import gradient_distance
from backfold.training.step import CompiledStep, RestorationTraining

VIT = (
    "vit_tiny_patch16_224", {"patch_size": 4, "embed_dim": 16, "depth": 1, "num_heads": 2}, 16,
)  # fmt: skip
SWIN = (
    "swin_tiny_patch4_window7_224",
    {"depths": (2,), "embed_dim": 16, "num_heads": (2,), "window_size": 4, "drop_path_rate": 0.0},
    32,
)
CONVNEXT = ("convnext_atto", {"depths": (1, 0, 0, 0), "dims": (8, 8, 8, 8)}, 32)


def make(case):
    name, options, size = case
    torch.manual_seed(0)
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


# Tracing the graph is what may fail; what the C++ compiler makes of it takes minutes here, and is
# checked before each run trusts it.
@pytest.mark.parametrize(
    ("case", "counts", "sparse"),
    [
        (VIT, (6, 4), False),  # the last micro-batch is smaller
        (VIT, (6, 4), True),
        (SWIN, (4,), False),
        (CONVNEXT, (4,), False),
    ],
    ids=["vit", "sparse vit", "swin", "convnext"],
)
def test_compiled_gradients_equal_eager_ones_and_each_shape_is_compiled_once(case, counts, sparse):
    energy, size = make(case)
    eager = RestorationTraining(energy, 1.0).restore
    compiled = CompiledStep(eager, backend="aot_eager")
    parameters = dict(energy.named_parameters())
    for seed in range(2):
        energy.train()
        for count in counts:
            tokens = torch.rand(count, 16).argsort(dim=1)[:, :8].sort(dim=1).values
            inputs = (*draw(count, size, seed), tokens if sparse else None)
            losses = [lambda i=inputs, step=step: step(*i)[0] for step in (compiled, eager)]
            assert gradient_distance(parameters, *losses)[0] < 1e-4
            for ours, expected in zip(compiled(*inputs), eager(*inputs), strict=True):
                torch.testing.assert_close(ours, expected, rtol=1e-4, atol=1e-5)
        energy.eval()  # as at every look at the held-out images
        with torch.no_grad():
            energy(draw(2, size, seed)[0])
    assert compiled.is_compiled
    assert counters["stats"]["unique_graphs"] == len(counts)


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
    (record,) = [each for each in caplog.records if each.name == "backfold"]
    assert "can't be compiled and runs eagerly" in record.message
    assert "--compile false" in record.message
    assert "\n" not in record.message


def test_running_out_of_memory_is_no_failure_of_the_compiler():
    compiled = CompiledStep(lambda *_: None)
    compiled.compiled = Mock(side_effect=torch.OutOfMemoryError("no memory"))
    with pytest.raises(torch.OutOfMemoryError):
        compiled(*draw(2, 8, 0), None)
    assert compiled.is_compiled


def test_gradient_distance_is_the_worst_parameter_s_and_leaves_no_gradients():
    loud, quiet = (torch.nn.Parameter(torch.tensor(values)) for values in ([3.0, 4.0], [1.0]))
    parameters = {"loud": loud, "quiet": quiet}

    def bent(loud_share, quiet_share):
        return lambda: loud_share * loud.sum() + 0.1 * quiet_share * quiet.sum()

    exact = bent(1.0, 1.0)
    for step, share, name in ((bent(1.1, 1.0), 0.1, "loud"), (bent(1.0, 1.5), 0.5, "quiet")):
        found = gradient_distance(parameters, step, exact)
        assert found == (pytest.approx(share, rel=1e-4), name)
    assert loud.grad is None
    assert gradient_distance(parameters, loud.sum, exact) == (float("inf"), "quiet")
