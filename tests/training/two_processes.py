"""What test_two_processes.py runs under torchrun, in each of two processes, and alone.

torchrun --standalone --nproc-per-node 2 two_processes.py FOLDER
"""

import os
import sys
import warnings
import zlib
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any
from unittest.mock import patch

import torch
from lightning.fabric import Fabric
from rich.console import Console

from backfold import pretext
from backfold.data.statistics import ChannelStatistics
from backfold.errors import UserError
from backfold.pretext import Corruption, HiddenPatches, Masking, Mixture, PretextTask, Sorting
from backfold.training import pretrain as trainer
from backfold.training.config import OptimizerSettings, PretrainConfig
from backfold.training.devices import make_fabric
from backfold.training.optimizer import freeze_unreachable
from backfold.training.pretrain import pretrain
from backfold.training.step import CompiledStep, Stepper
from tiny_run import tiny_config, tiny_energy, write_images

STATISTICS = ChannelStatistics((0.5, 0.4, 0.3), (0.3, 0.3, 0.2))
MASKING = Masking(mask_patch_size=7)
SORTING = Sorting(sorting_patch_size=7)
OTHERS = pretext.Denoising(), pretext.SuperResolution(), pretext.Colorization()
STEPS, BATCH = 3, 8
MOST_TORN = 10  # of 12 torn images: more than any process meets, and fewer than both do
CASES: dict[str, tuple[PretextTask, dict[str, Any]]] = {
    "masking": (MASKING, {}),
    "mixture": (Mixture((MASKING, SORTING, *OTHERS), (1,) * 5), {}),
    "K = 2 and accumulation": (SORTING, {"num_steps": 2, "micro_batch": 3}),
    "sparse": (Masking(mask_patch_size=7, mask_ratio=0.75, hidden_share=1 / 3), {}),
    "compiled": (MASKING, {}),
    "sharded optimizer": (MASKING, {"shard_optimizer": True}),
    "conditional": (
        HiddenPatches((MASKING, SORTING), (2.0, 1.0), MASKING), {"num_steps": 2, "micro_batch": 3}
    ),
    "two views": (HiddenPatches((MASKING,), (1.0,), MASKING), {"invariance": 0.1}),
    "two dense views": (MASKING, {"invariance": 0.1}),
}  # fmt: skip


@dataclass(frozen=True)
class EachAlone:
    """Corrupts each image by what the image itself shows, whatever batch it is in."""

    task: PretextTask

    def __call__(self, clean: torch.Tensor, generator: torch.Generator) -> Corruption:
        del generator
        made = []
        for image in clean.split(1):
            seed = zlib.crc32((1000 * image).round().to(torch.int32).numpy().tobytes())
            made.append(self.task(image, torch.Generator().manual_seed(seed)))
        return Corruption.join(made)


def pictures(step: int) -> torch.Tensor:
    """The global batch of a step: smooth colours, float64 in [0, 1], (8, 3, 28, 28)."""
    coarse = torch.rand(BATCH, 3, 6, 6, generator=torch.Generator().manual_seed(step))
    images = torch.nn.functional.interpolate(coarse.double(), size=28, mode="bilinear")
    return images.clamp(0, 1)


def make_stepper(name: str, fabric: Fabric, **changes: Any) -> Stepper:
    """A stepper on a tiny ViT in float64."""
    task, settings = CASES[name]
    heads = {"second_head": isinstance(task, HiddenPatches), "projector": "invariance" in settings}
    energy = tiny_energy(heads=heads).double()
    images = torch.randn(2, 3, 28, 28, dtype=torch.float64)
    running = task(images, torch.Generator().manual_seed(0)).running
    freeze_unreachable(energy, images, running=running)
    task = EachAlone(task)
    optimizer = OptimizerSettings(base_lr=0.1, warmup_epochs=0)
    config = PretrainConfig(batch_size=BATCH, optimizer=optimizer, **{**settings, **changes})
    stepper = Stepper(config, energy, task, STATISTICS, fabric, 10, 5)
    if name == "compiled" and fabric.world_size > 1:
        assert stepper.restoration is not None
        step = CompiledStep(stepper.restoration.restore, backend="aot_eager")
        stepper.restoration.compiled = step
    return stepper


