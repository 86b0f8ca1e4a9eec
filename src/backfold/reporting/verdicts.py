"""Verdicts in words, derived from the numbers: is the run healthy, and did pretraining pay?

The thresholds at the top tell a working run from a broken one; they do not rank runs.
"""

import math
from collections.abc import Mapping, Sequence
from typing import Any, Literal, NamedTuple

import numpy as np
from numpy.typing import NDArray

from backfold.evaluation.results import BEFORE, OVER, PIXELS, PRETRAINED, RANDOM, SCRATCH, Row

# Of telling corrupted from clean images by energy; chance alone stays below 0.6.
AUROC_CHANCE, AUROC_GOOD = 0.5, 0.6
# Effective rank by the largest possible one: a collapsed backbone uses a handful of directions.
RANK_SHARE_WATCH, RANK_SHARE_GOOD = 0.02, 0.1
KNN_FALL_POINTS = 2.0  # below its best so far, or below where it began
DATA_WAIT_GOOD, DATA_WAIT_WATCH = 0.05, 0.2  # shares of the training time
GRADIENT_NORM_GROWTH = 10.0  # median at the end of the run by that of the whole run
ENDS_SHARE = 0.1  # beginning and end of a curve: this share of its rows, one at least
CLEAR_POINTS = 0.5  # smaller differences between accuracies do not count

ABSENT = "not measured"
JUDGED = ("knn", "linear", "attentive", "finetune", "segmentation")
# The first that was measured stands for the backbone without this pretraining.
BASELINES = {
    BEFORE: "the weights before pretraining are",
    SCRATCH: "training from scratch is",
    RANDOM: "random weights are",
    PIXELS: "pixels are",
}

State = Literal["good", "watch", "bad", "unknown"]
Found = tuple[str, State, str]  # the value in words, the state, a note
Series = NDArray[np.float64]
Look = Mapping[str, Any]  # one entry of the history in ``health.json``, without what is null


class Verdict(NamedTuple):
    """An answer: one headline with its state, and the sentences that it rests on."""

    state: State
    headline: str
    sentences: tuple[str, ...] = ()


class Measure(NamedTuple):
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


def psnr_gains(look: Look, over: str = "corrupted") -> dict[str, float]:
    """By task: how many dB restored images are closer to the clean ones than these are."""
    ours, other, tasks = "psnr_restored_db", f"psnr_{over}_db", look["tasks"].items()
    return {task: row[ours] - row[other] for task, row in tasks if {ours, other} <= row.keys()}


def measure_health(
    looks: Sequence[Look], metrics: Mapping[str, Series], held_out: float
) -> list[Measure]:
    """Of the looks, by step, at so many images, and of metrics.csv; "unknown" without numbers."""
    look = looks[-1] if looks else {"tasks": {}}
    aurocs = {task: row["auroc"] for task, row in look["tasks"].items() if "auroc" in row}
    gain, fill = (_mean(psnr_gains(look, over)) for over in ("corrupted", "mean_fill"))
    columns, rank_found = _of_columns(metrics), None
    if {"rank_me", "embedding_size"} <= look.keys():
        rank_me, size = look["rank_me"], look["embedding_size"]
        # A few images can't span more directions than there are images.
        largest = min(size, held_out)
        note = "" if largest == size else f"limited by the {largest:,.0f} held-out images"
        state = _state(rank_me / largest, RANK_SHARE_WATCH, RANK_SHARE_GOOD)
        rank_found = f"{show(rank_me, '.1f')} of {largest:,.0f}", state, note
    chance = f"above {AUROC_CHANCE}, which is chance, for every task; clear from {AUROC_GOOD}"
    rank = f"{RANK_SHARE_GOOD:.0%} of the largest possible; collapsed at {RANK_SHARE_WATCH:.0%}"
    steady = f"always finite, at the end no more than {GRADIENT_NORM_GROWTH:g} times its median"
    table: list[tuple[str, str, Found | None]] = [
        ("Restoration against doing nothing", "above 0 dB for every task", gain),
        ("Restoration against the mean fill", "above 0 dB for every task", fill),
        ("Energy tells corrupted from clean (AUROC)", chance, _mean(aurocs, is_gain=False)),
        ("Effective rank of the embeddings (RankMe)", rank, rank_found),
        ("Training loss", "finite, lower at the end than at the beginning", columns.get("loss")),
        ("Gradient norm", steady, columns.get("gradient_norm")),
        ("Waiting for images", f"up to {DATA_WAIT_GOOD:.0%} of the time", columns.get("data_wait")),
        ("kNN accuracy on held-out images", "rising, as long as training goes on", _knn(looks)),
    ]
    return [Measure(name, good, *(found or (ABSENT, "unknown"))) for name, good, found in table]


