"""The committed results of races, read back and averaged over their seeds."""

import json
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from statistics import mean, stdev
from typing import Any

PROBES = ("linear", "knn", "few")


@dataclass(frozen=True)
class Score:
    """Mean and sample deviation over seeds, in percent; the deviation of one seed is 0."""

    mean: float
    std: float
    count: int

    @classmethod
    def of(cls, values: Sequence[float]) -> "Score":
        """Of one value or more."""
        return cls(mean(values), stdev(values) if len(values) > 1 else 0.0, len(values))

    def __str__(self) -> str:
        spread = f" ± {self.std:.1f}" if self.count > 1 else ""
        return f"{self.mean:.1f}{spread}"

    def ahead_of(self, other: "Score") -> bool:
        """Beyond the spread: by more than the deviation of the difference."""
        return self.mean - other.mean > self.spread(other)

    def level_with(self, other: "Score") -> bool:
        """Neither is ahead."""
        return not self.ahead_of(other) and not other.ahead_of(self)

    def spread(self, other: "Score") -> float:
        """Deviation of the difference of two independent values."""
        return float((self.std**2 + other.std**2) ** 0.5)


@dataclass(frozen=True)
class Entry:
    """A contender's results over all seeds that are there.

    Attributes:
        name: of the contender.
        title: for readers.
        runs: the pretrainings' JSON, by seed; empty for the untrained.
        results: the judgements' JSON, by seed.
        timing: of its step; None for the untrained.
    """

    name: str
    title: str
    runs: dict[int, Any]
    results: dict[int, Any]
    timing: Any | None

    @property
    def validation(self) -> float:
        """Linear probe on the validation images, by which recipes are chosen."""
        return mean(result["validation_linear"] for result in self.results.values())

    @property
    def epochs(self) -> float:
        """Of the schedule."""
        return max((run["epochs"] for run in self.runs.values()), default=0.0)

    @property
    def seconds(self) -> float:
        """In steps, by the step's time as measured in turn with all others."""
        return self._steps() * self.timing["seconds_per_step"] if self.timing else 0.0

    def operations(self, batch: int) -> float:
        """Counted, of all steps."""
        return self._steps() * batch * self.timing["operations_per_image"] if self.timing else 0.0

    def _steps(self) -> int:
        return max((run["steps"] for run in self.runs.values()), default=0)

    def score(self, measure: str) -> Score:
        """Of a probe, or of fine-tuning with so many labels a class ("fine-tuned 10")."""
        return Score.of([_value(result, measure) for result in self.results.values()])

    def measures(self) -> list[str]:
        """The probes, and fine-tuning by rising numbers of labels."""
        first = next(iter(self.results.values()))
        labels = sorted(int(count) for count in first["fine_tuned"])
        return [*PROBES, *(f"fine-tuned {count}" for count in labels)]

    def curve(self, measure: str) -> list[tuple[float, Score]]:
        """(share of the run's steps, score) at each point at which the backbone was kept."""
        points = [result["points"] for result in self.results.values()]
        last = points[0][-1]["step"] or 1
        return [
            (kept[0]["step"] / last, Score.of([point[measure] for point in kept]))
            for kept in zip(*points, strict=True)
        ]


@dataclass(frozen=True)
class RaceResults:
    """A race's folder.

    Attributes:
        name: of the folder.
        size: its extent.
        entries: by the contenders' names, in the order of the race.
        choices: of layer, pooling and fine-tuning's learning rates, by contender.
        facts: of every piece.
    """

    name: str
    size: Any
    entries: dict[str, Entry]
    choices: dict[str, Any]
    facts: list[Any]


def _value(result: Any, measure: str) -> float:
    kind, _, labels = measure.partition(" ")
    return float(result["fine_tuned"][labels] if labels else result["points"][-1][kind])


def read_races(folder: Path) -> list[RaceResults]:
    """Every race below a folder that has results."""
    races = [_read(path.parent) for path in sorted(folder.glob("race-*/race.json"))]
    return [race for race in races if race.entries]


def _read(folder: Path) -> RaceResults:
    timings: dict[str, Any] = {}
    for path in sorted(folder.glob("timing-*.json")):
        timings |= _load(path)["contenders"]
    results = _by_contender(folder / "results")
    runs = _by_contender(folder / "runs")
    entries = {}
    for name, found in results.items():
        first = next(iter(found.values()))
        entries[name] = Entry(
            name, first["title"], runs.get(name, {}), found, timings.get(first["tuned"])
        )
    ordered = sorted(entries.values(), key=_place)
    return RaceResults(
        folder.name,
        _load(folder / "race.json"),
        {entry.name: entry for entry in ordered},
        {path.stem: _load(path) for path in sorted((folder / "choices").glob("*.json"))},
        [_load(path)["facts"] for path in sorted(folder.rglob("*.json")) if path.stem != "race"],
    )


def _place(entry: Entry) -> tuple[bool, int]:
    """The ViT first; of one backbone, the order in which they race."""
    first = next(iter(entry.results.values()))
    return entry.name.startswith("convnext"), int(first["position"])


def _by_contender(folder: Path) -> dict[str, dict[int, Any]]:
    found: dict[str, dict[int, Any]] = {}
    for path in sorted(folder.glob("*.json")):
        content = _load(path)
        found.setdefault(content["contender"], {})[content["seed"]] = content
    return found


def _load(path: Path) -> Any:
    return json.loads(path.read_text())


def distinct(values: Iterable[str]) -> str:
    """Each once, in order, joined."""
    return ", ".join(dict.fromkeys(values))
