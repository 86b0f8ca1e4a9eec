import base64
import math
import re
from xml.etree import ElementTree

import matplotlib as mpl
import numpy as np
import pytest
from fake_run import all_rows, by_severity
from matplotlib import pyplot

from backfold.evaluation.results import Row
from backfold.reporting.plots import HISTOGRAM_BINS, LARGEST, plot_curves, plot_energies, plot_rows

SVG = "{http://www.w3.org/2000/svg}"


def drawn_points(plot, colour="#0072b2") -> list[list[tuple[float, float]]]:
    """The points of every line in this colour, one list for each unbroken piece."""
    kind, data = plot.data_uri.split(",")
    assert kind == "data:image/svg+xml;base64"
    pieces = []
    for path in ElementTree.fromstring(base64.b64decode(data)).iter(f"{SVG}path"):
        if f"stroke: {colour}" in path.get("style", "") and "clip-path" in path.attrib:
            for piece in path.get("d", "").split("M")[1:]:
                values = [float(number) for number in re.findall(r"-?\d+\.?\d*", piece)]
                pieces.append(list(zip(values[::2], values[1::2], strict=True)))
    return pieces


def curves(**columns):
    return plot_curves([], {name: np.array(values, float) for name, values in columns.items()})


def energies(clean, corrupted=(), restored=()):
    kinds = {"clean": clean, "corrupted": corrupted, "restored": restored}
    return {name: np.array(values, float) for name, values in kinds.items()}


def test_a_curve_goes_through_the_values():
    (plot,) = curves(step=[0, 10, 30, 40], energy_gap=[1.0, 3.0, 2.0, 7.0])
    (points,) = drawn_points(plot)
    x, y = np.array(points).T
    np.testing.assert_allclose((x - x[0]) / (x[-1] - x[0]), [0, 0.25, 0.75, 1], atol=1e-4)
    np.testing.assert_allclose((y - y[0]) / (y[-1] - y[0]), [0, 1 / 3, 1 / 6, 1], atol=1e-4)


def test_values_that_are_not_finite_leave_a_gap_and_are_counted():
    values = [1.0, 2.0, math.nan, math.inf, 4.0, 5.0, math.nan]
    (plot,) = curves(step=range(7), energy_gap=values)
    assert [len(piece) for piece in drawn_points(plot)] == [2, 2]
    assert plot.caption.endswith("missing or not finite: 3")
    assert curves(step=[1, 2], loss=[math.nan, math.nan]) == []


def test_long_curves_are_thinned_but_keep_their_ends():
    steps = np.arange(20_000)
    (plot,) = curves(step=steps, energy_gap=np.sin(steps))
    assert sum(map(len, drawn_points(plot))) <= 1000
    assert plot.caption.endswith("at step 19,999")


def test_the_bars_of_the_histogram_hold_every_image():
    random = np.random.default_rng(0)
    groups = energies(random.normal(-3, 1, 50), random.normal(2, 1, 50))
    plot = plot_energies("masking", groups)
    (outline,) = [piece for piece in drawn_points(plot) if len(piece) > HISTOGRAM_BINS]
    x, y = np.array(outline).T
    edges = np.linspace(x.min(), x.max(), HISTOGRAM_BINS + 1)
    middles = (edges[1:] + edges[:-1]) / 2
    heights = np.array([y[0] - y[np.flatnonzero(x <= middle)[-1]] for middle in middles])
    low, high = np.percentile(np.concatenate(list(groups.values())), [0.5, 99.5])
    clipped = np.clip(groups["clean"], low, high)
    expected, _ = np.histogram(clipped, HISTOGRAM_BINS, (low, high))
    np.testing.assert_allclose(50 * heights / heights.sum(), expected, atol=1e-2)


@pytest.mark.parametrize(
    "values",
    [[1.0], [3.0] * 20, [1e8, 1e8 + 1e-6], [*np.linspace(0, 1, 500), 1e30], [-3e38, 3e38]],
)
def test_extreme_energies_can_be_drawn(values):
    assert drawn_points(plot_energies("a $task", energies(values, values)))


def test_energies_that_are_not_finite_are_counted():
    plot = plot_energies("t", energies([1.0, math.nan], [2.0, math.inf], [math.nan]))
    assert plot.caption == "mean energies: clean 1, corrupted 2; not finite: 3"
    assert plot_energies("t", energies([math.nan])) is None


def test_a_panel_for_each_corruption_through_the_means():
    rows = by_severity(
        "restoration", "PSNR (dB)", ["blur", "noise"], ["energy, 1 step", "identity"]
    )
    blur, noise = plot_rows([*rows, *by_severity("restoration", "SSIM", ["gray"], ["identity"])])
    assert (blur.title, noise.title) == ("blur", "noise")
    (line,) = [piece for piece in drawn_points(blur) if len(piece) == 5]
    y, means = np.array(line)[:, 1], np.array([row.mean for row in rows[::2][:5]])
    expected = (means - means[0]) / (means[-1] - means[0])
    np.testing.assert_allclose((y - y[0]) / (y[-1] - y[0]), expected, atol=1e-3)


def test_clean_images_are_severity_0_and_differences_are_no_line():
    rows = by_severity("adaptation", "accuracy (%)", ["noise"], ["as they are", "a over b"])
    rows.append(Row.of("adaptation", "clean", "as they are", "accuracy (%)", [0.9]))
    (plot,) = plot_rows(rows)
    assert [len(p) for p in drawn_points(plot) if len(p) > 2] == [6]
    assert "a over b" not in plot.alt


def test_layers_have_a_panel_a_pooling_and_pixels_are_level():
    average, largest = plot_rows([row for row in all_rows() if row.protocol == "layers"])
    assert (average.title, largest.title) == ("linear, average", "linear, max")
    (ours,) = [piece for piece in drawn_points(average) if len(piece) == 12]
    assert np.argmin(np.array(ours)[:, 1]) == 12 - 5  # 80 + 2 n - n²/5 is largest at layer -5
    (pixels,) = [piece for piece in drawn_points(average, "#009e73") if len(piece) == 12]
    assert len({y for _, y in pixels}) == 1


@pytest.mark.parametrize("mean", [math.nan, math.inf, 1e308, LARGEST])
def test_rows_that_cannot_be_drawn_leave_a_gap(mean):
    rows = by_severity("energy", "AUROC", ["a"], ["energy"])
    rows[2] = Row("energy", rows[2].case, "energy", "AUROC", mean, math.nan, 1)
    (plot,) = plot_rows(rows)
    assert [len(p) for p in drawn_points(plot) if len(p) == 2][:2] == [2, 2]
    assert plot_rows([rows[2]]) == []
    assert plot_rows([]) == []


def test_the_same_numbers_give_the_same_plots_and_settings_stay():
    def plots():
        drawn = [*curves(step=[1, 2], loss=[1.0, 20.0]), plot_energies("t", energies([1.0, 2.0]))]
        return [*drawn, *plot_rows([row for row in all_rows() if row.protocol == "energy"])]

    before = dict(mpl.rcParams)
    assert plots() == plots()
    assert dict(mpl.rcParams) == before
    assert pyplot.get_fignums() == []
