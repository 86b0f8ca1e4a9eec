"""The report's plots, SVG pictures as data URIs; matplotlib's settings stay as they were."""

import base64
from collections.abc import Mapping
from dataclasses import dataclass

import matplotlib as mpl
import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from backfold.evaluation.picture_style import (
    BLUE,
    GREEN,
    ORANGE,
    STYLE,
    add_grid,
    svg_text,
)
from backfold.reporting import wording
from backfold.reporting.fields import Series
from backfold.reporting.records import Run, TaskEnergies

SIZE_INCHES = (4.4, 2.7)
MAX_POINTS = 1000
FEW_POINTS = 30  # up to here each point is marked
HISTOGRAM_BINS = 40
# Beyond these percentiles an energy counts in the outermost bar: one diverged image must not
# squeeze all others into a single bar.
HISTOGRAM_PERCENTILES = (0.5, 99.5)


@dataclass(frozen=True)
class Plot:
    """A picture with its title and caption, and its content in words."""

    title: str
    caption: str
    alt: str
    data_uri: str


@dataclass(frozen=True)
class Curve:
    """What a curve shows: its title, its unit (or nothing) and whether its axis is logarithmic."""

    title: str
    unit: str = ""
    logarithmic: bool = False


TRAINING_CURVES: Mapping[str, Curve] = {
    "loss": Curve("Training loss", logarithmic=True),
    "psnr_gain_db": Curve("PSNR gain over the corrupted image", "dB"),
    "energy_gap": Curve("Energy gap, corrupted minus clean"),
    "gradient_norm": Curve("Gradient norm", logarithmic=True),
    "lr": Curve("Learning rate"),
    "images_per_second": Curve("Speed", "images/s"),
    "data_wait": Curve("Share of time waiting for images"),
}
HEALTH_CURVES: Mapping[str, Curve] = {
    "psnr_gain_db": Curve("Held out: PSNR gain", "dB"),
    "energy_gap": Curve("Held out: energy gap, corrupted minus clean"),
    "auroc": Curve("Held out: AUROC of the energy"),
    "rank_me": Curve("Held out: effective rank (RankMe)"),
    "knn": Curve("Held out: kNN accuracy", "%"),
}


def plot_curves(run: Run) -> list[Plot]:
    """All curves against the step for which the run has a finite value; held-out ones first."""
    steps = np.array([entry.step for entry in run.history], dtype=np.float64)
    plots = [
        _plot_curve(curve, steps, np.array([getattr(entry, name) for entry in run.history], float))
        for name, curve in HEALTH_CURVES.items()
    ]
    plots += [
        _plot_curve(curve, run.metrics["step"], run.metrics[name])
        for name, curve in TRAINING_CURVES.items()
        if name in run.metrics
    ]
    return [plot for plot in plots if plot is not None]


def _plot_curve(curve: Curve, steps: Series, values: Series) -> Plot | None:
    finite = np.isfinite(values)
    if not finite.any():
        return None
    known = np.flatnonzero(finite)
    first, last = (
        f"{_with_unit(values[index], curve.unit)} at step {wording.whole(steps[index])}"
        for index in (known[0], known[-1])
    )
    caption = f"last: {last}"
    if not finite.all():
        missing = wording.counted(int((~finite).sum()), "value is", "values are")
        caption += f"; {missing} missing or not finite"
    thinned = np.unique(np.linspace(0, len(values) - 1, MAX_POINTS).round().astype(int))
    shown = np.where(finite, values, np.nan)[thinned]
    with mpl.rc_context(STYLE):
        figure, axes = _new_figure("step", curve.unit)
        marker = "o" if len(known) <= FEW_POINTS else None
        axes.plot(steps[thinned], shown, color=BLUE, linewidth=1.5, marker=marker, markersize=4)
        lowest, highest = values[finite].min(), values[finite].max()
        if curve.logarithmic and 0 < 10 * lowest < highest:
            axes.set_yscale("log")
        data_uri = _data_uri(figure)
    alt = f"Curve of {curve.title} against the step, from {first} to {last}."
    return Plot(curve.title, caption, alt, data_uri)


def _with_unit(value: float, unit: str) -> str:
    return f"{wording.significant(value, 4)}{unit and ' ' + unit}"


def plot_energies(task: str, energies: TaskEnergies) -> Plot | None:
    """Histograms of the clean, the corrupted and the restored images' energies, on one axis.

    None where no energy is finite.
    """
    groups = {
        "clean": (np.array(energies.clean), BLUE, "-"),
        "corrupted": (np.array(energies.corrupted), ORANGE, "--"),
        "restored": (np.array(energies.restored), GREEN, ":"),
    }
    finite = {name: values[np.isfinite(values)] for name, (values, _, _) in groups.items()}
    shown = {name: values for name, values in finite.items() if len(values)}
    if not shown:
        return None
    edges = _edges(np.concatenate(list(shown.values())))
    with mpl.rc_context(STYLE):
        figure, axes = _new_figure("energy", "images")
        for name, values in shown.items():
            _, colour, line = groups[name]
            clipped = np.clip(values, edges[0], edges[-1])
            counts, _ = np.histogram(clipped, edges)
            axes.stairs(counts, edges, fill=True, color=colour, alpha=0.12)
            axes.stairs(counts, edges, color=colour, linestyle=line, linewidth=1.6, label=name)
        figure.legend(loc="outside upper left", ncols=3, frameon=False, handlelength=2.5)
        data_uri = _data_uri(figure)
    means = ", ".join(f"{name} {wording.significant(float(v.mean()))}" for name, v in shown.items())
    caption = f"mean energies: {means}"
    left_out = sum(len(values) - len(finite[name]) for name, (values, _, _) in groups.items())
    if left_out:
        caption += f"; {wording.counted(left_out, 'energy is', 'energies are')} not finite"
    alt = f"Histograms of energies for {task}; mean {means}."
    return Plot(f"Energies: {task}", caption, alt, data_uri)


def _edges(energies: Series) -> Series:
    low, high = np.percentile(energies, HISTOGRAM_PERCENTILES)
    # Equal energies still need a bar of some width.
    margin = max(0.0, 1e-6 * max(1.0, abs(low), abs(high)) - (high - low))
    return np.linspace(low - margin, high + margin, HISTOGRAM_BINS + 1)


def _new_figure(x_label: str, y_label: str) -> tuple[Figure, Axes]:
    figure = Figure(figsize=SIZE_INCHES, layout="constrained")
    axes = figure.add_subplot()
    axes.set_xlabel(x_label)
    axes.set_ylabel(y_label)
    add_grid(axes)
    return figure, axes


def _data_uri(figure: Figure) -> str:
    return "data:image/svg+xml;base64," + base64.b64encode(svg_text(figure).encode()).decode()
