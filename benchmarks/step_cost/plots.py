"""Results as pictures."""

import io
from collections.abc import Sequence
from typing import Any

import matplotlib as mpl
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from step_cost.models import find
from step_cost.tables import Row, growth, mode, quantity_of, select, series_of

SETTINGS = {"svg.hashsalt": "backfold", "svg.fonttype": "none"}
PANELS = {"time": "time", "memory": "peak memory", "operations": "counted operations"}
COLOURS = {"Backfold": "#d95f02", "ordinary": "#1b9e77", "other": "#7570b3"}
FACTORS = {"batch": "batch", "tokens": "tokens", "depth": "depth", "num_steps": "steps K"}


def cost_plot(content: dict[str, Any]) -> bytes:
    """SVG: time, memory and operations over those of the ordinary eager float32 step."""
    names = list(dict.fromkeys(row["model"] for row in content["rows"]))
    groups = [[row for row in content["rows"] if row["model"] == name] for name in names]
    heights = [len(group) + 4 for group in groups]
    figure = Figure(figsize=(13, 0.22 * sum(heights)), layout="constrained")
    axes = figure.subplots(len(names), len(PANELS), squeeze=False, height_ratios=heights)
    for name, group, line in zip(names, groups, axes, strict=True):
        ordinary = select(group, method="ordinary", compiled=False) or group[0]
        for quantity, axis in zip(PANELS, line, strict=True):
            _bars(axis, group, ordinary, quantity)
        line[0].set_title(f"{find(name).title}, batch {group[0]['batch']}", loc="left")
        line[0].set_yticks(range(len(group)), [_label(row) for row in group], fontsize=7)
    return _svg(figure)


def _label(row: Row) -> str:
    return f"{row['title']}, {row['precision']}, {mode(row)}"


def _colour(row: Row) -> str:
    method = "ordinary" if row["method"].startswith("ordinary") else "other"
    return COLOURS["Backfold" if row["title"].startswith("Backfold") else method]


def _bars(axis: Axes, rows: Sequence[Row], ordinary: Row, quantity: str) -> None:
    unit = quantity_of(ordinary, quantity)
    values = [quantity_of(row, quantity) / unit for row in rows]
    colours = [_colour(row) for row in rows]
    axis.barh(range(len(rows)), values, color=colours)
    if quantity == "time":
        lower = [
            value - row["seconds"]["lower"] / unit for value, row in zip(values, rows, strict=True)
        ]
        upper = [
            row["seconds"]["upper"] / unit - value for value, row in zip(values, rows, strict=True)
        ]
        axis.errorbar(values, range(len(rows)), xerr=[lower, upper], fmt="none", ecolor="black")
    for position, value in enumerate(values):
        axis.annotate(f" {value:.2f}", (value, position), va="center", fontsize=7)
    axis.axvline(1.0, color="black", linewidth=0.5)
    axis.set_yticks([])
    axis.invert_yaxis()
    axis.margins(x=0.15)
    axis.set_xlabel(f"{PANELS[quantity]}, x {ordinary['title']}, {mode(ordinary)}", fontsize=8)


def growth_plot(content: dict[str, Any]) -> bytes:
    """SVG: measured growth (lines) against counted growth (dashes) for each factor."""
    factors = list(dict.fromkeys(row["factor"] for row in content["rows"]))
    figure = Figure(figsize=(3.6 * len(factors), 3.6), layout="constrained")
    axes = figure.subplots(1, len(factors), squeeze=False)[0]
    for factor, axis in zip(factors, axes, strict=True):
        rows = [row for row in content["rows"] if row["factor"] == factor]
        for number, series in enumerate(series_of(rows)):
            values = [row["value"] for row in series]
            label = f"{series[0]['title']}, {mode(series[0])}"
            axis.plot(values, growth(series, "time"), f"C{number}o-", label=label)
            axis.plot(values, growth(series, "operations"), f"C{number}--")
        axis.set_xscale("log", base=2)
        axis.set_yscale("log", base=2)
        ticks = sorted({row["value"] for row in rows})
        axis.set_xticks(ticks, [str(tick) for tick in ticks])
        axis.set_xlabel(FACTORS[factor])
    axes[0].set_ylabel("growth: time (dots), operations (dashes)")
    axes[0].legend(fontsize=7)
    return _svg(figure)


def _svg(figure: Figure) -> bytes:
    buffer = io.BytesIO()
    with mpl.rc_context(SETTINGS):
        figure.savefig(buffer, format="svg", metadata={"Date": None})
    return buffer.getvalue()
