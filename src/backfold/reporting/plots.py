"""The report's plots, SVG pictures as data URIs; matplotlib's settings stay as they were."""

import base64
import io
import math
import re
from collections.abc import Mapping, Sequence
from itertools import chain, cycle, product
from typing import Any, NamedTuple

import matplotlib as mpl
import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import MaxNLocator

from backfold.evaluation.results import ACCURACY, OVER, Row, parse_case
from backfold.reporting.verdicts import Look, Series, show

STYLE: dict[Any, Any] = {
    "svg.hashsalt": "backfold",  # the same numbers give the same bytes
    "font.size": 9, "legend.fontsize": 8, "legend.frameon": False, "legend.handlelength": 2.5,
    "axes.spines.top": False, "axes.spines.right": False, "axes.edgecolor": "#555555",
    "axes.axisbelow": True, "grid.color": "#dddddd", "lines.markersize": 4,
}  # fmt: skip
BLUE = "#0072b2"
# Colours are of Okabe and Ito's palette, which the colour-blind can tell apart; line styles and
# markers differ too.
LOOKS = (
    (BLUE, "-", "o"), ("#d55e00", "--", "s"), ("#009e73", ":", "^"), ("#777777", "-.", "v"),
    ("#56b4e9", "-", "D"), ("#cc79a7", "--", "<"), ("#e69f00", ":", ">"), ("#003d66", "-.", "x"),
)  # fmt: skip
SIZE_INCHES = (4.4, 2.7)
LEGEND_COLUMNS, LEGEND_LINE_INCHES = 3, 0.17
MAX_POINTS = 1000
FEW_POINTS = 30  # up to here each point is marked
HISTOGRAM_BINS = 40
# Beyond them an energy is in the outermost bar: one diverged image must not squeeze all others.
HISTOGRAM_PERCENTILES = (0.5, 99.5)
LARGEST = 1e30  # larger numbers can't be drawn
BY_SEVERITY = ("AUROC", "PSNR (dB)", ACCURACY)  # of each protocol the first that it has
LAYER = re.compile(r"(?P<probe>.+), layer (?P<layer>-?\d{1,4}), (?P<pooling>.+)")
# What they show, and the unit.
CURVES = {
    "loss": ("loss", ""),
    "psnr_gain_db": ("PSNR gain over the corrupted image", "dB"),
    "energy_gap": ("energy gap, corrupted minus clean", ""),
    "auroc": ("AUROC of the energy", ""),
    "rank_me": ("effective rank (RankMe)", ""),
    "knn": ("kNN accuracy", "%"),
    "gradient_norm": ("gradient norm", ""),
    "lr": ("learning rate", ""),
    "images_per_second": ("speed", "images/s"),
    "data_wait": ("share of time waiting for images", ""),
}
LOGARITHMIC = ("loss", "gradient_norm")  # where they span more than a factor of ten

# Mean and spread by position on the x axis, by contender.
Panel = dict[str, dict[float, tuple[float, float]]]


class Plot(NamedTuple):
    """A picture with its title and caption, which say in words what it shows."""

    title: str
    caption: str
    data_uri: str


@mpl.rc_context(STYLE)
def plot_curves(looks: Sequence[Look], metrics: Mapping[str, Series]) -> list[Plot]:
    """All curves against the step that have a finite value; those of held-out images first."""
    plots = []
    held_out = {
        name: np.array([look.get(name, np.nan) for look in looks]) for name in ("step", *CURVES)
    }
    wanted = product((("Held out", held_out), ("Training", metrics)), CURVES.items())
    for (where, columns), (name, (title, unit)) in wanted:
        values = columns.get(name, np.array([]))
        finite = np.isfinite(values)
        if not finite.any():
            continue
        steps, known = columns["step"], np.flatnonzero(finite)
        last = f"last: {show(values[known[-1]], '.4g', unit)} at step {steps[known[-1]]:,.0f}"
        missing = "" if finite.all() else f"; missing or not finite: {(~finite).sum()}"
        thinned = np.unique(np.linspace(0, len(values) - 1, MAX_POINTS).round().astype(int))
        axes, marker = _axes("step", unit), "o" if len(known) <= FEW_POINTS else None
        axes.plot(steps[thinned], values[thinned], BLUE, marker=marker)
        if name in LOGARITHMIC and 0 < 10 * values[finite].min() < values[finite].max():
            axes.set_yscale("log")
        plots.append(Plot(f"{where}: {title}", f"{last}{missing}", _svg(axes)))
    return plots


@mpl.rc_context(STYLE)
def plot_energies(task: str, energies: Mapping[str, Series]) -> Plot | None:
    """Histograms of clean, corrupted and restored images' energies; None where none is finite."""
    finite = {name: values[np.isfinite(values)] for name, values in energies.items()}
    if not (shown := {name: values for name, values in finite.items() if len(values)}):
        return None
    low, high = np.percentile(np.concatenate(list(shown.values())), HISTOGRAM_PERCENTILES)
    # Equal energies still need a bar of some width.
    margin = max(0.0, 1e-6 * max(1.0, abs(low), abs(high)) - (high - low))
    edges = np.linspace(low - margin, high + margin, HISTOGRAM_BINS + 1)
    means = ", ".join(f"{name} {show(float(values.mean()))}" for name, values in shown.items())
    broken = sum(map(len, energies.values())) - sum(map(len, shown.values()))
    caption = f"mean energies: {means}" + (f"; not finite: {broken}" if broken else "")
    axes = _axes("energy", "images")
    for (name, values), (colour, line, _) in zip(shown.items(), LOOKS, strict=False):
        counts, _ = np.histogram(np.clip(values, edges[0], edges[-1]), edges)
        axes.stairs(counts, edges, fill=True, color=colour, alpha=0.12)
        axes.stairs(counts, edges, color=colour, linestyle=line, linewidth=1.6, label=name)
    return Plot(f"Energies: {task}", caption, _svg(axes))


