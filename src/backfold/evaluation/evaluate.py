"""Judging a backbone: one verb, one row, and the protocols by name.

A protocol is a function of an `Evaluation` that returns rows, one entry of `PROTOCOLS`, and one of
`backfold.evaluation.results.ABOUT`.
"""

import copy
import logging
import typing
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import cached_property
from pathlib import Path
from typing import Any, Literal, NamedTuple

import torch
from torch import nn

from backfold.batch_norm import batch_norms, measure_batch_norm
from backfold.data.files import IN_MEMORY
from backfold.data.loading import default_workers
from backfold.data.open import open_source
from backfold.data.source import NoTestSplit, SubsetSource, split_held_out, split_source
from backfold.data.statistics import ChannelStatistics
from backfold.data.survey import ENOUGH, survey
from backfold.embedding import EmbeddingChoice
from backfold.errors import UserError, at_least, check_ranges, not_negative
from backfold.evaluation.adaptation import adaptation
from backfold.evaluation.attentive import attentive
from backfold.evaluation.energy import energy
from backfold.evaluation.finetune import LEARNING_RATE_FACTORS, FineTuning, finetune
from backfold.evaluation.frozen import FrozenVectors, knn, layers, linear
from backfold.evaluation.images import Images, Parts
from backfold.evaluation.restoration import restoration
from backfold.evaluation.results import RANDOM, Row, add_rows, data_name
from backfold.evaluation.segmentation import SegmentationSettings, open_masks, segmentation
from backfold.evaluation.subject import Subject, open_subject
from backfold.files import write_atomically
from backfold.training.config import NOT_DENSE, parse_image_size
from backfold.training.devices import choose_device
from backfold.training.run import DEMO_RUN, RunFolder

LOGGER = logging.getLogger("backfold")
BATCH_NORM_IMAGES = 256
TEST_SHARE, VALIDATION_SHARE, MOST_VALIDATION = 0.2, 0.2, 10_000
SEEN = "test images may be among those that were pretrained on"
UNKNOWN = "the run's images were in memory: test images may be among them"


@dataclass
class EvaluateSettings:
    """How `backfold evaluate` measures a backbone and its energy.

    Args:
        checkpoint: a run's folder or a .ckpt file, an exported folder, or the name of a timm model.
        weights: of a timm model: a file or folder as pretraining's init takes it, or "timm".
        data: labelled images: a folder with a sub-folder a class, or parquet files with a label
            column; none takes the run's own data.
        protocols: comma-separated: knn, linear, layers, attentive, finetune, lowshot (linear and
            finetune with very few labels), segmentation, energy, restoration, adaptation.
        embedding: layer and pooling of frozen vectors; "auto" chooses them on validation images.
        labels: comma-separated numbers of labelled images a class, shares such as 1%, or all.
        draws: how often few labels are drawn; the table shows mean and deviation.
        near: other images that look like the run's; how well the energy tells them apart.
        far: the same of images that look different.
        train_images: labelled training images, and energy's neighbours; none takes all.
        test_images: test images of energy, restoration and adaptation, and of near and far.
        num_steps: restoration steps that are compared by restoration.
        finetuning: the recipe of finetune, lowshot and adaptation.
        rate_factors: learning rates tried, as factors of finetuning's base_lr; one needs no trial.
        segmentation: data with masks, and how heads are trained on them.
        image_size: N or HxW pixels, of backbones that are no run's; none takes their own.
        channels: of the images of a timm model.
        seed: of draws, splits and training.
        out: folder for evaluation.json and pictures; none takes the run's.
        accelerator: cpu, cuda, mps, or auto.
        num_workers: processes that decode images; none takes up to 8, one core left free.
    """

    checkpoint: str | Path = DEMO_RUN
    weights: str | None = None
    data: str | Path | None = None
    protocols: str | list[str] = "knn,linear"
    embedding: EmbeddingChoice | Literal["auto"] = "auto"
    labels: str | list[str] = "all,10"
    draws: int = 5
    near: str | Path | None = None
    far: str | Path | None = None
    train_images: int | None = None
    test_images: int = 500
    num_steps: tuple[int, ...] = (1, 2, 4)
    finetuning: FineTuning = field(default_factory=FineTuning)
    rate_factors: tuple[float, ...] = LEARNING_RATE_FACTORS
    segmentation: SegmentationSettings = field(default_factory=SegmentationSettings)
    image_size: int | str | None = None
    channels: int = 3
    seed: int = 0
    out: str | Path | None = None
    accelerator: str = "auto"
    num_workers: int | None = None

    def __post_init__(self) -> None:
        ranges = (
            at_least(2, "train_images test_images"), at_least(1, "draws channels"),
            not_negative("seed num_workers"),
        )  # fmt: skip
        check_ranges(self, ranges)
        if not self.rate_factors or not all(factor > 0 for factor in self.rate_factors):
            raise UserError(f"rate_factors is {self.rate_factors}; give one or more, each above 0")
        self.protocol_names()
        self.label_counts()
        parse_image_size(self.image_size)

    def protocol_names(self) -> list[str]:
        """The protocols asked for, each once; an unknown one, or none, raises a `UserError`."""
        names = _listed(self.protocols)
        for name in names:
            if name not in PROTOCOLS:
                raise UserError(f"unknown protocol {name!r}; choose from {', '.join(PROTOCOLS)}")
        return names

    def label_counts(self) -> list[int | float | None]:
        """Labels a class; floats are the share of each class; None is all."""
        return [_count(text) for text in _listed(self.labels)]


