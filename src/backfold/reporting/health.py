"""Is a run healthy? Each measure with its value, what is good, and a state.

All thresholds stand here, at the top. They tell a working run from a broken one; they do not rank
runs. Where a measure has a watch range, values between the two bounds are worth an eye.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

import numpy as np

from backfold.reporting import wording
from backfold.reporting.fields import Series
from backfold.reporting.records import HealthEntry, Run

# Area under the ROC curve of telling corrupted from clean images by energy: 0.5 is chance. With a
# few hundred images, chance alone stays below 0.6.
AUROC_CHANCE, AUROC_GOOD = 0.5, 0.6
# Effective rank by the largest possible one, the number of features (or of images, if fewer): a
# collapsed backbone uses a handful of directions.
RANK_SHARE_WATCH, RANK_SHARE_GOOD = 0.02, 0.1
# kNN accuracy in points below its best so far, or below where it began.
KNN_FALL_POINTS = 2.0
# Share of the training time that is spent on waiting for images.
DATA_WAIT_GOOD, DATA_WAIT_WATCH = 0.05, 0.2
# Median gradient norm at the end of the run, as a multiple of the whole run's median.
GRADIENT_NORM_GROWTH = 10.0
# Beginning and end of a curve: this share of its rows, one at least.
ENDS_SHARE = 0.1

State = Literal["good", "watch", "bad", "unknown"]


@dataclass(frozen=True)
class Measure:
    """One line of the health panel: its name, the value in words, what is good, and the state."""

    name: str
    value: str
    good: str
    state: State
    note: str = ""


def measure_health(run: Run) -> list[Measure]:
    """All measures; those that the run has no numbers for are in the state "unknown"."""
    latest = run.latest
    return [
        _gain(latest),
        _gain_over_mean_fill(latest),
        _auroc(latest),
        _rank(latest, run.facts.held_out_images),
        _loss(run.metrics.get("loss")),
        _gradient_norm(run.metrics.get("gradient_norm")),
        _data_wait(run.metrics.get("data_wait")),
        _knn(run.history),
    ]


def _gain(latest: HealthEntry | None) -> Measure:
    gains = {} if latest is None else {task: row.gain_db for task, row in latest.tasks.items()}
    return _gain_measure(
        "Restoration against doing nothing",
        "above 0 dB for every task: restored images are closer to the clean ones than corrupted",
        gains,
    )


def _gain_over_mean_fill(latest: HealthEntry | None) -> Measure:
    tasks = {} if latest is None else latest.tasks
    return _gain_measure(
        "Restoration against the mean fill",
        "above 0 dB for every task: better than filling in the data's mean",
        {task: row.gain_over_mean_fill_db for task, row in tasks.items()},
    )


def _gain_measure(name: str, good: str, gains: dict[str, float | None]) -> Measure:
    measured = {task: gain for task, gain in gains.items() if gain is not None}
    if not measured:
        return Measure(name, wording.ABSENT, good, "unknown")
    mean = sum(measured.values()) / len(measured)
    losing = [task for task, gain in measured.items() if not gain > 0]
    state: State = "good" if not losing else "watch" if mean > 0 else "bad"
    value = f"{wording.signed(mean, 1, 'dB')}{' on average' if len(measured) > 1 else ''}"
    return Measure(name, value, good, state, f"not above 0: {', '.join(losing)}" if losing else "")


def _auroc(latest: HealthEntry | None) -> Measure:
    value, tasks = (None, {}) if latest is None else (latest.auroc, latest.tasks)
    at_chance = [
        task
        for task, row in tasks.items()
        if row.auroc is not None and not row.auroc > AUROC_CHANCE  # NaN too
    ]
    state = _rising(value, AUROC_CHANCE, AUROC_GOOD)
    return Measure(
        "Energy tells corrupted from clean (AUROC)",
        wording.decimals(value, 3),
        f"above {AUROC_CHANCE}, which is chance, for every task; clear from {AUROC_GOOD}",
        "watch" if state == "good" and at_chance else state,
        f"not above chance: {', '.join(at_chance)}" if at_chance else "",
    )


def _rank(latest: HealthEntry | None, images: float | None) -> Measure:
    rank, size = (None, None) if latest is None else (latest.rank_me, latest.embedding_size)
    # A few images can't span more directions than there are images.
    largest = min(size, images) if size and images else size
    share = None if rank is None or not largest else rank / largest
    of_largest = f" of {wording.whole(largest)} ({wording.percent(share)})" if share else ""
    return Measure(
        "Effective rank of the embeddings (RankMe)",
        wording.decimals(rank, 1) + (of_largest if wording.is_finite(rank) else ""),
        f"{wording.percent(RANK_SHARE_GOOD, 0)} of the largest possible or more; "
        f"below {wording.percent(RANK_SHARE_WATCH, 0)} the embeddings have collapsed",
        _rising(share, RANK_SHARE_WATCH, RANK_SHARE_GOOD),
        "" if largest == size else f"limited by the {wording.whole(images)} held-out images",
    )


def _rising(value: float | None, bad_below: float, good_from: float) -> State:
    if value is None:
        return "unknown"
    if not value > bad_below:  # NaN too
        return "bad"
    return "good" if value >= good_from else "watch"


def _loss(losses: Series | None) -> Measure:
    name, good = "Training loss", "finite, and lower at the end than at the beginning"
    finite, broken = _finite(losses)
    if len(finite) + broken < 2:
        return Measure(name, wording.ABSENT, good, "unknown", "fewer than two logged values")
    if broken:
        return Measure(name, wording.NOT_FINITE, good, "bad", _rows(broken))
    first, last = _end_median(finite[::-1]), _end_median(finite)
    value = f"{wording.significant(first)} to {wording.significant(last)}"
    note = "medians of the first and the last tenth of the run"
    return Measure(name, value, good, "good" if last < first else "watch", note)


def _gradient_norm(norms: Series | None) -> Measure:
    name = "Gradient norm"
    good = f"always finite, at the end no more than {GRADIENT_NORM_GROWTH:g} times its median"
    finite, broken = _finite(norms)
    if len(finite) + broken == 0:
        return Measure(name, wording.ABSENT, good, "unknown")
    if broken:
        return Measure(name, wording.NOT_FINITE, good, "bad", _rows(broken))
    last, median = _end_median(finite), float(np.median(finite))
    state: State = "good" if last <= GRADIENT_NORM_GROWTH * median else "watch"
    value = f"{wording.significant(last)} at the end"
    return Measure(name, value, good, state, f"median {wording.significant(median)}")


def _finite(values: Series | None) -> tuple[Series, int]:
    """The finite values, and the number of the others."""
    if values is None:
        return np.array([]), 0
    finite = values[np.isfinite(values)]
    return finite, len(values) - len(finite)


def _rows(count: int) -> str:
    return f"{wording.counted(count, 'logged value is', 'logged values are')} not finite"


def _end_median(values: Series) -> float:
    length = max(1, int(ENDS_SHARE * len(values)))
    return float(np.median(values[-length:]))


def _data_wait(shares: Series | None) -> Measure:
    finite, _ = _finite(shares)
    good = f"below {wording.percent(DATA_WAIT_GOOD, 0)} of the time"
    if len(finite) == 0:
        return Measure("Waiting for images", wording.ABSENT, good, "unknown")
    median = float(np.median(finite))
    state: State = (
        "good" if median < DATA_WAIT_GOOD else "watch" if median < DATA_WAIT_WATCH else "bad"
    )
    note = "" if state == "good" else "more workers or smaller image files help"
    return Measure("Waiting for images", f"{wording.percent(median)} (median)", good, state, note)


def _knn(history: Sequence[HealthEntry]) -> Measure:
    values = [entry.knn for entry in history if entry.knn is not None]
    name, good = "kNN accuracy on held-out images", "rising, as long as training goes on"
    if len(values) < 2:
        note = "one look only so far" if values else "needs labels: --watch-labels true"
        value = wording.decimals(values[-1] if values else None, 1, "%")
        return Measure(name, value, good, "unknown", note)
    first, last = values[0], values[-1]
    value = f"{wording.decimals(first, 1, '%')} to {wording.decimals(last, 1, '%')}"
    if not last >= first - KNN_FALL_POINTS:  # NaN too
        return Measure(name, value, good, "bad", "lower than at the beginning")
    best = float(np.nanmax(values))
    if last > first and last >= best - KNN_FALL_POINTS:
        return Measure(name, value, good, "good")
    note = f"the best was {wording.decimals(best, 1, '%')}" if best > last else "not rising"
    return Measure(name, value, good, "watch", note)
