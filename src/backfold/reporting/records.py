"""What a run folder holds, as records; None or empty wherever it holds nothing."""

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from backfold.evaluation.measures import MeasureRow
from backfold.evaluation.protocol import EvaluationRow
from backfold.reporting.fields import Series


@dataclass(frozen=True)
class RunFacts:
    """What ``run.json`` says. ``seconds`` is the duration, ``image_size`` (height, width)."""

    command: str | None
    started: str | None
    seconds: float | None
    versions: Mapping[str, Any]
    hardware: str | None
    device: str | None
    precision: str | None
    backbone: str | None
    parameters: float | None
    image_size: tuple[float, ...]
    channels: float | None
    mean: tuple[float, ...]
    std: tuple[float, ...]
    data: str | None
    training_images: float | None
    held_out_images: float | None
    tasks: tuple[str, ...]
    steps: float | None
    total_steps: float | None
    epochs: float | None


@dataclass(frozen=True)
class TaskHealth:
    """One pretext task, measured on held-out images.

    PSNR in decibels; ``patches_placed_right_*`` are shares from 0 to 1; ``chroma_error_*`` are in
    units of the data set's deviation.
    """

    psnr_corrupted_db: float | None
    psnr_restored_db: float | None
    psnr_mean_fill_db: float | None
    energy_gap: float | None
    auroc: float | None
    patches_placed_right_corrupted: float | None
    patches_placed_right_restored: float | None
    chroma_error_corrupted: float | None
    chroma_error_restored: float | None

    @property
    def gain_db(self) -> float | None:
        """How much closer the restored images are to the clean ones than the corrupted ones."""
        return _difference(self.psnr_restored_db, self.psnr_corrupted_db)

    @property
    def gain_over_mean_fill_db(self) -> float | None:
        """How much closer they are than images filled with the data's mean."""
        return _difference(self.psnr_restored_db, self.psnr_mean_fill_db)


def _difference(value: float | None, baseline: float | None) -> float | None:
    return None if value is None or baseline is None else value - baseline


@dataclass(frozen=True)
class HealthEntry:
    """One look at the held-out images during training; ``knn`` is in percent."""

    step: float | None
    epoch: float | None
    psnr_gain_db: float | None
    energy_gap: float | None
    auroc: float | None
    rank_me: float | None
    embedding_size: float | None
    knn: float | None
    tasks: Mapping[str, TaskHealth]


@dataclass(frozen=True)
class TaskEnergies:
    """The energies of one task's held-out images, a number each."""

    clean: tuple[float, ...]
    corrupted: tuple[float, ...]
    restored: tuple[float, ...]


@dataclass(frozen=True)
class Preview:
    """A picture whose every row is one image: corrupted, its trajectory, restored, clean.

    Width and height in pixels.
    """

    task: str
    step: int
    width: int
    height: int
    data_uri: str


@dataclass(frozen=True)
class Measures:
    """What one protocol measured besides accuracies; the picture is a data URI, or missing."""

    protocol: str
    rows: tuple[MeasureRow, ...]
    picture: str | None


@dataclass(frozen=True)
class Run:
    """All that a report is made from. ``metrics`` are columns over the same steps."""

    path: Path
    settings: str
    facts: RunFacts
    metrics: Mapping[str, Series]
    history: tuple[HealthEntry, ...]
    energies: Mapping[str, TaskEnergies]
    previews: tuple[Preview, ...]
    broken_previews: tuple[str, ...]
    evaluation: tuple[EvaluationRow, ...]
    measures: tuple[Measures, ...]
    other_files: tuple[str, ...]

    @property
    def name(self) -> str:
        """The folder's own name."""
        return self.path.resolve().name

    @property
    def latest(self) -> HealthEntry | None:
        """The last look at the held-out images."""
        return self.history[-1] if self.history else None
