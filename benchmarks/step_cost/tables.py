"""Results as markdown."""

from collections.abc import Sequence
from typing import Any

from step_cost.models import find
from step_cost.profiling import KINDS

Row = dict[str, Any]
MIB = 2**20
GIGA = 1e9


def mode(row: Row) -> str:
    return "compiled" if row["compiled"] else "eager"


def select(rows: Sequence[Row], **facts: Any) -> Row | None:
    """The first row with these values, if there is one."""
    return next(
        (row for row in rows if all(row.get(key) == value for key, value in facts.items())), None
    )


def markdown_table(header: Sequence[str], lines: Sequence[Sequence[str]]) -> str:
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


def left_out_lines(content: dict[str, Any]) -> str:
    if not content["left_out"]:
        return ""
    return "Left out:\n\n" + "\n".join(f"- {line}" for line in content["left_out"])


def cost_tables(content: dict[str, Any]) -> str:
    """One table for each model."""
    names = list(dict.fromkeys(row["model"] for row in content["rows"]))
    parts = [
        f"### {find(name).title}\n\n"
        + _model_table([row for row in content["rows"] if row["model"] == name])
        for name in names
    ]
    return "\n\n".join([*parts, left_out_lines(content)]).strip()


def _model_table(rows: Sequence[Row]) -> str:
    header = (
        "step", "precision", "mode", "ms (quartiles)", "images/s", "time x", "peak MiB",
        "memory x", "GFLOP an image", "operations x",
    )  # fmt: skip
    return f"Batch {rows[0]['batch']}.\n\n" + markdown_table(
        header, [_cells(row, reference(rows, row)) for row in rows]
    )


def reference(rows: Sequence[Row], row: Row) -> Row | None:
    """The ordinary step with this row's precision and mode."""
    same = {"precision": row["precision"], "compiled": row["compiled"]}
    return select(rows, method="ordinary", **same)


def _cells(row: Row, ordinary: Row | None) -> list[str]:
    seconds = row["seconds"]
    times = [f"{1000 * seconds[key]:.0f}" for key in ("median", "lower", "upper")]
    note = " (fell back to eager)" if row["warnings"] else ""
    return [
        row["title"],
        row["precision"],
        mode(row) + note,
        f"{times[0]} ({times[1]} to {times[2]})",
        f"{row['images_per_second']:.1f}",
        _ratio(seconds["median"], ordinary and ordinary["seconds"]["median"]),
        f"{row['peak_bytes'] / MIB:.0f}",
        _ratio(row["peak_bytes"], ordinary and ordinary["peak_bytes"]),
        f"{row['operations'] / row['batch'] / GIGA:.2f}",
        _ratio(row["operations"], ordinary and ordinary["operations"]),
    ]


def _ratio(value: float, reference: float | None) -> str:
    return f"{value / reference:.2f}" if reference else ""


def kind_tables(content: dict[str, Any]) -> str:
    """Milliseconds of the dense, sparse and ordinary steps by kind of work, for each model."""
    parts = []
    for name in dict.fromkeys(row["model"] for row in content["rows"]):
        rows = [
            row for row in content["rows"] if row["model"] == name and "time_by_kind" in row
            and row["precision"] == content["rows"][0]["precision"]
        ]  # fmt: skip
        kinds = [kind for kind in KINDS if any(kind in row["time_by_kind"] for row in rows)]
        lines = [
            [f"{row['title']}, {mode(row)}", *(_milliseconds(row, kind) for kind in kinds)]
            for row in rows
        ]
        parts.append(f"### {find(name).title}\n\n" + markdown_table(["ms in", *kinds], lines))
    return "\n\n".join(parts)


def _milliseconds(row: Row, kind: str) -> str:
    share = row["time_by_kind"].get(kind, 0.0)
    return f"{1000 * share * row['seconds']['median']:.0f}"


def growth_tables(content: dict[str, Any]) -> str:
    """One table for each factor: time and counted operations, relative to the first point."""
    titles = {"batch": "Batch", "tokens": "Tokens", "depth": "Depth", "num_steps": "Steps K"}
    parts = []
    for factor in dict.fromkeys(row["factor"] for row in content["rows"]):
        rows = [row for row in content["rows"] if row["factor"] == factor]
        parts.append(f"### {titles[factor]}\n\n" + _growth_table(factor, rows))
    return "\n\n".join([*parts, left_out_lines(content)]).strip()


def growth(rows: Sequence[Row], quantity: str) -> list[float]:
    """A quantity of rows relative to the first: "time", "memory" or "operations"."""
    values = [quantity_of(row, quantity) for row in rows]
    return [value / values[0] for value in values]


def quantity_of(row: Row, quantity: str) -> float:
    """Median seconds, peak bytes or operations of a row."""
    if quantity == "time":
        return float(row["seconds"]["median"])
    return float(row["peak_bytes" if quantity == "memory" else "operations"])


def _growth_table(factor: str, rows: Sequence[Row]) -> str:
    header = [
        factor, "step", "mode", "ms", "time grew", "operations grew", "memory grew",
        "time over ordinary", "operations over ordinary",
    ]  # fmt: skip
    lines = []
    for series in series_of(rows):
        grown = [growth(series, name) for name in ("time", "operations", "memory")]
        for row, *factors in zip(series, *grown, strict=True):
            value = 1 if factor == "num_steps" else row["value"]
            ordinary = select(rows, method="ordinary", value=value, compiled=row["compiled"])
            ratios = [
                _ratio(quantity_of(row, name), ordinary and quantity_of(ordinary, name))
                for name in ("time", "operations")
            ]
            lines.append([
                str(row["value"]), row["title"].partition(", K")[0], mode(row),
                f"{1000 * row['seconds']['median']:.0f}",
                *(f"{times:.2f}" for times in factors), *ratios,
            ])  # fmt: skip
    return f"{_setting(factor, rows[0])}\n\n" + markdown_table(header, lines)


def series_of(rows: Sequence[Row]) -> list[list[Row]]:
    """The rows of a factor, one list for each method and mode."""
    kinds = dict.fromkeys((row["method"], row["compiled"]) for row in rows)
    return [[row for row in rows if (row["method"], row["compiled"]) == kind] for kind in kinds]


def _setting(factor: str, row: Row) -> str:
    settings = {"batch": row["batch"], "tokens": row["tokens"], "depth": row["depth"]}
    others = [f"{name} {value}" for name, value in settings.items() if name != factor]
    return f"ViT-Ti's width, {', '.join(others)}."
