"""The pieces that a race is cut into; each writes one JSON file and is skipped where it exists."""

from collections.abc import Sequence
from dataclasses import asdict, dataclass
from typing import Any, Protocol

from backfold.embedding import EmbeddingChoice
from racing.contenders import BY_NAME, CONTENDERS, Contender
from racing.embedding import LAYERS
from racing.judging import choices_from_dict, choices_to_dict
from racing.pretraining import describe, pretrain
from racing.race import Race
from racing.timing import Stopwatch, Variant, fastest, measure_interleaved, variants

LONG = 1000  # steps of a schedule that is only timed
# Every layer, averaged: a probe of each pooling would take as long as the trial itself.
TRIAL_CHOICES = [EmbeddingChoice(layer) for layer in LAYERS]
TRIAL_SEED = 100  # of the learning-rate trials; no reported run has it


class Piece(Protocol):
    """A part of a race."""

    @property
    def name(self) -> str:
        """Of its JSON file, in the race's folder."""

    @property
    def needs(self) -> Sequence[str]:
        """Names of the files that must be there first."""

    def run(self, race: Race) -> dict[str, Any]:
        """Do it; returns the file's content.

        Raises:
            OutOfTimeError: the deadline came; what was done is kept in the race's work folder.
        """


@dataclass(frozen=True)
class Timing:
    """Measures the steps of all contenders with one backbone, in turn."""

    backbone: str
    contenders: tuple[Contender, ...]

    @property
    def name(self) -> str:
        """See `Piece`."""
        return f"timing-{self.backbone}.json"

    @property
    def needs(self) -> Sequence[str]:
        """See `Piece`."""
        return ()

    def run(self, race: Race) -> dict[str, Any]:
        """See `Piece`."""
        lr = race.size.learning_rates[0]

        def watch(contender: Contender, variant: Variant) -> Stopwatch:
            setting = race.setting(
                contender, LONG, lr, TRIAL_SEED, variant.precision, variant.attention
            )
            return Stopwatch(contender.method(setting))

        watches = {
            contender: {
                variant: watch(contender, variant)
                for variant in variants(contender, race.precisions)
            }
            for contender in self.contenders
        }
        every = [watch for group in watches.values() for watch in group.values()]
        measure_interleaved(every, race.size.rounds, race.size.timed_steps)
        return {
            "contenders": {
                contender.name: {
                    **fastest(group, next(iter(group.values())).operations(), race.size.batch),
                    "recipe": dict(contender.recipe),
                }
                for contender, group in watches.items()
            }
        }


@dataclass(frozen=True)
class Trial:
    """A short run with one learning rate, judged on the validation images."""

    contender: Contender
    lr: float

    @property
    def name(self) -> str:
        """See `Piece`."""
        return f"trials/{self.contender.name}-lr{self.lr:g}.json"

    @property
    def needs(self) -> Sequence[str]:
        """See `Piece`."""
        return (f"timing-{self.contender.backbone}.json",)

    def run(self, race: Race) -> dict[str, Any]:
        """See `Piece`."""
        total = race.whole_steps(race.size.trial_share)
        folder = race.folder(f"trial-{self.contender.name}-lr{self.lr:g}")
        timing = race.timing(self.contender)
        setting = race.setting(
            self.contender, total, self.lr, TRIAL_SEED, timing["precision"], timing["attention"]
        )
        method = self.contender.method(setting)
        progress = pretrain(method, total, [], folder, race.deadline)
        choice, accuracy = race.judge(self.contender).choose(
            method.backbone(), TRIAL_SEED, TRIAL_CHOICES
        )
        return {
            "contender": self.contender.name,
            "lr": self.lr,
            "seed": TRIAL_SEED,
            "validation_linear": accuracy,
            "embedding": asdict(choice),
            **describe(progress),
        }


def trials_of(contender: Contender, learning_rates: Sequence[float]) -> list[Trial]:
    """Of the contender that was tuned for this one."""
    tuned = BY_NAME[contender.tuned]
    return [Trial(tuned, lr) for lr in learning_rates] if contender.is_trained else []


def best_lr(race: Race, contender: Contender) -> tuple[float, bool]:
    """The learning rate of the best trial, and whether it is at the grid's edge."""
    rates = race.size.learning_rates
    scores = [race.read(trial.name)["validation_linear"] for trial in trials_of(contender, rates)]
    position = scores.index(max(scores))
    return rates[position], position in (0, len(rates) - 1)


