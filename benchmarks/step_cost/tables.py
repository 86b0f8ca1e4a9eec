"""Results as markdown, and the limits that this project sets itself."""

from collections.abc import Iterable, Sequence
from typing import Any, NamedTuple

from step_cost.workload import MODELS

Row = dict[str, Any]
MIB = 2**20
GIGA = 1e9


class Bar(NamedTuple):
    """A quantity ("time", "memory" or "operations") of one step over another's, at most ``limit``.

    ``step`` and ``over`` are facts of the two rows; ``models`` are those that the bar speaks of.
    """

    text: str
    limit: float
    quantity: str
    step: dict[str, Any]
    over: dict[str, Any]
    devices: tuple[str, ...] = ("cpu", "cuda")
    models: Sequence[str] = tuple(MODELS)


def _facts(method: str, compiled: bool = False, precision: str = "float32", steps: int = 1) -> Row:
    return {"method": method, "compiled": compiled, "precision": precision, "num_steps": steps}


EXACT, PLAIN, ORDINARY = map(_facts, ("exact", "ordinary-plain", "ordinary"))
EXACT_COMPILED, ORDINARY_COMPILED = _facts("exact", True), _facts("ordinary", True)
CONDITIONAL = _facts("conditional")
EXACT_BF16 = _facts("exact", True, "bf16")
SMALL_VITS = [name for name in MODELS if name.endswith("_32")]
LARGE_VITS = [name for name in MODELS if name.startswith("vit") and name.endswith("_224")]
CPU, CUDA, VIT_B = ("cpu",), ("cuda",), ["vit_base_224"]
BARS = (
    Bar("operations, dense over ordinary, 64 tokens", 2.10, "operations", EXACT, PLAIN,
        models=SMALL_VITS),
    Bar("operations, dense over ordinary, 196 tokens", 2.20, "operations", EXACT, PLAIN,
        models=LARGE_VITS),
    Bar("operations, sparse over ordinary dense", 1.10, "operations", _facts("sparse"), PLAIN),
    Bar("operations, conditional over MAE", 0.70, "operations", CONDITIONAL, _facts("mae"),
        models=VIT_B),
    Bar("time, conditional eager over MAE eager", 0.8, "time", CONDITIONAL, _facts("mae"), CPU),
    Bar("time, conditional compiled over MAE compiled", 0.8, "time", _facts("conditional", True),
        _facts("mae", True)),
    Bar("time, dense eager over ordinary eager", 2.3, "time", EXACT, ORDINARY, CPU),
    Bar("time, dense compiled over ordinary compiled", 2.3, "time", EXACT_COMPILED,
        ORDINARY_COMPILED, CPU),
    Bar("time, sparse compiled over SimMIM compiled", 1.2, "time", _facts("sparse", True),
        _facts("simmim", True), CPU),
    Bar("peak memory, dense eager over ordinary eager", 2.5, "memory", EXACT, ORDINARY),
    Bar("peak memory, dense compiled over ordinary compiled", 2.5, "memory", EXACT_COMPILED,
        ORDINARY_COMPILED),
    Bar("peak memory, K = 4 over K = 1, eager", 1.05, "memory", _facts("exact", steps=4), EXACT),
    Bar("peak memory, K = 4 over K = 1, compiled", 1.05, "memory", _facts("exact", True, steps=4),
        EXACT_COMPILED),
    Bar("time, bf16, dense compiled over ordinary compiled with unfused attention", 2.3, "time",
        EXACT_BF16, _facts("ordinary-plain", True, "bf16"), CUDA, VIT_B),
    Bar("time, bf16, dense compiled over ordinary compiled with fused attention", 2.8, "time",
        EXACT_BF16, _facts("ordinary", True, "bf16"), CUDA, VIT_B),
)  # fmt: skip


