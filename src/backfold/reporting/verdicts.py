"""Verdicts in words, derived from the numbers: is the run healthy, and did pretraining pay?

All thresholds stand here, at the top. They tell a working run from a broken one; they do not rank
runs. Where a measure has a watch range, values between the two bounds are worth an eye.
"""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Literal

import numpy as np
from numpy.typing import NDArray

from backfold.evaluation.results import (
    ACCURACY,
    BEFORE,
    OVER,
    PIXELS,
    PRETRAINED,
    RANDOM,
    SCRATCH,
    Row,
)

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
# A difference between accuracies counts if it exceeds this many points, and its own spread.
CLEAR_POINTS = 0.5

ABSENT = "not measured"
JUDGED = {
    "knn": "kNN",
    "linear": "linear probe",
    "attentive": "attentive probe",
    "finetune": "fine-tuning",
    "segmentation": "segmentation",
}
BASELINES = {
    BEFORE: "the weights before pretraining are",
    SCRATCH: "training from scratch is",
    RANDOM: "random weights are",
    PIXELS: "pixels are",
}
REFERENCES = (BEFORE, SCRATCH, RANDOM)  # the first that was measured counts
METRICS = (ACCURACY, "mIoU (%)")
NAMED = 2  # of more cases than these, a headline says how many

State = Literal["good", "watch", "bad", "unknown"]
Found = tuple[str, State, str]
Series = NDArray[np.float64]
Leads = Mapping[str, Row]


@dataclass(frozen=True)
class Verdict:
    """An answer: one headline with its state, and the sentences that it rests on."""

    state: State
    headline: str
    sentences: tuple[str, ...] = ()


@dataclass(frozen=True)
class Look:
    """One look at the held-out images; a measure that was not taken is in no mapping.

    Args:
        step: of the run.
        measures: over all tasks, by the names of ``health.json``; ``knn`` is in percent.
        tasks: each pretext task's own.
    """

    step: float
    measures: Mapping[str, float]
    tasks: Mapping[str, Mapping[str, float]]

    def gains(self, over: str = "psnr_corrupted_db") -> dict[str, float]:
        """By task: how many dB restored images are closer to the clean ones than these are."""
        return {
            task: row["psnr_restored_db"] - row[over]
            for task, row in self.tasks.items()
            if {"psnr_restored_db", over} <= row.keys()
        }


@dataclass(frozen=True)
class Measure:
    """One line of the health panel: its name, what is good, the value in words, and the state."""

    name: str
    good: str
    value: str
    state: State
    note: str = ""


def show(value: float | None, spec: str = ".3g", unit: str = "") -> str:
    """The value in this format with its unit, or that there is none."""
    if value is None:
        return ABSENT
    return f"{value:{spec}}{unit and ' ' + unit}" if math.isfinite(value) else "not finite"


def percent(share: float, digits: int = 0) -> str:
    """A share from 0 to 1 in percent."""
    return show(100 * share, f".{digits}f", "%")


def measure_health(
    looks: Sequence[Look], metrics: Mapping[str, Series], held_out: float | None
) -> list[Measure]:
    """All measures; those that the run has no numbers for are in the state "unknown".

    Args:
        looks: in the order of the steps.
        metrics: columns of ``metrics.csv``.
        held_out: the number of images looked at.
    """
    latest = looks[-1] if looks else Look(0, {}, {})
    knn = [look.measures["knn"] for look in looks if "knn" in look.measures]
    loss, norm, wait = (
        metrics.get(name, np.array([])) for name in ("loss", "gradient_norm", "data_wait")
    )
    gain, fill = (latest.gains(f"psnr_{name}_db") for name in ("corrupted", "mean_fill"))
    chance = f"above {AUROC_CHANCE}, which is chance, for every task; clear from {AUROC_GOOD}"
    largest, collapsed = percent(RANK_SHARE_GOOD), percent(RANK_SHARE_WATCH)
    rank = f"{largest} of the largest possible or more; below {collapsed} it has collapsed"
    steady = f"always finite, at the end no more than {GRADIENT_NORM_GROWTH:g} times its median"
    table: list[tuple[str, str, Found]] = [
        ("Restoration against doing nothing", "above 0 dB for every task", _gain(gain)),
        ("Restoration against the mean fill", "above 0 dB for every task", _gain(fill)),
        ("Energy tells corrupted from clean (AUROC)", chance, _auroc(latest)),
        ("Effective rank of the embeddings (RankMe)", rank, _rank(latest.measures, held_out)),
        ("Training loss", "finite, and lower at the end than at the beginning", _loss(loss)),
        ("Gradient norm", steady, _gradient_norm(norm)),
        ("Waiting for images", f"below {percent(DATA_WAIT_GOOD)} of the time", _data_wait(wait)),
        ("kNN accuracy on held-out images", "rising, as long as training goes on", _knn(knn)),
    ]
    return [Measure(name, good, *found) for name, good, found in table]