@mpl.rc_context(STYLE)
def plot_rows(rows: Sequence[Row]) -> list[Plot]:
    """What of one protocol's rows is a curve: by severity for each corruption, and by layer."""
    return [*_by_severity(rows), *_by_layer(rows)]


def _point(row: Row) -> tuple[float, float]:
    """Mean (NaN where it can't be drawn) and spread, which bars show."""
    # PSNR's spread is over the images: it says how much they differ, and would hide the lines.
    spread = row.std if row.std < LARGEST and "dB" not in row.metric else 0.0
    return (row.mean if abs(row.mean) < LARGEST else math.nan), spread


def _by_severity(rows: Sequence[Row]) -> list[Plot]:
    """A panel for each corruption, a line for each contender; clean images are severity 0."""
    metrics = {row.metric for row in rows if parse_case(row.case)}
    metric = next((name for name in BY_SEVERITY if name in metrics), "")
    rows = [row for row in rows if row.metric == metric and OVER not in row.contender]
    clean = {row.contender: {0.0: _point(row)} for row in rows if row.case == "clean"}
    panels: dict[str, Panel] = {}
    for row in rows:
        if case := parse_case(row.case):
            lines = panels.setdefault(case[0], {})
            lines.setdefault(row.contender, {**clean.get(row.contender, {})})[case[1]] = _point(row)
    return _panels(panels, "severity (0: clean)" if clean else "severity", metric)


def _by_layer(rows: Sequence[Row]) -> list[Plot]:
    """A panel for each pooling, a line for each contender; pixels, without layers, are level."""
    panels: dict[str, Panel] = {}
    level: dict[str, tuple[float, float]] = {}
    for row in rows:
        if found := LAYER.fullmatch(row.case):
            panel = panels.setdefault(f"{found['probe']}, {found['pooling']}", {})
            panel.setdefault(row.contender, {})[int(found["layer"])] = _point(row)
        else:
            level[row.contender] = max(_point(row), level.get(row.contender, _point(row)))
    for lines in panels.values():
        layers = set(chain.from_iterable(lines.values()))
        lines |= {f"{name}, the best": dict.fromkeys(layers, best) for name, best in level.items()}
    return _panels(panels, "layer (-1: the last)", rows[0].metric if rows else "")


def _panels(panels: Mapping[str, Panel], x_label: str, metric: str) -> list[Plot]:
    """Small plots with the same y axis, to be compared; none where nothing can be drawn."""
    lines = chain.from_iterable(panel.values() for panel in panels.values())
    points = [point for line in lines for point in line.values()]
    ends = [mean + sign * spread for mean, spread in points for sign in (-1, 1)]
    if not np.isfinite(ends).any():
        return []
    low, high = np.nanmin(ends), np.nanmax(ends)
    margin = 0.06 * (high - low) or 1.0
    plots = []
    for title, panel in panels.items():
        axes = _axes(x_label, metric)
        for (contender, line), (colour, style, marker) in zip(panel.items(), cycle(LOOKS)):
            means, spreads = np.array([line[place] for place in sorted(line)]).T
            look: dict[str, Any] = {"color": colour, "linestyle": style, "marker": marker}
            bars = spreads if spreads.any() else None
            axes.errorbar(sorted(line), means, bars, label=contender, **look)
        axes.set_ylim(low - margin, high + margin)
        axes.xaxis.set_major_locator(MaxNLocator(integer=True))
        if metric == "AUROC":
            axes.axhline(0.5, color="#bbbbbb", linewidth=0.8, zorder=0)  # chance
        plots.append(Plot(title, f"{metric} against {x_label}", _svg(axes)))
    return plots


def _axes(x_label: str, y_label: str) -> Axes:
    figure = Figure(figsize=SIZE_INCHES, layout="constrained")
    axes = figure.add_subplot(xlabel=x_label, ylabel=_plain(y_label))
    axes.grid(axis="y")
    return axes


def _svg(axes: Axes) -> str:
    """The picture, with a legend, as a data URI."""
    figure: Any = axes.get_figure()
    handles, labels = axes.get_legend_handles_labels()
    if labels:
        further_lines = (len(labels) - 1) // LEGEND_COLUMNS
        figure.set_figheight(SIZE_INCHES[1] + LEGEND_LINE_INCHES * further_lines)
        names = [_plain(label) for label in labels]
        figure.legend(handles, names, loc="outside upper left", ncols=LEGEND_COLUMNS)
    buffer = io.BytesIO()
    figure.savefig(buffer, format="svg", metadata={"Date": None})
    return "data:image/svg+xml;base64," + base64.b64encode(buffer.getvalue()).decode()


def _plain(text: str) -> str:
    # Names come from files: dollars would begin a formula, control characters break the SVG.
    return "".join(filter(str.isprintable, text)).replace("$", r"\$")
