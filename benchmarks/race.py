"""A race: the energy beside MAE, SimMIM, SimCLR, the untrained backbone and training from scratch.

    python benchmarks/race.py --size cpu --data ../shared/data/cifar10   # resumes where it stopped
    python benchmarks/race.py --size cpu --data ... --max-minutes 30 --only mae energy --seeds 0
    python benchmarks/race.py --size gpu-imagenette --data ../shared/data/imagenette160 \
        --pack runs/packed/imagenette                                    # under 60 MB, and end
    python scripts/results_page.py                                       # docs/results.md

Same images, crops, order, optimizer, schedule, batch and evaluation for all; of each contender the
best of the same learning rates, layers and poolings, all chosen on a validation split that no
reported number uses. Rivals are third-party code (transformers, lightly). Steps are timed first, in
turn; a contender that fills another's seconds gets its number of steps from there.

Each piece writes one JSON file below --out and is skipped where that exists; weights and
checkpoints go below --work. Several processes may be started on the same race and share the
pieces out among them (give each --threads 1). Needs `pip install backfold[benchmarks]`.
"""

import argparse
import logging
import math
import time
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

import torch

from backfold.memory import keep_freed_memory
from racing.contenders import CONTENDERS
from racing.driving import drive, pieces_of, with_tuned
from racing.packing import pack
from racing.race import Race
from racing.sizes import SIZES, Size

RESULTS = Path(__file__).parent / "results"


def parse(arguments: Sequence[str] | None = None) -> argparse.Namespace:
    """The options."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--size", choices=list(SIZES), default="cpu")
    parser.add_argument("--data", type=Path, required=True, help="folder with train and test files")
    parser.add_argument("--out", type=Path, help="by default benchmarks/results/race-SIZE")
    parser.add_argument("--work", type=Path, help="by default runs/race-SIZE")
    parser.add_argument("--only", nargs="+", choices=[each.name for each in CONTENDERS])
    parser.add_argument("--backbone", choices=["vit", "convnext"])
    parser.add_argument("--seeds", nargs="+", type=int, default=[0, 1, 2])
    parser.add_argument("--epochs", type=float, help="of a whole run, in place of the size's")
    parser.add_argument("--images", type=int, help="to pretrain on, in place of the size's")
    parser.add_argument(
        "--max-minutes", type=float, default=math.inf, help="stop then; run again to go on"
    )
    parser.add_argument("--accelerator", default="auto", help="Lightning's name of the hardware")
    parser.add_argument("--threads", type=int, help="of PyTorch")
    parser.add_argument("--pack", type=Path, help="only pack the data into this folder")
    return parser.parse_args(arguments)


def race_of(options: argparse.Namespace, started: float) -> Race:
    """The race that the options describe."""
    size: Size = SIZES[options.size]
    size = replace(size, epochs=options.epochs or size.epochs, images=options.images or size.images)
    return Race(
        size,
        options.data,
        options.out or RESULTS / f"race-{size.name}",
        options.work or Path("runs") / f"race-{size.name}",
        options.accelerator,
        started + 60 * options.max_minutes,
    )


def run(options: argparse.Namespace) -> list[str]:
    """Run the race as far as time allows; returns the names of the pieces that are left."""
    race = race_of(options, time.monotonic())
    names = options.only or [
        contender.name for contender in CONTENDERS if options.backbone in (None, contender.backbone)
    ]
    chosen = [each for each in with_tuned(names) if each.backbone in race.size.backbones]
    return drive(race, pieces_of(chosen, options.seeds, race.size.learning_rates))


def main() -> None:
    options = parse()
    if options.pack:
        quality = pack(options.data, options.pack)
        print(f"{options.pack}: " + (f"JPEG quality {quality}" if quality else "as it was"))
        return
    if options.threads:
        torch.set_num_threads(options.threads)
    keep_freed_memory()
    logging.getLogger("lightning.fabric").setLevel(logging.ERROR)
    left = run(options)
    print(f"{len(left)} pieces left" + (f", next: {left[0]}" if left else ""), flush=True)


if __name__ == "__main__":
    main()