def _gain(gains: Mapping[str, float]) -> Found:
    if not gains:
        return ABSENT, "unknown", ""
    mean = sum(gains.values()) / len(gains)
    losing = [task for task, gain in gains.items() if not gain > 0]  # NaN too
    value = f"{show(mean, '+z.1f', 'dB')}{' on average' if len(gains) > 1 else ''}"
    if not losing:
        return value, "good", ""
    return value, "watch" if mean > 0 else "bad", f"not above 0: {', '.join(losing)}"


def _auroc(latest: Look) -> Found:
    found = {task: row["auroc"] for task, row in latest.tasks.items() if "auroc" in row}
    at_chance = [task for task, auroc in found.items() if not auroc > AUROC_CHANCE]
    value = latest.measures.get("auroc")
    state = _rising(value, AUROC_CHANCE, AUROC_GOOD)
    if not at_chance:
        return show(value, ".3f"), state, ""
    note = f"not above chance: {', '.join(at_chance)}"
    return show(value, ".3f"), "watch" if state == "good" else state, note


def _rank(measures: Mapping[str, float], images: float | None) -> Found:
    rank, size = measures.get("rank_me"), measures.get("embedding_size")
    if rank is None or not size:
        return show(rank, ".1f"), "unknown", ""
    # A few images can't span more directions than there are images.
    largest = min(size, images or size)
    note = "" if largest == size else f"limited by the {largest:,.0f} held-out images"
    of_largest = f" of {largest:,.0f} ({percent(rank / largest, 1)})" if math.isfinite(rank) else ""
    value = f"{show(rank, '.1f')}{of_largest}"
    return value, _rising(rank / largest, RANK_SHARE_WATCH, RANK_SHARE_GOOD), note


def _rising(value: float | None, bad_below: float, good_from: float) -> State:
    if value is None:
        return "unknown"
    if not value > bad_below:  # NaN too
        return "bad"
    return "good" if value >= good_from else "watch"


def _loss(values: Series) -> Found:
    if not np.isfinite(values).all():
        return "not finite", "bad", f"in {_broken(values)} of the logged values"
    if len(values) < 2:
        return ABSENT, "unknown", "fewer than two logged values"
    first, last = _end_median(values[::-1]), _end_median(values)
    note = "medians of the first and the last tenth of the run"
    return f"{show(first)} to {show(last)}", "good" if last < first else "watch", note


def _gradient_norm(values: Series) -> Found:
    if not np.isfinite(values).all():
        return "not finite", "bad", f"in {_broken(values)} of the logged values"
    if len(values) == 0:
        return ABSENT, "unknown", ""
    last, median = _end_median(values), float(np.median(values))
    state: State = "good" if last <= GRADIENT_NORM_GROWTH * median else "watch"
    return f"{show(last)} at the end", state, f"median {show(median)}"


def _broken(values: Series) -> int:
    return int((~np.isfinite(values)).sum())


def _end_median(values: Series) -> float:
    return float(np.median(values[-max(1, int(ENDS_SHARE * len(values))) :]))


def _data_wait(shares: Series) -> Found:
    finite = shares[np.isfinite(shares)]
    if len(finite) == 0:
        return ABSENT, "unknown", ""
    median = float(np.median(finite))
    if median < DATA_WAIT_GOOD:
        return f"{percent(median, 1)} (median)", "good", ""
    state: State = "watch" if median < DATA_WAIT_WATCH else "bad"
    return f"{percent(median, 1)} (median)", state, "more workers or smaller image files help"


def _knn(values: Sequence[float]) -> Found:
    if len(values) < 2:
        note = "one look only so far" if values else "needs labels: --watch-labels true"
        return show(values[0] if values else None, ".1f", "%"), "unknown", note
    first, last, best = values[0], values[-1], float(np.nanmax([-math.inf, *values]))
    value = f"{show(first, '.1f', '%')} to {show(last, '.1f', '%')}"
    if not last >= first - KNN_FALL_POINTS:  # NaN too
        return value, "bad", "lower than at the beginning"
    if last > first and last >= best - KNN_FALL_POINTS:
        return value, "good", ""
    return value, "watch", f"the best was {best:.1f} %" if best > last else "not rising"