def _listed(given: str | Sequence[object]) -> list[str]:
    parts = given.split(",") if isinstance(given, str) else map(str, given)
    return list(dict.fromkeys(part.strip() for part in parts if part.strip())) or [""]


def _count(text: str) -> int | float | None:
    if text == "all":
        return None
    try:
        number = float(text.removesuffix("%")) / 100 if text.endswith("%") else int(text)
    except ValueError:
        number = 0
    if number <= 0 or (text.endswith("%") and number >= 1):
        raise UserError(f"labels is {text!r}; give all, numbers of 1 or more, or shares such as 1%")
    return number


class Evaluation:
    """What the protocols share; images and backbones are made once, when they are needed."""

    def __init__(self, settings: EvaluateSettings, subject: Subject, device: torch.device) -> None:
        self.settings, self.subject, self.device = settings, subject, device
        workers = settings.num_workers
        self.num_workers = default_workers() if workers is None else workers
        self.pictures: dict[str, bytes] = {}  # files that protocols leave, by name

    @cached_property
    def parts(self) -> Parts:
        """The images, with labels if they have any; see `open_parts`."""
        return open_parts(self.settings, self.subject, self.num_workers)

    @cached_property
    def frozen(self) -> FrozenVectors:
        """All contenders' vectors."""
        return FrozenVectors(self)

    @cached_property
    def statistics(self) -> ChannelStatistics:
        """What normalises the images: the subject's, or else measured on the training part."""
        if self.subject.statistics is not None:
            return self.subject.statistics
        source, workers = self.parts.train.source, min(1, self.num_workers)
        return survey(source, self.subject.channels, ENOUGH, num_workers=workers).statistics

    @cached_property
    def backbones(self) -> Mapping[str, nn.Module]:
        """By contender: frozen, in eval mode, on the device."""
        made = {
            name: self.subject.backbone(name).requires_grad_(False).to(self.device)
            for name in self.subject.weights
        }
        if RANDOM in made and batch_norms(made[RANDOM]):  # as training does with its own start
            images, _ = self.parts.train.load(BATCH_NORM_IMAGES, self.settings.seed)
            measure_batch_norm(made[RANDOM], self.statistics.normalize(images.to(self.device)))
        return made


