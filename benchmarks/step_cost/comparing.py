"""All variants of one model in one process, measured in turn."""

import logging
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import asdict, replace
from logging.handlers import BufferingHandler
from typing import Any, NamedTuple

import torch

from step_cost.measuring import Step, peak_memory, spread, time_interleaved
from step_cost.operations import count_operations
from step_cost.workload import MODELS, Variant, Workload

SHARE_OF_WARMING_UP = 0.7


class Case(NamedTuple):
    """A variant of a workload; ``facts`` go into its row of the results."""

    workload: Workload
    variant: Variant
    facts: Mapping[str, Any]


Cases = Mapping[str, Case]


class Results(NamedTuple):
    """Rows of measurements, and one line for each thing that was left out, with the reason."""

    rows: list[dict[str, Any]]
    left_out: list[str]


def cases_of(name: str, variants: Sequence[Variant], device: torch.device) -> Cases:
    """The variants of one of `MODELS`, in order of importance."""
    model = MODELS[name]
    batch = model.gpu_batch if device.type == "cuda" else model.cpu_batch
    workload = Workload(model, batch, device)
    return {
        f"{model.title}, {variant.name}": Case(workload, variant, {"model": name})
        for variant in variants
    }


def measure_each(
    groups: Mapping[str, Callable[[], Cases]], repeats: int, device: torch.device, deadline: float
) -> Iterator[Results]:
    """Measure groups of cases one after another, each in an equal share of the time that is left.

    They are made when their turn comes; ``repeats`` are rounds of timing; ``deadline`` is in
    seconds of `time.perf_counter`.
    """
    for number, (name, make) in enumerate(groups.items()):
        left = deadline - (now := time.perf_counter())
        if left < 0:
            yield Results([], [f"{name}: no time left"])
            continue
        yield measure(make(), repeats, device, now + left / (len(groups) - number))
        torch._dynamo.reset()


def measure(cases: Cases, repeats: int, device: torch.device, deadline: float) -> Results:
    """Run once, time in rounds, then measure memory and operations."""
    start = time.perf_counter()
    last_start = start + SHARE_OF_WARMING_UP * (deadline - start)
    steps: dict[str, Step] = {}
    rows: dict[str, dict[str, Any]] = {}
    left_out: list[str] = []
    late: list[str] = []

    def prepare() -> None:
        for case in cases.values():
            case.workload.clear_gradients()

    for name, case in cases.items():
        if time.perf_counter() > last_start:
            late.append(name)
            continue
        try:
            steps[name], rows[name] = _first_run(case, device)
        except Exception as error:
            # One step that can't run must not cost the others; what it said is in the results.
            said = (str(error).strip() or type(error).__name__).splitlines()[0]
            left_out.append(f"{name}: {type(error).__name__}: {said}")
        case.workload.clear_gradients()
    if late:
        left_out.append(f"no time left for {'; '.join(late)}")
    seconds = time_interleaved(steps, repeats, prepare, deadline=deadline)
    operations: dict[tuple[int, Variant], int] = {}
    for name, step in steps.items():
        workload, variant, _ = cases[name]
        taken = spread(seconds[name])
        # Counted on the eager float32 step; the other ways to run it multiply as much.
        plain = replace(variant, compiled=False, precision="float32")
        if (key := (id(workload), plain)) not in operations:
            prepare()
            operations[key] = count_operations(workload.step(plain))
        prepare()
        rows[name] |= {
            "seconds": taken,
            "images_per_second": workload.batch / taken["median"],
            "peak_bytes": peak_memory(step, device),
            "operations": operations[key],
        }
    prepare()
    return Results(list(rows.values()), left_out)


def _first_run(case: Case, device: torch.device) -> tuple[Step, dict[str, Any]]:
    """The step after its first run, and its row with how long that took and what was said."""
    variant, start = case.variant, time.perf_counter()
    said, logger = BufferingHandler(1000), logging.getLogger("backfold")
    said.setLevel(logging.WARNING)  # such as that a step could not be compiled
    logger.addHandler(said)
    try:
        step = case.workload.step(variant)
        step()
        if device.type == "cuda":
            torch.cuda.synchronize(device)
    finally:
        logger.removeHandler(said)
    row = {
        **case.facts,
        **asdict(variant),
        "title": variant.title,
        "batch": case.workload.batch,
        "first_run_seconds": time.perf_counter() - start,
        "warnings": [record.getMessage() for record in said.buffer],
    }
    return step, row