def health_verdict(measures: Sequence[Measure], latest: Look | None) -> Verdict:
    """Is the run healthy? The worst measure decides.

    Args:
        measures: of `measure_health`.
        latest: the last look, whose gains are told.
    """
    sentences = [
        f"Restored images are {abs(gain):.1f} dB {'closer to' if gain > 0 else 'further from'} the "
        f"clean ones than the corrupted ones ({task})."
        for task, gain in (latest.gains() if latest else {}).items()
        if math.isfinite(gain)
    ]
    bad, watched, unknown = (
        [measure.name for measure in measures if measure.state == state]
        for state in ("bad", "watch", "unknown")
    )
    sentences += [f"Bad: {'; '.join(bad)}."] if bad else []
    sentences += [f"To watch: {'; '.join(watched)}."] if watched else []
    measured = len(measures) - len(unknown)
    state: State = "unknown" if not measured else "bad" if bad else "watch" if watched else "good"
    headline = {
        "unknown": "Not known: nothing was measured",
        "bad": f"No: {len(bad)} of {measured} measures {'are' if bad[1:] else 'is'} bad",
        "watch": f"Yes, but watch {len(watched)} of {measured} measures",
        "good": f"Yes: all {measured} {'taken ' if unknown else ''}measures are good",
    }[state]
    return Verdict(state, headline, tuple(sentences))


def payoff(rows: Sequence[Row]) -> Verdict:
    """Did pretraining pay? Yes, where the pretrained backbone beats whatever is simpler.

    That is its weights before pretraining, training from scratch, random weights, and pixels. To
    beat them is to be ahead by more than `CLEAR_POINTS` and the difference's own spread.

    Args:
        rows: of any protocols; those in `JUDGED` count.
    """
    cases = {case: leads for case, leads in _leads(rows).items() if _reference(leads)}
    if not cases:
        evaluated = any(row.protocol in JUDGED for row in rows)
        reason = "compared with an untrained backbone" if evaluated else "evaluated"
        return Verdict("unknown", f"Not known: the run was not {reason}")
    unbeaten = {
        name: {
            case: row[name] for case, row in cases.items() if name in row and _sign(row[name]) < 1
        }
        for name in BASELINES
    }
    # What is not beaten comes first: the report folds long lists.
    ordered = sorted(cases, key=lambda case: not any(case in found for found in unbeaten.values()))
    sentences = tuple(_sentence(case, cases[case]) for case in ordered)
    if not any(unbeaten.values()):
        names = ", ".join(dict.fromkeys(name for leads in cases.values() for name in leads))
        every = "the only case" if len(cases) == 1 else f"all {len(cases)} cases"
        return Verdict("good", f"Yes: ahead of {names} in {every}", sentences)
    which = "; ".join(
        f"{BASELINES[name]} not beaten in {_places(found, len(cases))}"
        for name, found in unbeaten.items()
        if found
    )
    if any(_sign(leads[_reference(leads)]) == 1 for leads in cases.values()):
        return Verdict("watch", f"In part: {which}", sentences)
    return Verdict("bad", f"No: {which}", sentences)


def _leads(rows: Sequence[Row]) -> dict[str, Leads]:
    """By case and baseline: the row that says how far the pretrained backbone is ahead."""
    found: dict[str, dict[str, Row]] = {}
    for row in rows:
        if row.protocol in JUDGED and "%" in row.metric:
            other = "" if row.metric in METRICS else f", {row.metric}"
            case = f"{JUDGED[row.protocol]}, {row.case}{other}"
            found.setdefault(case, {})[row.contender] = row
    return {
        case: {name: lead for name in BASELINES if (lead := _lead(members, name)) is not None}
        for case, members in found.items()
    }


def _lead(members: Leads, name: str) -> Row | None:
    """Over one baseline: the paired difference, or else that of the means."""
    ours, theirs = members.get(PRETRAINED), members.get(name)
    if (paired := members.get(f"{PRETRAINED}{OVER}{name}")) or ours is None or theirs is None:
        return paired
    return replace(ours, mean=ours.mean - theirs.mean, std=math.hypot(ours.std, theirs.std))


def _reference(leads: Leads) -> str:
    """What stands for the backbone without this pretraining; "" where nothing does."""
    return next((name for name in REFERENCES if name in leads), "")


def _sign(lead: Row) -> int:
    """1 if clearly ahead, -1 if clearly behind, else 0, also where a number is not finite."""
    if not abs(lead.mean) > max(lead.std, CLEAR_POINTS):
        return 0
    return 1 if lead.mean > 0 else -1


def _places(found: Mapping[str, Row], total: int) -> str:
    lost = sum(_sign(lead) < 0 for lead in found.values())
    behind = " (clearly better)" if lost == len(found) else f" (clearly better in {lost})"
    behind = behind if lost else ""
    if len(found) <= NAMED:
        return f"{', nor in '.join(found)}{behind}"
    return f"{'any case' if len(found) == total else f'{len(found)} of {total} cases'}{behind}"


def _sentence(case: str, leads: Leads) -> str:
    words = {1: "ahead of", 0: "not clearly ahead of", -1: "behind"}
    parts = []
    for name, lead in leads.items():
        spread = f" ± {show(lead.std, '.1f')}" if lead.std else ""
        points = f"{show(lead.mean, '+z.1f')}{spread} points"
        parts.append(f"{words[_sign(lead)]} {name} ({points})")
    return f"{case}: {', '.join(parts)}."
