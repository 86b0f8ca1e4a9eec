"""What probing embeddings of ImageNet's size costs: nearest neighbours and the linear probe.

    python benchmarks/probes.py --out benchmarks/results
    python benchmarks/probes.py --scale 0.01 --out /tmp/probes

The embeddings are synthetic, in half precision in a memory-mapped file: class centres and noise of
unequal spread, mixed among the features. Writes probes.json.
"""

import argparse
import tempfile
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from resource import RUSAGE_SELF, getrusage
from typing import Any

import numpy as np
import torch
from torch import Tensor

from backfold.evaluation.probes import knn_predictions, linear_probes
from backfold.files import write_json
from step_cost.measuring import facts

IMAGES = {"train": 1_281_167, "test": 50_000, "validation": 10_000}
FEATURES, CLASSES = 384, 1_000
# Centres differ in so many directions, by so much of the noise: both probes are right on some half.
DIRECTIONS, CENTRE_SPREAD = 48, 0.6
REGULARISATIONS = (1e-4, 1e-2, 1.0)
ROWS = 50_000
SEED = 0

Embedded = tuple[Tensor, Tensor]


def write_embeddings(path: Path, count: int, seed: int) -> Embedded:
    """float16 (count, features), memory-mapped, and labels (count,); the classes are fixed."""
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


def measure(work: Callable[[], Any]) -> tuple[Any, dict[str, float]]:
    """What ``work`` returns, its seconds, and the process's peak memory so far in GB."""
    start, processor_start = time.perf_counter(), time.process_time()
    result = work()
    return result, {
        "seconds": round(time.perf_counter() - start, 1),
        # Beside other work, what tells the cost.
        "processor_seconds": round(time.process_time() - processor_start, 1),
        "peak_rss_gb": round(getrusage(RUSAGE_SELF).ru_maxrss * 1024 / 1e9, 2),
    }


def linear(data: Sequence[Embedded]) -> dict[str, Any]:
    (x, y), (test_x, test_y), (held_x, held_y) = data
    fits = linear_probes(x, y, REGULARISATIONS, device="cpu")
    path, cost = measure(lambda: list(fits))
    losses = [probe.log_loss(held_x, held_y) for probe in path]
    right = [float((probe.predict(test_x) == test_y).double().mean()) for probe in path]
    best = int(np.argmin(losses))
    return {
        **cost,
        "regularisations": REGULARISATIONS,
        "validation_log_loss": losses,
        "chosen": REGULARISATIONS[best],
        "accuracy": right[best],
        "accuracies": right,
    }


def knn(data: Sequence[Embedded]) -> dict[str, Any]:
    (x, y), (test_x, test_y), _ = data
    predicted, cost = measure(lambda: knn_predictions(x, y, test_x, device="cpu"))
    return {**cost, "accuracy": float((predicted == test_y).double().mean())}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--scale", type=float, default=1.0, help="of the numbers of images")
    parser.add_argument("--out", type=Path, default=Path(__file__).with_name("results"))
    arguments = parser.parse_args()
    counts = [max(2 * CLASSES, round(arguments.scale * count)) for count in IMAGES.values()]
    results = {"machine": facts(torch.device("cpu")) | {"seed": SEED}}
    results |= {"images": counts, "features": FEATURES, "classes": CLASSES}
    with tempfile.TemporaryDirectory() as folder:  # with 1.1 GB of room
        paths = [Path(folder) / name for name in IMAGES]
        data = [write_embeddings(path, counts[seed], seed) for seed, path in enumerate(paths)]
        for probe in (linear, knn):
            results[probe.__name__] = probe(data)
            print(probe.__name__, results[probe.__name__])
            write_json(arguments.out / "probes.json", results)


if __name__ == "__main__":
    main()
