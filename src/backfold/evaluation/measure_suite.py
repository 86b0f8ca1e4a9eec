"""The protocols that end in measures: segmentation, energy, restoration, adaptation."""

import logging
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from backfold.data.segmentation import MaskedSource, open_masked
from backfold.data.source import (
    ImageSource,
    NoTestSplit,
    SubsetSource,
    open_source,
    stratified_split,
)
from backfold.errors import UserError
from backfold.evaluation.adaptation import adaptation_rows
from backfold.evaluation.classifier import Classifier
from backfold.evaluation.energy_tests import EnergyTestImages, energy_rows
from backfold.evaluation.finetuning import fine_tune
from backfold.evaluation.images import LoadedImages, load_images
from backfold.evaluation.learning_rate_choice import choose_learning_rate
from backfold.evaluation.lowshot import LabelledTensors
from backfold.evaluation.measures import MeasureRow
from backfold.evaluation.pictures import adaptation_picture, auroc_picture, psnr_picture
from backfold.evaluation.restoration_choice import (
    STEP_SIZES,
    ClassifiedImages,
    RestorationChoice,
    Restorer,
    choose_restoration,
)
from backfold.evaluation.restoration_tests import restoration_rows
from backfold.evaluation.run import LabelledImages, open_labelled
from backfold.evaluation.segmentation import segment_with_run
from backfold.evaluation.settings import EvaluateSettings
from backfold.evaluation.suite import Subject, contenders, load_labelled
from backfold.training.pretrained import Pretrained
from backfold.training.setup import open_images

LOGGER = logging.getLogger("backfold")
HELD_OUT_SHARE = 0.2
NEIGHBOURS = 5000  # training images among which the kNN distance looks, where none are asked for


@dataclass(frozen=True)
class Measured:
    """A protocol's rows, and a picture of them.

    Args:
        rows: what was measured.
        picture: a file's content.
        suffix: the file's kind, "png" or "svg".
    """

    rows: list[MeasureRow]
    picture: bytes
    suffix: str = "svg"


@dataclass(frozen=True)
class MeasureData:
    """The data of the protocols that were asked for; None where none of them needs it.

    Args:
        parts: images that the run was trained on, or of their kind, and others for testing.
        labelled: labelled images, for adaptation.
        masked: a training and a test part, for segmentation.
        others: images of other data, by what the tables call them.
    """

    parts: LabelledImages | None = None
    labelled: LabelledImages | None = None
    masked: tuple[MaskedSource, MaskedSource] | None = None
    others: tuple[tuple[str, ImageSource], ...] = ()


def open_measure_data(
    protocols: Sequence[str], run: Pretrained, given: EvaluateSettings
) -> MeasureData:
    """Open what the protocols need, so that what is missing is said before anything is computed.

    Raises:
        UserError: no such data, data without masks for segmentation or without labels for
            adaptation.
    """
    own, pixels = given.data or run.config.data, run.config.max_pixels
    others = {"near": given.near, "far": given.far} if "energy" in protocols else {}
    return MeasureData(
        open_parts(given.data, run) if {"energy", "restoration"} & set(protocols) else None,
        open_labelled(own, given.seed, pixels) if "adaptation" in protocols else None,
        open_masked(given.segmentation.data or own, given.seed)
        if "segmentation" in protocols
        else None,
        tuple(
            (f"{Path(data).name} ({kind})", _open_test(data, pixels))
            for kind, data in others.items()
            if data is not None
        ),
    )


def open_parts(data: str | Path | None, run: Pretrained) -> LabelledImages:
    """A training and a test part, with or without labels.

    Without a test split, the test part is what the run held out of its own data, or a fifth of
    other data.

    Args:
        data: as `open_source` takes it; None takes the run's own.
        run: whose images are taken.

    Raises:
        UserError: no data.
    """
    chosen, pixels = data or run.config.data, run.config.max_pixels
    train = open_source(chosen, "train", True, pixels)
    try:
        return LabelledImages(train, open_source(chosen, "test", True, pixels))
    except NoTestSplit:
        if data is None:
            own = open_images(run.config)
            return LabelledImages(own.training, own.held_out)
        training, test = stratified_split(len(train), HELD_OUT_SHARE, run.config.seed)
        return LabelledImages(SubsetSource(train, training), SubsetSource(train, test))


def _open_test(data: str | Path, max_pixels: int) -> ImageSource:
    try:
        return open_source(data, "test", max_pixels=max_pixels)
    except NoTestSplit:
        return open_source(data, "train", max_pixels=max_pixels)


