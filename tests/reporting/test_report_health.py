import json
import math
from dataclasses import replace

import numpy as np
import pytest
from test_report_reading import FACTS, health_entry, write_run

from backfold.reporting.health import measure_health
from backfold.reporting.reading import read_run

GAIN = "Restoration against doing nothing"
MEAN_FILL = "Restoration against the mean fill"
AUROC = "Energy tells corrupted from clean (AUROC)"
RANK = "Effective rank of the embeddings (RankMe)"
LOSS, NORM, WAIT = "Training loss", "Gradient norm", "Waiting for images"
KNN = "kNN accuracy on held-out images"


@pytest.fixture
def measure(tmp_path):
    """Measures by name of a run with these entries of the history and columns of metrics."""
    folder = write_run(tmp_path / "run")

    def measured(*entries: dict, facts: dict | None = None, **columns: list[float]) -> dict:
        (folder / "health.json").write_text(json.dumps({"history": entries}))
        (folder / "run.json").write_text(json.dumps(FACTS | (facts or {})))
        metrics = {"step": np.arange(99.0)} | {k: np.array(v, float) for k, v in columns.items()}
        run = replace(read_run(folder), metrics=metrics)
        return {measure.name: measure for measure in measure_health(run)}

    return measured


def task_gains(*gains: float, mean_fill: float = 5.0) -> dict:
    return {
        f"task{index}": {
            "psnr_corrupted_db": 10.0,
            "psnr_restored_db": 10.0 + gain,
            "psnr_mean_fill_db": mean_fill,
        }
        for index, gain in enumerate(gains)
    }


@pytest.mark.parametrize(
    ("gains", "state", "value", "note"),
    [
        ((0.5, 2.0), "good", "+1.2 dB on average", ""),
        ((2.0, -1.0), "watch", "+0.5 dB on average", "not above 0: task1"),
        ((1.0, -2.0), "bad", "-0.5 dB on average", "not above 0: task1"),
        ((0.0,), "bad", "0.0 dB", "not above 0: task0"),
        ((1.0, math.nan), "bad", "not finite on average", "not above 0: task1"),
    ],
)
def test_gain_over_doing_nothing(measure, gains, state, value, note):
    found = measure(health_entry(tasks=task_gains(*gains)))[GAIN]
    assert (found.state, found.value, found.note) == (state, value, note)


def test_gain_over_the_mean_fill_is_its_own_measure(measure):
    found = measure(health_entry(tasks=task_gains(1.0, mean_fill=12.0)))
    assert found[GAIN].state == "good"
    assert (found[MEAN_FILL].state, found[MEAN_FILL].value) == ("bad", "-1.0 dB")


@pytest.mark.parametrize(
    ("auroc", "state", "value"),
    [
        (0.913, "good", "0.913"),
        (0.55, "watch", "0.550"),
        (0.5, "bad", "0.500"),
        (0.2, "bad", "0.200"),
        (math.nan, "bad", "not finite"),
        (None, "unknown", "not measured"),
    ],
)
def test_auroc(measure, auroc, state, value):
    found = measure(health_entry(auroc=auroc))[AUROC]
    assert (found.state, found.value, found.note) == (state, value, "")


@pytest.mark.parametrize("auroc", [0.268, 0.5, math.nan])
def test_a_task_at_chance_is_not_hidden_by_the_mean(measure, auroc):
    entry = health_entry(auroc=0.664)
    entry["tasks"]["denoising"]["auroc"] = auroc
    found = measure(entry)[AUROC]
    assert (found.state, found.note) == ("watch", "not above chance: denoising")


@pytest.mark.parametrize(
    ("rank", "images", "state", "value"),
    [
        (48.0, 512, "good", "48.0 of 192 (25.0 %)"),
        (9.6, 512, "watch", "9.6 of 192 (5.0 %)"),
        (2.0, 512, "bad", "2.0 of 192 (1.0 %)"),
        (8.0, 16, "good", "8.0 of 16 (50.0 %)"),
        (math.nan, 512, "bad", "not finite"),
        (None, 512, "unknown", "not measured"),
    ],
)
def test_rank_relative_to_the_largest_possible(measure, rank, images, state, value):
    found = measure(health_entry(rank_me=rank), facts={"held_out_images": images})[RANK]
    assert (found.state, found.value) == (state, value)
    assert ("limited by the 16 held-out images" in found.note) == (images == 16)


def test_loss_compares_the_ends_of_the_run(measure):
    falling = np.linspace(2.0, 1.0, 101)
    found = measure(loss=falling)[LOSS]
    # Medians of the first and last ten of 101 evenly spaced values: 4.5 steps from the ends.
    assert (found.state, found.value) == ("good", "1.96 to 1.04")
    assert measure(loss=falling[::-1])[LOSS].state == "watch"
    assert measure(loss=[1.0])[LOSS].state == "unknown"
    broken = measure(loss=[2.0, math.nan, 1.0])[LOSS]
    assert (broken.state, broken.note) == ("bad", "1 logged value is not finite")


def test_gradient_norm_must_stay_finite_and_not_grow(measure):
    assert measure(gradient_norm=[3.0, 2.0, 1.0])[NORM].state == "good"
    assert measure(gradient_norm=[1.0, 1.0, 10.0])[NORM].state == "good"
    assert measure(gradient_norm=[1.0, 1.0, 10.1])[NORM].state == "watch"
    broken = measure(gradient_norm=[1.0, math.inf, math.nan])[NORM]
    assert (broken.state, broken.value) == ("bad", "not finite")
    assert broken.note == "2 logged values are not finite"
    assert measure(gradient_norm=[math.nan])[NORM].state == "bad"


@pytest.mark.parametrize(
    ("waits", "state", "value"),
    [
        ([0.9, 0.01, 0.02], "good", "2.0 % (median)"),
        ([0.05, 0.05], "watch", "5.0 % (median)"),
        ([0.2, 0.2], "bad", "20.0 % (median)"),
        ([math.nan, 0.01], "good", "1.0 % (median)"),
        ([math.nan], "unknown", "not measured"),
    ],
)
def test_waiting_for_images(measure, waits, state, value):
    found = measure(data_wait=waits)[WAIT]
    assert (found.state, found.value) == (state, value)


@pytest.mark.parametrize(
    ("values", "state", "value", "note"),
    [
        ((60.0, 70.0, 69.0), "good", "60.0 % to 69.0 %", ""),
        ((60.0, 70.0, 65.0), "watch", "60.0 % to 65.0 %", "the best was 70.0 %"),
        ((60.0, 59.0), "watch", "60.0 % to 59.0 %", "the best was 60.0 %"),
        ((60.0, 60.0), "watch", "60.0 % to 60.0 %", "not rising"),
        ((60.0, 57.9), "bad", "60.0 % to 57.9 %", "lower than at the beginning"),
        ((60.0, math.nan), "bad", "60.0 % to not finite", "lower than at the beginning"),
        ((60.0,), "unknown", "60.0 %", "one look only so far"),
        ((None, None), "unknown", "not measured", "needs labels: --watch-labels true"),
    ],
)
def test_knn(measure, values, state, value, note):
    entries = [health_entry(step, knn=knn) for step, knn in enumerate(values)]
    found = measure(*entries)[KNN]
    assert (found.state, found.value, found.note) == (state, value, note)


def test_nothing_measured(tmp_path):
    measures = measure_health(read_run(write_run(tmp_path / "bare", parts=False)))
    assert {measure.state for measure in measures} == {"unknown"}
    assert {measure.value for measure in measures} == {"not measured"}