def open_parts(settings: EvaluateSettings, subject: Subject, num_workers: int = 0) -> Parts:
    """The data, or else the run's own, or the embedded sample, split.

    Without a test split of their own, the test part of a run's own data is what the run held out,
    and a fifth of other data. A fifth of the training part, 10,000 images at most, is for choices.
    """
    run, seed, limit = subject.run, settings.seed, settings.train_images
    own = None if run is None else run.config.data
    chosen = own if settings.data is None else settings.data
    reading = subject.max_pixels, None if run is None else run.config.frames
    train = open_source(chosen, "train", True, *reading)
    whole, pretrained = (
        Path(each).resolve() if isinstance(each, (str, Path)) else None for each in (chosen, own)
    )
    caveat = ""
    # The train part of data with parts holds no test images.
    if whole and pretrained and (pretrained.parent, pretrained.name.lower()) != (whole, "train"):
        within = whole in pretrained.parents or pretrained in whole.parents
        caveat = SEEN if within else ""
    if str(own).endswith(IN_MEMORY):
        caveat = UNKNOWN
    try:
        test = open_source(chosen, "test", True, *reading)
    except NoTestSplit:
        if run and whole and whole == pretrained:
            config = run.config
            trained_on = open_source(own, "train", config.watch_labels, *reading)
            learned, tested = split_held_out(trained_on, config.held_out, config.seed)
        else:
            learned, tested = split_source(train, TEST_SHARE, seed)
        LOGGER.warning(f"{train.name} has no test split: {len(tested)} of its images are tested on")
        train, test = SubsetSource(train, learned), SubsetSource(train, tested)
    if caveat:
        LOGGER.warning("%s: give data with a test split of their own", caveat)
    if limit is not None and limit < len(train):
        # Shares are rounded up: half an image less gives this number whatever float they become.
        train = SubsetSource(train, split_source(train, (limit - 0.5) / len(train), seed)[1])
    share = min(VALIDATION_SHARE, MOST_VALIDATION / max(1, len(train)))
    fit, validation = map(torch.from_numpy, split_source(train, share, seed))
    learned_from, tested_on = (Images(source, subject, num_workers) for source in (train, test))
    return Parts(learned_from, tested_on, fit, validation, caveat)


class Protocol(NamedTuple):
    """How something is measured."""

    run: Callable[[Evaluation], list[Row]]
    needs: Literal["labels", "masks", "energy", "energy and labels"]  # only runs have an energy


def lowshot(given: Evaluation) -> list[Row]:
    """`linear` and `finetune` with very few labels; numbers that a class lacks are left out."""
    few = copy.copy(given)  # the same images and backbones
    few.settings = replace(given.settings, labels="1,5,10,25,1%,10%")
    return [*linear(few), *finetune(few)]


PROTOCOLS: Mapping[str, Protocol] = {
    "knn": Protocol(knn, "labels"),
    "linear": Protocol(linear, "labels"),
    "layers": Protocol(layers, "labels"),
    "attentive": Protocol(attentive, "labels"),
    "finetune": Protocol(finetune, "labels"),
    "lowshot": Protocol(lowshot, "labels"),
    "segmentation": Protocol(segmentation, "masks"),
    "energy": Protocol(energy, "energy"),
    "restoration": Protocol(restoration, "energy"),
    "adaptation": Protocol(adaptation, "energy and labels"),
}
TUNING = {"finetune", "lowshot", "adaptation"}
# Settings that not every protocol uses.
USED_BY: Mapping[str, set[str]] = {
    "labels": {"knn", "linear", "attentive", "finetune"},
    "draws": {"knn", "linear", "attentive", "finetune", "lowshot"},
    "train_images": {"knn", "linear", "layers", "attentive", "energy", *TUNING},
    "test_images": {"energy", "restoration", "adaptation"},
    "embedding": {"knn", "linear", "layers", "lowshot", "energy"},
    "finetuning": TUNING,
    "rate_factors": TUNING,
    "segmentation": {"segmentation"},
    "near": {"energy"},
    "far": {"energy"},
    "num_steps": {"restoration"},
}


