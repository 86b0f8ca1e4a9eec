import base64
import math
import re
from xml.etree import ElementTree

import numpy as np
import pytest
from fake_run import all_rows, by_severity

from backfold.evaluation.results import Row
from backfold.reporting.plots import HISTOGRAM_BINS, plot_curves, plot_energies, plot_rows


def drawn_points(plot, colour="#0072b2") -> list[list[tuple[float, float]]]:
    """The points of every line in this colour, one list for each unbroken piece."""
    svg = ElementTree.fromstring(base64.b64decode(plot.data_uri.split(",")[1]))
    pieces = []
    for path in svg.iter("{http://www.w3.org/2000/svg}path"):
        if f"stroke: {colour}" in path.get("style", "") and "clip-path" in path.attrib:
            for piece in path.get("d", "").split("M")[1:]:
                values = [float(number) for number in re.findall(r"-?\d+\.?\d*", piece)]
                pieces.append(list(zip(values[::2], values[1::2], strict=True)))
    return pieces


def curve(steps, values):
    return plot_curves([], {"step": np.array(steps), "energy_gap": np.array(values)})[0]


def test_a_curve_goes_through_the_values():
    (points,) = drawn_points(curve([0, 10, 30, 40], [1.0, 3.0, 2.0, 7.0]))
    x, y = np.array(points).T
    np.testing.assert_allclose((x - x[0]) / (x[-1] - x[0]), [0, 0.25, 0.75, 1], atol=1e-4)
    np.testing.assert_allclose((y - y[0]) / (y[-1] - y[0]), [0, 1 / 3, 1 / 6, 1], atol=1e-4)


def test_gaps_are_counted_and_long_curves_thinned():
    plot = curve(range(7), [1.0, 2.0, math.nan, math.inf, 4.0, 5.0, math.nan])
    assert [len(piece) for piece in drawn_points(plot)] == [2, 2]
    assert plot.caption.endswith("missing or not finite: 3")
    plot = curve(range(20_000), np.sin(np.arange(20_000)))
    assert sum(map(len, drawn_points(plot))) <= 1000
    assert plot.caption.endswith("at step 19,999")


def test_the_bars_of_the_histogram_hold_every_image():
    random = np.random.default_rng(0)
    groups = {"clean": random.normal(-3, 1, 50), "corrupted": random.normal(2, 1, 50)}
    plot = plot_energies("masking", groups)
    (outline,) = [piece for piece in drawn_points(plot) if len(piece) > HISTOGRAM_BINS]
    x, y = np.array(outline).T
    edges = np.linspace(x.min(), x.max(), HISTOGRAM_BINS + 1)
    middles = (edges[1:] + edges[:-1]) / 2
    heights = np.array([y[0] - y[np.flatnonzero(x <= middle)[-1]] for middle in middles])
    low, high = np.percentile(np.concatenate(list(groups.values())), [0.5, 99.5])
    expected, _ = np.histogram(np.clip(groups["clean"], low, high), HISTOGRAM_BINS, (low, high))
    np.testing.assert_allclose(50 * heights / heights.sum(), expected, atol=1e-2)


@pytest.mark.parametrize("values", [[1.0, math.nan], [1e8, 1e8 + 1e-6], [0, 1e30], [-3e38, 3e38]])
def test_extreme_energies_can_be_drawn_and_others_are_counted(values):
    plot = plot_energies("a $task", {"clean": np.array(values), "restored": np.array([math.inf])})
    assert drawn_points(plot)
    assert plot.caption.endswith(f"not finite: {1 + np.isnan(values).sum()}")


def test_a_panel_for_each_corruption_through_the_means_from_the_clean_images_on():
    rows = by_severity("adaptation", "accuracy (%)", ["blur", "noise"], ["as it is", "a over b"])
    rows.append(Row.of("adaptation", "clean", "as it is", "accuracy (%)", [0.9]))
    blur, noise = plot_rows([*rows, *by_severity("adaptation", "SSIM", ["gray"], ["as it is"])])
    assert (blur.title, noise.title) == ("blur", "noise")
    (line,) = [piece for piece in drawn_points(blur) if len(piece) == 6]
    y, means = np.array(line)[:, 1], np.array([0.9, 1 / 2, 1 / 3, 1 / 4, 1 / 5, 1 / 6])
    expected = (means - means[0]) / (means[-1] - means[0])
    np.testing.assert_allclose((y - y[0]) / (y[-1] - y[0]), expected, atol=1e-3)


def test_layers_have_a_panel_a_pooling_and_pixels_are_level():
    average, largest = plot_rows([row for row in all_rows() if row.protocol == "layers"])
    assert (average.title, largest.title) == ("linear, average", "linear, max")
    (ours,) = [piece for piece in drawn_points(average) if len(piece) == 12]
    assert np.argmin(np.array(ours)[:, 1]) == 12 - 5  # 80 + 2 n - n²/5 is largest at layer -5
    (pixels,) = [piece for piece in drawn_points(average, "#009e73") if len(piece) == 12]
    assert len({y for _, y in pixels}) == 1
