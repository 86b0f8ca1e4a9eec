"""The report's plots, SVG pictures as data URIs; matplotlib's settings stay as they were."""

import base64
import io
import re
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from itertools import chain
from typing import Any

import matplotlib as mpl
import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from backfold.evaluation.results import ACCURACY, OVER, Row, parse_case
from backfold.reporting.verdicts import Look, Series, show

# Colours are of Okabe and Ito's palette, which the colour-blind can tell apart; line styles and
# markers differ too.
STYLE: dict[Any, Any] = {
    "svg.hashsalt": "backfold",  # the same numbers give the same bytes
    "font.size": 9.0,
    "legend.fontsize": 8.0,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.edgecolor": "#555555",
    "xtick.color": "#333333",
    "ytick.color": "#333333",
}
BLUE, SKY, NIGHT = "#0072b2", "#56b4e9", "#003d66"
ORANGE, AMBER, GREEN, PINK, GREY = "#d55e00", "#e69f00", "#009e73", "#cc79a7", "#777777"
LOOKS = (
    (BLUE, "-", "o"), (ORANGE, "--", "s"), (GREEN, ":", "^"), (GREY, "-.", "v"), (SKY, "-", "D"),
    (PINK, "--", "<"), (AMBER, ":", ">"), (NIGHT, "-.", "x"),
)  # fmt: skip
SIZE_INCHES = (4.4, 2.7)
LEGEND_COLUMNS, LEGEND_LINE_INCHES = 3, 0.17
MAX_POINTS = 1000
FEW_POINTS = 30  # up to here each point is marked
HISTOGRAM_BINS = 40
# Beyond these percentiles an energy counts in the outermost bar: one diverged image must not
# squeeze all others into a single bar.
HISTOGRAM_PERCENTILES = (0.5, 99.5)
LARGEST = 1e30  # larger numbers can't be drawn
BY_SEVERITY = ("AUROC", "PSNR (dB)", ACCURACY)  # of each protocol the first that it has
CLEAN = "clean"
LAYER = re.compile(r"(?P<probe>.+), layer (?P<layer>-?\d{1,4}), (?P<pooling>.+)")


@dataclass(frozen=True)
class Plot:
    """A picture with its title and caption, and its content in words."""

    title: str
    caption: str
    alt: str
    data_uri: str


# Titles and units.
HELD_OUT_CURVES: Mapping[str, tuple[str, str]] = {
    "psnr_gain_db": ("Held out: PSNR gain", "dB"),
    "energy_gap": ("Held out: energy gap, corrupted minus clean", ""),
    "auroc": ("Held out: AUROC of the energy", ""),
    "rank_me": ("Held out: effective rank (RankMe)", ""),
    "knn": ("Held out: kNN accuracy", "%"),
}
TRAINING_CURVES: Mapping[str, tuple[str, str]] = {
    "loss": ("Training loss", ""),
    "psnr_gain_db": ("PSNR gain over the corrupted image", "dB"),
    "energy_gap": ("Energy gap, corrupted minus clean", ""),
    "gradient_norm": ("Gradient norm", ""),
    "lr": ("Learning rate", ""),
    "images_per_second": ("Speed", "images/s"),
    "data_wait": ("Share of time waiting for images", ""),
}
LOGARITHMIC = ("loss", "gradient_norm")  # where they span more than a factor of ten


def plot_curves(looks: Sequence[Look], metrics: Mapping[str, Series]) -> list[Plot]:
    """All curves against the step that have a finite value; those of held-out images first."""
    steps = np.array([look.step for look in looks], dtype=np.float64)
    plots = [
        _curve(*titled, steps, np.array([look.measures.get(name, np.nan) for look in looks], float))
        for name, titled in HELD_OUT_CURVES.items()
    ]
    plots += [
        _curve(*titled, metrics["step"], metrics[name], name in LOGARITHMIC)
        for name, titled in TRAINING_CURVES.items()
        if name in metrics
    ]
    return [plot for plot in plots if plot is not None]


