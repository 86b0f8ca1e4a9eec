"""Draw the README's picture from a finished `backfold demo`.

    python scripts/draw_trajectory.py runs/demo

A row a test image, each corrupted by one of the run's tasks in turn: the corrupted image, the
points of its trajectory, and the clean image.
"""

import sys
from itertools import cycle
from pathlib import Path

import torch

from backfold.data.loading import evaluation_batches
from backfold.data.open import open_source
from backfold.restoration import restore
from backfold.training.config import used_tasks
from backfold.training.run import load_pretrained
from backfold.training.watch import restoration_grid

IMAGES = (5, 11, 23)
NUM_STEPS = 1
OUT = Path(__file__).parent.parent / "docs" / "images" / "trajectory.png"


def main(run_folder: Path) -> None:
    """Write docs/images/trajectory.png."""
    run = load_pretrained(run_folder)
    source = open_source(run.config.data, "test")
    (batch,) = evaluation_batches(source, run.image_size, run.channels, [IMAGES])
    clean = run.statistics.normalize(batch.images)
    tasks, points = cycle(used_tasks(run.config, run.channels).values()), []
    for image, task in zip(clean.split(1), tasks, strict=False):
        made = task(image, torch.Generator().manual_seed(1))
        points.append(restore(run.energy.of(made), made.corrupted, NUM_STEPS).trajectory)
    trajectory = torch.cat(points, dim=1)
    picture = restoration_grid(trajectory, clean, run.statistics)
    picture.save(OUT, optimize=True)


if __name__ == "__main__":
    main(Path(sys.argv[1]))
