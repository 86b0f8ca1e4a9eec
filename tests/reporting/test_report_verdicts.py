import math
from dataclasses import replace

import pytest
from test_report_reading import health_entry, write_run

from backfold.evaluation import EvaluationRow
from backfold.reporting.health import Measure
from backfold.reporting.reading import read_run
from backfold.reporting.records import HealthEntry, TaskHealth
from backfold.reporting.verdicts import health_verdict, payoff_verdict, restoration_sentences

COMMAND = "backfold evaluate --checkpoint RUN"


@pytest.fixture
def bare(tmp_path):
    return read_run(write_run(tmp_path / "bare", parts=False))


def rows(*accuracies: tuple, protocol: str = "linear") -> list[EvaluationRow]:
    """Rows for (labels, pretrained, untrained, deviation of both)."""
    return [
        EvaluationRow(protocol, labels, backbone, accuracy, std)
        for labels, pretrained, untrained, std in accuracies
        for backbone, accuracy in (("untrained", untrained), ("pretrained", pretrained))
    ]


def payoff(run, *evaluation: EvaluationRow):
    return payoff_verdict(replace(run, evaluation=evaluation), COMMAND)


def looked_at(gain: float | None) -> HealthEntry:
    restored = None if gain is None else 12.0 + gain
    task = TaskHealth(12.0, restored, 5.0, 1.0, 0.9, None, None, None, None)
    entry = health_entry() | {"tasks": {"masking": task}}
    return HealthEntry(**entry)


@pytest.mark.parametrize(
    ("gain", "sentence"),
    [
        (4.2, "Restored images are 4.2 dB closer to the clean ones than the corrupted ones"),
        (-1.26, "Restored images are 1.3 dB further from the clean ones than the corrupted ones"),
        (0.04, "Restored images are as far from the clean ones as the corrupted ones"),
        (math.nan, "Restored images are not finite, or their distance is not"),
        (None, "How close restored images are to the clean ones was not measured"),
    ],
)
def test_restoration_in_words(gain, sentence):
    assert restoration_sentences(looked_at(gain)) == [f"{sentence} (masking)."]


def test_a_win_in_words(bare):
    verdict = payoff(bare, *rows(("all", 81.2, 76.0, 0.0)))
    assert verdict.state == "good"
    assert verdict.headline == "Yes: better than the untrained backbone in the only comparison"
    assert verdict.sentences == (
        "Linear probe, all labels: 81.2 % pretrained, 76.0 % untrained: a gain of 5.2 points.",
    )


def test_a_loss_in_words(bare):
    evaluation = rows(("all", 70.0, 76.0, 0.0), (10, 50.0, 60.5, 2.0), protocol="knn")
    verdict = payoff(bare, *evaluation)
    assert verdict.state == "bad"
    assert verdict.headline == "No: worse than the untrained backbone in all 2 comparisons"
    assert verdict.sentences == (
        "kNN, all labels: 70.0 % pretrained, 76.0 % untrained: a loss of 6.0 points.",
        "kNN, 10 labels a class: 50.0 % pretrained, 60.5 % untrained: a loss of 10.5 points.",
    )


@pytest.mark.parametrize(
    ("accuracies", "state", "headline"),
    [
        (
            [("all", 80.0, 70.0, 0.0), (10, 40.0, 50.0, 1.0)],
            "watch",
            "In part: clearly better in 1, clearly worse in 1 of 2 comparisons",
        ),
        (
            [("all", 70.0, 80.0, 0.0), (10, 50.0, 50.0, 1.0)],
            "bad",
            "No: clearly better in 0, clearly worse in 1 of 2 comparisons",
        ),
        (
            [("all", 80.5, 80.0, 0.0), (10, 51.0, 50.0, 1.0)],
            "watch",
            "No clear difference in all 2 comparisons",
        ),
        (
            [("all", 80.6, 80.0, 0.0), (10, 51.5, 50.0, 1.0)],
            "good",
            "Yes: better than the untrained backbone in all 2 comparisons",
        ),
    ],
)
def test_only_clear_differences_count(bare, accuracies, state, headline):
    verdict = payoff(bare, *rows(*accuracies))
    assert (verdict.state, verdict.headline) == (state, headline)


def test_no_clear_difference_in_words(bare):
    verdict = payoff(bare, *rows((10, 51.0, 50.0, 1.0)))
    assert verdict.sentences == (
        "Linear probe, 10 labels a class: 51.0 % pretrained, 50.0 % untrained: "
        "no clear difference.",
    )


def test_without_an_evaluation_the_command_and_what_training_saw(tmp_path):
    run = replace(read_run(write_run(tmp_path / "run")), evaluation=())
    verdict = payoff_verdict(run, COMMAND)
    assert (verdict.state, verdict.headline) == ("unknown", "Not known: the run was not evaluated")
    assert verdict.sentences == (
        "During training, kNN accuracy on held-out images went from 70.0 % (step 0) to "
        "74.0 % (step 1,200).",
        f"Evaluate it: {COMMAND}",
    )


@pytest.mark.parametrize("untrained", [None, math.nan])
def test_without_an_untrained_accuracy_nothing_is_known(bare, untrained):
    evaluation = [EvaluationRow("linear", "all", "pretrained", 81.2, 0.0)]
    if untrained is not None:
        evaluation.append(EvaluationRow("linear", "all", "untrained", untrained, 0.0))
    verdict = payoff(bare, *evaluation)
    assert verdict.state == "unknown"
    assert "not compared with an untrained backbone" in verdict.headline
    assert verdict.sentences[0].startswith("Linear probe, all labels: 81.2 % pretrained")


@pytest.mark.parametrize(
    ("states", "state", "headline"),
    [
        ("ggg", "good", "Yes: all 3 measures are good"),
        ("ggu", "good", "Yes: all 2 taken measures are good"),
        ("gwu", "watch", "Yes, but watch 1 of 2 measures"),
        ("bwg", "bad", "No: 1 of 3 measures is bad"),
        ("bbg", "bad", "No: 2 of 3 measures are bad"),
        ("uuu", "unknown", "Not known: nothing was measured"),
    ],
)
def test_the_worst_measure_decides_on_health(bare, states, state, headline):
    names = {"g": "good", "w": "watch", "b": "bad", "u": "unknown"}
    measures = [Measure(f"measure {letter}", "1", "more", names[letter]) for letter in states]
    verdict = health_verdict(bare, measures)
    assert (verdict.state, verdict.headline) == (state, headline)
    assert ("Bad: measure b." in verdict.sentences) == (states.count("b") == 1)
    assert ("To watch: measure w." in verdict.sentences) == ("w" in states)


@pytest.mark.parametrize(
    ("steps", "sentence"),
    [
        (1200, "Training finished: 1,200 steps."),
        (1100, "Training has not finished: 1,100 of 1,200 steps."),
    ],
)
def test_an_unfinished_training_is_said_first(bare, steps, sentence):
    run = replace(bare, facts=replace(bare.facts, steps=steps))
    assert health_verdict(run, []).sentences[0] == sentence
