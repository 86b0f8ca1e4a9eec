"""Writing results to files with a picture, and their tables into the page that reads them."""

import io
import json
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import matplotlib as mpl
import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from backfold.files import write_atomically, write_json
from step_cost import tables
from step_cost.tables import Row, grouped, growth, mode, quantity_of, select
from step_cost.workload import MODELS

DEVICES = ("cpu", "cuda")
OTHER_BACKBONES = "other-backbones"  # folder of a run with backbones that the main run lacks
SETTINGS = {"svg.hashsalt": "backfold", "svg.fonttype": "none"}
PANELS = {"time": "time", "memory": "peak memory", "operations": "counted operations"}
COLOURS = {"Backfold": "#d95f02", "ordinary": "#1b9e77"}
FACTORS = {"batch": "batch", "tokens": "tokens", "depth": "depth", "num_steps": "steps K"}


def write_results(folder: Path, content: dict[str, Any], grows: bool) -> Path:
    """cost-DEVICE.json, .md and .svg, or cost-growth-DEVICE.*; returns the path of the first."""
    path = folder / f"cost-{'growth-' * grows}{content['facts']['device']}.json"
    if grows:
        text = ["# How cost grows", tables.facts_line(content), tables.growth_tables(content)]
    else:
        text = ["# Cost of a training step", tables.facts_line(content),
                tables.bars_table(content), tables.cost_tables(content)]  # fmt: skip
    write_json(path, content)
    write_atomically(path.with_suffix(".md"), ("\n\n".join(text) + "\n").encode())
    if content["rows"]:
        draw = growth_plot if grows else cost_plot
        write_atomically(path.with_suffix(".svg"), draw(content))
    return path


def write_page(page: Path, results: Path) -> None:
    """Renew all tables of the page from the results that are there."""
    parts = {}
    for device in DEVICES:
        cost = results / f"cost-{device}.json"
        parts |= {
            f"bars-{device}": _tables(cost, "facts_line", "bars_table"),
            f"cost-{device}": _tables(cost, "cost_tables"),
            f"kinds-{device}": _tables(cost, "kind_tables"),
            f"growth-{device}": _tables(
                results / f"cost-growth-{device}.json", "facts_line", "growth_tables"
            ),
        }
    other = results / OTHER_BACKBONES / "cost-cpu.json"
    parts |= {
        "bars-others": _tables(other, "facts_line", "bars_table"),
        "cost-others": _tables(other, "cost_tables"),
    }
    write_atomically(page, fill(page.read_text(), parts).encode())


def _tables(path: Path, *names: str) -> str:
    if not path.exists():
        return "Not measured yet."
    content = json.loads(path.read_text())
    return "\n\n".join(getattr(tables, name)(content) for name in names)


def fill(text: str, parts: Mapping[str, str]) -> str:
    """Put each part between its markers, ``<!-- begin NAME -->`` and ``<!-- end NAME -->``.

    Raises:
        ValueError: a part has no markers in the text.
    """
    for name, part in parts.items():
        pattern = re.compile(rf"(?s)(<!-- begin {name} -->\n).*?(<!-- end {name} -->)")
        text, count = pattern.subn(lambda at, part=part: f"{at[1]}\n{part}\n\n{at[2]}", text)
        if count != 1:
            raise ValueError(f"the page has {count} places marked {name!r}; it needs one")
    return text


def cost_plot(content: dict[str, Any]) -> bytes:
    """SVG: time, memory and operations over those of the ordinary eager float32 step."""
    groups = grouped(content["rows"], "model")
    heights = [len(group) + 4 for group in groups.values()]
    figure = Figure(figsize=(13, 0.22 * sum(heights)), layout="constrained")
    axes = figure.subplots(len(groups), len(PANELS), squeeze=False, height_ratios=heights)
    for (name, group), line in zip(groups.items(), axes, strict=True):
        ordinary = select(group, method="ordinary", compiled=False) or group[0]
        for quantity, axis in zip(PANELS, line, strict=True):
            _bars(axis, group, ordinary, quantity)
        line[0].set_title(f"{MODELS[name].title}, batch {group[0]['batch']}", loc="left")
        labels = [f"{row['title']}, {row['precision']}, {mode(row)}" for row in group]
        line[0].set_yticks(range(len(group)), labels, fontsize=7)
    return svg(figure)


def _bars(axis: Axes, rows: list[Row], ordinary: Row, quantity: str) -> None:
    unit = quantity_of(ordinary, quantity)
    colours = [
        next((c for start, c in COLOURS.items() if row["title"].startswith(start)), "#7570b3")
        for row in rows
    ]
    bars = axis.barh(range(len(rows)), [quantity_of(row, quantity) / unit for row in rows],
                     color=colours)  # fmt: skip
    axis.bar_label(bars, fmt=" {:.2f}", fontsize=7)
    if quantity == "time":
        keys = ("lower", "median", "upper")
        times = np.array([[row["seconds"][key] / unit for key in keys] for row in rows]).T
        axis.errorbar(
            times[1], range(len(rows)), xerr=np.diff(times, axis=0), fmt="none", ecolor="black"
        )
    axis.axvline(1.0, color="black", linewidth=0.5)
    axis.set_yticks([])
    axis.invert_yaxis()
    axis.margins(x=0.15)
    axis.set_xlabel(f"{PANELS[quantity]}, x {ordinary['title']}, {mode(ordinary)}", fontsize=8)


def growth_plot(content: dict[str, Any]) -> bytes:
    """SVG: measured growth (lines) against counted growth (dashes) for each factor."""
    factors = grouped(content["rows"], "factor")
    figure = Figure(figsize=(3.6 * len(factors), 3.6), layout="constrained")
    axes = figure.subplots(1, len(factors), squeeze=False)[0]
    for (factor, rows), axis in zip(factors.items(), axes, strict=True):
        for number, series in enumerate(grouped(rows, "method", "compiled").values()):
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
    return svg(figure)


def svg(figure: Figure) -> bytes:
    """The figure's file, the same whenever it is drawn."""
    buffer = io.BytesIO()
    with mpl.rc_context(SETTINGS):
        figure.savefig(buffer, format="svg", metadata={"Date": None})
    return buffer.getvalue()
