import math
from dataclasses import replace

import numpy as np
import pytest
from fake_run import all_rows, judged, right

from backfold.evaluation.results import OVER, Row, accuracy_rows
from backfold.reporting.verdicts import Look, Measure, health_verdict, measure_health, payoff

GAIN, FILL, AUROC, RANK, LOSS, NORM, WAIT, KNN = range(8)


def swapped(rows: list[Row], first: str, second: str) -> list[Row]:
    """The rows of an evaluation in which these two had each other's results."""
    names = {first: second, second: first}
    correct: dict[tuple[str, str], dict] = {}
    for row in rows:
        if OVER not in row.contender:
            name = names.get(row.contender, row.contender)
            correct.setdefault((row.protocol, row.case), {})[name] = right(row.mean)
    return [
        row
        for (protocol, case), found in correct.items()
        for row in accuracy_rows(
            protocol, case, {n: found[n] for n in sorted(found, key="pretrained".__ne__)}
        )
    ]


WON = [
    *judged("knn", "all labels", pretrained=80.0, before=60.0, pixels=70.0),
    *judged("linear", "10 labels a class", pretrained=85.0, before=62.0, pixels=75.0, random=50.0),
]


def test_ahead_of_everything_everywhere_is_a_yes():
    verdict = payoff(WON)
    assert verdict.state == "good"
    assert verdict.headline.startswith("Yes")
    assert all(name in verdict.headline for name in ("before", "pixels", "random"))


def test_swapping_pretrained_and_before_flips_the_verdict():
    assert payoff(swapped(WON, "pretrained", "pretrained")).headline == payoff(WON).headline
    verdict = payoff(swapped(WON, "pretrained", "before"))
    assert verdict.state == "bad"
    assert verdict.headline.startswith("No")
    assert "clearly better" in verdict.headline
    # Names swapped in the rows themselves, where no difference is left that is the pretrained's.
    renamed = [replace(row, contender=flip(row.contender)) for row in WON]
    assert payoff(renamed).headline.startswith("No")


def flip(contender: str) -> str:
    names = {"pretrained": "before", "before": "pretrained"}
    return OVER.join(names.get(name, name) for name in contender.split(OVER))


def test_pixels_ahead_in_one_case_are_named_with_the_place():
    more = judged("knn", "10 labels a class", pretrained=50.0, before=40.0, pixels=52.0)
    verdict = payoff([*WON, *more])
    assert verdict.state == "watch"
    assert verdict.headline.startswith("In part: pixels are not beaten in kNN, 10 labels a class")
    assert "weights before" not in verdict.headline
    assert verdict.sentences[0].startswith("kNN, 10 labels a class: ahead of before (+10.0")
    assert "behind pixels (-2.0" in verdict.sentences[0]


def test_pixels_ahead_everywhere_are_still_in_part():
    verdict = payoff(swapped(WON, "pretrained", "pixels"))
    assert verdict.headline.startswith("In part: pixels are not beaten in")


@pytest.mark.parametrize(
    ("lead", "spread", "paid"),
    [(0.6, 0.0, True), (0.5, 0.0, False), (2.0, 2.1, False), (2.1, 2.0, True), (-5.0, 1.0, False),
     (math.nan, 0.0, False), (5.0, math.nan, False)],
)  # fmt: skip
def test_what_is_within_the_spread_is_no_gain(lead, spread, paid):
    rows = [
        Row("linear", "all labels", "pretrained", "accuracy (%)", 70.0, 9.0, 3),
        Row("linear", "all labels", "before", "accuracy (%)", 70.0 - lead, 9.0, 3),
        Row("linear", "all labels", "pretrained over before", "accuracy (%)", lead, spread, 3),
    ]
    verdict = payoff(rows)
    assert verdict.headline.startswith("Yes" if paid else "No")
    # Without the paired difference the contenders' own spreads, 12.7 together, hide it.
    assert payoff(rows[:2]).headline.startswith("No")


def test_a_run_that_started_from_weights_and_learned_nothing_is_a_no():
    known = {"before": 85.0, "random": 50.0}
    rows = [
        *judged("knn", "all labels", pretrained=85.0, pixels=60.0, **known),
        *judged("linear", "all labels", pretrained=85.2, pixels=60.0, **known),
        *judged("finetune", "all labels", pretrained=85.0, before=85.0, from_scratch=70.0),
    ]
    verdict = payoff(rows)
    assert verdict.state == "bad"
    assert verdict.headline.startswith("No: the weights before pretraining are not beaten in any")


def test_fine_tuning_is_compared_with_training_from_scratch():
    won = judged("finetune", "all labels", pretrained=90.0, from_scratch=80.0)
    assert payoff(won).headline.startswith("Yes")
    lost = judged("finetune", "all labels", pretrained=80.0, from_scratch=90.0)
    assert payoff(lost).headline.startswith("No: training from scratch is not beaten")


def test_other_protocols_do_not_count_and_segmentation_does():
    rows = all_rows()
    other = [row for row in rows if row.protocol in ("layers", "energy", "restoration")]
    assert payoff([*WON, *other]) == payoff(WON)
    segmentation = [row for row in rows if row.protocol == "segmentation"]
    assert payoff(segmentation).headline.startswith("Yes")
    assert payoff(rows).headline.startswith("In part: pixels are not beaten in kNN, 10 labels")


def test_nothing_is_known_without_rows_or_without_anything_untrained():
    pixels = judged("knn", "all labels", pretrained=80.0, pixels=70.0)
    for rows in ([], [row for row in all_rows() if row.protocol == "energy"], pixels):
        verdict = payoff(rows)
        assert (verdict.state, verdict.headline[:9]) == ("unknown", "Not known")


