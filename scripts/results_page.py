"""Writes docs/results.md and its pictures from the committed JSON of the races, and nothing else.

python scripts/results_page.py
"""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from results_bars import Verdict, judge, shorter_schedules
from results_energy import (
    RunMeasures,
    contenders,
    energy_table,
    judge_energy,
    read_run,
    restoration_table,
)
from results_plots import race_plot
from results_reading import Entry, RaceResults, distinct, read_races
from results_transfer import Transfer, lowshot_table, read_transfer, segmentation_table

ROOT = Path(__file__).resolve().parent.parent
PAGE = ROOT / "docs" / "results.md"
IMAGES = ROOT / "docs" / "images"
RESULTS = ROOT / "benchmarks" / "results"
HOW = """\
## How it was raced

Same images, crops and flips, order, AdamW, warm-up and cosine, batch and evaluation for all. MAE
and SimMIM are those of Hugging Face transformers with their published masks and losses, on the timm
backbone's dimensions; their encoders' weights are moved into the timm backbone (a test asks for
equal features). SimCLR is lightly's head, loss and augmentation: stronger than what the others get,
because without it SimCLR does not learn. For ConvNeXt there is no MAE, and transformers has no
SimMIM: not available.

Learning rate: for each contender the best of the same grid, in short runs of a seed that nothing
else uses. Layer and pooling of each probe, and fine-tuning's learning rate: for each contender, at
its first seed. All of these are chosen on a validation split of the training file, which no number
here uses.
Runs that are shorter or longer than a rival's take the choices of their recipe. Which of our
recipes stands in a bar is chosen on that split too; but recipes joined the race one after another,
when the results of the earlier ones had been seen.

Seconds are steps times the median time of a step; the steps of all contenders were timed in turn,
each in the precision and with the attention kernel in which it is fastest on that machine.
Operations are counted (`backfold.operations.count_operations`). Ahead means by more than the
deviation of the difference, the root of the two squared deviations over the seeds; level, by less.
Curves: filled where a schedule ends, hollow in the middle of one; dashed and square for schedules
of another length. The linear probe and kNN have {labelled} labels, "few" 10 a class over
{draws} draws, and a fine-tuning as many a class as its column says.
"""


def page(
    races: Sequence[RaceResults],
    measures: RunMeasures | None = None,
    transfer: Transfer | None = None,
) -> str:
    """The whole page."""
    parts = ["# Results\n", _first_paragraph(races, measures)]
    for race in races:
        parts += [_bars(race), _race(race)]
    if measures:
        parts.append(_energy(measures))
    if transfer:
        parts.append(_transfer(transfer))
    if races:
        size = races[0].size
        parts.append(HOW.format(labelled=size["labelled"], draws=size["draws"]))
    parts.append("Written by `python scripts/results_page.py` from `benchmarks/results`.\n")
    return "\n".join(parts)


def _first_paragraph(races: Sequence[RaceResults], measures: RunMeasures | None) -> str:
    if not races:
        return "No race has been run yet, so no bar is met.\n"
    sentences = []
    judged = [(race.name, judge(race)) for race in races]
    if measures:
        judged.append(("What the energy knows", judge_energy(measures)))
    for name, verdicts in judged:
        missed = [verdict for verdict in verdicts if verdict.met is False]
        open_ = [verdict.what for verdict in verdicts if verdict.met is None]
        line = f"**{name}: {len(missed)} of {len(verdicts)} bars are missed.**"
        for verdict in missed:
            line += f" Missed: {verdict.what} (asked: {verdict.bar}): {verdict.found}."
        if open_:
            line += f" Not measured: {'; '.join(open_)}."
        sentences.append(line)
    return " ".join(sentences) + "\n"


def _bars(race: RaceResults) -> str:
    short = shorter_schedules(race)
    beside = "" if short.met is None else f"Not a bar: {short.what}: ahead on {short.found}.\n"
    return f"## {race.name}\n\n### Bars\n\n{_verdicts(judge(race))}\n\n{beside}"


def _verdicts(verdicts: Sequence[Verdict]) -> str:
    rows = [[verdict.what, verdict.bar, verdict.found, _word(verdict)] for verdict in verdicts]
    return _table(["what", "bar", "found", ""], rows)


def _energy(measures: RunMeasures) -> str:
    scores = _table(["AUROC", *contenders(measures)], energy_table(measures))
    commands = "\n".join(measures.facts["commands"])
    return (
        f"## What the energy knows\n\n{_verdicts(judge_energy(measures))}\n\n"
        f"{measures.facts['run']}\n\n{scores}\n\n"
        "An AUROC near 0 separates as well as one near 1, but the wrong way round. ± is over "
        f"bootstrap samples of the images.\n\n{_restoration(measures)}```bash\n{commands}\n```\n"
    )


def _restoration(measures: RunMeasures) -> str:
    rows = restoration_table(measures)
    if not rows:
        return ""
    head = ["PSNR, dB", "corrupted", "1 step", "2 steps", "4 steps", "best without learning"]
    return f"Restored at middle severity:\n\n{_table(head, rows)}\n\n"


