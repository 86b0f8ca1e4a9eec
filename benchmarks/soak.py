"""Whether memory, file handles and threads stay flat while pretraining runs for an hour.

    python benchmarks/soak.py --minutes 60 --out benchmarks/results

Pretrains a small backbone on a folder of JPEGs of many sizes, some of them broken, with workers,
looks at held-out images and checkpoints, and samples the process and its workers every ten seconds.
At the end the run gets a SIGTERM, and must leave behind a checkpoint. Writes soak.json and soak.md.
"""

import argparse
import json
import os
import platform
import signal
import subprocess
import sys
import tempfile
import time
from dataclasses import asdict, dataclass
from datetime import UTC, datetime
from importlib.metadata import version
from pathlib import Path
from typing import Any

import numpy as np
import psutil
import yaml
from PIL import Image

IMAGES, BROKEN, SEED = 2000, 16, 0
SIDES = (32, 160)
WORKERS = 2
SECONDS = 10.0
START_SHARE = 0.2  # of the time, left out of the slopes: caches and allocators fill first
MIB = 2**20


@dataclass(frozen=True)
class Sample:
    """The process and its workers together, at one time.

    Attributes:
        seconds: since the start.
        steps: done at the last checkpoint.
        rss_mib: resident memory; pages that processes share count for each of them.
        unique_mib: resident memory that no other process shares.
        main_rss_mib: resident memory of the training process alone.
        handles: open file handles.
        threads: threads.
        processes: processes.
    """

    seconds: float
    steps: int
    rss_mib: float
    unique_mib: float
    main_rss_mib: float
    handles: int
    threads: int
    processes: int


MEASURES = ("rss_mib", "unique_mib", "main_rss_mib", "handles", "threads", "processes")