class Run(typing.Protocol):
    """What `backfold.pretrain` and `backfold.load` give."""

    path: Path


def evaluate(subject: str | Path | Run | nn.Module, **settings: Any) -> list[Row]:
    """Judge a backbone, and leave the rows in its run's folder, or in ``out`` if that is given.

    Args:
        subject: a run, its folder or checkpoint, an exported folder, a timm name, or a module.
        **settings: those of `EvaluateSettings`, such as ``data`` and ``protocols``.

    Raises:
        UserError: an unknown protocol, data that one of them can't use, or what it raises.
    """
    given = subject if isinstance(subject, (str, Path, nn.Module)) else subject.path
    found = evaluate_each(EvaluateSettings(**{**settings, "checkpoint": given}))
    return [row for rows in found for row in rows]


def evaluate_each(settings: EvaluateSettings) -> Iterator[list[Row]]:
    """The rows of one protocol after another, written as they are found; see `evaluate`."""
    names = settings.protocol_names()
    device = choose_device(settings.accelerator)
    subject = open_subject(
        settings.checkpoint,
        weights=settings.weights,
        image_size=parse_image_size(settings.image_size),
        channels=settings.channels,
        seed=settings.seed,
    )
    evaluation, run = Evaluation(settings, subject, device), subject.run
    _refuse(names, evaluation)
    if run and run.config.energy == "conditional" and {"energy", "adaptation"} & {*names}:
        LOGGER.warning(NOT_DENSE)
    for name, users in USED_BY.items():
        changed = getattr(settings, name) != getattr(EvaluateSettings(), name)
        if changed and not users & {*names}:
            LOGGER.warning(f"{name} has no effect on {', '.join(names)}")
    if run and settings.image_size is not None:
        LOGGER.warning("image_size has no effect on a run, which has its own")
    if subject.folder and settings.weights is not None:
        LOGGER.warning(f"weights has no effect on {subject.name}, which has its own")
    out = subject.folder if settings.out is None else Path(settings.out)
    if out is not None and out.is_file():
        raise UserError(f"out is {out}, a file; give a folder")
    if out is None:
        LOGGER.info(f"no rows are written: {subject.name} lies in no run's folder; give out")
    for name in names:
        LOGGER.info("evaluating: %s", name)
        rows = [_signed(row, evaluation) for row in PROTOCOLS[name].run(evaluation)]
        if out is not None:
            add_rows(RunFolder(out).evaluation, rows)
            for picture, content in evaluation.pictures.items():
                write_atomically(RunFolder(out).pictures / picture, content)
        yield rows


def _refuse(names: Sequence[str], evaluation: Evaluation) -> None:
    """Say what is missing before anything is computed."""
    settings, subject = evaluation.settings, evaluation.subject
    needs = {name: PROTOCOLS[name].needs for name in names}
    if asked := [name for name in names if "energy" in needs[name] and subject.run is None]:
        raise UserError(
            f"{', '.join(asked)} measures an energy, and {subject.name} is a backbone alone; give "
            "a run's folder"
        )
    if {*needs.values()} - {"masks"}:
        _ = evaluation.parts
    if any("labels" in each for each in needs.values()):
        _ = evaluation.parts.train.labels, evaluation.parts.test.labels
    if "masks" in needs.values():
        open_masks(evaluation)
    if "energy" in names and subject.run is not None:
        for data in (settings.near, settings.far):
            if data is not None:
                open_source(data, "train", False, subject.max_pixels, subject.run.config.frames)


def _signed(row: Row, evaluation: Evaluation) -> Row:
    """With the data's name, the run's step, and what can't be kept."""
    settings, run = evaluation.settings, evaluation.subject.run
    data = settings.data if settings.data is not None or run is None else run.config.data
    if row.protocol == "segmentation":
        data, caveat = settings.segmentation.data or data, ""
    else:
        caveat = evaluation.parts.caveat
    note = "; ".join(filter(None, (row.note, caveat)))
    return replace(row, data=data_name(data), step=run.step if run else None, note=note)
