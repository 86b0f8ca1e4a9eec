"""What only a GPU can show: the first person with one runs these."""

import subprocess
import sys
from dataclasses import replace

import pytest
import torch
from lightning.fabric import Fabric
from torch.nn.attention import SDPBackend, sdpa_kernel

from backfold import EnergyModel, evaluate, restore
from backfold.cli.main import main
from backfold.data.statistics import ChannelStatistics
from backfold.pretext import HiddenPatches, Masking
from backfold.sparse import running_tokens
from backfold.training.autotune import GRADIENT_TOLERANCE, gradient_distance
from backfold.training.config import PretrainConfig
from backfold.training.optimizer import freeze_unreachable
from backfold.training.step import CompiledStep, RestorationTraining, Stepper

pytestmark = [
    pytest.mark.skipif(not torch.cuda.is_available(), reason="there is no CUDA device"),
    # What the compiler warns of is not ours; as an error it would end compiling.
    pytest.mark.filterwarnings("ignore"),
]
OPTIONS = {"patch_size": 16, "embed_dim": 128, "depth": 4, "num_heads": 4}
CONVNEXT = {"depths": (2, 2, 2, 2), "dims": (16, 32, 64, 128)}
TASK = Masking(mask_patch_size=16)


def make(name="vit_tiny_patch16_224", options=OPTIONS):
    torch.manual_seed(0)
    return EnergyModel(name, image_size=96, backbone_options=options).cuda()


def draw(count=8, task=TASK):
    generator = torch.Generator().manual_seed(1)
    clean = torch.randn(count, 3, 96, 96, generator=generator)
    corruption = task(clean, generator).to(torch.device("cuda"))
    return corruption, (corruption.corrupted, clean.cuda(), corruption.loss_mask)


@pytest.mark.parametrize("graphs", [False, True])
@pytest.mark.parametrize(
    ("name", "options", "conditional"),
    [
        ("vit_tiny_patch16_224", OPTIONS, False),
        ("vit_tiny_patch16_224", OPTIONS, True),
        ("convnext_atto", CONVNEXT, False),
    ],
)
def test_the_compiled_step_has_the_eager_gradient(name, options, conditional, graphs):
    energy = make(name, options)
    training = RestorationTraining(energy, 1.0, conditional=conditional)
    step = CompiledStep(training.restore, graphs=graphs)
    masking = replace(TASK, normalised_share=0.0)
    made, given = draw(task=HiddenPatches((masking,), (1.0,), masking) if conditional else TASK)
    tokens = running_tokens(made.running, energy.backbone, (96, 96))
    for _ in range(3):  # warm, recorded, replayed
        losses = [lambda s=s: s(*given, *tokens)[0] for s in (step, training.restore)]
        distance, name = gradient_distance(dict(energy.named_parameters()), *losses)
        assert distance < 0.01, name
    assert step.is_compiled


def test_bf16_has_float32_s_gradient_but_for_rounding():
    energy = make()
    training = RestorationTraining(energy, 1.0)

    def rounded():
        with torch.autocast("cuda", torch.bfloat16):
            return training.restore(*draw()[1])[0]

    exact = lambda: training.restore(*draw()[1])[0]  # noqa: E731
    distance, name = gradient_distance(dict(energy.named_parameters()), rounded, exact)
    assert distance < 2 * GRADIENT_TOLERANCE[torch.bfloat16], name


def test_restoring_runs_on_fused_attention():
    energy = make()
    corrupted = draw()[0].corrupted
    with sdpa_kernel([SDPBackend.EFFICIENT_ATTENTION, SDPBackend.FLASH_ATTENTION]):
        fused = restore(energy, corrupted, num_steps=2).restored
    with sdpa_kernel(SDPBackend.MATH):
        plain = restore(energy, corrupted, num_steps=2).restored
    torch.testing.assert_close(fused, plain, rtol=1e-3, atol=1e-3)


def peak(num_steps):
    """Bytes of one optimizer step."""
    energy = make()
    freeze_unreachable(energy, draw(2)[0].corrupted)
    config = PretrainConfig(batch_size=64, num_steps=num_steps, precision="32-true")
    fabric = Fabric(accelerator="cuda", devices=1)
    statistics = ChannelStatistics((0.5,) * 3, (0.25,) * 3)
    step = Stepper(config, energy, TASK, statistics, fabric, 100, 10)
    images = torch.rand(64, 3, 96, 96, device="cuda")
    step(images, 0)
    torch.cuda.reset_peak_memory_stats()
    step(images, 1)
    return torch.cuda.max_memory_allocated()


def test_memory_does_not_grow_with_the_steps():
    assert peak(4) < 1.1 * peak(1)


TRAIN = [
    "pretrain", "--backbone=vit_tiny_patch16_224", "--backbone-options.embed_dim=32",
    "--backbone-options.patch_size=7", "--backbone-options.depth=2",
    "--backbone-options.num_heads=2", "--image-size=28", "--batch-size=64", "--max-steps=20",
    "--tasks.masking.mask-patch-size=7", "--held-out=64",
]  # fmt: skip


def test_a_run_is_trained_and_evaluated_on_the_device(tmp_path):
    out = tmp_path / "run"
    assert main([*TRAIN, f"--out={out}", "--accelerator=cuda", "--devices=1"]) == 0
    rows = evaluate(out, protocols=["knn", "linear"], labels=["10"], draws=2, accelerator="cuda")
    assert {row.contender for row in rows} >= {"pretrained", "before", "pixels"}


@pytest.mark.skipif(torch.cuda.device_count() < 2, reason="there are not two CUDA devices")
def test_two_devices_train_by_nccl(tmp_path):
    command = [sys.executable, "-m", "backfold.cli.main", *TRAIN, f"--out={tmp_path / 'run'}"]
    finished = subprocess.run(
        [*command, "--accelerator=cuda", "--devices=2"], capture_output=True, text=True, check=False
    )
    assert finished.returncode == 0, finished.stderr
