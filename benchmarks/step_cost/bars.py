"""The limits that this project sets itself, and what was measured of them."""

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any, Literal

from step_cost.models import Model, find
from step_cost.tables import Row, markdown_table, quantity_of, select

Quantity = Literal["time", "memory", "operations"]


@dataclass(frozen=True)
class Bar:
    """One quantity of one step over that of another, at most ``limit``.

    Args:
        text: what is compared.
        limit: the largest ratio.
        quantity: of which the ratio is taken.
        step: facts of the row above the line.
        over: facts of the row below it.
        devices: where the bar holds.
        vit_size: only vision transformers of this image size, if given.
        model: only this model, if given.
    """

    text: str
    limit: float
    quantity: Quantity
    step: dict[str, Any]
    over: dict[str, Any]
    devices: tuple[str, ...] = ("cpu", "cuda")
    vit_size: int | None = None
    model: str | None = None

    def holds_for(self, model: Model) -> bool:
        """Whether the bar speaks of this model."""
        if self.vit_size and (model.family, model.image_size) != ("vit", self.vit_size):
            return False
        return self.model in (None, model.name)


@dataclass(frozen=True)
class Verdict:
    """A bar, with the ratio for each model that it could be taken of."""

    bar: Bar
    ratios: dict[str, float] = field(default_factory=dict)


EAGER = {"compiled": False, "precision": "float32", "num_steps": 1}
COMPILED = EAGER | {"compiled": True}
BF16_COMPILED = COMPILED | {"precision": "bf16"}
EXACT, SPARSE, SIMMIM = {"method": "exact"}, {"method": "sparse"}, {"method": "simmim"}
ORDINARY, PLAIN = {"method": "ordinary"}, {"method": "ordinary-plain"}
CPU, CUDA = ("cpu",), ("cuda",)
BARS = (
    Bar("operations, dense over ordinary, 64 tokens", 2.10, "operations",
        EXACT | EAGER, PLAIN | EAGER, vit_size=32),
    Bar("operations, dense over ordinary, 196 tokens", 2.20, "operations",
        EXACT | EAGER, PLAIN | EAGER, vit_size=224),
    Bar("operations, sparse over ordinary dense", 1.10, "operations",
        SPARSE | EAGER, PLAIN | EAGER),
    Bar("time, dense eager over ordinary eager", 2.3, "time",
        EXACT | EAGER, ORDINARY | EAGER, CPU),
    Bar("time, dense compiled over ordinary compiled", 2.3, "time",
        EXACT | COMPILED, ORDINARY | COMPILED, CPU),
    Bar("time, sparse compiled over SimMIM compiled", 1.2, "time",
        SPARSE | COMPILED, SIMMIM | COMPILED, CPU),
    Bar("peak memory, dense eager over ordinary eager", 2.5, "memory",
        EXACT | EAGER, ORDINARY | EAGER),
    Bar("peak memory, dense compiled over ordinary compiled", 2.5, "memory",
        EXACT | COMPILED, ORDINARY | COMPILED),
    Bar("peak memory, K = 4 over K = 1, eager", 1.05, "memory",
        EXACT | EAGER | {"num_steps": 4}, EXACT | EAGER),
    Bar("peak memory, K = 4 over K = 1, compiled", 1.05, "memory",
        EXACT | COMPILED | {"num_steps": 4}, EXACT | COMPILED),
    Bar("time, bf16, dense compiled over ordinary compiled with unfused attention", 2.3, "time",
        EXACT | BF16_COMPILED, PLAIN | BF16_COMPILED, CUDA, model="vit_base_224"),
    Bar("time, bf16, dense compiled over ordinary compiled with fused attention", 2.8, "time",
        EXACT | BF16_COMPILED, ORDINARY | BF16_COMPILED, CUDA, model="vit_base_224"),
)  # fmt: skip


def judge(rows: Sequence[Row], device: str) -> list[Verdict]:
    """The bars of this device, each with the ratios that the rows allow."""
    names = list(dict.fromkeys(row["model"] for row in rows))
    return [
        Verdict(bar, _ratios(bar, rows, [name for name in names if bar.holds_for(find(name))]))
        for bar in BARS
        if device in bar.devices
    ]


def _ratios(bar: Bar, rows: Sequence[Row], names: Sequence[str]) -> dict[str, float]:
    ratios = {}
    for name in names:
        step, over = select(rows, model=name, **bar.step), select(rows, model=name, **bar.over)
        if step and over:
            ratios[name] = quantity_of(step, bar.quantity) / quantity_of(over, bar.quantity)
    return ratios


def bars_table(content: dict[str, Any]) -> str:
    """Each bar with its ratios; a model above the limit is marked."""
    lines = []
    for verdict in judge(content["rows"], content["facts"]["device"]):
        limit = verdict.bar.limit
        found = "<br>".join(
            f"{find(name).title}: {ratio:.3f}{' **above**' if ratio > limit else ''}"
            for name, ratio in verdict.ratios.items()
        )
        lines.append([verdict.bar.text, f"{limit:g}", found or "not measured"])
    return markdown_table(["what", "at most", "measured"], lines)