def _curve(
    title: str, unit: str, steps: Series, values: Series, logarithmic: bool = False
) -> Plot | None:
    finite = np.isfinite(values)
    if not finite.any():
        return None
    known = np.flatnonzero(finite)
    first, last = (
        f"{show(values[index], '.4g', unit)} at step {steps[index]:,.0f}"
        for index in (known[0], known[-1])
    )
    missing = "" if finite.all() else f"; missing or not finite: {(~finite).sum()}"
    thinned = np.unique(np.linspace(0, len(values) - 1, MAX_POINTS).round().astype(int))
    shown = np.where(finite, values, np.nan)[thinned]
    with _drawing("step", unit) as (axes, finish):
        marker = "o" if len(known) <= FEW_POINTS else None
        axes.plot(steps[thinned], shown, color=BLUE, linewidth=1.5, marker=marker, markersize=4)
        if logarithmic and 0 < 10 * values[finite].min() < values[finite].max():
            axes.set_yscale("log")
        alt = f"Curve of {title} against the step, from {first} to {last}."
        return Plot(title, f"last: {last}{missing}", alt, finish())


def plot_energies(task: str, energies: Mapping[str, Series]) -> Plot | None:
    """Histograms of the clean, the corrupted and the restored images' energies, on one axis.

    None where no energy is finite.
    """
    finite = {name: values[np.isfinite(values)] for name, values in energies.items()}
    shown = {name: values for name, values in finite.items() if len(values)}
    if not shown:
        return None
    edges = _edges(np.concatenate(list(shown.values())))
    means = ", ".join(f"{name} {show(float(values.mean()))}" for name, values in shown.items())
    broken = sum(map(len, energies.values())) - sum(map(len, shown.values()))
    caption = f"mean energies: {means}" + (f"; not finite: {broken}" if broken else "")
    with _drawing("energy", "images") as (axes, finish):
        for (name, values), (colour, line, _) in zip(shown.items(), LOOKS, strict=False):
            counts, _ = np.histogram(np.clip(values, edges[0], edges[-1]), edges)
            axes.stairs(counts, edges, fill=True, color=colour, alpha=0.12)
            axes.stairs(counts, edges, color=colour, linestyle=line, linewidth=1.6, label=name)
        alt = f"Histograms of energies for {task}; mean {means}."
        return Plot(f"Energies: {task}", caption, alt, finish())


def _edges(energies: Series) -> Series:
    low, high = np.percentile(energies, HISTOGRAM_PERCENTILES)
    # Equal energies still need a bar of some width.
    margin = max(0.0, 1e-6 * max(1.0, abs(low), abs(high)) - (high - low))
    return np.linspace(low - margin, high + margin, HISTOGRAM_BINS + 1)


def plot_rows(rows: Sequence[Row]) -> list[Plot]:
    """What of one protocol's rows is a curve: by severity for each corruption, and by layer."""
    return [*_by_severity(rows), *_by_layer(rows)]


# Mean and spread by position on the x axis, of one contender.
_Points = dict[float, tuple[float, float]]


def _by_severity(rows: Sequence[Row]) -> list[Plot]:
    """A panel for each corruption, a line for each contender; clean images are severity 0."""
    rows = [row for row in rows if OVER not in row.contender]
    metrics = {row.metric for row in rows if parse_case(row.case)}
    metric = next((name for name in BY_SEVERITY if name in metrics), "")
    clean = {row.contender: row for row in rows if (row.case, row.metric) == (CLEAN, metric)}
    panels: dict[str, dict[str, _Points]] = {}
    for row in rows:
        case = parse_case(row.case)
        if case and row.metric == metric:
            points = panels.setdefault(case[0], {}).setdefault(row.contender, {})
            for place, found in ((0, clean.get(row.contender)), (case[1], row)):
                if found is not None:
                    points[place] = (found.mean, found.std)
    return _panels(panels, "severity (0: clean)" if clean else "severity", metric)


