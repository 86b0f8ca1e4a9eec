"""Verdicts in words, derived from the numbers: is the run healthy, and did pretraining pay?"""

import math
from collections.abc import Sequence
from dataclasses import dataclass

from backfold.evaluation.protocol import EvaluationRow
from backfold.reporting import wording
from backfold.reporting.health import Measure, State
from backfold.reporting.records import HealthEntry, Run

# A difference between accuracies counts if it exceeds this many points, and the draws' deviations
# (pretrained and untrained, added in quadrature).
CLEAR_DIFFERENCE_POINTS = 0.5


@dataclass(frozen=True)
class Verdict:
    """An answer: one headline with its state, and the sentences that it rests on."""

    state: State
    headline: str
    sentences: tuple[str, ...]


@dataclass(frozen=True)
class Comparison:
    """Both backbones under one protocol and number of labels; None where one was not evaluated."""

    protocol: str
    labels: int | str
    pretrained: EvaluationRow | None
    untrained: EvaluationRow | None

    @property
    def difference(self) -> float | None:
        """Pretrained minus untrained in points; None unless both are finite."""
        if self.pretrained is None or self.untrained is None:
            return None
        pair = (self.pretrained.accuracy_mean, self.untrained.accuracy_mean)
        return pair[0] - pair[1] if all(map(wording.is_finite, pair)) else None

    @property
    def is_clear(self) -> bool:
        """Whether the difference is beyond `CLEAR_DIFFERENCE_POINTS` and the draws' deviations."""
        if self.difference is None or self.pretrained is None or self.untrained is None:
            return False
        deviation = math.hypot(self.pretrained.accuracy_std or 0, self.untrained.accuracy_std or 0)
        return abs(self.difference) > max(CLEAR_DIFFERENCE_POINTS, deviation)


def compare(rows: Sequence[EvaluationRow]) -> list[Comparison]:
    """One comparison for each protocol and number of labels, in the order of the rows."""
    cells = {(row.protocol, row.labels, row.backbone): row for row in rows}
    return [
        Comparison(
            protocol,
            labels,
            cells.get((protocol, labels, "pretrained")),
            cells.get((protocol, labels, "untrained")),
        )
        for protocol, labels in dict.fromkeys((row.protocol, row.labels) for row in rows)
    ]


def health_verdict(run: Run, measures: Sequence[Measure]) -> Verdict:
    """Is the run healthy? The worst measure decides."""
    sentences = [*_progress(run), *restoration_sentences(run.latest)]
    if run.latest is None:
        sentences.append("Restorations and energies have not been measured.")
    names = {
        state: [measure.name for measure in measures if measure.state == state]
        for state in ("good", "watch", "bad", "unknown")
    }
    for state, beginning in (("bad", "Bad"), ("watch", "To watch")):
        if names[state]:
            sentences.append(f"{beginning}: {'; '.join(names[state])}.")
    measured = len(measures) - len(names["unknown"])
    if measured == 0:
        return Verdict("unknown", "Not known: nothing was measured", tuple(sentences))
    if names["bad"]:
        verb = "is" if len(names["bad"]) == 1 else "are"
        headline = f"No: {len(names['bad'])} of {measured} measures {verb} bad"
        return Verdict("bad", headline, tuple(sentences))
    if names["watch"]:
        headline = f"Yes, but watch {len(names['watch'])} of {measured} measures"
        return Verdict("watch", headline, tuple(sentences))
    taken = f"all {measured} measures" if not names["unknown"] else f"all {measured} taken measures"
    return Verdict("good", f"Yes: {taken} are good", tuple(sentences))


def _progress(run: Run) -> list[str]:
    steps, total = run.facts.steps, run.facts.total_steps
    if not wording.is_finite(steps) or not wording.is_finite(total):
        return []
    assert steps is not None
    assert total is not None
    if steps < total:
        return [
            f"Training has not finished: {wording.whole(steps)} of {wording.whole(total)} steps."
        ]
    return [f"Training finished: {wording.whole(steps)} steps."]


def restoration_sentences(latest: HealthEntry | None) -> list[str]:
    """For each task: how much closer to the clean images restoration leads, if it does."""
    if latest is None:
        return []
    return [_restoration(task, row.gain_db) for task, row in latest.tasks.items()]


def _restoration(task: str, gain: float | None) -> str:
    if gain is None:
        return f"How close restored images are to the clean ones was not measured ({task})."
    if not math.isfinite(gain):
        return f"Restored images are not finite, or their distance is not ({task})."
    if round(gain, 1) == 0:
        return f"Restored images are as far from the clean ones as the corrupted ones ({task})."
    return (
        f"Restored images are {wording.decimals(abs(gain), 1, 'dB')} "
        f"{'closer to' if gain > 0 else 'further from'} the clean ones than the corrupted ones "
        f"({task})."
    )


def payoff_verdict(run: Run, command: str) -> Verdict:
    """Did pretraining pay? Counts clear wins and losses against the untrained backbone.

    Args:
        run: with or without an evaluation.
        command: the one that evaluates this run.
    """
    headline: str
    state: State
    comparisons = compare(run.evaluation)
    sentences = tuple(_comparison_sentence(comparison) for comparison in comparisons)
    known = [comparison for comparison in comparisons if comparison.difference is not None]
    if not known:
        reason = "evaluated" if not comparisons else "compared with an untrained backbone"
        hints = (*sentences, *_knn_hint(run), f"Evaluate it: {command}")
        return Verdict("unknown", f"Not known: the run was not {reason}", hints)
    wins = sum(comparison.is_clear and (comparison.difference or 0) > 0 for comparison in known)
    losses = sum(comparison.is_clear and (comparison.difference or 0) < 0 for comparison in known)
    total = wording.counted(len(known), "comparison", "comparisons")
    every = "the only comparison" if len(known) == 1 else f"all {total}"
    if wins == len(known):
        headline, state = f"Yes: better than the untrained backbone in {every}", "good"
    elif losses == len(known):
        headline, state = f"No: worse than the untrained backbone in {every}", "bad"
    elif not wins and not losses:
        headline, state = f"No clear difference in {every}", "watch"
    else:
        beginning, state = ("In part", "watch") if wins else ("No", "bad")
        headline = f"{beginning}: clearly better in {wins}, clearly worse in {losses} of {total}"
    return Verdict(state, headline, sentences)


def _comparison_sentence(comparison: Comparison) -> str:
    beginning = (
        f"{wording.protocol_name(comparison.protocol)}, {wording.labels_phrase(comparison.labels)}:"
    )
    pair = ", ".join(
        f"{wording.decimals(row.accuracy_mean, 1, '%')} {name}"
        for row, name in (
            (comparison.pretrained, "pretrained"),
            (comparison.untrained, "untrained"),
        )
        if row is not None
    )
    difference = comparison.difference
    if difference is None:
        return f"{beginning} {pair}."
    if not comparison.is_clear:
        return f"{beginning} {pair}: no clear difference."
    points = wording.decimals(abs(difference), 1, "points")
    return f"{beginning} {pair}: {'a gain' if difference > 0 else 'a loss'} of {points}."


def _knn_hint(run: Run) -> list[str]:
    looks = [entry for entry in run.history if wording.is_finite(entry.knn)]
    if len(looks) < 2:
        return []
    first, last = looks[0], looks[-1]
    return [
        f"During training, kNN accuracy on held-out images went from "
        f"{wording.decimals(first.knn, 1, '%')} (step {wording.whole(first.step)}) to "
        f"{wording.decimals(last.knn, 1, '%')} (step {wording.whole(last.step)})."
    ]