def measure(protocol: str, subject: Subject, data: MeasureData) -> Measured:
    """Rows and picture of one protocol.

    Args:
        protocol: "segmentation", "energy", "restoration" or "adaptation".
        subject: what is measured.
        data: see `open_measure_data`.

    Raises:
        UserError: what loading or the protocol raises.
    """
    LOGGER.info(f"measuring: {protocol}")
    subject.run.energy.to(subject.device).eval()
    if protocol == "energy":
        return _measure_energy(subject, data)
    if protocol == "restoration":
        return _measure_restoration(subject, data)
    if protocol == "adaptation":
        return _measure_adaptation(subject, data)
    assert protocol == "segmentation"
    assert data.masked is not None
    settings = subject.settings
    result = segment_with_run(
        subject.run, data.masked, settings.segmentation, seed=settings.seed, device=subject.device
    )
    return Measured(result.rows, result.picture, "png")


def _load(subject: Subject, source: ImageSource, limit: int | None) -> LoadedImages:
    return load_images(
        source, subject.run, limit, subject.settings.seed, num_workers=subject.num_workers
    )


def _measure_energy(subject: Subject, data: MeasureData) -> Measured:
    settings = subject.settings
    assert data.parts is not None
    test = _load(subject, data.parts.test, settings.test_images)
    train = _load(subject, data.parts.train, settings.train_images or NEIGHBOURS)
    others = {
        name: _load(subject, source, settings.test_images).images for name, source in data.others
    }
    rows = energy_rows(
        subject.run,
        EnergyTestImages(test.images, others, train.images, test.labels, train.labels),
        choice=settings.embedding,
        seed=settings.seed,
        device=subject.device,
    )
    return Measured(rows, auroc_picture(rows).encode())


def _measure_restoration(subject: Subject, data: MeasureData) -> Measured:
    assert data.parts is not None
    images = _load(subject, data.parts.test, subject.settings.test_images).images
    rows = restoration_rows(
        subject.run,
        images,
        num_steps=subject.settings.num_steps,
        seed=subject.settings.seed,
        device=subject.device,
    )
    return Measured(rows, psnr_picture(rows).encode())


def _measure_adaptation(subject: Subject, data: MeasureData) -> Measured:
    """A classifier is fine-tuned on four fifths; how to restore is chosen on the rest."""
    run, settings = subject.run, subject.settings
    assert data.labelled is not None
    images = load_labelled(subject, data.labelled)
    fit, kept = stratified_split(images.train_labels.numpy(), HELD_OUT_SHARE, settings.seed)
    classifier = _fine_tuned(subject, images, torch.from_numpy(fit))
    restorer = Restorer(run.energy, classifier, device=subject.device)
    classes, limit = classifier.classes.cpu(), settings.test_images
    held_out = _classified(
        images, images.train_images, images.train_labels, kept[_spread(len(kept), limit)], classes
    )
    test = _classified(
        images,
        images.test_images,
        images.test_labels,
        _spread(len(images.test_labels), limit),
        classes,
    )
    choice = choose_restoration(
        restorer,
        held_out,
        step_sizes=[share * run.config.step_size for share in STEP_SIZES],
        seed=settings.seed,
    )
    LOGGER.info(f"adaptation: {_describe(choice)}")
    rows = adaptation_rows(restorer, choice, test, seed=settings.seed)
    return Measured(rows, adaptation_picture(rows).encode())


def _spread(length: int, count: int) -> NDArray[np.int64]:
    """Up to ``count`` indices spread over the length: data are often sorted by class."""
    return np.unique(np.linspace(0, length - 1, count).round().astype(np.int64))


def _describe(choice: RestorationChoice) -> str:
    if choice.num_steps == 0:
        return "no way to restore helped on held-out images: all are left as they are"
    chosen = (
        f"the images whose energy is above {choice.threshold:.4g}"
        if choice.quantile > 0
        else "all images"
    )
    return f"{choice.num_steps} step(s) of size {choice.step_size:g} for {chosen}"


def _fine_tuned(subject: Subject, data: LabelledTensors, indices: Tensor) -> Classifier:
    contender = contenders(subject)[-1]
    images, labels = data.train_images[indices], data.train_labels[indices]
    chosen = choose_learning_rate(
        contender.make_backbone,
        images,
        labels,
        data.statistics,
        contender.settings,
        subject.device,
        subject.settings.rate_factors,
    )
    return fine_tune(
        contender.make_backbone, images, labels, data.statistics, chosen, subject.device
    )


def _classified(
    data: LabelledTensors,
    images: Tensor,
    labels: Tensor,
    indices: NDArray[np.int64],
    classes: Tensor,
) -> ClassifiedImages:
    """Normalised images, with their labels as the classifier counts them.

    Raises:
        UserError: a class that the classifier has not seen.
    """
    chosen = torch.from_numpy(indices)
    wanted = labels[chosen]
    unknown = wanted[~torch.isin(wanted, classes)]
    if len(unknown):
        raise UserError(
            f"class {int(unknown[0])} has no training images for adaptation's classifier; give "
            "some of each class"
        )
    normalised = data.statistics.normalize(images[chosen])
    return ClassifiedImages(normalised, torch.searchsorted(classes, wanted), data.statistics)