def test_many_unbeaten_places_are_counted():
    rows = [
        row
        for case in ("1 label a class", "5 labels a class", "10 labels a class", "all labels")
        for row in judged("knn", case, pretrained=60.0, before=50.0, pixels=60.0)
    ]
    rows += judged("linear", "all labels", pretrained=60.0, before=50.0, pixels=50.0)
    assert payoff(rows).headline == "In part: pixels are not beaten in 4 of 5 cases"
    assert len(payoff(rows).sentences) == 5


def gains(*values: float, fill: float = 5.0) -> Look:
    tasks = {
        f"task{i}": {
            "psnr_corrupted_db": 10.0, "psnr_restored_db": 10.0 + gain, "psnr_mean_fill_db": fill
        }
        for i, gain in enumerate(values)
    }  # fmt: skip
    return Look(1, {}, tasks)


def state(number: int, *looks: Look, held_out: float = 512, **columns) -> str:
    metrics = {name: np.array(values, float) for name, values in columns.items()}
    return measure_health(looks, metrics, held_out)[number].state


def look(**measures: float) -> Look:
    return Look(1, measures, {})


@pytest.mark.parametrize(
    ("number", "looks", "expected"),
    [
        (GAIN, [gains(0.5, 2.0)], "good"),
        (GAIN, [gains(2.0, -1.0)], "watch"),
        (GAIN, [gains(1.0, -2.0)], "bad"),
        (GAIN, [gains(0.0)], "bad"),
        (GAIN, [gains(1.0, math.nan)], "bad"),
        (GAIN, [gains(2.0), gains(-1.0)], "bad"),
        (FILL, [gains(1.0, fill=12.0)], "bad"),
        (FILL, [gains(1.0, fill=10.5)], "good"),
        (AUROC, [look(auroc=0.913)], "good"),
        (AUROC, [look(auroc=0.55)], "watch"),
        (AUROC, [look(auroc=0.5)], "bad"),
        (AUROC, [look(auroc=math.nan)], "bad"),
        (AUROC, [Look(1, {"auroc": 0.7}, {"a": {"auroc": 0.9}, "b": {"auroc": 0.5}})], "watch"),
        (RANK, [look(rank_me=48.0, embedding_size=192)], "good"),
        (RANK, [look(rank_me=9.6, embedding_size=192)], "watch"),
        (RANK, [look(rank_me=2.0, embedding_size=192)], "bad"),
        (RANK, [look(rank_me=math.nan, embedding_size=192)], "bad"),
        (KNN, [look(knn=60), look(knn=70), look(knn=69)], "good"),
        (KNN, [look(knn=60), look(knn=70), look(knn=65)], "watch"),
        (KNN, [look(knn=60), look(knn=60)], "watch"),
        (KNN, [look(knn=60), look(knn=57.9)], "bad"),
        (KNN, [look(knn=60), look(knn=math.nan)], "bad"),
        (KNN, [look(knn=60)], "unknown"),
    ],
)
def test_states_of_looks(number, looks, expected):
    assert state(number, *looks) == expected


def test_rank_is_limited_by_the_images():
    assert state(RANK, look(rank_me=8.0, embedding_size=192), held_out=16) == "good"


@pytest.mark.parametrize(
    ("number", "columns", "expected"),
    [
        (LOSS, {"loss": np.linspace(2, 1, 101)}, "good"),
        (LOSS, {"loss": np.linspace(1, 2, 101)}, "watch"),
        (LOSS, {"loss": [1.0]}, "unknown"),
        (LOSS, {"loss": [2.0, math.nan, 1.0]}, "bad"),
        (NORM, {"gradient_norm": [1.0, 1.0, 10.0]}, "good"),
        (NORM, {"gradient_norm": [1.0, 1.0, 10.1]}, "watch"),
        (NORM, {"gradient_norm": [1.0, math.inf]}, "bad"),
        (WAIT, {"data_wait": [0.9, 0.01, 0.02]}, "good"),
        (WAIT, {"data_wait": [0.05, 0.05]}, "watch"),
        (WAIT, {"data_wait": [0.2, 0.2]}, "bad"),
        (WAIT, {"data_wait": [math.nan]}, "unknown"),
    ],
)
def test_states_of_columns(number, columns, expected):
    assert state(number, **columns) == expected


def test_nothing_measured_is_unknown():
    assert {measure.state for measure in measure_health([], {}, 512)} == {"unknown"}


@pytest.mark.parametrize(
    ("states", "expected", "beginning"),
    [
        ("ggg", "good", "Yes: all 3 measures"),
        ("ggu", "good", "Yes: all 2 taken measures"),
        ("gwu", "watch", "Yes, but watch 1 of 2"),
        ("bwg", "bad", "No: 1 of 3 measures is"),
        ("bbg", "bad", "No: 2 of 3 measures are"),
        ("uuu", "unknown", "Not known"),
    ],
)
def test_the_worst_measure_decides_on_health(states, expected, beginning):
    names = {"g": "good", "w": "watch", "b": "bad", "u": "unknown"}
    measures = [Measure(f"measure {letter}", "more", "1", names[letter]) for letter in states]
    verdict = health_verdict(measures, gains(4.2))
    assert verdict.state == expected
    assert verdict.headline.startswith(beginning)
    assert "4.2 dB closer" in verdict.sentences[0]
    assert any("measure b" in sentence for sentence in verdict.sentences) == ("b" in states)