def take_steps(stepper: Stepper) -> dict[str, Any]:
    """Train on this process's share of each batch; returns losses, norms and the weights."""
    fabric, losses, norms = stepper.fabric, [], []
    for step in range(STEPS):
        share = pictures(step).chunk(fabric.world_size)[fabric.global_rank]
        loss, norm, _ = stepper(share, step)
        losses.append(float(loss))
        norms.append(float(norm))
    compiled = stepper.restoration.compiled if stepper.restoration is not None else None
    return {
        "losses": losses,
        "norms": norms,
        "compiled": compiled is not None and compiled.is_compiled,
        "weights": {name: v.clone() for name, v in stepper.energy.state_dict().items()},
    }


def run_config(folder: Path, torn_every: int = 0, **changes: Any) -> PretrainConfig:
    """A whole run of a second, on as many processes as there are."""
    data = folder / f"torn-{torn_every}.parquet"
    if not data.exists() and int(os.environ.get("RANK", "0")) == 0:
        write_images(data, torn_every=torn_every)
    return tiny_config(**{"data": data, "devices": "auto", "max_steps": 4, "seed": 3, **changes})


def torn_config(folder: Path, **changes: Any) -> PretrainConfig:
    """An epoch on images of which every seventh can't be read."""
    return run_config(folder, torn_every=7, max_steps=9, **changes)


class RunEndedError(Exception):
    """Stands for whatever ends a run."""


def whole_run(config: PretrainConfig, stop_at: int | None = None, **options: Any) -> dict[str, Any]:
    """`pretrain`, and what this process saw, computed and wrote in it."""
    seen: list[torch.Tensor] = []
    measured: dict[str, list[float]] = {"loss": [], "psnr_gain_db": [], "energy_gap": []}
    original = Stepper.__call__

    def step(self: Stepper, images: torch.Tensor, number: int) -> Any:
        if number == stop_at:
            raise RunEndedError
        result = original(self, images, number)
        seen.append(images)
        measured["loss"].append(float(result[0]))
        std = torch.tensor(self.statistics.std)
        measured["psnr_gain_db"].append(result[2].psnr_gain_db(std))
        measured["energy_gap"].append(result[2].energy_gap(self.energy))
        return result

    before = len(WRITTEN)
    with patch.object(Stepper, "__call__", step), suppress(RunEndedError):
        pretrain(config, console=Console(quiet=True), **options)
    inside = [path for path in WRITTEN[before:] if path.startswith(str(config.out))]
    return {"images": torch.stack(seen), "measured": measured, "written": inside}


WRITTEN: list[str] = []
WRITING = ("os.mkdir", "os.remove", "os.rename", "os.rmdir", "os.truncate", "os.link")


def note_writing(event: str, arguments: tuple[Any, ...]) -> None:
    """An audit hook that keeps the paths of all files that are written, made or removed."""
    if event == "open":
        flags = arguments[2]
        if isinstance(flags, int) and flags & (os.O_WRONLY | os.O_RDWR):
            WRITTEN.append(str(arguments[0]))
    elif event in WRITING:
        WRITTEN.extend(str(argument) for argument in arguments if isinstance(argument, str | Path))


def main(folder: Path) -> None:
    """Every case in this process of two; results go to ``rank-N.pt``."""
    warnings.simplefilter("error", FutureWarning)
    sys.addaudithook(note_writing)
    first = run_config(folder, out=folder / "run")
    torn = torn_config(folder, out=folder / "torn", max_broken_share=0.5)
    fabric = make_fabric(first)
    fabric.barrier()
    results: dict[str, Any] = {name: take_steps(make_stepper(name, fabric)) for name in CASES}
    results["run"] = whole_run(first)
    sharded = run_config(folder, out=folder / "sharded", shard_optimizer=True, checkpoint_minutes=0)
    with patch.object(trainer, "LOG_EVERY", 1):  # processes agree on checkpoints where they log
        whole_run(sharded, stop_at=2)
    fabric.barrier()
    results["resumed run"] = whole_run(sharded, resume=True)
    whole_run(torn)
    try:
        whole_run(torn_config(folder, out=folder / "stopped", max_broken_share=MOST_TORN / 72))
    except UserError as error:
        results["stopped"] = str(error)
    results["processes"] = (fabric.world_size, fabric.global_rank)
    results["ddp"] = type(fabric.strategy).__name__
    torch.save(results, folder / f"rank-{fabric.global_rank}.pt")


if __name__ == "__main__":
    main(Path(sys.argv[1]))
