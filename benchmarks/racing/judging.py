"""The same evaluation for every backbone: probes, and fine-tuning, on the same images and draws."""

from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from statistics import mean, stdev
from typing import Any, Literal

import torch
from torch import Tensor, nn

from backfold.backbone import use_plain_attention
from backfold.data.statistics import ChannelStatistics
from backfold.embedding import EmbeddingChoice
from backfold.evaluation.finetuning import DivergedError, FineTuning, accuracy, fine_tune
from backfold.evaluation.probes import linear_probe_accuracy
from backfold.evaluation.protocol import draw_labelled
from backfold.metrics import knn_accuracy
from racing.embedding import embed_all
from racing.images import Labelled, RaceImages
from racing.methods import Attention
from racing.sizes import BackboneSpec, Size

CHOSEN_ON = 2000  # labelled images that the choices' probes learn from
FEW = 10
Weights = Mapping[str, Tensor]


@dataclass(frozen=True)
class Judge:
    """Judges backbones of one architecture.

    Args:
        size: of the race.
        spec: the architecture.
        images: of the race.
        device: where backbones run.
        precision: of embeddings and fine-tuning.
        attention: likewise; the fastest ones on this machine, the same for every backbone.
    """

    size: Size
    spec: BackboneSpec
    images: RaceImages
    device: torch.device
    precision: Literal["32-true", "bf16-mixed"]
    attention: Attention

    def backbone(self, weights: Weights | None, seed: int, drop_path: float = 0.0) -> nn.Module:
        """With these weights, or with random ones."""
        made = self.spec.build(self.size.image_size, seed, drop_path)
        if weights is not None:
            made.load_state_dict(weights)
        if self.attention == "plain":
            use_plain_attention(made)
        return made

    def choose(
        self, weights: Weights | None, seed: int, among: Sequence[EmbeddingChoice] = ()
    ) -> tuple[EmbeddingChoice, float]:
        """The layer and pooling of the best linear probe, and its accuracy in percent.

        Among all that there are, or some; on the validation images, no test image is looked at.
        """
        found = self.validate(weights, seed, among)
        best = max(found, key=found.__getitem__)
        return best, found[best]

    def validate(
        self, weights: Weights | None, seed: int, only: Sequence[EmbeddingChoice] = ()
    ) -> dict[EmbeddingChoice, float]:
        """Linear probes' accuracies on the validation images, of all choices or some; percent."""
        known, validation = self.images.labelled.first(CHOSEN_ON), self.images.validation
        train, held = (self._embed(weights, seed, part, only) for part in (known, validation))
        return {
            choice: 100
            * linear_probe_accuracy(train[choice], known.labels, held[choice], validation.labels)
            for choice in train
        }

    def scores(self, weights: Weights | None, seed: int) -> dict[str, dict[EmbeddingChoice, float]]:
        """Each probe's accuracy on the validation images, of every layer and pooling; percent."""
        known, validation = self.images.labelled.first(CHOSEN_ON), self.images.validation
        train, held = (self._embed(weights, seed, part, ()) for part in (known, validation))
        found: dict[str, dict[EmbeddingChoice, float]] = {"linear": {}, "knn": {}, "few": {}}
        for choice in train:
            parts = train[choice], known.labels, held[choice], validation.labels
            found["linear"][choice] = 100 * linear_probe_accuracy(*parts)
            found["knn"][choice] = 100 * knn_accuracy(*parts)
            found["few"][choice] = 100 * mean(self._few(*parts))
        return found

    def choose_each(self, weights: Weights | None, seed: int) -> "Choices":
        """The layer and pooling that are best for each probe, on the validation images."""
        scores = self.scores(weights, seed)
        return Choices(
            **{name: max(found, key=found.__getitem__) for name, found in scores.items()}
        )

    def probe(
        self, weights: Weights | None, seed: int, choices: "Choices", few: bool
    ) -> dict[str, float]:
        """Accuracies on the test images in percent: "linear", "knn" and, if asked for, "few".

        "few" is a linear probe's with 10 labels a class, its mean over the draws.
        """
        known, test = self.images.labelled, self.images.test
        train = self._embed(weights, seed, known, choices.all)
        held = self._embed(weights, seed, test, choices.all)

        def parts(choice: EmbeddingChoice) -> tuple[Tensor, Tensor, Tensor, Tensor]:
            return train[choice], known.labels, held[choice], test.labels

        row = {
            "linear": linear_probe_accuracy(*parts(choices.linear)),
            "knn": knn_accuracy(*parts(choices.knn)),
        }
        if few:
            scores = self._few(*parts(choices.few))
            row["few"], row["few_std"] = mean(scores), stdev(scores)
        return {name: 100 * value for name, value in row.items()}

    def _few(
        self, train: Tensor, train_labels: Tensor, held: Tensor, held_labels: Tensor
    ) -> list[float]:
        """A linear probe's accuracy with 10 labels a class, for each draw."""
        count = min(FEW, int(torch.bincount(train_labels).min()))
        drawn = [draw_labelled(train_labels, count, 0, draw) for draw in range(self.size.draws)]
        return [
            linear_probe_accuracy(train[rows], train_labels[rows], held, held_labels)
            for rows in drawn
        ]

    def fine_tuned(
        self, weights: Weights | None, seed: int, labels: int, lr: float, on: Labelled
    ) -> float:
        """Accuracy in percent on some images after fine-tuning, or training from scratch.

        Args:
            weights: None trains from scratch.
            seed: of the run, and of which labels are drawn.
            labels: of each class.
            lr: the head's highest learning rate.
            on: the validation or the test images.
        """
        rows = draw_labelled(self.images.labelled.labels, labels, 1, seed)
        settings = self._settings(lr, seed)
        statistics: ChannelStatistics = self.images.statistics
        try:
            classifier = fine_tune(
                lambda drop_path: self.backbone(weights, seed, drop_path).train(),
                self.images.labelled.images[rows],
                self.images.labelled.labels[rows],
                statistics,
                settings if weights is not None else settings.from_scratch(),
                self.device,
            )
        except DivergedError:
            return 0.0
        return 100 * accuracy(classifier, on.images, on.labels, statistics, self.device)

    def best_lr(self, weights: Weights | None, seed: int, labels: int) -> float:
        """Of the budget's grid, on the validation images."""
        rates = self.size.fine_tuning.learning_rates
        if len(rates) == 1:
            return rates[0]
        validation = self.images.validation
        found = {lr: self.fine_tuned(weights, seed, labels, lr, validation) for lr in rates}
        return max(found, key=found.__getitem__)

    def _settings(self, lr: float, seed: int) -> FineTuning:
        budget = self.size.fine_tuning
        return FineTuning(
            epochs=0,
            min_steps=budget.steps,
            batch_size=budget.batch,
            base_lr=lr * 256 / budget.batch,
            precision=self.precision,
            seed=seed,
        )

    def _embed(
        self, weights: Weights | None, seed: int, part: Labelled, only: Sequence[EmbeddingChoice]
    ) -> dict[EmbeddingChoice, Tensor]:
        backbone = self.backbone(weights, seed).to(self.device)
        statistics = self.images.statistics
        return embed_all(backbone, part.images, statistics, self.device, self.precision, only)


@dataclass(frozen=True)
class Choices:
    """The layer and pooling that each probe of a contender reads.

    Args:
        linear: the linear probe with all labels.
        knn: the nearest neighbours.
        few: the linear probe with 10 labels a class.
    """

    linear: EmbeddingChoice
    knn: EmbeddingChoice
    few: EmbeddingChoice

    @property
    def all(self) -> list[EmbeddingChoice]:
        """Each once."""
        return list(dict.fromkeys((self.linear, self.knn, self.few)))


def choices_to_dict(choices: Choices, validation: float, lr: Mapping[int, float]) -> Any:
    """For a choice's JSON; the inverse is `choices_from_dict`."""
    return {
        "embedding": asdict(choices),
        "validation_linear": validation,
        "fine_tuning_lr": {str(labels): value for labels, value in lr.items()},
    }


def choices_from_dict(content: Mapping[str, Any]) -> Choices:
    """The layers and poolings of a choice's JSON."""
    found = content["embedding"]
    return Choices(**{name: EmbeddingChoice(**found[name]) for name in ("linear", "knn", "few")})
