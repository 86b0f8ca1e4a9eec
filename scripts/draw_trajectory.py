"""Draw the README's picture from a finished `backfold demo`.

    python scripts/draw_trajectory.py runs/demo

One row for each of masking, super-resolution and denoising: a corrupted test image, the points of
its trajectory over two steps, and the clean image.
"""

import sys
from pathlib import Path

import torch

from backfold.data.loading import evaluation_batches
from backfold.data.open import open_source
from backfold.restoration import restore
from backfold.training.config import build_tasks
from backfold.training.run import load_pretrained
from backfold.training.watch import restoration_grid

TASKS = ("masking", "superresolution", "denoising")
IMAGES = (5, 11, 23)
NUM_STEPS = 2
OUT = Path(__file__).parent.parent / "docs" / "images" / "trajectory.png"


def main(run_folder: Path) -> None:
    """Write docs/images/trajectory.png."""
    run = load_pretrained(run_folder)
    source = open_source(run.config.data, "test")
    (batch,) = evaluation_batches(source, run.image_size, run.channels, 8, indices=IMAGES)
    clean = run.statistics.normalize(batch.images)
    tasks = build_tasks(run.config, run.channels)
    corrupted = torch.cat(
        [
            tasks[name](image[None], torch.Generator().manual_seed(1)).corrupted
            for name, image in zip(TASKS, clean, strict=True)
        ]
    )
    trajectory = restore(run.energy, corrupted, NUM_STEPS).trajectory
    picture = restoration_grid(trajectory, clean, run.statistics)
    picture.save(OUT, optimize=True)


if __name__ == "__main__":
    main(Path(sys.argv[1]))
