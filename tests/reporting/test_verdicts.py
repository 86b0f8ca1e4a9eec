import math
from dataclasses import replace

import numpy as np
import pytest
from fake_run import all_rows, judged

from backfold.evaluation.results import Row
from backfold.reporting.verdicts import Measure, health_verdict, measure_health, payoff

GAIN, FILL, AUROC, RANK, LOSS, NORM, WAIT, KNN = range(8)
WON = {"pretrained": 80.0, "before": 60.0, "pixels": 70.0}


@pytest.mark.parametrize(
    ("accuracies", "state", "headline"),
    [
        (WON, "good", "Yes: ahead of before, pixels in all cases: 1"),
        (WON | {"pretrained": 60.0, "before": 80.0}, "bad", "No: the weights before pretraining "
         "are not beaten in knn, few and clearly ahead there; pixels are not beaten in"),
        (WON | {"pixels": 90.0}, "watch", "In part: pixels are not beaten in knn, few and clearly"),
        (WON | {"before": 80.0, "random": 50.0}, "bad", "No: the weights before pretraining are"),
        ({"pretrained": 80.0, "from_scratch": 90.0}, "bad", "No: training from scratch is not"),
        ({"pretrained": 80.0, "pixels": 70.0}, "unknown", "Not known"),
    ],
)  # fmt: skip
def test_pretraining_paid_where_it_is_ahead_of_all_that_is_simpler(accuracies, state, headline):
    verdict = payoff(judged("knn", "few", **accuracies))
    assert verdict.state == state
    assert verdict.headline.startswith(headline)


def test_what_is_within_the_spread_or_not_finite_is_no_gain():
    for paid, lead, spread in (
        ("Yes", 0.6, 0.0), ("No", 0.5, 0.0), ("No", 2.0, 2.1), ("Yes", 2.1, 2.0),
        ("No", -5.0, 1.0), ("No", math.nan, 0.0), ("No", 5.0, math.nan),
    ):  # fmt: skip
        row = Row("linear", "all", "pretrained over before", "accuracy (%)", lead, spread, 3)
        assert payoff([row]).headline.startswith(paid), (lead, spread)


def test_unbeaten_places_are_counted_and_come_first_and_other_protocols_do_not_count():
    verdict = payoff(all_rows())
    assert verdict.headline.startswith("In part: pixels are not beaten in knn, 10 labels")
    assert len(verdict.sentences) == 6
    assert verdict.sentences[0].startswith("knn, 10 labels a class: ahead of before (+5.0")
    assert "behind pixels (-2.0" in verdict.sentences[0]
    more = [*all_rows(), *judged("finetune", "few", pretrained=60.0, before=50.0, pixels=60.0)]
    assert "not beaten in 2 of 7 cases and clearly ahead in 1 of them" in payoff(more).headline
    both = [replace(row, data=name) for name in "ab" for row in judged("knn", "few", **WON)]
    told = [each.partition(":")[0] for each in payoff(both).sentences]
    assert told == ["knn, few, on a", "knn, few, on b"]
    other = [row for row in all_rows() if row.protocol in ("layers", "energy", "restoration")]
    assert payoff(other) == payoff([])
    assert payoff([]).state == "unknown"


def gains(*values: float, fill: float = 5.0) -> dict:
    psnr = {"psnr_corrupted_db": 10.0, "psnr_mean_fill_db": fill}
    return {"tasks": {f"{v}": psnr | {"psnr_restored_db": 10 + v} for v in values}}


def aurocs(*values: float) -> list[dict]:
    return [{"tasks": {f"{value}": {"auroc": value} for value in values}}]


def looks(name: str, *values: float) -> list[dict]:
    return [{"tasks": {}, "embedding_size": 192, name: value} for value in values]


@pytest.mark.parametrize(
    ("number", "good", "watch", "bad"),
    [
        (GAIN, [gains(0.5, 2.0)], [gains(2.0, -1.0)], [gains(1.0, -2.0)]),
        (GAIN, [gains(-1.0), gains(2.0)], [gains(2.0, 0.0)], [gains(2.0), gains(-1.0)]),
        (FILL, [gains(1.0, fill=10.5)], [gains(3.0, 1.0, fill=11.5)], [gains(1.0, fill=12.0)]),
        (AUROC, aurocs(0.913), aurocs(0.55), aurocs(0.5)),
        (AUROC, aurocs(0.6, 0.7), aurocs(0.9, 0.5), aurocs(0.9, math.nan)),
        (RANK, looks("rank_me", 48.0), looks("rank_me", 9.6), looks("rank_me", 2.0)),
        (KNN, looks("knn", 60, 70, 69), looks("knn", 60, 70, 65), looks("knn", 60, 57.9)),
        (KNN, looks("knn", 60, 61), looks("knn", 60, 60), looks("knn", 60, math.nan)),
    ],
)
def test_states_of_looks(number, good, watch, bad):
    found = [measure_health(given, {}, 512)[number].state for given in (good, watch, bad)]
    assert found == ["good", "watch", "bad"]


def test_states_of_columns():
    for number, name, *states in (
        (LOSS, "loss", np.linspace(2, 1, 101), np.linspace(1, 2, 101), [2.0, math.nan, 1.0]),
        (NORM, "gradient_norm", [1.0, 1.0, 10.0], [1.0, 1.0, 10.1], [1.0, math.inf]),
        (WAIT, "data_wait", [0.9, 0.01, 0.02], [0.06, 0.06], [0.2, 0.2]),
    ):
        measures = [measure_health([], {name: np.array(values)}, 512) for values in states]
        assert [found[number].state for found in measures] == ["good", "watch", "bad"]


def test_rank_is_limited_by_the_images_and_too_little_measured_is_unknown():
    assert measure_health(looks("rank_me", 8.0), {}, 16)[RANK].state == "good"
    measures = measure_health(looks("knn", 60), {"loss": np.array([1.0])}, 512)
    assert {measure.state for measure in measures} == {"unknown"}


def test_the_worst_measure_decides_on_health():
    for states, beginning in {
        "good good": "Yes: all 2 measures",
        "good unknown": "Yes: all 1 taken measures",
        "good watch unknown": "Yes, but watch 1 of 2",
        "bad watch good": "No: 1 of 3 measures is",
        "unknown": "Not known",
    }.items():
        measures = [Measure(f"a {state} one", "more", "1", state) for state in states.split()]
        verdict = health_verdict(measures, {"masking": 4.2})
        assert verdict.headline.startswith(beginning)
        assert "4.2 dB closer" in verdict.sentences[0]
        assert any("a bad one" in line for line in verdict.sentences) == ("bad" in states)