@dataclass(frozen=True)
class Run:
    """A whole pretraining with one seed."""

    contender: Contender
    seed: int
    learning_rates: tuple[float, ...]

    @property
    def name(self) -> str:
        """See `Piece`."""
        return f"runs/{self.contender.name}-seed{self.seed}.json"

    @property
    def needs(self) -> Sequence[str]:
        """See `Piece`."""
        return [trial.name for trial in trials_of(self.contender, self.learning_rates)]

    def run(self, race: Race) -> dict[str, Any]:
        """See `Piece`."""
        total = race.total_steps(self.contender)
        lr, at_edge = best_lr(race, self.contender)
        timing = race.timing(self.contender)
        method = self.contender.method(
            race.setting(
                self.contender, total, lr, self.seed, timing["precision"], timing["attention"]
            )
        )
        folder = race.folder(f"{self.contender.name}-seed{self.seed}")
        points = race.point_steps(self.contender)
        progress = pretrain(method, total, points, folder, race.deadline)
        return {
            "contender": self.contender.name,
            "seed": self.seed,
            "lr": lr,
            "lr_at_edge_of_grid": at_edge,
            "precision": timing["precision"],
            "attention": timing["attention"],
            "epochs": total / race.steps_per_epoch,
            "steps_per_epoch": race.steps_per_epoch,
            "recipe": dict(self.contender.recipe),
            "points": points,
            **describe(progress),
        }


@dataclass(frozen=True)
class Choice:
    """Layer, pooling and fine-tuning's learning rates of a contender, on the validation images."""

    contender: Contender
    seed: int
    learning_rates: tuple[float, ...]

    @property
    def name(self) -> str:
        """See `Piece`."""
        return f"choices/{self.contender.name}.json"

    @property
    def needs(self) -> Sequence[str]:
        """See `Piece`."""
        run = Run(self.contender, self.seed, self.learning_rates)
        timing = f"timing-{self.contender.backbone}.json"
        return [run.name] if self.contender.is_trained else [timing]

    def run(self, race: Race) -> dict[str, Any]:
        """See `Piece`."""
        judge = race.judge(self.contender)
        last = race.point_steps(self.contender)[-1]
        weights = race.weights(self.contender, self.seed, last)
        choices = judge.choose_each(weights, self.seed)
        validation = judge.validate(weights, self.seed, [choices.linear])[choices.linear]
        rates = {
            labels: judge.best_lr(weights, self.seed, labels)
            for labels in race.size.fine_tuning.labels_per_class
        }
        return {
            "contender": self.contender.name,
            "seed": self.seed,
            **choices_to_dict(choices, validation, rates),
        }


@dataclass(frozen=True)
class Judgement:
    """A run's numbers on the test images."""

    contender: Contender
    seed: int
    learning_rates: tuple[float, ...]

    @property
    def name(self) -> str:
        """See `Piece`."""
        return f"results/{self.contender.name}-seed{self.seed}.json"

    @property
    def needs(self) -> Sequence[str]:
        """See `Piece`."""
        run = Run(self.contender, self.seed, self.learning_rates)
        own = [run.name] if self.contender.is_trained else []
        return [*own, f"choices/{self.contender.tuned}.json"]

    def run(self, race: Race) -> dict[str, Any]:
        """See `Piece`."""
        found = race.read(f"choices/{self.contender.tuned}.json")
        judge, choices = race.judge(self.contender), choices_from_dict(found)
        steps = race.point_steps(self.contender) if self.contender.is_trained else [0]
        points = []
        for step in steps:
            weights = race.weights(self.contender, self.seed, step)
            row = judge.probe(weights, self.seed, choices, few=step == steps[-1])
            points.append({"step": step, "epochs": step / race.steps_per_epoch, **row})
        validation = judge.validate(weights, self.seed, [choices.linear])[choices.linear]
        fine_tuned = {
            labels: judge.fine_tuned(weights, self.seed, int(labels), lr, race.images.test)
            for labels, lr in found["fine_tuning_lr"].items()
        }
        return {
            "contender": self.contender.name,
            "title": self.contender.title,
            "tuned": self.contender.tuned,
            "position": CONTENDERS.index(self.contender),
            "seed": self.seed,
            "validation_linear": validation,
            "points": points,
            "fine_tuned": fine_tuned,
        }
