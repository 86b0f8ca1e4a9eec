"""Judging a backbone: one verb, one row, and the protocols by name.

A protocol is a function of an `Evaluation` that returns rows, one entry of `PROTOCOLS`, and one of
`backfold.evaluation.results.ABOUT`.
"""

import contextlib
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
from backfold.data.formats import MapDataset
from backfold.data.loading import default_workers
from backfold.data.open import open_source
from backfold.data.source import (
    ImageSource,
    Labels,
    NoTestSplit,
    SubsetSource,
    split_held_out,
    stratified_split,
)
from backfold.data.statistics import ChannelStatistics, measure_statistics
from backfold.embedding import EmbeddingChoice
from backfold.errors import UserError
from backfold.evaluation.adaptation import adaptation
from backfold.evaluation.attentive import attentive
from backfold.evaluation.energy import energy
from backfold.evaluation.finetune import LEARNING_RATE_FACTORS, FineTuning, finetune
from backfold.evaluation.frozen import FrozenVectors, knn, layers, linear
from backfold.evaluation.images import Images, Parts
from backfold.evaluation.restoration import restoration
from backfold.evaluation.results import RANDOM, Row, data_name, merge_rows, read_rows, write_rows
from backfold.evaluation.segmentation import SegmentationSettings, open_masks, segmentation
from backfold.evaluation.subject import Subject, open_subject
from backfold.files import write_atomically
from backfold.training.config import NOT_DENSE, PretrainConfig, parse_image_size
from backfold.training.devices import choose_device
from backfold.training.run import DEMO_RUN, RunFolder

LOGGER = logging.getLogger("backfold")
BATCH_NORM_IMAGES = 256
Split = tuple[Labels, Labels]
TEST_SHARE, FEW_TEST_IMAGES = 0.2, 200
VALIDATION_SHARE, MOST_VALIDATION = 0.2, 10_000
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
        num_workers: processes that decode images; none takes as many as there are cores but one.
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
        for name, least in (("train_images", 2), ("test_images", 2), ("draws", 1), ("channels", 1)):
            value = getattr(self, name)
            if value is not None and value < least:
                raise UserError(f"{name} is {value}; give {least} or more")
        if not self.rate_factors or not all(factor > 0 for factor in self.rate_factors):
            raise UserError(f"rate_factors is {self.rate_factors}; give one or more, each above 0")
        self.protocol_names()
        self.label_counts()
        parse_image_size(self.image_size)

    def protocol_names(self) -> list[str]:
        """The protocols asked for, each once; an unknown one, or none, raises a `UserError`."""
        names = _listed(self.protocols)
        unknown = [name for name in names if name not in PROTOCOLS]
        if unknown or not names:
            raise UserError(
                f"unknown protocol {', '.join(unknown) or self.protocols!r}; choose from "
                f"{', '.join(PROTOCOLS)}"
            )
        return names

    def label_counts(self) -> list[int | float | None]:
        """Labels a class; floats are the share of each class; None is all."""
        return [_count(text) for text in _listed(self.labels) or [""]]


def _listed(given: str | Sequence[object]) -> list[str]:
    parts = given.split(",") if isinstance(given, str) else map(str, given)
    return list(dict.fromkeys(part.strip() for part in parts if part.strip()))


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
        own, workers = self.settings, self.num_workers
        return open_parts(own.data, self.subject, own.seed, workers, own.train_images)

    @cached_property
    def frozen(self) -> FrozenVectors:
        """All contenders' vectors."""
        return FrozenVectors(self)

    @cached_property
    def statistics(self) -> ChannelStatistics:
        """What normalises the images: the subject's, or else measured on the training part."""
        known, channels = self.subject.statistics, self.subject.channels
        return known or measure_statistics(self.parts.train.source, channels)

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


def open_parts(
    data: str | Path | MapDataset | None,
    subject: Subject,
    seed: int = 0,
    num_workers: int = 0,
    limit: int | None = None,
) -> Parts:
    """The data, split; None takes the run's own, else the embedded sample.

    Without a test split of their own, the test part of a run's own data is what the run held out,
    and a fifth of other data. A fifth of the training part, 10,000 images at most, is for choices.
    ``data`` None takes the run's own, else the embedded sample; ``limit`` None all training images.
    """
    run = subject.run
    own = None if run is None else run.config.data
    chosen = own if data is None else data
    options = (True, subject.max_pixels, None if run is None else run.config.frames)
    train = open_source(chosen, "train", *options)
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
        test = open_source(chosen, "test", *options)
    except NoTestSplit:
        if run is not None and (data is None or (whole and whole == pretrained)):
            learned, tested = _held_out(run.config)
        else:
            LOGGER.info(f"{train.name} has no test split: {TEST_SHARE:.0%} of it is set apart")
            learned, tested = _split(train, TEST_SHARE, seed)
        train, test = SubsetSource(train, learned), SubsetSource(train, tested)
    if caveat:
        LOGGER.warning("%s: give data with a test split of their own", caveat)
    if limit is not None and limit < len(train):
        # Shares are rounded up: half an image less gives this number whatever float they become.
        train = SubsetSource(train, _split(train, (limit - 0.5) / len(train), seed)[1])
    share = min(VALIDATION_SHARE, MOST_VALIDATION / max(1, len(train)))
    fit, validation = map(torch.from_numpy, _split(train, share, seed))
    learned_from, tested_on = (Images(source, subject, num_workers) for source in (train, test))
    return Parts(learned_from, tested_on, fit, validation, caveat)