def bars_table(content: dict[str, Any]) -> str:
    """Each bar of the device with the ratios that the rows allow; one above its limit is marked."""
    lines = []
    for bar in BARS:
        if content["facts"]["device"] not in bar.devices:
            continue
        found = []
        for name, rows in grouped(content["rows"], "model").items():
            step, over = select(rows, **bar.step), select(rows, **bar.over)
            if name in bar.models and step and over:
                ratio = quantity_of(step, bar.quantity) / quantity_of(over, bar.quantity)
                mark = " **above**" if ratio > bar.limit else ""
                found.append(f"{MODELS[name].title}: {ratio:.3f}{mark}")
        lines.append([bar.text, f"{bar.limit:g}", "<br>".join(found) or "not measured"])
    return markdown_table(["what", "at most", "measured"], lines)


def mode(row: Row) -> str:
    return "compiled" if row["compiled"] else "eager"


def select(rows: Iterable[Row], **facts: Any) -> Row | None:
    """The first row with these values, if there is one."""
    return next((row for row in rows if facts.items() <= row.items()), None)


def grouped(rows: Iterable[Row], *keys: str) -> dict[Any, list[Row]]:
    """The rows by a value, or by a tuple of values, in the order in which these come."""
    groups: dict[Any, list[Row]] = {}
    for row in rows:
        values = tuple(row[key] for key in keys)
        groups.setdefault(values if len(keys) > 1 else values[0], []).append(row)
    return groups


def quantity_of(row: Row, quantity: str) -> float:
    """Median seconds ("time"), peak bytes ("memory") or operations of a row."""
    if quantity == "time":
        return float(row["seconds"]["median"])
    return float(row["peak_bytes" if quantity == "memory" else "operations"])


def markdown_table(header: Sequence[str], lines: Iterable[Sequence[str]]) -> str:
    """First column to the left, the others to the right."""
    rule = ["---", *["---:"] * (len(header) - 1)]
    return "\n".join("| " + " | ".join(cells) + " |" for cells in (header, rule, *lines))


def facts_line(content: dict[str, Any]) -> str:
    """Where, when and how the results were taken."""
    facts = content["facts"]
    versions = ", ".join(f"{name} {version}" for name, version in facts["versions"].items())
    return (
        f"{facts['date']}, {facts['hardware']}, {facts['threads']} threads, load at the start "
        f"{facts['load']}, {versions}, commit {facts['commit'] or 'unknown'}: "
        f"`{facts['command']}`"
    )


def cost_tables(content: dict[str, Any]) -> str:
    """One table for each model, and what was left out."""
    header = (
        "step", "precision", "mode", "ms (quartiles)", "images/s", "time x", "peak MiB",
        "memory x", "GFLOP an image", "operations x",
    )  # fmt: skip
    parts = []
    for name, rows in grouped(content["rows"], "model").items():
        table = markdown_table(header, [_cells(row, rows) for row in rows])
        parts.append(f"### {MODELS[name].title}\n\nBatch {rows[0]['batch']}.\n\n{table}")
    if content["left_out"]:
        parts.append("\n".join(["Left out:", "", *(f"- {line}" for line in content["left_out"])]))
    return "\n\n".join(parts)


def _cells(row: Row, rows: Sequence[Row]) -> list[str]:
    ordinary = select(rows, method="ordinary", precision=row["precision"], compiled=row["compiled"])
    times = [f"{1000 * row['seconds'][key]:.0f}" for key in ("median", "lower", "upper")]
    return [
        row["title"],
        row["precision"],
        mode(row) + (" (fell back to eager)" if row["warnings"] else ""),
        f"{times[0]} ({times[1]} to {times[2]})",
        f"{row['images_per_second']:.1f}",
        _ratio(row, ordinary, "time"),
        f"{row['peak_bytes'] / MIB:.0f}",
        _ratio(row, ordinary, "memory"),
        f"{row['operations'] / row['batch'] / GIGA:.2f}",
        _ratio(row, ordinary, "operations"),
    ]


def _ratio(row: Row, reference: Row | None, quantity: str) -> str:
    if reference is None or not quantity_of(reference, quantity):
        return ""
    return f"{quantity_of(row, quantity) / quantity_of(reference, quantity):.2f}"