def _state(value: float, bad_until: float, good_from: float) -> State:
    if not value > bad_until:  # NaN too
        return "bad"
    return "good" if value >= good_from else "watch"


def _mean(by_task: Mapping[str, float], *, is_gain: bool = True) -> Found | None:
    """Over the tasks; a good one is to be watched where a single task's is bad."""
    if not by_task:
        return None
    bad_until, good_from = (0, 0) if is_gain else (AUROC_CHANCE, AUROC_GOOD)
    mean = sum(by_task.values()) / len(by_task)
    losing = [task for task, value in by_task.items() if not value > bad_until]  # NaN too
    state = _state(mean, bad_until, good_from)
    note = f"not above {bad_until:g}: {', '.join(losing)}" if losing else ""
    state = "watch" if losing and state == "good" else state
    return show(mean, "+z.1f", "dB") if is_gain else show(mean, ".3f"), state, note


def _of_columns(metrics: Mapping[str, Series]) -> dict[str, Found]:
    """By column, from the medians of its first tenth, of all and of its last tenth."""
    found: dict[str, Found] = {}
    for name in ("loss", "gradient_norm", "data_wait"):
        values = metrics.get(name, np.array([]))
        if len(values) < 2:
            continue
        end = max(1, int(ENDS_SHARE * len(values)))
        known = values if np.isfinite(values).all() else np.full_like(values, np.nan)
        ends = (known[:end], known, known[-end:])
        first, median, last = (float(np.median(part)) for part in ends)
        if name == "loss":
            state = _state(float(np.sign(first - last)), -2, 1)
            note = "medians of the first and the last tenth"
            found[name] = f"{show(first)} to {show(last)}", state, note
        elif name == "gradient_norm":
            state = _state(-last, -math.inf, -GRADIENT_NORM_GROWTH * median)
            found[name] = f"{show(last)} at the end", state, f"median {show(median)}"
        else:
            state = _state(-median, -DATA_WAIT_WATCH, -DATA_WAIT_GOOD)
            note = "" if state == "good" else "more workers or smaller image files help"
            found[name] = f"{show(100 * median, '.1f', '%')} (median)", state, note
    return found


def _knn(looks: Sequence[Look]) -> Found:
    values = [look["knn"] for look in looks if "knn" in look]
    if len(values) < 2:
        note = "one look only so far" if values else "needs labels: --watch-labels true"
        return show(values[0] if values else None, ".1f", "%"), "unknown", note
    first, last, best = values[0], values[-1], max(values)
    state = _state(last - first, -KNN_FALL_POINTS, 1e-9)
    state = "watch" if state == "good" and best - last > KNN_FALL_POINTS else state
    note = "" if state == "good" else f"the best was {show(best, '.1f', '%')}"
    return f"{show(first, '.1f', '%')} to {show(last, '.1f', '%')}", state, note