def _held_out(config: PretrainConfig) -> Split:
    """Places of the images that the run was trained on, and of those that it held out."""
    options = (config.watch_labels, config.max_pixels, config.frames)
    own = open_source(config.data, "train", *options)
    training, held_out = split_held_out(own, config.held_out, config.seed)
    if len(held_out) < FEW_TEST_IMAGES:
        LOGGER.warning(
            f"the test part is the {len(held_out)} images that the run held out; give data with a "
            "test split for numbers that are surer"
        )
    return training, held_out


def _split(source: ImageSource, share: float, seed: int) -> Split:
    """Places of the larger and the smaller part, of each class alike where that can be."""
    with contextlib.suppress(UserError):  # fewer images in the part than classes
        if source.labels is not None:
            return stratified_split(source.labels, share, seed)
    return stratified_split(len(source), share, seed)


class Protocol(NamedTuple):
    """How something is measured."""

    run: Callable[[Evaluation], list[Row]]
    needs: Literal["labels", "masks", "energy", "energy and labels"]  # only runs have an energy
    uses: tuple[str, ...]  # settings that not every protocol uses


def lowshot(given: Evaluation) -> list[Row]:
    """`linear` and `finetune` with very few labels; numbers that a class lacks are left out."""
    few = copy.copy(given)  # the same images and backbones
    few.settings = replace(given.settings, labels="1,5,10,25,1%,10%")
    return [*linear(few), *finetune(few)]


TUNING = ("finetuning", "rate_factors", "train_images")
FROZEN = ("embedding", "draws", "train_images")
PROTOCOLS: Mapping[str, Protocol] = {
    "knn": Protocol(knn, "labels", (*FROZEN, "labels")),
    "linear": Protocol(linear, "labels", (*FROZEN, "labels")),
    "layers": Protocol(layers, "labels", ("embedding", "train_images")),
    "attentive": Protocol(attentive, "labels", ("labels", "draws", "train_images")),
    "finetune": Protocol(finetune, "labels", (*TUNING, "labels", "draws")),
    "lowshot": Protocol(lowshot, "labels", (*TUNING, *FROZEN)),
    "segmentation": Protocol(segmentation, "masks", ("segmentation",)),
    "energy": Protocol(
        energy, "energy", ("embedding", "near", "far", "test_images", "train_images")
    ),
    "restoration": Protocol(restoration, "energy", ("num_steps", "test_images")),
    "adaptation": Protocol(adaptation, "energy and labels", (*TUNING, "test_images")),
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
    return [row for rows in evaluate_each(EvaluateSettings(**settings), given) for row in rows]


def evaluate_each(
    settings: EvaluateSettings, given: str | Path | nn.Module | None = None
) -> Iterator[list[Row]]:
    """The rows of one protocol after another, written as they are found; see `evaluate`."""
    names = settings.protocol_names()
    device = choose_device(settings.accelerator)
    subject = open_subject(
        settings.checkpoint if given is None else given,
        weights=settings.weights,
        image_size=parse_image_size(settings.image_size),
        channels=settings.channels,
        seed=settings.seed,
    )
    evaluation = Evaluation(settings, subject, device)
    _refuse(names, evaluation)
    run = subject.run
    if (
        run is not None
        and run.config.energy == "conditional"
        and {"energy", "adaptation"} & {*names}
    ):
        LOGGER.warning(NOT_DENSE)
    for name in _without_effect(settings, names):
        LOGGER.warning(f"{name} has no effect on {', '.join(names)}")
    folder = subject.folder if settings.out is None else Path(settings.out)
    if folder is None:
        LOGGER.info(
            "no rows are written: %s lies in no run's folder, and no out is given", subject.name
        )
    for name in names:
        LOGGER.info("evaluating: %s", name)
        rows = [_signed(row, evaluation) for row in PROTOCOLS[name].run(evaluation)]
        if folder is not None:
            _write(RunFolder(folder), rows, evaluation.pictures)
        yield rows


def _refuse(names: Sequence[str], evaluation: Evaluation) -> None:
    """Say what is missing before anything is computed."""
    needs = {PROTOCOLS[name].needs for name in names}
    if evaluation.subject.run is None and needs & {"energy", "energy and labels"}:
        asked = [name for name in names if "energy" in PROTOCOLS[name].needs]
        raise UserError(
            f"{', '.join(asked)} measures an energy, and {evaluation.subject.name} is a backbone "
            "alone; give a run's folder"
        )
    if needs - {"masks"}:
        parts = evaluation.parts
        if needs & {"labels", "energy and labels"}:
            _ = parts.train.labels, parts.test.labels  # raise where there are none
    if "masks" in needs:
        open_masks(evaluation)
    if "energy" in names:
        subject = evaluation.subject
        frames = None if subject.run is None else subject.run.config.frames
        for data in (evaluation.settings.near, evaluation.settings.far):
            if data is not None:
                open_source(data, "train", False, subject.max_pixels, frames)


def _without_effect(settings: EvaluateSettings, names: Sequence[str]) -> list[str]:
    """Names of settings that were changed, and that none of these protocols uses."""
    of_some = {used for protocol in PROTOCOLS.values() for used in protocol.uses}
    used = {used for name in names for used in PROTOCOLS[name].uses}
    chosen, default = vars(settings), vars(EvaluateSettings())
    return [name for name in chosen if name in of_some - used and chosen[name] != default[name]]


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


def _write(folder: RunFolder, rows: Sequence[Row], pictures: Mapping[str, bytes]) -> None:
    before: list[Row] = []
    if folder.evaluation.exists():
        try:
            before = read_rows(folder.evaluation)
        except UserError as error:
            LOGGER.warning(f"{error}: it is replaced")
    write_rows(folder.evaluation, merge_rows(before, rows))
    for name, content in pictures.items():
        write_atomically(folder.pictures / name, content)
