"""What one run's energy knows: the bars of the protocols energy and adaptation."""

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from backfold.evaluation.adaptation import HARD
from backfold.evaluation.measures import MeasureRow, read_measures
from results_bars import Verdict

MIDDLE, LEAST_AUROC, ALLOWED_CLEAN_LOSS = "severity 3", 0.95, 0.5
RESTORED = ("energy, 1 step", "energy, 2 steps", "energy, 4 steps")
UNRESTORED = ("identity", "bicubic")  # what is shrunk is enlarged again before it is restored
TASKS = ("masking", "sorting", "superresolution", "denoising", "colorization")


@dataclass(frozen=True)
class RunMeasures:
    """Rows of one run, and how they were made.

    Attributes:
        rows: by protocol; a protocol that did not run is missing.
        facts: "run" (a sentence), "commands".
    """

    rows: dict[str, list[MeasureRow]]
    facts: dict[str, Any]


def read_run(folder: Path) -> RunMeasures | None:
    """The rows in a folder, or None where there is none."""
    if not (folder / "facts.json").exists():
        return None
    found = {
        name: read_measures(folder / f"{name}.json")
        for name in ("energy", "restoration", "adaptation")
        if (folder / f"{name}.json").exists()
    }
    return RunMeasures(found, json.loads((folder / "facts.json").read_text()))


def judge_energy(measures: RunMeasures) -> list[Verdict]:
    """Both bars."""
    return [
        _auroc(measures.rows.get("energy", [])),
        _adaptation(measures.rows.get("adaptation", [])),
    ]


def _auroc(rows: list[MeasureRow]) -> Verdict:
    what = "clean against corrupted, AUROC of the energy, each task, middle severity"
    found = {
        task: row for task in TASKS for row in rows
        if (row.case, row.contender) == (f"{task}, {MIDDLE}", "energy")
    }  # fmt: skip
    words = ", ".join(f"{task} {row.mean:.2f} ± {row.std:.2f}" for task, row in found.items())
    is_whole = len(found) == len(TASKS)
    reached = all(row.mean >= LEAST_AUROC for row in found.values())
    met = None if reached and not is_whole else reached
    return Verdict(what, f"at least {LEAST_AUROC}", words or "not run", met)


def _adaptation(rows: list[MeasureRow]) -> Verdict:
    what = "restoring before classifying, mean over corruptions at severity 3 and above"
    bar = f"higher accuracy, at most {ALLOWED_CLEAN_LOSS} points lost on clean images"
    gains = {row.case: row for row in rows if row.contender == "difference"}
    if HARD not in gains or "clean" not in gains:
        return Verdict(what, bar, "not run", None)
    hard, clean = gains[HARD], gains["clean"]
    met = hard.mean > hard.std and clean.mean >= -ALLOWED_CLEAN_LOSS
    words = (
        f"{hard.mean:+.1f} ± {hard.std:.1f} points on corrupted images, {clean.mean:+.1f} ± "
        f"{clean.std:.1f} on clean ones"
    )
    return Verdict(what, bar, words, met)


def energy_table(measures: RunMeasures) -> list[list[str]]:
    """AUROC of the energy and of the scores that need none, by case."""
    rows = measures.rows.get("energy", [])
    cases = [
        case for case in dict.fromkeys(row.case for row in rows)
        if MIDDLE in case or "severity" not in case
    ]  # fmt: skip
    cells = {(row.case, row.contender): f"{row.mean:.2f} ± {row.std:.2f}" for row in rows}
    return [
        [case, *(cells.get((case, name), "") for name in contenders(measures))] for case in cases
    ]


def restoration_table(measures: RunMeasures) -> list[list[str]]:
    """PSNR in dB at middle severity, by task: corrupted, energy, and the best of the others."""
    rows = [row for row in measures.rows.get("restoration", []) if row.metric == "PSNR (dB)"]
    table = []
    for task in TASKS:
        found = {row.contender: row for row in rows if row.case == f"{task}, {MIDDLE}"}
        others = {name: found[name] for name in found if name not in (*RESTORED, *UNRESTORED)}
        if not found:
            continue
        best = max(others, key=lambda name: others[name].mean)
        before = next(name for name in UNRESTORED if name in found)
        cells = [f"{found[name].mean:.1f}" for name in (before, *RESTORED)]
        table.append([task, *cells, f"{others[best].mean:.1f} ({best})"])
    return table


def contenders(measures: RunMeasures) -> list[str]:
    """Who gives the scores, the energy first."""
    return list(dict.fromkeys(row.contender for row in measures.rows.get("energy", [])))
