import base64
import math
import re
from dataclasses import replace
from xml.etree import ElementTree

import matplotlib as mpl
import numpy as np
import pytest
from matplotlib import pyplot
from test_report_reading import write_run

from backfold.reporting.figures import HISTOGRAM_BINS, plot_curves, plot_energies
from backfold.reporting.reading import read_run
from backfold.reporting.records import TaskEnergies

SVG = "{http://www.w3.org/2000/svg}"


def drawing(plot) -> ElementTree.Element:
    kind, data = plot.data_uri.split(",")
    assert kind == "data:image/svg+xml;base64"
    return ElementTree.fromstring(base64.b64decode(data))


def drawn_points(plot) -> list[list[tuple[float, float]]]:
    """The points of every path in the plot's own blue, one list for each unbroken piece."""
    pieces = []
    for path in drawing(plot).iter(f"{SVG}path"):
        if "stroke: #0072b2" in path.get("style", "") and "clip-path" in path.attrib:
            for piece in path.get("d").split("M")[1:]:
                values = [float(number) for number in re.findall(r"-?\d+\.?\d*", piece)]
                pieces.append(list(zip(values[::2], values[1::2], strict=True)))
    return pieces


@pytest.fixture
def run(tmp_path):
    return read_run(write_run(tmp_path / "run"))


def with_metrics(run, **columns):
    return replace(run, history=(), metrics={k: np.array(v, float) for k, v in columns.items()})


def test_a_curve_goes_through_the_values(run):
    values = [1.0, 3.0, 2.0, 7.0]
    (plot,) = plot_curves(with_metrics(run, step=[0, 10, 30, 40], energy_gap=values))
    (points,) = drawn_points(plot)
    x, y = np.array(points).T
    np.testing.assert_allclose((x - x[0]) / (x[-1] - x[0]), [0, 0.25, 0.75, 1], atol=1e-4)
    np.testing.assert_allclose((y - y[0]) / (y[-1] - y[0]), [0, 1 / 3, 1 / 6, 1], atol=1e-4)
    assert plot.caption == "last: 7 at step 40"
    assert plot.alt == (
        "Curve of Energy gap, corrupted minus clean against the step, "
        "from 1 at step 0 to 7 at step 40."
    )


def test_values_that_are_not_finite_leave_a_gap_and_are_counted(run):
    values = [1.0, 2.0, math.nan, math.inf, 4.0, 5.0, math.nan]
    (plot,) = plot_curves(with_metrics(run, step=range(7), energy_gap=values))
    assert [len(piece) for piece in drawn_points(plot)] == [2, 2]
    assert plot.caption == "last: 5 at step 5; 3 values are missing or not finite"


def test_long_curves_are_thinned_but_keep_their_ends(run):
    steps = np.arange(20_000)
    (plot,) = plot_curves(with_metrics(run, step=steps, energy_gap=np.sin(steps)))
    assert sum(map(len, drawn_points(plot))) <= 1000
    assert plot.caption.endswith("at step 19,999")


def test_curves_without_a_value_are_left_out(run):
    nothing = with_metrics(run, step=[1, 2], loss=[math.nan, math.nan])
    assert plot_curves(nothing) == []
    titles = [plot.title for plot in plot_curves(run)]
    assert "Training loss" in titles
    assert "Held out: kNN accuracy" in titles
    unlabelled = tuple(replace(entry, knn=None) for entry in run.history)
    fewer = [plot.title for plot in plot_curves(replace(run, history=unlabelled))]
    assert [title for title in titles if title not in fewer] == ["Held out: kNN accuracy"]


def test_the_histogram_of_energies(run):
    plot = plot_energies("masking", run.energies["masking"])
    words = {text.strip() for text in plot.alt.replace(";", ",").split(",")}
    clean = np.mean(run.energies["masking"].clean)
    assert f"mean clean {clean:.3g}" in words
    assert plot.title == "Energies: masking"
    # The outline of the clean images' histogram is closed on the axis: its bars hold every image.
    (outline,) = [piece for piece in drawn_points(plot) if len(piece) > HISTOGRAM_BINS]
    heights = bar_heights(outline)
    shares = heights / heights.sum() * 50
    np.testing.assert_allclose(shares, shares.round(), atol=1e-2)
    low, high = np.percentile(
        np.concatenate(list(vars(run.energies["masking"]).values())), [0.5, 99.5]
    )
    expected, _ = np.histogram(
        np.clip(run.energies["masking"].clean, low, high), HISTOGRAM_BINS, (low, high)
    )
    np.testing.assert_array_equal(shares.round(), expected)


def bar_heights(outline: list[tuple[float, float]]) -> np.ndarray:
    """Heights above the outline's first point, sampled in the middle of each bar."""
    x, y = np.array(outline).T
    edges = np.linspace(x.min(), x.max(), HISTOGRAM_BINS + 1)
    middles = (edges[1:] + edges[:-1]) / 2
    # A stairs path alternates: at each level it runs to the next edge.
    levels = [y[np.flatnonzero(x <= middle)[-1]] for middle in middles]
    return y[0] - np.array(levels)


@pytest.mark.parametrize(
    "values",
    [
        [1.0],
        [3.0] * 20,
        [0.0] * 20,
        [1e8, 1e8 + 1e-6],
        [*np.linspace(0, 1, 500), 1e30],
        [-3e38, 3e38],
    ],
)
def test_extreme_energies_can_be_drawn(values):
    plot = plot_energies("a $task", TaskEnergies(tuple(values), tuple(values), ()))
    assert "restored" not in plot.caption
    assert "not finite" not in plot.caption
    assert drawing(plot).tag == f"{SVG}svg"


def test_energies_that_are_not_finite_are_counted():
    plot = plot_energies("t", TaskEnergies((1.0, math.nan), (2.0, math.inf), (math.nan,)))
    assert plot.caption == "mean energies: clean 1, corrupted 2; 3 energies are not finite"
    assert plot_energies("t", TaskEnergies((math.nan,), (), ())) is None


def test_the_same_run_gives_the_same_plots_and_settings_stay(run):
    def plots():
        one = with_metrics(run, step=[1, 2], loss=[1.0, 20.0])
        return [*plot_curves(one), plot_energies("t", run.energies["masking"])]

    before = dict(mpl.rcParams)
    assert plots() == plots()
    assert dict(mpl.rcParams) == before
    assert pyplot.get_fignums() == []