def write_images(folder: Path, seed: int) -> None:
    """Smooth noise in JPEGs of random sizes; some cut off, some no JPEGs at all."""
    random = np.random.default_rng(seed)
    for number in range(IMAGES):
        height, width = random.integers(*SIDES, size=2)
        small = Image.fromarray(random.integers(0, 256, (6, 6, 3), dtype=np.uint8))
        path = folder / f"{number % 20:02d}" / f"{number:05d}.jpg"
        path.parent.mkdir(parents=True, exist_ok=True)
        small.resize((int(width), int(height)), Image.Resampling.BICUBIC).save(path, quality=90)
        if number % (IMAGES // BROKEN) == 7:
            content = path.read_bytes()
            cut = content[: len(content) // 2] if number % 2 else random.bytes(500)
            path.write_bytes(cut)


def settings(data: Path, out: Path) -> dict[str, Any]:
    return {
        "data": str(data),
        "out": str(out),
        "backbone": "vit_tiny_patch16_224",
        "backbone_options": {"patch_size": 8, "embed_dim": 64, "depth": 2, "num_heads": 2},
        "image_size": 32,
        "batch_size": 64,
        "epochs": 1e6,
        "held_out": 100,
        "watch_every": 10.0,
        "checkpoint_minutes": 0.5,
        "pretext": "mixture",
        "num_workers": WORKERS,
        "max_broken_share": 0.05,
        "compile": False,
        "accelerator": "cpu",
        "devices": 1,
    }


def sample(process: psutil.Process, start: float, out: Path) -> Sample:
    """One sample; a worker that ends meanwhile is left out."""
    readings = []
    for each in [process, *process.children(recursive=True)]:
        try:
            with each.oneshot():
                memory = each.memory_full_info()
                readings.append((memory.rss, memory.uss, each.num_fds(), each.num_threads()))
        except psutil.NoSuchProcess:
            continue
    rss, unique, handles, threads = (sum(column) for column in zip(*readings, strict=True))
    facts = out / "run.json"
    return Sample(
        seconds=round(time.monotonic() - start, 1),
        steps=json.loads(facts.read_text())["steps"] if facts.exists() else 0,
        rss_mib=rss / MIB,
        unique_mib=unique / MIB,
        main_rss_mib=readings[0][0] / MIB,
        handles=handles,
        threads=threads,
        processes=len(readings),
    )


def slopes(samples: list[Sample]) -> dict[str, dict[str, float]]:
    """Least-squares slope an hour, its standard error, and the mean, behind the start."""
    settled = samples[int(START_SHARE * len(samples)) :]
    hours = np.array([each.seconds for each in settled]) / 3600
    found = {}
    for name in MEASURES:
        values = np.array([getattr(each, name) for each in settled], dtype=float)
        (slope, _), covariance = np.polyfit(hours, values, 1, cov=True)
        found[name] = {
            "mean": float(values.mean()),
            "slope_per_hour": float(slope),
            "standard_error": float(np.sqrt(covariance[0, 0])),
        }
    return found


def soak(minutes: float, folder: Path) -> dict[str, Any]:
    """Run, sample, stop; what was seen."""
    data, out, config = folder / "images", folder / "run", folder / "settings.yaml"
    write_images(data, SEED)
    config.write_text(yaml.safe_dump(settings(data, out)))
    start = time.monotonic()
    command = [sys.executable, "-m", "backfold.cli.main", "pretrain", f"--config={config}"]
    samples: list[Sample] = []
    with (folder / "err").open("wb") as err, subprocess.Popen(command, stderr=err) as run:
        try:
            process = psutil.Process(run.pid)
            while time.monotonic() - start < 60 * minutes and run.poll() is None:
                time.sleep(SECONDS)
                # Workers are there from the first checkpoint on.
                if (out / "checkpoints").exists() and run.poll() is None:
                    samples.append(sample(process, start, out))
            run.send_signal(signal.SIGTERM)
        except BaseException:
            run.kill()
            raise
    log = (folder / "err").read_text().splitlines()
    return {
        "minutes": minutes,
        "steps": json.loads((out / "run.json").read_text())["steps"],
        "exit_code": run.returncode,
        "last_line": log[-1].replace(str(folder), "FOLDER"),
        "broken_files_skipped": sum("skipped: " in line for line in log),
        "slopes": slopes(samples),
        "samples": [asdict(each) for each in samples],
    }


def describe_machine() -> dict[str, Any]:
    return {
        "date": datetime.now(UTC).date().isoformat(),
        "system": platform.platform(),
        "processor": platform.machine(),
        "cores": len(os.sched_getaffinity(0)),
        "python": platform.python_version(),
        "versions": {name: version(name) for name in ("backfold", "torch", "pillow", "psutil")},
        "seed": SEED,
        "images": IMAGES,
        "broken_images": BROKEN,
        "workers": WORKERS,
    }


def table(result: dict[str, Any]) -> str:
    machine = result["machine"]
    lines = [
        "# Soak",
        "",
        f"`python benchmarks/soak.py --minutes {result['minutes']:g}` on {machine['date']}: "
        f"{result['steps']} steps of pretraining on {machine['images']} JPEGs, of which "
        f"{machine['broken_images']} are broken ({result['broken_files_skipped']} were met and "
        f"skipped), with {machine['workers']} workers on {machine['cores']} cores "
        f"({machine['system']}, Python {machine['python']}, torch {machine['versions']['torch']}). "
        f"At the end it got a SIGTERM and left with exit code {result['exit_code']}:",
        "",
        f"> {result['last_line']}",
        "",
        f"Slopes leave out the first {START_SHARE:.0%} of the time.",
        "",
        "| measure, all processes | mean | slope an hour | its standard error |",
        "|---|---|---|---|",
    ]
    lines += [
        f"| {name} | {found['mean']:.1f} | {found['slope_per_hour']:+.2f} | "
        f"{found['standard_error']:.2f} |"
        for name, found in result["slopes"].items()
    ]
    return "\n".join(lines) + "\n"


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawTextHelpFormatter
    )
    parser.add_argument("--minutes", type=float, default=60.0)
    parser.add_argument("--out", type=Path, default=Path("benchmarks/results"))
    arguments = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        found = soak(arguments.minutes, Path(folder))
    result = {"machine": describe_machine(), **found}
    arguments.out.mkdir(parents=True, exist_ok=True)
    (arguments.out / "soak.json").write_text(json.dumps(result, indent=1) + "\n")
    (arguments.out / "soak.md").write_text(table(result))
    print(table(result))


if __name__ == "__main__":
    main()
