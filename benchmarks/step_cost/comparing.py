"""All variants of one model in one process, measured in turn."""

import dataclasses
import logging
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import torch

from step_cost.measuring import Clock, Step, peak_memory, spread, synchronize, time_interleaved
from step_cost.models import Model
from step_cost.operations import count_operations
from step_cost.profiling import time_by_kind
from step_cost.variants import Variant
from step_cost.workload import Workload

LONG_RUN = 2.0  # seconds; an eager step of this length needs no second warm-up
COMPILING = 6  # as many times as long as an eager variant, roughly
PROFILED = ("ordinary", "ordinary-plain", "exact", "sparse")
SHARE_OF_WARMING_UP = 0.7


@dataclass(frozen=True)
class Case:
    """A variant of a workload; ``facts`` go into its row of the results."""

    workload: Workload
    variant: Variant
    facts: Mapping[str, Any] = field(default_factory=dict)


@dataclass(frozen=True)
class Results:
    """Rows of measurements, and one line for each thing that was left out, with the reason."""

    rows: list[dict[str, Any]]
    left_out: list[str]


def compare_models(
    models: Sequence[Model],
    variants: Callable[[Model], Sequence[Variant]],
    batch: int | None,
    repeats: int,
    device: torch.device,
    deadline: float,
) -> Iterator[Results]:
    """Measure the models one after another; each gets a share of the time that is left.

    Yields the results of each model when it is done.

    Args:
        models: in this order.
        variants: what to measure of a model, in order of importance.
        batch: images in a step; None takes the model's own.
        repeats: rounds of timing.
        device: where to run.
        deadline: in seconds of `time.perf_counter`.
    """
    wanted = [variants(model) for model in models]
    weights = [sum(COMPILING if made.compiled else 1 for made in each) for each in wanted]
    for number, model in enumerate(models):
        if not wanted[number]:
            continue
        now = time.perf_counter()
        if now > deadline:
            yield Results([], [f"{model.title}: no time left"])
            continue
        size = batch or (model.gpu_batch if device.type == "cuda" else model.cpu_batch)
        workload = Workload(model, size, device)
        cases = {
            variant.name: Case(workload, variant, {"model": model.name})
            for variant in wanted[number]
        }
        share = (deadline - now) * weights[number] / sum(weights[number:])
        measured = measure(cases, repeats, device, now + share)
        yield Results(measured.rows, [f"{model.title}: {line}" for line in measured.left_out])
        torch._dynamo.reset()


def measure(
    cases: Mapping[str, Case], repeats: int, device: torch.device, deadline: float
) -> Results:
    """Warm up, time in rounds, then measure memory, operations and where the time goes."""
    start = time.perf_counter()
    last_warm_up = start + SHARE_OF_WARMING_UP * (deadline - start)
    steps: dict[str, Step] = {}
    rows: dict[str, dict[str, Any]] = {}
    left_out: list[str] = []
    late: list[str] = []
    for name, case in cases.items():
        if time.perf_counter() > last_warm_up:
            late.append(name)
            continue
        try:
            steps[name], rows[name] = _warm_up(case, device)
        except Exception as error:
            # One step that can't run must not cost the others; what it said is in the results.
            left_out.append(f"{name}: {_first_line(error)}")
            case.workload.clear_gradients()
    if late:
        left_out.append(f"no time left for {'; '.join(late)}")
    clear = [case.workload.clear_gradients for case in cases.values()]

    def prepare() -> None:
        for function in clear:
            function()

    seconds = time_interleaved(steps, repeats, device, prepare, deadline=deadline)
    operations: dict[tuple[int, Variant], int] = {}
    for name, step in steps.items():
        case = cases[name]
        images = case.workload.batch
        taken = spread(seconds[name])
        rows[name] |= {
            "seconds": dataclasses.asdict(taken),
            "images_per_second": images / taken.median,
            "peak_bytes": _after(prepare, lambda step=step: peak_memory(step, device)),
            "operations": _operations(case, operations, prepare),
        }
        if case.variant.method in PROFILED and case.variant.num_steps == 1:
            kinds = _after(prepare, lambda step=step: time_by_kind(step, device))
            rows[name]["time_by_kind"] = kinds
    prepare()
    return Results([rows[name] for name in steps], left_out)


def _after(prepare: Callable[[], None], function: Callable[[], Any]) -> Any:
    prepare()
    return function()


def _warm_up(
    case: Case, device: torch.device, clock: Clock = time.perf_counter
) -> tuple[Step, dict[str, Any]]:
    """The step after its first runs, and its row with what was said and how long the first took."""
    variant, workload = case.variant, case.workload
    start = clock()
    with _warnings() as said:
        step = workload.step(variant)
        step()
        synchronize(device)
        first = clock() - start
        if variant.compiled or first < LONG_RUN:
            workload.clear_gradients()
            step()
            synchronize(device)
    workload.clear_gradients()
    row = {
        **case.facts,
        "method": variant.method,
        "title": variant.title,
        "compiled": variant.compiled,
        "precision": variant.precision,
        "num_steps": variant.num_steps,
        "batch": workload.batch,
        "first_run_seconds": first,
        "warnings": said,
    }
    return step, row


@contextmanager
def _warnings() -> Iterator[list[str]]:
    """Collect what backfold warns of, such as a step that could not be compiled."""
    said: list[str] = []

    class Collector(logging.Handler):
        def emit(self, record: logging.LogRecord) -> None:
            said.append(record.getMessage())

    logger, collector = logging.getLogger("backfold"), Collector(logging.WARNING)
    logger.addHandler(collector)
    try:
        yield said
    finally:
        logger.removeHandler(collector)


def _operations(
    case: Case, known: dict[tuple[int, Variant], int], prepare: Callable[[], None]
) -> int:
    """Counted on the eager float32 step; the other ways to run it multiply as much."""
    plain = dataclasses.replace(case.variant, compiled=False, precision="float32")
    key = (id(case.workload), plain)
    if key not in known:
        prepare()
        known[key] = count_operations(case.workload.step(plain))
    return known[key]


def _first_line(error: Exception) -> str:
    text = str(error).strip() or type(error).__name__
    return f"{type(error).__name__}: {text.splitlines()[0]}"
