"""A training step asks nothing back of the device, which would make the host wait for it."""

import pytest
import torch
from lightning.fabric import Fabric
from torch.utils._python_dispatch import TorchDispatchMode

from backfold.data.statistics import ChannelStatistics
from backfold.pretext import (
    Bands,
    Colorization,
    Denoising,
    Excerpt,
    ExcerptSettings,
    Masking,
    Mixture,
    Sorting,
    SuperResolution,
)
from backfold.training.config import PretrainConfig
from backfold.training.optimizer import freeze_unreachable
from backfold.training.step import Stepper
from tiny_run import tiny_energy

TASKS = (
    Masking(mask_patch_size=7), Sorting(sorting_patch_size=7), SuperResolution(), Denoising(),
    Colorization(0.5, 1.0), Bands(band_patch_size=7),
)  # fmt: skip
STATISTICS = ChannelStatistics((0.3,) * 3, (0.35,) * 3)
# Results whose size or value the host must know.
WAITS = (
    torch.ops.aten._local_scalar_dense, torch.ops.aten.nonzero, torch.ops.aten.masked_select,
    torch.ops.aten._unique2, torch.ops.aten.unique_dim, torch.ops.aten.equal,
)  # fmt: skip


class CountsWaits(TorchDispatchMode):
    """Which operations would wait, were the tensors on a GPU."""

    def __init__(self):
        super().__init__()
        self.found = []

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        by_mask = any(
            isinstance(index, torch.Tensor) and index.dtype == torch.bool
            for argument in args if isinstance(argument, (list, tuple)) for index in argument
        )  # fmt: skip
        if function.overloadpacket in WAITS or (by_mask and "index" in str(function)):
            self.found.append(str(function))
        return function(*args, **(kwargs or {}))


def test_a_task_that_waits_is_noticed():
    drawn = torch.rand(4) < 0.5
    with CountsWaits() as counted:
        drawn.nonzero()
        torch.randn(4)[drawn] *= 1.0
        bool(drawn.any())
    assert len(counted.found) >= 3


@pytest.mark.parametrize(
    "task",
    [
        *TASKS,
        Masking(mask_patch_size=7, hidden_share=0.5),
        Masking(mask_patch_size=7, normalised_share=0.5),
        Masking(mask_patch_size=7, blocks=True),
        Mixture(TASKS, (1.0,) * len(TASKS)),
        Excerpt(Mixture(TASKS[:2], (1.0, 2.0)), ExcerptSettings(0.5, 7)),
    ],
    ids=lambda task: type(task).__name__,
)
def test_a_step_waits_for_nothing(task):
    second = {"second_head": getattr(task, "normalised_share", 0) > 0}
    energy = tiny_energy(heads=second, depth=2)
    freeze_unreachable(energy, torch.randn(2, 3, 28, 28))
    fabric = Fabric(accelerator="cpu", devices=1, precision="32-true")
    config = PretrainConfig(batch_size=12, num_steps=2, micro_batch=5)
    step = Stepper(config, energy, task, STATISTICS, fabric, 100, 10)
    images = torch.rand(12, 3, 28, 28)
    step(images, 0)  # what is copied to the device once
    with CountsWaits() as counted:  # AdamW counts its steps on the host: it is left out
        step.optimizer.zero_grad()
        step.accumulate(images, 1)
        fabric.clip_gradients(step.training, step.optimizer, max_norm=1.0, error_if_nonfinite=False)
    assert counted.found == []
