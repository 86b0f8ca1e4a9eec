"""The race's bars, held against what was measured."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass

from results_reading import Entry, RaceResults, Score

MAE_SECONDS, SIMMIM_SECONDS, HALF = "-mae-seconds", "-simmim-seconds", "-half"
SHORTER = 0.5
CONVNEXT = ("convnext-energy", "convnext-judging", "convnext-judging-long")
CONVNEXT_SCRATCH = "convnext-untrained"
RECIPES = ("energy", "twoheads", "xavier", "masked", "excerpt", "sparse")


@dataclass(frozen=True)
class Verdict:
    """A bar and what came out.

    Attributes:
        what: was asked.
        bar: that it was to reach.
        found: in words and numbers.
        met: None where it was not measured.
    """

    what: str
    bar: str
    found: str
    met: bool | None


def judge(race: RaceResults) -> list[Verdict]:
    """All bars of one race."""
    return [
        _against(race, "MAE", "mae", "", "ahead on 3 of 4 beyond the spread", 3, Score.ahead_of),
        _against(race, "MAE", "mae", MAE_SECONDS, "level or ahead on 2 of 4", 2, _at_least_level),
        _against(race, "SimMIM", "simmim", "", "ahead on all 4", 4, Score.ahead_of),
        _against(race, "SimMIM", "simmim", SIMMIM_SECONDS, "ahead on all 4", 4, Score.ahead_of),
        _epochs_to_reach_mae(race),
        _convnext(race),
    ]


def shorter_schedules(race: RaceResults) -> Verdict:
    """The first bar's question, of schedules of half the length: it shows who is early."""
    bar = "ahead on 3 of 4 beyond the spread"
    return _against(race, "MAE", "mae-half", HALF, bar, 3, Score.ahead_of)


def four(entry: Entry) -> list[str]:
    """Linear, kNN, 10 labels a class, and fine-tuning with the most labels."""
    measures = entry.measures()
    return [*measures[:3], measures[-1]]


def recipes(race: RaceResults, ending: str) -> list[Entry]:
    """The energy's recipes on the ViT at equal epochs (no ending), or at a rival's seconds."""
    names = [f"{recipe}{ending}" for recipe in RECIPES]
    return [race.entries[name] for name in names if name in race.entries]


def _at_least_level(ours: Score, theirs: Score) -> bool:
    return not theirs.ahead_of(ours)


def _against(
    race: RaceResults,
    title: str,
    rival_name: str,
    ending: str,
    bar: str,
    needed: int,
    passes: Callable[[Score, Score], bool],
) -> Verdict:
    kind = "seconds" if ending.endswith("seconds") else "epochs"
    what = f"energy against {title}, equal {kind}{', half as many' if ending == HALF else ''}"
    rival = race.entries.get(rival_name)
    best = rival and _best(recipes(race, ending), rival)
    if rival is None or best is None:
        return Verdict(what, bar, "not run", None)
    passed = [m for m in four(rival) if passes(best.score(m), rival.score(m))]
    found = f"{len(passed)} of 4, {best.title}: {_differences(best, rival, four(rival))}"
    return Verdict(what, bar, found, len(passed) >= needed)


def _best(ours: Sequence[Entry], rival: Entry) -> Entry | None:
    """By the validation images, of those with as many seeds as the rival; None if there is none."""
    whole = [entry for entry in ours if len(entry.results) >= len(rival.results)]
    return max(whole, key=lambda entry: entry.validation, default=None)


def _differences(ours: Entry, theirs: Entry, measures: Sequence[str]) -> str:
    return "; ".join(
        f"{measure} {ours.score(measure)} against {theirs.score(measure)} "
        f"({ours.score(measure).mean - theirs.score(measure).mean:+.1f})"
        for measure in measures
    )


def _epochs_to_reach_mae(race: RaceResults) -> Verdict:
    what, bar = "epochs to reach MAE's final linear probe", "at most half of MAE's"
    mae = race.entries.get("mae")
    ours = [entry for entry in race.entries.values() if entry.name.startswith(RECIPES)]
    if mae is None or not ours:
        return Verdict(what, bar, "not run", None)
    goal = mae.score("linear").mean
    reached = [
        (share * entry.epochs, entry.title)
        for entry in ours
        for share, score in entry.curve("linear")
        if score.mean >= goal
    ]
    if not reached:
        best = max(ours, key=lambda entry: entry.score("linear").mean)
        found = (
            f"never reached: at most {best.score('linear')} ({best.title}) against "
            f"{mae.score('linear')} ({best.score('linear').mean - goal:+.1f})"
        )
        return Verdict(what, bar, found, False)
    epochs, title = min(reached)
    found = f"{epochs:.1f} of {mae.epochs:.1f} epochs, {title}"
    return Verdict(what, bar, found, epochs <= SHORTER * mae.epochs)


def _convnext(race: RaceResults) -> Verdict:
    what = "ConvNeXt by energy against from scratch, fine-tuned"
    bar = "ahead beyond the spread, with few labels and with many"
    scratch = race.entries.get(CONVNEXT_SCRATCH)
    made = [race.entries[name] for name in CONVNEXT if name in race.entries]
    ours = scratch and _best(made, scratch)
    if ours is None or scratch is None:
        return Verdict(what, bar, "not run", None)
    measures = [measure for measure in ours.measures() if measure.startswith("fine-tuned")]
    met = all(ours.score(m).ahead_of(scratch.score(m)) for m in measures)
    return Verdict(what, bar, f"{ours.title}: {_differences(ours, scratch, measures)}", met)
