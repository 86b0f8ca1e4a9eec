"""What an evaluation is given."""

import dataclasses
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from backfold.embedding import EmbeddingChoice
from backfold.errors import UserError
from backfold.evaluation.finetuning import FineTuning
from backfold.evaluation.learning_rate_choice import LEARNING_RATE_FACTORS
from backfold.evaluation.segmentation import SegmentationSettings

CLASSIFIER_PROTOCOLS = ("knn", "linear", "attentive", "finetune", "lowshot")
MEASURE_PROTOCOLS = ("segmentation", "energy", "restoration", "adaptation")
PROTOCOLS = (*CLASSIFIER_PROTOCOLS, *MEASURE_PROTOCOLS)
DEMO_RUN = Path("runs/demo")
TUNING_PROTOCOLS = ("finetune", "lowshot", "adaptation")
# Settings that no other protocol uses.
USED_BY = {
    "embedding": ("knn", "linear", "lowshot", "energy"),
    "labels_per_class": ("knn", "linear", "attentive", "finetune"),
    "draws": ("knn", "linear", "attentive", "finetune", "lowshot"),
    "near": ("energy",),
    "far": ("energy",),
    "train_images": ("attentive", *TUNING_PROTOCOLS, "energy"),
    "test_images": ("energy", "restoration", "adaptation"),
    "num_steps": ("restoration",),
    "finetuning": TUNING_PROTOCOLS,
    "rate_factors": TUNING_PROTOCOLS,
    "segmentation": ("segmentation",),
}


@dataclass
class EvaluateSettings:
    """How `backfold evaluate` measures a run's backbone and its energy.

    Args:
        checkpoint: a run's folder or a .ckpt file.
        data: labelled images: a folder with a sub-folder a class, or parquet files with a label
            column; none takes the run's own data.
        protocol: comma-separated: knn (k = 20, cosine), linear (logistic regression), attentive,
            finetune, lowshot, segmentation, energy, restoration, adaptation.
        embedding: which layer and pooling give the embedding of knn, linear, lowshot and energy.
        labels_per_class: labelled training images a class in the low-label rows.
        draws: how often these are drawn; the table shows mean and deviation.
        near: other images that look like the run's; how well the energy tells them apart.
        far: the same of images that look different.
        train_images: labelled training images of attentive, finetune, lowshot and adaptation, and
            the neighbours of energy; none takes all.
        test_images: test images of energy, restoration and adaptation, and of near and far.
        num_steps: restoration steps that are compared by restoration.
        finetuning: the recipe of finetune, lowshot and adaptation.
        rate_factors: learning rates tried on held-out images, as factors of finetuning's base_lr; a
            single one is taken without a trial.
        segmentation: data with masks, and how heads are trained on them.
        seed: of draws, splits and training.
        out: folder for evaluation.json and measures; none takes the run's.
        accelerator: cpu, cuda, mps, or auto.

    Raises:
        UserError: a value outside its range.
    """

    checkpoint: Path = DEMO_RUN
    data: str | Path | None = None
    protocol: str = "knn,linear"
    embedding: EmbeddingChoice = field(default_factory=EmbeddingChoice)
    labels_per_class: int = 10
    draws: int = 5
    near: str | Path | None = None
    far: str | Path | None = None
    train_images: int | None = None
    test_images: int = 500
    num_steps: tuple[int, ...] = (1, 2, 4)
    finetuning: FineTuning = field(default_factory=FineTuning)
    rate_factors: tuple[float, ...] = LEARNING_RATE_FACTORS
    segmentation: SegmentationSettings = field(default_factory=SegmentationSettings)
    seed: int = 0
    out: Path | None = None
    accelerator: str = "auto"

    def __post_init__(self) -> None:
        for name in ("train_images", "test_images"):
            value = getattr(self, name)
            if value is not None and value < 2:
                raise UserError(f"{name} is {value}; give 2 or more")
        if not self.rate_factors or not all(factor > 0 for factor in self.rate_factors):
            raise UserError(f"rate_factors is {self.rate_factors}; give one or more, each above 0")

    def without_effect(self, protocols: list[str]) -> list[str]:
        """Names of settings that were changed, and that none of these protocols uses."""
        return [
            item.name
            for item in dataclasses.fields(self)
            if item.name in USED_BY
            and not set(USED_BY[item.name]) & set(protocols)
            and getattr(self, item.name) != _default(item)
        ]


def _default(item: dataclasses.Field[Any]) -> Any:
    if item.default_factory is dataclasses.MISSING:
        return item.default
    return item.default_factory()


def parse_protocols(text: str) -> list[str]:
    """The protocols of a comma-separated list, each once.

    Raises:
        UserError: an unknown one, or none.
    """
    names = [name.strip() for name in text.split(",") if name.strip()]
    unknown = [name for name in names if name not in PROTOCOLS]
    if unknown or not names:
        raise UserError(
            f"unknown protocol {', '.join(unknown) or text!r}; choose from {', '.join(PROTOCOLS)}"
        )
    return list(dict.fromkeys(names))
