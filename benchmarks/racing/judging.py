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

    def probe(
        self, weights: Weights | None, seed: int, choice: EmbeddingChoice, few: bool
    ) -> dict[str, float]:
        """Accuracies on the test images in percent: "linear", "knn" and, if asked for, "few".

        "few" is a linear probe's with 10 labels a class, its mean over the draws.
        """
        known, test = self.images.labelled, self.images.test
        train = (self._embed(weights, seed, known, [choice])[choice], known.labels)
        held = (self._embed(weights, seed, test, [choice])[choice], test.labels)
        row = {"linear": linear_probe_accuracy(*train, *held), "knn": knn_accuracy(*train, *held)}
        if few:
            count = min(FEW, int(torch.bincount(known.labels).min()))
            drawn = [draw_labelled(known.labels, count, 0, draw) for draw in range(self.size.draws)]
            scores = [
                linear_probe_accuracy(train[0][rows], train[1][rows], *held) for rows in drawn
            ]
            row["few"], row["few_std"] = mean(scores), stdev(scores)
        return {name: 100 * value for name, value in row.items()}

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


def choice_to_dict(choice: EmbeddingChoice, validation: float, lr: Mapping[int, float]) -> Any:
    """For a choice's JSON; the inverse is `choice_from_dict`."""
    return {
        "embedding": asdict(choice),
        "validation_linear": validation,
        "fine_tuning_lr": {str(labels): value for labels, value in lr.items()},
    }


def choice_from_dict(content: Mapping[str, Any]) -> EmbeddingChoice:
    """The layer and pooling of a choice's JSON."""
    return EmbeddingChoice(**content["embedding"])
