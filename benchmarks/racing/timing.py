"""Seconds and counted operations of a step of each contender, measured in turn on a quiet machine.

Each contender then races in the precision and with the attention kernel in which its step is
fastest here: on a CPU, bfloat16 or fused attention can be the slower choice.
"""

import itertools
import statistics
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from torch import Tensor

from backfold.operations import count_operations
from racing.contenders import Contender
from racing.methods import Attention, Method

WARM_UP_STEPS = 3
ROUNDS_OF_VIEWS = 2


@dataclass(frozen=True)
class Variant:
    """How a contender's step may run.

    Args:
        precision: "32-true" or "bf16-mixed".
        attention: see `racing.methods.Setting`.
    """

    precision: str
    attention: Attention


def variants(contender: Contender, precisions: Sequence[str]) -> list[Variant]:
    """What there is to choose from; the energy's attention is always plain."""
    attentions: list[Attention] = ["plain"]
    if contender.kind != "energy" and contender.backbone == "vit":
        attentions.append("fused")
    return [Variant(*pair) for pair in itertools.product(precisions, attentions)]


class Stopwatch:
    """A method's step, timed over and over on the same batches."""

    def __init__(self, method: Method) -> None:
        self.method = method
        self.batches = list(method.batches(range(ROUNDS_OF_VIEWS)))
        self.seconds: list[float] = []
        self.step = 0
        for _ in range(WARM_UP_STEPS):
            self._take()

    def _take(self) -> None:
        float(self.method.step(self._batch(), self.step))
        self.step += 1

    def _batch(self) -> Tensor:
        return self.batches[self.step % len(self.batches)]

    def measure(self, steps: int) -> None:
        """Take some more steps, each timed."""
        for _ in range(steps):
            started = time.perf_counter()
            self._take()
            self.seconds.append(time.perf_counter() - started)

    def operations(self) -> int:
        """Of one step."""
        return count_operations(self._take)


def measure_interleaved(watches: Sequence[Stopwatch], rounds: int, steps: int) -> None:
    """All in turn, so that what else the machine does falls on all alike."""
    for _ in range(rounds):
        for watch in watches:
            watch.measure(steps)


def fastest(watches: Mapping[Variant, Stopwatch], operations: int, batch: int) -> dict[str, Any]:
    """A contender's line in the timing's JSON."""
    medians = {variant: statistics.median(watch.seconds) for variant, watch in watches.items()}
    best = min(medians, key=medians.__getitem__)
    return {
        "precision": best.precision,
        "attention": best.attention,
        "seconds_per_step": medians[best],
        "images_per_second": batch / medians[best],
        "operations_per_image": operations / batch,
        "variants": [
            {"precision": v.precision, "attention": v.attention, "seconds_per_step": seconds}
            for v, seconds in medians.items()
        ],
    }