def health_verdict(measures: Sequence[Measure], gains: Mapping[str, float]) -> Verdict:
    """Is the run healthy? The worst measure decides; the last look's `psnr_gains` are told."""
    sentences = [
        f"Restored images are {abs(gain):.1f} dB {'closer to' if gain > 0 else 'further from'} the "
        f"clean ones than the corrupted ones ({task})."
        for task, gain in gains.items()
        if math.isfinite(gain)
    ]
    bad, watched = ([m.name for m in measures if m.state == state] for state in ("bad", "watch"))
    sentences += [f"Bad: {'; '.join(bad)}."] if bad else []
    sentences += [f"To watch: {'; '.join(watched)}."] if watched else []
    total = sum(measure.state != "unknown" for measure in measures)
    state: State = "unknown" if not total else "bad" if bad else "watch" if watched else "good"
    headline = {
        "unknown": "Not known: nothing was measured",
        "bad": f"No: {len(bad)} of {total} measures {'are' if bad[1:] else 'is'} bad",
        "watch": f"Yes, but watch {len(watched)} of {total} measures",
        "good": f"Yes: all {total} {'taken ' if total < len(measures) else ''}measures are good",
    }[state]
    return Verdict(state, headline, tuple(sentences))


def payoff(rows: Sequence[Row]) -> Verdict:
    """Did pretraining pay? Yes, where the pretrained backbone beats whatever is simpler.

    That is its weights before pretraining, training from scratch, random weights, and pixels. To
    beat them is to be ahead by more than `CLEAR_POINTS` and the difference's own spread.
    """
    cases: dict[str, dict[str, Row]] = {}
    several = len({row.data for row in rows if row.protocol in JUDGED}) > 1
    for name in BASELINES:
        for row in rows:
            if row.protocol in JUDGED and row.contender == f"{PRETRAINED}{OVER}{name}":
                case = f"{row.protocol}, {row.case}" + (f", on {row.data}" if several else "")
                cases.setdefault(case, {})[name] = row
    # Being ahead of pixels alone says nothing about the pretraining.
    cases = {case: leads for case, leads in cases.items() if set(leads) != {PIXELS}}
    if not cases:
        return Verdict("unknown", "Not known: the run was not compared with an untrained backbone")
    # What is not beaten comes first: the report folds long lists.
    ordered = sorted(cases.items(), key=lambda item: min(map(_sign, item[1].values())) == 1)
    sentences = tuple(f"{case}: {', '.join(map(_tell, row.values()))}." for case, row in ordered)
    parts = []
    for name, words in BASELINES.items():
        signs = {case: _sign(leads[name]) for case, leads in cases.items() if name in leads}
        if unbeaten := [case for case, sign in signs.items() if sign < 1]:
            lost = sum(sign < 0 for sign in signs.values())
            places = f"{len(unbeaten)} of {len(cases)} cases" if unbeaten[1:] else unbeaten[0]
            where = f"in {lost} of them" if unbeaten[1:] else "there"
            better = f" and clearly ahead {where}" if lost else ""
            parts.append(f"{words} not beaten in {places}{better}")
    if not parts:
        names = ", ".join(dict.fromkeys(name for leads in cases.values() for name in leads))
        return Verdict("good", f"Yes: ahead of {names} in all cases: {len(cases)}", sentences)
    if any(_sign(next(iter(leads.values()))) == 1 for leads in cases.values()):
        return Verdict("watch", f"In part: {'; '.join(parts)}", sentences)
    return Verdict("bad", f"No: {'; '.join(parts)}", sentences)


def _sign(lead: Row) -> int:
    """1 if clearly ahead, -1 if clearly behind, else 0, also where a number is not finite."""
    return int(np.sign(lead.mean)) if abs(lead.mean) > max(lead.std, CLEAR_POINTS) else 0


def _tell(lead: Row) -> str:
    start = ("not clearly ahead of", "ahead of", "behind")[_sign(lead)]
    points = f"{show(lead.mean, '+z.1f')} ± {show(lead.std, '.1f')} points"
    return f"{start} {lead.contender.partition(OVER)[2]} ({points})"
