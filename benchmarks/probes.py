"""What probing embeddings of ImageNet's size costs: nearest neighbours and the linear probe.

    python benchmarks/probes.py --out benchmarks/results
    python benchmarks/probes.py --scale 0.01 --out /tmp/probes

The embeddings are synthetic, in half precision in a memory-mapped file: class centres and noise of
unequal spread, mixed among the features. Writes probes.json.
"""

import argparse
import datetime
import json
import platform
import resource
import tempfile
import time
from collections.abc import Callable
from importlib.metadata import version
from pathlib import Path
from typing import Any, TypeVar

import numpy as np
import torch
from rich.console import Console
from torch import Tensor

from backfold.evaluation.probes import fit_linear_path, knn_predictions

TRAIN, TEST, VALIDATION = 1_281_167, 50_000, 10_000
FEATURES, CLASSES = 384, 1_000
# Centres differ in so many directions, by so much of the noise: both probes are right on some half.
DIRECTIONS, CENTRE_SPREAD = 48, 0.6
REGULARISATIONS = (1e-4, 1e-2, 1.0)
ROWS = 50_000
SEED = 0

Timed = TypeVar("Timed")


def write_embeddings(path: Path, count: int, seed: int) -> tuple[Tensor, Tensor]:
    """float16 (count, features), memory-mapped, and labels (count,); all seeds share the classes.

    Args:
        path: of the file.
        count: images.
        seed: of the labels and the noise.
    """
    fixed = np.random.default_rng(SEED)
    centres = CENTRE_SPREAD * fixed.standard_normal((CLASSES, FEATURES), dtype=np.float32)
    centres[:, DIRECTIONS:] = 0
    mixing = np.linalg.qr(fixed.standard_normal((FEATURES, FEATURES)))[0].astype(np.float32)
    mixing *= np.logspace(0, -1.5, FEATURES, dtype=np.float32)[:, None]
    random = np.random.default_rng([SEED, seed])
    labels = random.integers(0, CLASSES, count)
    stored = np.memmap(path, np.float16, "w+", shape=(count, FEATURES))
    for start in range(0, count, ROWS):
        part = labels[start : start + ROWS]
        noise = random.standard_normal((len(part), FEATURES), dtype=np.float32)
        stored[start : start + ROWS] = (centres[part] + noise) @ mixing
    stored.flush()
    return torch.from_numpy(stored), torch.from_numpy(labels)


def measure(work: Callable[[], Timed]) -> tuple[Timed, dict[str, float]]:
    """What ``work`` returns, its seconds, and the process's peak memory so far in GB."""
    start, processor_start = time.perf_counter(), time.process_time()
    result = work()
    seconds = time.perf_counter() - start
    processor = time.process_time() - processor_start
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024 / 1e9
    return result, {
        "seconds": round(seconds, 1),
        "processor_seconds": round(processor, 1),  # beside other work, what tells the cost
        "peak_rss_gb": round(peak, 2),
    }


def run(folder: Path, scale: float, console: Console) -> dict[str, Any]:
    """Both probes of synthetic embeddings; ``scale`` is of the numbers of images."""
    counts = [max(2 * CLASSES, round(scale * count)) for count in (TRAIN, TEST, VALIDATION)]
    data, written = measure(
        lambda: [
            write_embeddings(folder / str(seed), count, seed) for seed, count in enumerate(counts)
        ]
    )
    (x, y), (test_x, test_y), (held_x, held_y) = data
    found: dict[str, Any] = {"images": counts, "writing": written}
    console.print(f"{counts} embeddings: {written}")

    path, cost = measure(lambda: fit_linear_path(x, y, REGULARISATIONS, device="cpu", seed=SEED))
    losses = path.log_loss(held_x, held_y)
    best = int(losses.argmin())
    right = (path.predict(test_x) == test_y).double().mean(dim=1)
    found["linear"] = {
        **cost,
        "regularisations": REGULARISATIONS,
        "validation_log_loss": losses.tolist(),
        "chosen": REGULARISATIONS[best],
        "accuracy": float(right[best]),
        "accuracies": right.tolist(),
    }
    console.print(f"linear: {found['linear']}")

    predicted, cost = measure(lambda: knn_predictions(x, y, test_x, device="cpu"))
    found["knn"] = {**cost, "accuracy": float((predicted == test_y).double().mean())}
    console.print(f"kNN: {found['knn']}")
    return found


def machine() -> dict[str, Any]:
    return {
        "date": datetime.datetime.now(tz=datetime.UTC).date().isoformat(),
        "system": platform.platform(),
        "threads": torch.get_num_threads(),
        "python": platform.python_version(),
        "versions": {name: version(name) for name in ("backfold", "torch", "numpy")},
        "seed": SEED,
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--scale", type=float, default=1.0, help="of the numbers of images")
    parser.add_argument("--out", type=Path, default=Path("benchmarks/results"))
    parser.add_argument("--temporary", type=Path, help="folder with 1.1 GB of room")
    arguments = parser.parse_args()
    with tempfile.TemporaryDirectory(dir=arguments.temporary) as folder:
        found = run(Path(folder), arguments.scale, Console())
    arguments.out.mkdir(parents=True, exist_ok=True)
    facts = {"machine": machine(), "features": FEATURES, "classes": CLASSES, **found}
    (arguments.out / "probes.json").write_text(json.dumps(facts, indent=1) + "\n")


if __name__ == "__main__":
    main()