def _by_layer(rows: Sequence[Row]) -> list[Plot]:
    """A panel for each pooling, a line for each contender; pixels, without layers, are level."""
    panels: dict[str, dict[str, _Points]] = {}
    best: dict[str, tuple[float, float]] = {}
    for row in rows:
        found, here = LAYER.fullmatch(row.case), (row.mean, row.std)
        if found:
            lines = panels.setdefault(f"{found['probe']}, {found['pooling']}", {})
            lines.setdefault(row.contender, {})[int(found["layer"])] = here
        else:
            best[row.contender] = max(here, best.get(row.contender, here))
    for lines in panels.values():
        layers = set(chain.from_iterable(lines.values()))
        lines |= {f"{name}, the best": dict.fromkeys(layers, best[name]) for name in best}
    metric = next((row.metric for row in rows), "")
    return _panels(panels, "layer (-1: the last)", metric)


def _panels(panels: Mapping[str, Mapping[str, _Points]], x_label: str, metric: str) -> list[Plot]:
    """Small plots with the same y axis, to be compared."""
    lines = chain.from_iterable(panel.values() for panel in panels.values())
    ends = (
        mean + sign * (spread if _has_bars(metric) else 0.0)
        for points in lines
        for mean, spread in points.values()
        for sign in (-1, 1)
    )
    finite = [end for end in ends if abs(end) < LARGEST]
    if not finite:
        return []
    low, high = min(finite), max(finite)
    margin = 0.06 * (high - low) or 1.0
    limits = (low - margin, high + margin)
    return [_panel(title, panel, x_label, metric, limits) for title, panel in panels.items()]


def _has_bars(metric: str) -> bool:
    # PSNR's spread is over the images: it says how much they differ, and would hide the lines.
    return "dB" not in metric


def _panel(
    title: str,
    panel: Mapping[str, _Points],
    x_label: str,
    metric: str,
    limits: tuple[float, float],
) -> Plot:
    ticks = sorted(set(chain.from_iterable(panel.values())))
    with _drawing(x_label, metric) as (axes, finish):
        for number, (contender, points) in enumerate(panel.items()):
            colour, line, marker = LOOKS[number % len(LOOKS)]
            places = sorted(points)
            means, spreads = np.array([points[place] for place in places], float).T
            axes.errorbar(
                places,
                np.where(np.abs(means) < LARGEST, means, np.nan),
                np.where(np.isfinite(spreads), spreads, 0.0) if _has_bars(metric) else None,
                color=colour,
                linestyle=line,
                marker=marker,
                markersize=4,
                linewidth=1.4,
                label=contender,
            )
        axes.set_ylim(limits)
        if len(ticks) <= FEW_POINTS:
            axes.set_xticks(ticks)
        if metric == BY_SEVERITY[0]:
            axes.axhline(0.5, color="#bbbbbb", linewidth=0.8, zorder=0)
        alt = f"{metric} against {x_label}, {title}, of {', '.join(panel)}."
        return Plot(title, metric, alt, finish())


@contextmanager
def _drawing(x_label: str, y_label: str) -> Iterator[tuple[Axes, Callable[[], str]]]:
    """Axes in the report's style, and what makes them, with a legend, a data URI."""
    with mpl.rc_context(STYLE):
        figure = Figure(figsize=SIZE_INCHES, layout="constrained")
        axes = figure.add_subplot()
        axes.set_xlabel(_plain(x_label))
        axes.set_ylabel(_plain(y_label))
        axes.grid(axis="y", color="#dddddd", linewidth=0.6)
        axes.set_axisbelow(True)
        yield axes, lambda: _finished(figure, axes)


def _plain(text: str) -> str:
    # Names come from files: dollars would begin a formula, control characters break the SVG.
    return "".join(filter(str.isprintable, text)).replace("$", r"\$")


def _finished(figure: Figure, axes: Axes) -> str:
    handles, labels = axes.get_legend_handles_labels()
    if labels:
        lines = -(-len(labels) // LEGEND_COLUMNS)
        figure.set_figheight(SIZE_INCHES[1] + LEGEND_LINE_INCHES * (lines - 1))
        figure.legend(
            handles,
            [_plain(label) for label in labels],
            loc="outside upper left",
            ncols=LEGEND_COLUMNS,
            frameon=False,
            handlelength=2.5,
        )
    buffer = io.StringIO()
    figure.savefig(buffer, format="svg", metadata={"Date": None})
    return "data:image/svg+xml;base64," + base64.b64encode(buffer.getvalue().encode()).decode()
