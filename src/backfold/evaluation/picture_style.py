"""How plots look, here and in the report.

Colours are of Okabe and Ito's palette, which the colour-blind can tell apart; line styles and
markers differ too.
"""

import io
from typing import Any

from matplotlib.axes import Axes
from matplotlib.figure import Figure

STYLE: dict[Any, Any] = {
    "svg.hashsalt": "backfold",  # the same numbers give the same bytes
    "font.size": 9.0,
    "axes.titlesize": 9.0,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.edgecolor": "#555555",
    "xtick.color": "#333333",
    "ytick.color": "#333333",
}
BLUE, SKY, NIGHT = "#0072b2", "#56b4e9", "#003d66"
ORANGE, AMBER, GREEN, PINK, GREY = "#d55e00", "#e69f00", "#009e73", "#cc79a7", "#777777"


def add_grid(axes: Axes) -> None:
    """Faint lines behind the curves at the y axis' ticks."""
    axes.grid(axis="y", color="#dddddd", linewidth=0.6)
    axes.set_axisbelow(True)


def svg_text(figure: Figure) -> str:
    """The figure as the text of an SVG file, without the date; `STYLE` must be in force."""
    buffer = io.StringIO()
    figure.savefig(buffer, format="svg", metadata={"Date": None})
    return buffer.getvalue()
