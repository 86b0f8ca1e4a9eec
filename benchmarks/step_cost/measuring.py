"""Time, peak memory and counted operations of steps: functions that do one thing and return it.

A step is any callable without arguments. Nothing here knows what the steps are.
"""

import statistics
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass

import torch
from torch.profiler import ProfilerActivity, profile

Step = Callable[[], None]
Clock = Callable[[], float]


@dataclass(frozen=True)
class Spread:
    """Quartiles of repeated measurements, in their unit; ``count`` of them were taken."""

    median: float
    lower: float
    upper: float
    count: int


def spread(values: list[float]) -> Spread:
    """The quartiles (inclusive method) of one value or more."""
    if len(values) == 1:
        return Spread(values[0], values[0], values[0], 1)
    lower, median, upper = statistics.quantiles(values, n=4, method="inclusive")
    return Spread(median, lower, upper, len(values))


def synchronize(device: torch.device) -> None:
    """Wait until the device has done what it was told."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)


def time_interleaved(
    steps: Mapping[str, Step],
    repeats: int,
    device: torch.device,
    prepare: Callable[[], None] = lambda: None,
    clock: Clock = time.perf_counter,
    deadline: float = float("inf"),
) -> dict[str, list[float]]:
    """Seconds of each step, taken in rounds: every step once, in order, then all of them again.

    So slow drifts of the machine (heat, neighbours) meet all steps alike. Warm the steps up first.

    Args:
        steps: by name.
        repeats: rounds at most.
        device: waited for before and after each step.
        prepare: called before each step, outside the clock.
        clock: in seconds.
        deadline: no round but the first starts when the clock has passed this.
    """
    seconds: dict[str, list[float]] = {name: [] for name in steps}
    for number in range(repeats):
        if number and clock() > deadline:
            break
        for name, step in steps.items():
            prepare()
            synchronize(device)
            start = clock()
            step()
            synchronize(device)
            seconds[name].append(clock() - start)
    return seconds


def peak_memory(step: Step, device: torch.device) -> int:
    """Bytes at the highest point of a step, above what was allocated before it.

    On CUDA from the caching allocator's own statistics. On the CPU from the allocation events of
    `torch.profiler`, summed in the order in which they happened: PyTorch's allocator reports each
    one, to the byte, for eager operations and for the buffers of compiled graphs alike. What
    libraries such as oneDNN take for themselves is not seen; neither is memory that freed tensors
    leave in the process.
    """
    if device.type == "cuda":
        synchronize(device)
        before = torch.cuda.memory_allocated(device)
        torch.cuda.reset_peak_memory_stats(device)
        step()
        synchronize(device)
        return torch.cuda.max_memory_allocated(device) - before
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as recorded:
        step()
    events = recorded.profiler.kineto_results.events()
    allocations = [
        (event.start_ns(), event.nbytes()) for event in events if event.name() == "[memory]"
    ]
    current = highest = 0
    for _, size in sorted(allocations, key=lambda allocation: allocation[0]):
        current += size
        highest = max(highest, current)
    return highest
