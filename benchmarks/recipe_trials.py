"""Trials for the recipe: what makes the representation good, judged on validation images only.

    python benchmarks/recipe_trials.py --data ../shared/data/cifar10 --only mae dense  # appends
    python benchmarks/recipe_trials.py --write-log                     # recipe-log.md from the JSON

Each trial is a short pretraining in the setting of the CPU race (`racing`), with a seed that no
reported run has; its backbone is judged by a linear probe, kNN and 10 labels a class on the race's
validation images, which no reported number uses. Hypotheses stand in `racing/trials.py`, results
and verdicts in `results/recipe-trials.json` and `results/recipe-verdicts.json`.
"""

import argparse
import json
import math
import shlex
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch

from backfold import restoration
from backfold.memory import keep_freed_memory
from backfold.training.run_folder import write_atomically, write_json
from racing.judging import CHOSEN_ON, Judge
from racing.pretraining import pretrain
from racing.race import Race
from racing.sizes import CPU
from racing.trials import TRIALS, Trial

RESULTS = Path(__file__).parent / "results"
SEED = 100
READ_IMAGES = 500


@contextmanager
def trial_loss(trial: Trial) -> Iterator[None]:
    """Within, the product trains with the trial's loss."""
    before = restoration.restoration_loss
    if trial.loss is not None:
        restoration.restoration_loss = trial.loss
    try:
        yield
    finally:
        restoration.restoration_loss = before


def judge_backbone(judge: Judge, weights: Any, seed: int) -> dict[str, Any]:
    """Accuracies on the validation images in percent, with the layer and pooling best for each."""
    scores = judge.scores(weights, seed)
    best = {name: max(found, key=found.__getitem__) for name, found in scores.items()}
    return {
        **{name: scores[name][choice] for name, choice in best.items()},
        "choices": {name: f"{choice.layer} {choice.pooling}" for name, choice in best.items()},
    }


def content_over_noise(judge: Judge, weights: Any, seed: int) -> float | None:
    """How loudly the patch embedding answers to images, over its answer to white noise as strong.

    Deviations over the images, root mean squares over patches and features; None without patches.
    """
    backbone = judge.backbone(weights, seed).cpu().eval()
    if not hasattr(backbone, "patch_embed"):
        return None
    images = judge.images.statistics.normalize(judge.images.validation.images[:READ_IMAGES].cpu())
    noise = torch.randn(images.shape, generator=torch.Generator().manual_seed(seed))
    with torch.no_grad():
        content, answer = (
            backbone.patch_embed(part - part.mean(dim=0)).var(dim=0).mean().sqrt() / part.std()
            for part in (images, noise)
        )
    return round(float(content / answer), 3)


def fine_tune_backbone(judge: Judge, weights: Any, seed: int) -> dict[str, float]:
    """Fine-tuned accuracy on the validation images in percent, by labels a class."""
    budget, images = judge.size.fine_tuning, judge.images.validation
    return {
        str(labels): max(
            judge.fine_tuned(weights, seed, labels, lr, images) for lr in budget.learning_rates
        )
        for labels in budget.labels_per_class
    }


def run_trial(
    race: Race, trial: Trial, epochs: float, seed: int, fine_tunes: bool
) -> dict[str, Any]:
    """Pretrain and judge."""
    contender = trial.contender
    total = round(epochs * race.steps_per_epoch)
    started = time.monotonic()
    spec = race.size.backbones[contender.backbone]
    judge = Judge(race.size, spec, race.images, race.device, race.best_precision, "plain")
    row: dict[str, Any] = {
        "name": trial.name,
        "seed": seed,
        "lr": trial.lr,
        "epochs": epochs,
        "batch": race.size.batch,
    }
    weights = None
    if contender.is_trained:
        with trial_loss(trial):
            attention = "plain" if contender.kind == "energy" else "fused"
            setting = race.setting(contender, total, trial.lr, seed, trial.precision, attention)
            method = contender.method(setting)
            trial.prepare(method)
            folder = race.folder(f"recipe-{trial.name}-{seed}")
            progress = pretrain(method, total, [], folder, math.inf)
        weights = method.backbone()
        row |= {
            "seconds_a_step": round(sum(progress.seconds) / total, 4),
            "loss": round(sum(progress.losses[-20:]) / len(progress.losses[-20:]), 5),
        }
    row |= judge_backbone(judge, weights, seed)
    row["content_over_noise"] = content_over_noise(judge, weights, seed)
    if fine_tunes:
        row["fine_tuned"] = fine_tune_backbone(judge, weights, seed)
    return row | {
        "recipe": dict(contender.recipe),
        "trial_seconds": round(time.monotonic() - started),
        "threads": torch.get_num_threads(),
        "command": shlex.join(["python", "benchmarks/recipe_trials.py", *sys.argv[1:]]),
        "facts": dict(race.facts()),
    }


