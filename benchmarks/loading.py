"""What loading JPEG images costs.

    python benchmarks/loading.py --data ../shared/data/imagenette160 --out benchmarks/results

Folders of JPEG files are made in a temporary place: the images as they are stored, and some of them
scaled up, with noise for the detail that scaling can't give. Images are brought to 224 pixels by
the random crops that are the default. How long training waits stands in every run's metrics.csv.

Writes loading.json and loading.md.
"""

import argparse
import io
import itertools
import tempfile
import time
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow.parquet as pq
import torch
from PIL import Image
from torch import Tensor
from torch.utils.benchmark import Timer

from backfold.data.augmentation import Augmentation
from backfold.data.formats import FolderSource
from backfold.data.loading import BatchDataset, training_loader
from backfold.files import write_json
from step_cost.measuring import facts
from step_cost.tables import facts_line, markdown_table

SIZE = (224, 224)
STORED, MEDIUM, LARGE = "160 x 160, as stored", "640 x 480", "2000 x 1500"


def write_folders(parquet: Path, place: Path) -> dict[str, Path]:
    """Three folders of 256 JPEG files; the scaled images are 32 different ones."""
    column = pq.read_table(parquet, columns=["image"]).column("image")
    stored = [column[index].as_py() for index in range(0, len(column), len(column) // 256)][:256]
    folders = {name: place / str(number) for number, name in enumerate((STORED, MEDIUM, LARGE))}
    for folder in folders.values():
        folder.mkdir()
    for number, content in enumerate(stored):
        (folders[STORED] / f"{number:03}.jpg").write_bytes(content)
    for name, size in ((MEDIUM, (640, 480)), (LARGE, (2000, 1500))):
        scaled = [enlarge(content, size, seed) for seed, content in enumerate(stored[::8])]
        for number, content in zip(range(256), itertools.cycle(scaled), strict=False):
            (folders[name] / f"{number:03}.jpg").write_bytes(content)
    return folders


def enlarge(content: bytes, size: tuple[int, int], seed: int) -> bytes:
    with Image.open(io.BytesIO(content)) as image:
        pixels = np.asarray(image.convert("RGB").resize(size, Image.Resampling.BICUBIC))
    noise = np.random.default_rng(seed).normal(0, 6, (*pixels.shape[:2], 1))
    buffer = io.BytesIO()
    noisy = (pixels + noise).clip(0, 255).astype(np.uint8)
    Image.fromarray(noisy).save(buffer, "JPEG", quality=90)
    return buffer.getvalue()


class FullSize(FolderSource):
    """A folder whose images are always decoded with all their pixels."""

    def read(self, index: int, *_: int | None) -> Tensor:
        """All pixels, whatever is asked."""
        return super().read(index)


def milliseconds(source: FolderSource) -> float:
    """To load an image on one core and to share it; the median of a second of batches of 8."""
    dataset, places = BatchDataset(source, SIZE, 3, Augmentation()), itertools.count()

    def load() -> None:
        dataset[[(0, next(places) % len(source)) for _ in range(8)]].images.share_memory_()

    timer = Timer("load()", globals={"load": load})
    return 1e3 * timer.blocked_autorange(min_run_time=1.0).median / 8


def time_worker(folder: Path) -> float:
    """Images a second that arrive here from one worker, when nothing else computes."""
    loader = training_loader(
        FolderSource(folder), SIZE, 3, Augmentation(), 16, 0, 0, 20, num_workers=1
    )
    arrivals = [time.perf_counter() for _ in loader]
    return 16 * 15 / (arrivals[-1] - arrivals[-16])


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--data", type=Path, default=Path("../shared/data/imagenette160"))
    parser.add_argument("--out", type=Path, default=Path(__file__).with_name("results"))
    options = parser.parse_args()
    known = facts(torch.device("cpu"))
    with tempfile.TemporaryDirectory() as temporary:
        place = Path(temporary)
        folders = write_folders(options.data / "train.parquet", place)
        loading = {
            name: {
                "full size, uint8 batches": milliseconds(FullSize(folder)),
                "reduced size, uint8 batches": milliseconds(FolderSource(folder)),
                "images a second from one worker": time_worker(folder),
            }
            for name, folder in folders.items()
        }
    known["data"] = "Imagenette (160 px, squashed), and 32 of its images scaled up with noise"
    path = options.out / "loading.json"
    write_json(path, {**known, "seed": 0, "loading_ms": loading})
    parts = [
        f"{facts_line({'facts': known})}. {known['data']}; one run of each, seed 0.",
        "Milliseconds to load an image on one core (read, decode, crop, resize to 224, stack, share"
        " with the training process); median of a second of batches of 8.",
        table([{"JPEG images": name, **row} for name, row in loading.items()]),
    ]
    path.with_suffix(".md").write_text("\n\n".join(parts) + "\n")


def table(rows: list[dict[str, Any]]) -> str:
    lines = [[f"{cell:.3g}" if isinstance(cell, float) else str(cell) for cell in row.values()]
             for row in rows]  # fmt: skip
    return markdown_table([name.replace("_", " ") for name in rows[0]], lines)


if __name__ == "__main__":
    main()
