"""Pictures of the measures by severity, each the text of an SVG file."""

from collections.abc import Mapping, Sequence

import matplotlib as mpl
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from backfold.evaluation import adaptation, energy_tests, restoration_tests
from backfold.evaluation.measures import MeasureRow
from backfold.evaluation.picture_style import (
    AMBER,
    BLUE,
    GREEN,
    GREY,
    NIGHT,
    ORANGE,
    PINK,
    SKY,
    STYLE,
    add_grid,
    svg_text,
)
from backfold.evaluation.severities import SEVERITIES, parse_case

COLUMNS = 3
PANEL_INCHES = (2.5, 2.1)
HEADER_INCHES = 0.5
# Colour, line style and marker.
Look = tuple[str, str, str]
SCORES: Mapping[str, Look] = {
    "energy": (BLUE, "-", "o"),
    "kNN distance": (ORANGE, "--", "s"),
    "file size": (GREEN, ":", "^"),
    "total variation": (GREY, "-.", "v"),
}
ENERGY_LOOKS: Sequence[Look] = ((SKY, "-", "o"), (BLUE, "-", "s"), (NIGHT, "-", "D"))
CLASSICAL: Mapping[str, Look] = {
    "identity": (GREY, ":", "x"),
    "bicubic": (GREY, "--", "x"),
    "mean fill": (AMBER, ":", "+"),
    "biharmonic inpainting": (GREEN, "--", "^"),
    "total variation": (ORANGE, "--", "v"),
    "non-local means": (PINK, "-.", "<"),
}
ACCURACIES: Mapping[str, Look] = {
    adaptation.UNCHANGED: (GREY, "--", "s"),
    adaptation.RESTORED: (BLUE, "-", "o"),
}


def auroc_picture(rows: Sequence[MeasureRow]) -> str:
    """AUROC of each score by severity, a panel for each task; one more for all other cases.

    Args:
        rows: of `energy_rows`.

    Raises:
        ValueError: there are none.
    """
    rows = [row for row in rows if row.protocol == energy_tests.PROTOCOL]
    names = _names(rows)
    others = [row for row in rows if parse_case(row.case) is None]
    with mpl.rc_context(STYLE):
        figure, panels = _panels(len(names) + bool(others))
        for axes, name in zip(panels, names, strict=False):
            _lines(axes, name, rows, SCORES, bars=True)
        for axes in panels:
            axes.set_ylim(-0.04, 1.04)
            axes.axhline(0.5, color="#bbbbbb", linewidth=0.8, zorder=0)
        if others:
            _points(panels[-1], others)
        return _finished(figure, panels, "AUROC")


def psnr_picture(rows: Sequence[MeasureRow]) -> str:
    """PSNR by severity of the energy's restorations and of classical ones, a panel for each task.

    Args:
        rows: of `restoration_rows`.

    Raises:
        ValueError: there are none.
    """
    rows = [row for row in rows if row.metric == restoration_tests.PSNR]
    names = _names(rows)
    ours = dict.fromkeys(row.contender for row in rows if row.contender not in CLASSICAL)
    looks = {name: ENERGY_LOOKS[i % len(ENERGY_LOOKS)] for i, name in enumerate(ours)}
    looks.update(CLASSICAL)
    with mpl.rc_context(STYLE):
        figure, panels = _panels(len(names))
        for axes, name in zip(panels, names, strict=True):
            _lines(axes, name, rows, looks, bars=False)
        return _finished(figure, panels, restoration_tests.PSNR)


def adaptation_picture(rows: Sequence[MeasureRow]) -> str:
    """Accuracy by severity with and without restoring, a panel for each corruption.

    Args:
        rows: of `adaptation_rows`.

    Raises:
        ValueError: there are none.
    """
    rows = [row for row in rows if row.metric == adaptation.ACCURACY]
    clean = [row for row in rows if row.case == adaptation.CLEAN]
    names = _names(rows)
    with mpl.rc_context(STYLE):
        figure, panels = _panels(len(names))
        for axes, name in zip(panels, names, strict=True):
            _lines(axes, name, rows, ACCURACIES, bars=True, clean=clean)
            axes.set_ylim(bottom=0)
        return _finished(figure, panels, adaptation.ACCURACY)


def _names(rows: Sequence[MeasureRow]) -> list[str]:
    parsed = [parse_case(row.case) for row in rows]
    return list(dict.fromkeys(case[0] for case in parsed if case is not None))


def _panels(count: int) -> tuple[Figure, list[Axes]]:
    if count == 0:
        raise ValueError("there is nothing to draw: no row has a case by severity")
    columns = min(count, COLUMNS)
    lines = -(-count // columns)
    size = (columns * PANEL_INCHES[0], lines * PANEL_INCHES[1] + HEADER_INCHES)
    figure = Figure(figsize=size, layout="constrained")
    grid = figure.subplots(lines, columns, squeeze=False)
    panels: list[Axes] = list(grid.flat)
    for axes in panels[count:]:
        axes.remove()
    for axes in panels[:count]:
        add_grid(axes)
    return figure, panels[:count]


def _lines(
    axes: Axes,
    name: str,
    rows: Sequence[MeasureRow],
    looks: Mapping[str, Look],
    bars: bool,
    clean: Sequence[MeasureRow] = (),
) -> None:
    """A line for each contender over the severities, and severity 0 if clean rows are given."""
    for contender, (colour, line, marker) in looks.items():
        points: dict[int, MeasureRow] = {}
        points.update((0, row) for row in clean if row.contender == contender)
        for row in rows:
            case = parse_case(row.case)
            if case is not None and case[0] == name and row.contender == contender:
                points[case[1]] = row
        if not points:
            continue
        axes.errorbar(
            list(points),
            [row.mean for row in points.values()],
            [row.std for row in points.values()] if bars else None,
            color=colour,
            linestyle=line,
            marker=marker,
            markersize=4,
            linewidth=1.4,
            label=contender,
        )
    axes.set_title(name)
    axes.set_xticks(SEVERITIES)
    if clean:
        axes.set_xticks([0, *SEVERITIES], ["clean", *map(str, SEVERITIES)])


def _points(axes: Axes, rows: Sequence[MeasureRow]) -> None:
    """A column of points for each case, side by side."""
    cases = list(dict.fromkeys(row.case for row in rows))
    for number, (contender, (colour, _, marker)) in enumerate(SCORES.items()):
        found = {row.case: row for row in rows if row.contender == contender}
        shift = 0.18 * (number - (len(SCORES) - 1) / 2)
        axes.errorbar(
            [cases.index(case) + shift for case in found],
            [row.mean for row in found.values()],
            [row.std for row in found.values()],
            color=colour,
            linestyle="none",
            marker=marker,
            markersize=4,
        )
    labels = [case.removeprefix(energy_tests.OTHER_DATA) for case in cases]
    shown = ["one class" if label == energy_tests.ONE_CLASS else label for label in labels]
    axes.set_xticks(range(len(cases)), shown, fontsize=7.5)
    axes.set_title("other data, other classes")


def _finished(figure: Figure, panels: Sequence[Axes], y_label: str) -> str:
    figure.supxlabel("severity", fontsize=9)
    figure.supylabel(y_label, fontsize=9)
    entries = {
        label: handle
        for axes in panels
        for handle, label in zip(*axes.get_legend_handles_labels(), strict=True)
    }
    figure.legend(
        entries.values(),
        entries.keys(),
        loc="outside upper left",
        ncols=4,
        frameon=False,
        handlelength=2.5,
        fontsize=8,
    )
    return svg_text(figure)