def _transfer(transfer: Transfer) -> str:
    tables = [
        f"{title}\n\n{_table(head, rows)}\n"
        for title, (head, rows) in (
            ("Accuracy in percent, ± over the draws of the labels:", lowshot_table(transfer)),
            ("Segmentation, ± over the seeds of the heads:", segmentation_table(transfer)),
        )
        if rows
    ]
    commands = "\n".join(transfer.facts["commands"])
    return (
        f"## Few labels, and segmentation\n\n{transfer.facts['run']}\n\n"
        + "\n".join(tables)
        + f"\n```bash\n{commands}\n```\n"
    )


def _word(verdict: Verdict) -> str:
    return {True: "met", False: "**missed**", None: "not measured"}[verdict.met]


def _race(race: RaceResults) -> str:
    size = race.size
    pictures = "\n".join(
        f"![Accuracy over epochs, seconds and operations](images/{picture})\n"
        for picture in pictures_of(race)
    )
    images = size["images"] or "all"
    return "\n".join(
        [
            f"### Accuracy\n\n{size['data']}, {images} unlabelled images of {size['image_size']} "
            f"pixels, batch {size['batch']}, {size['epochs']:g} epochs for a whole schedule, "
            f"{size['test']} test images. Percent, mean ± deviation over seeds.\n",
            _accuracy(race),
            "",
            pictures,
            "### Steps\n",
            _steps(race),
            "",
            "### Chosen\n",
            _chosen(race),
            "",
            _facts(race),
        ]
    )


def _accuracy(race: RaceResults) -> str:
    entries = list(race.entries.values())
    measures = entries[0].measures()
    head = ["", "seeds", "epochs", "s in steps", "10¹² operations", *measures]
    rows = [
        [
            entry.title,
            str(len(entry.results)),
            f"{entry.epochs:.1f}",
            f"{entry.seconds:.0f}",
            f"{entry.operations(race.size['batch']) / 1e12:.1f}",
            *(str(entry.score(measure)) for measure in measures),
        ]
        for entry in entries
    ]
    return _table(head, rows)


def _trained(race: RaceResults) -> list[Entry]:
    return [e for e in race.entries.values() if e.timing is not None and e.name in race.choices]


def _steps(race: RaceResults) -> str:
    rows = [
        [
            entry.title,
            f"{entry.timing['images_per_second']:.0f}",
            f"{entry.timing['operations_per_image'] / 1e6:.1f}",
            entry.timing["precision"],
            entry.timing["attention"],
        ]
        for entry in _trained(race)
        if entry.timing is not None
    ]
    return _table(["", "images/s", "10⁶ operations an image", "precision", "attention"], rows)


def _chosen(race: RaceResults) -> str:
    rows = []
    for name, choice in race.choices.items():
        if name not in race.entries:
            continue
        runs = list(race.entries[name].runs.values())
        edge = " (edge of the grid)" if runs and runs[0]["lr_at_edge_of_grid"] else ""
        embedding, rates = choice["embedding"], choice["fine_tuning_lr"]
        rows.append(
            [
                race.entries[name].title,
                f"{runs[0]['lr']:g}{edge}" if runs else "",
                *(_embedding(embedding[probe]) for probe in ("linear", "knn", "few")),
                ", ".join(f"{labels}: {rate:g}" for labels, rate in rates.items()),
            ]
        )
    grid = ", ".join(f"{rate:g}" for rate in race.size["learning_rates"])
    probes = ["layer and pooling: linear", "kNN", "few"]
    return _table(["", f"learning rate of {grid}", *probes, "fine-tuning's, by labels"], rows)


def _embedding(choice: dict[str, Any]) -> str:
    return f"{choice['layer']}, {choice['pooling'].replace('_', ' ')}"


def _facts(race: RaceResults) -> str:
    facts = race.facts
    versions = "; ".join(
        dict.fromkeys(
            ", ".join(f"{name} {version}" for name, version in fact["versions"].items())
            for fact in facts
        )
    )
    commands = "\n".join(dict.fromkeys(fact["command"] for fact in facts))
    seeds = sorted({seed for entry in race.entries.values() for seed in entry.results})
    return (
        f"Seeds {', '.join(map(str, seeds))}. {distinct(fact['hardware'] for fact in facts)}, "
        f"{distinct(str(fact['threads']) for fact in facts)} thread(s) a process; "
        f"{distinct(fact['date'] for fact in facts)}; "
        f"commit {distinct(fact['commit'] for fact in facts)}; {versions}.\n\n"
        f"```bash\n{commands}\n```\n"
    )


def _table(head: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    lines = [head, ["---"] + ["---:"] * (len(head) - 1), *rows]
    return "\n".join(f"| {' | '.join(line)} |" for line in lines)


def pictures_of(race: RaceResults) -> dict[str, str]:
    """File names of a race's pictures, and the backbones that they show."""
    trained = [entry for entry in race.entries.values() if entry.timing is not None]
    names = {"convnext" if entry.name.startswith("convnext") else "vit" for entry in trained}
    return {f"{race.name}-{name}.svg": name for name in sorted(names, reverse=True)}


def main() -> None:
    """Write the page and the pictures."""
    races = read_races(RESULTS)
    measured = read_run(RESULTS / "energy-bars"), read_transfer(RESULTS / "transfer")
    PAGE.write_text(page(races, *measured))
    for race in races:
        for picture, backbone in pictures_of(race).items():
            (IMAGES / picture).write_bytes(race_plot(race, backbone))


if __name__ == "__main__":
    main()
