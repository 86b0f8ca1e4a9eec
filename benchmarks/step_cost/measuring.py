"""Time and peak memory of steps, and what a measurement ran on.

A step is any callable without arguments. Nothing here knows what the steps are.
"""

import datetime
import importlib.metadata
import os
import platform
import shlex
import subprocess
import sys
import time
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch.profiler import ProfilerActivity, profile
from torch.utils import benchmark

Step = Callable[[], object]
PACKAGES = ("torch", "timm", "transformers")


def spread(values: list[float]) -> dict[str, float]:
    """Quartiles (inclusive method) of one value or more, and how many these are."""
    lower, median, upper = np.percentile(values, (25, 50, 75)).tolist()
    return {"median": median, "lower": lower, "upper": upper, "count": len(values)}


def time_interleaved(
    steps: Mapping[str, Step],
    repeats: int,
    prepare: Callable[[], None] = lambda: None,
    clock: Callable[[], float] = benchmark.timer,
    deadline: float = float("inf"),
) -> dict[str, list[float]]:
    """Seconds of each step, taken in rounds: every step once, in order, then all of them again.

    So slow drifts of the machine (heat, neighbours) meet all steps alike. In each round a step runs
    once to warm up, then on the clock, which waits for the device; ``prepare`` is called before
    both, untimed. No round but the first starts after the deadline of `time.perf_counter`.
    """
    threads = torch.get_num_threads()
    seconds: dict[str, list[float]] = {name: [] for name in steps}
    for number in range(repeats):
        if number and time.perf_counter() > deadline:
            break
        for name, step in steps.items():
            names = {"step": step, "prepare": prepare}
            timer = benchmark.Timer("step()", "prepare()", "", clock, names, num_threads=threads)
            # So short a time asks for single runs.
            seconds[name] += timer.blocked_autorange(min_run_time=1e-12).raw_times
    return seconds


def peak_memory(step: Step, device: torch.device) -> int:
    """Bytes at the highest point of a step, above what was allocated before it.

    On CUDA from the caching allocator's statistics, on the CPU from the allocation events of
    `torch.profiler`, to the byte, compiled graphs' buffers too; without what libraries such as
    oneDNN take for themselves and what freed tensors leave in the process.
    """
    if device.type == "cuda":
        torch.cuda.synchronize(device)
        before = torch.cuda.memory_allocated(device)
        torch.cuda.reset_peak_memory_stats(device)
        step()
        torch.cuda.synchronize(device)
        return torch.cuda.max_memory_allocated(device) - before
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as recorded:
        step()
    events = recorded.profiler.kineto_results.events()
    sizes = [(event.start_ns(), event.nbytes()) for event in events if event.name() == "[memory]"]
    sizes.sort(key=lambda allocation: allocation[0])
    return max([0, *np.cumsum([size for _, size in sizes]).tolist()])


def facts(device: torch.device) -> dict[str, Any]:
    """Date, command, commit, hardware, threads and versions."""
    processor = torch.cpu.get_capabilities().get("cpu_name") or platform.machine()
    return {
        "date": datetime.datetime.now(datetime.UTC).date().isoformat(),
        "command": shlex.join(["python", f"benchmarks/{Path(sys.argv[0]).name}", *sys.argv[1:]]),
        "commit": _commit(),
        "device": device.type,
        "hardware": torch.cuda.get_device_name(device) if device.type == "cuda" else processor,
        "threads": torch.get_num_threads(),
        "load": round(os.getloadavg()[0], 2),
        "versions": {
            "python": platform.python_version(),
            **{name: importlib.metadata.version(name) for name in PACKAGES},
        },
    }


def _commit() -> str:
    """The git commit of this script, with "+" if files differ from it; empty outside of git."""
    command = ["git", "describe", "--always", "--exclude=*", "--dirty=+"]
    try:
        run = subprocess.run(
            command, cwd=Path(__file__).parent, check=False, capture_output=True, text=True
        )
    except FileNotFoundError:
        return ""
    return run.stdout.strip()