def append(path: Path, row: dict[str, Any]) -> None:
    rows = json.loads(path.read_text()) if path.exists() else []
    write_json(path, [*rows, row])


def write_log(rows: list[dict[str, Any]], verdicts: dict[str, str]) -> str:
    """The log as a page."""
    facts = rows[0]["facts"]
    versions = ", ".join(f"{name} {version}" for name, version in facts["versions"].items())
    lines = [
        "# Trials for the recipe",
        "",
        "Written by `python benchmarks/recipe_trials.py --write-log`; do not edit.",
        "",
        "CIFAR-10 (JPEG q92), 10,000 images, the race's small ViT (4 layers of 128, patch 8), "
        f"bf16 but where it says float32, {rows[0]['threads']} thread. Linear probe and kNN with "
        f"{CHOSEN_ON} labels, and a linear probe with 10 labels a class ({CPU.draws} draws), in "
        "percent on the race's 2,000 validation images, each at its best layer and pooling (10 "
        "labels marked with an asterisk: at the linear probe's); of some also fine-tuned, at the "
        "better of two rates. "
        "One seed is noise of a point, and of two with 10 labels. "
        "Content / noise: how loudly the patch embedding answers to images, over its answer to "
        "white noise as strong. The loss is the trial's own, so it compares with no other. "
        f"{facts['date']}, {facts['hardware']}, {versions}; other work ran beside it, so no times.",
        "",
        "| trial | seed | batch | epochs | lr | hypothesis | linear | kNN | 10 labels "
        "| fine-tuned, 10 / 100 labels | content / noise | loss | best for linear | verdict |",
        "|---|---:|---:|---:|---:|---|---:|---:|---:|---:|---:|---:|---|---|",
    ]
    for row in rows:
        seed = row.get("seed", SEED)
        key = f"{row['name']}/{row['batch']}"
        verdict = verdicts.get(key if seed == SEED else f"{key}/{seed}", "")
        numbers = " | ".join(f"{row[name]:.1f}" for name in ("linear", "knn", "few"))
        numbers += "" if "few" in row["choices"] else "\\*"
        tuned = " / ".join(f"{value:.1f}" for value in row.get("fine_tuned", {}).values())
        reads = row.get("content_over_noise") or ""
        lines.append(
            f"| {row['name']} | {seed} | {row['batch']} | {row['epochs']:g} | {row['lr']:g} "
            f"| {TRIALS[row['name']].hypothesis} | {numbers} | {tuned} | {reads} "
            f"| {row.get('loss', '-')} | {row['choices']['linear']} | {verdict} |"
        )
    commands = dict.fromkeys(row["command"] for row in rows)
    lines += [
        "",
        "Commands:",
        "",
        "```",
        *commands,
        "```",
        "",
        "What each trial changes stands in `benchmarks/racing/trials.py`.",
    ]
    return "\n".join(lines) + "\n"


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--data", type=Path, default=Path("../shared/data/cifar10"))
    parser.add_argument("--only", nargs="+", choices=list(TRIALS), default=list(TRIALS))
    parser.add_argument("--epochs", type=float, default=4.0)
    parser.add_argument("--batch", type=int, default=CPU.batch)
    parser.add_argument("--seed", type=int, default=SEED, help=f"{SEED} or above")
    parser.add_argument("--threads", type=int)
    parser.add_argument("--fine-tune", action="store_true", help="judge by that too")
    parser.add_argument("--out", type=Path, default=RESULTS / "recipe-trials.json")
    parser.add_argument("--write-log", action="store_true")
    options = parser.parse_args()
    if options.write_log:
        rows = json.loads((RESULTS / "recipe-trials.json").read_text())
        verdicts = json.loads((RESULTS / "recipe-verdicts.json").read_text())
        write_atomically(RESULTS / "recipe-log.md", write_log(rows, verdicts).encode())
        return
    if options.threads:
        torch.set_num_threads(options.threads)
    keep_freed_memory()
    race = Race(
        replace(CPU, batch=options.batch),
        options.data,
        options.out.parent,
        Path("runs/recipe-trials"),
    )
    for name in options.only:
        row = run_trial(race, TRIALS[name], options.epochs, options.seed, options.fine_tune)
        append(options.out, row)
        print(
            f"{name:28s} lin {row['linear']:.1f} knn {row['knn']:.1f} few {row['few']:.1f} "
            f"{row.get('fine_tuned', '')} loss {row.get('loss')} {row['choices']} "
            f"{row['trial_seconds']} s",
            flush=True,
        )


if __name__ == "__main__":
    main()
