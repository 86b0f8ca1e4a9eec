"""What decides how fast restoration starts: the first gradient's scale, positions, crops.

    python benchmarks/start_of_training.py --steps 600 --out benchmarks/results

Every variant is the demo's recipe with one thing changed, the same seed and the same images; all
run in one process, one after the other. Writes start-of-training.json and .md.
"""

import argparse
import dataclasses
import datetime
import json
import math
import platform
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import timm
import torch
import yaml
from lightning.fabric import Fabric

from backfold.cli.main import recipe_path
from backfold.data.augmentation import Augmentation
from backfold.data.broken import BrokenFiles
from backfold.data.loading import training_loader
from backfold.data.sampling import steps_per_epoch
from backfold.energy import EnergyModel
from backfold.training import setup
from backfold.training.config import PretrainConfig, build_tasks, combine_tasks
from backfold.training.config_file import config_from_dict
from backfold.training.health import watch
from backfold.training.stepper import Stepper

IMAGE_SIZE = (28, 28)
Change = Callable[[EnergyModel], None]


def scale_head(factor: float) -> Change:
    def change(energy: EnergyModel) -> None:
        energy.head.weight.data.mul_(factor)

    return change


def quiet_positions(energy: EnergyModel) -> None:
    """Timm's own start: a deviation of 0.02."""
    positions: torch.nn.Parameter = energy.backbone.pos_embed
    positions.data.mul_(0.02 / positions.data.square().mean().sqrt())


def unchanged(_: EnergyModel) -> None:
    return None


def variants(config: PretrainConfig) -> dict[str, tuple[PretrainConfig, Change]]:
    cropped = dataclasses.replace(config, augmentation=Augmentation(crop_scale=(0.25, 1.0)))
    return {
        "the demo's recipe": (config, unchanged),
        "first gradient 0.05": (config, scale_head(0.05)),
        "first gradient 0.25": (config, scale_head(0.25)),
        "first gradient 4": (config, scale_head(4.0)),
        "positions as timm starts them": (config, quiet_positions),
        "with random crops": (cropped, unchanged),
        "quadratic head": (dataclasses.replace(config, head="quadratic"), unchanged),
    }


def run(config: PretrainConfig, change: Change, steps: int) -> dict[str, Any]:
    images = setup.open_images(config)
    tasks = build_tasks(config, images.channels)
    fabric = Fabric(accelerator=config.accelerator, devices=1, precision="32-true")
    energy = setup.build_energy(config, images.channels).to(fabric.device)
    broken = BrokenFiles.for_source(images.training)
    held_out = setup.load_held_out(images, IMAGE_SIZE, fabric.device, broken)
    setup.calibrate(energy, tasks, held_out.images)
    change(energy)
    epoch = steps_per_epoch(len(images.training), config.batch_size)
    task = combine_tasks(config, tasks)
    stepper = Stepper(config, energy, task, images.statistics, fabric, steps, epoch)
    loader = training_loader(
        images.training, IMAGE_SIZE, images.channels, config.augmentation, config.batch_size,
        config.seed, 0, steps,
    )  # fmt: skip
    energy.train()
    start = time.monotonic()
    for step, batch in enumerate(loader):
        loss, _, _ = stepper(batch.images.to(fabric.device), step)
    seconds = time.monotonic() - start
    entry, _ = watch(
        energy, tasks, held_out, images.statistics, config.embedding,
        num_steps=config.num_steps, step_size=config.step_size, batch_size=config.batch_size,
    )  # fmt: skip
    gains = {
        name: row["psnr_restored_db"] - row["psnr_corrupted_db"]
        for name, row in entry["tasks"].items()
    }
    return {"gains_db": gains, "knn": entry["knn"], "loss": float(loss), "seconds": seconds}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--steps", type=int, default=600)
    parser.add_argument("--out", type=Path, default=Path("benchmarks/results"))
    options = parser.parse_args()
    config = config_from_dict(yaml.safe_load(recipe_path("demo").read_text()))
    rows = {
        name: run(changed, change, options.steps)
        for name, (changed, change) in variants(config).items()
    }
    facts = {
        "date": datetime.datetime.now(datetime.UTC).date().isoformat(),
        "command": f"python benchmarks/start_of_training.py --steps {options.steps}",
        "steps": options.steps,
        "batch_size": config.batch_size,
        "seed": config.seed,
        "versions": {"torch": torch.__version__, "timm": timm.__version__},
        "hardware": f"{platform.machine()}, {torch.get_num_threads()} threads",
    }
    options.out.mkdir(parents=True, exist_ok=True)
    path = options.out / "start-of-training.json"
    path.write_text(json.dumps({**facts, "rows": rows}, indent=2) + "\n")
    path.with_suffix(".md").write_text(table(facts, rows))


def table(facts: dict[str, Any], rows: dict[str, dict[str, Any]]) -> str:
    names = list(next(iter(rows.values()))["gains_db"])
    lines = [
        f"{facts['date']}, {facts['hardware']}, torch {facts['versions']['torch']}, "
        f"{facts['steps']} steps of {facts['batch_size']}, seed {facts['seed']}, one seed: "
        f"`{facts['command']}`. Held-out PSNR gain over the corrupted image in dB, kNN in percent.",
        "",
        "| variant | " + " | ".join(names) + " | kNN |",
        "|---|" + "---|" * (len(names) + 1),
    ]
    for name, row in rows.items():
        gains = " | ".join(f"{row['gains_db'][task]:+.2f}" for task in names)
        knn = row["knn"] if row["knn"] is not None else math.nan
        lines.append(f"| {name} | {gains} | {knn:.1f} |")
    return "\n".join(lines) + "\n"


if __name__ == "__main__":
    main()
