"""A race's curves: accuracy over epochs, seconds and counted operations."""

import io
from collections.abc import Callable

import matplotlib as mpl
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from results_reading import Entry, RaceResults

SETTINGS = {"svg.hashsalt": "backfold", "svg.fonttype": "none"}
MEASURES = {"linear": "linear probe, %", "knn": "kNN, %"}
COLOURS = {
    "energy": "#d95f02",
    "twoheads": "#1f78b4",
    "xavier": "#a6761d",
    "masked": "#66a61e",
    "excerpt": "#e6ab02",
    "sparse": "#e7298a",
    "simclr": "#333333",
    "mae": "#7570b3",
    "simmim": "#1b9e77",
}
OTHER = "#666666"


def race_plot(race: RaceResults, backbone: str) -> bytes:
    """SVG: filled where a schedule ends, hollow in the middle of one; bars over the seeds."""
    entries = [entry for entry in race.entries.values() if _is_on(entry, backbone)]
    batch = race.size["batch"]
    scales: dict[str, Callable[[Entry], float]] = {
        "epochs": lambda entry: entry.epochs,
        "seconds in steps": lambda entry: entry.seconds,
        "counted operations, 10¹²": lambda entry: entry.operations(batch) / 1e12,
    }
    figure = Figure(figsize=(12, 7.5), layout="constrained")
    axes = figure.subplots(len(MEASURES), len(scales), squeeze=False)
    for (measure, label), line in zip(MEASURES.items(), axes, strict=True):
        for (scale, extent), axis in zip(scales.items(), line, strict=True):
            for entry in entries:
                _draw(axis, entry, measure, extent(entry))
            axis.set_xlabel(scale)
        line[0].set_ylabel(label)
    figure.legend(*axes[0, 0].get_legend_handles_labels(), loc="outside lower center", ncols=4)
    buffer = io.BytesIO()
    with mpl.rc_context(SETTINGS):
        figure.savefig(buffer, format="svg", metadata={"Date": None})
    return buffer.getvalue()


def _is_on(entry: Entry, backbone: str) -> bool:
    return entry.name.startswith("convnext") == (backbone == "convnext")


def _draw(axis: Axes, entry: Entry, measure: str, extent: float) -> None:
    if entry.timing is None:
        axis.axhline(entry.score(measure).mean, color="black", linewidth=0.8, linestyle=":",
                     label=entry.title)  # fmt: skip
        return
    family = entry.name.removeprefix("convnext-").partition("-")[0]
    colour = COLOURS.get(family, OTHER)
    curve = entry.curve(measure)
    places, means = [share * extent for share, _ in curve], [score.mean for _, score in curve]
    deviations = [score.std for _, score in curve]
    is_whole = "-" not in entry.name.removeprefix("convnext-")
    axis.errorbar(places, means, yerr=deviations, color=colour, linewidth=1.0, capsize=2,
                  linestyle="-" if is_whole else "--", marker="o", markerfacecolor="white",
                  label=entry.title if is_whole else None)  # fmt: skip
    axis.plot(places[-1:], means[-1:], color=colour, marker="o" if is_whole else "s",
              zorder=3)  # fmt: skip
