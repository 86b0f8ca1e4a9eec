"""Labelled images of a training, a validation and a test part, decoded as they are needed."""

import contextlib
import logging
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from backfold.data.broken import BrokenFiles
from backfold.data.decode import as_float
from backfold.data.guarded_loading import evaluation_batches, guarded_batches
from backfold.data.source import (
    ImageSource,
    NoTestSplit,
    SubsetSource,
    open_source,
    stratified_split,
)
from backfold.errors import UserError
from backfold.evaluation.subject import Subject
from backfold.training.setup import split_held_out

LOGGER = logging.getLogger("backfold")
TEST_SHARE = 0.2
VALIDATION_SHARE, MOST_VALIDATION = 0.2, 10_000
KEPT_BYTES = 2**29  # decoded images of less stay in memory
BATCH_SIZE = 256
FEW_TEST_IMAGES = 200
SEEN = "test images may be among those that were pretrained on"


class Images:
    """Images of a source at the backbone's size, with their labels if there are any.

    Small sources are decoded once and kept; of others every batch is decoded when it is asked for.
    A file that can't be read is replaced by the next one, label and all.

    Args:
        source: where they are.
        subject: whose channels, size and allowed share of broken files count.
        num_workers: processes that decode.
    """

    def __init__(self, source: ImageSource, subject: Subject, num_workers: int = 0) -> None:
        self.source, self._subject, self._num_workers = source, subject, num_workers
        self._broken = BrokenFiles.for_source(source, subject.max_broken_share)
        self._kept: tuple[Tensor, Tensor] | None = None
        self._labels = None if source.labels is None else torch.tensor(source.labels)

    def __len__(self) -> int:
        return len(self.source)

    @property
    def labels(self) -> Tensor:
        """int64, (images,); of an image that could not be read, those of its replacement.

        Raises:
            UserError: there are none.
        """
        if self._labels is None:
            raise UserError(
                f"{self.source.name} has no labels; give a folder with one sub-folder a class, or "
                "parquet files with a label column"
            )
        return self._labels

    @property
    def shape(self) -> tuple[int, int, int]:
        """(channels, height, width)."""
        return (self._subject.channels, *self._subject.image_size)

    def batches(
        self, indices: Sequence[Sequence[int]] | None = None
    ) -> Iterator[tuple[Tensor, Tensor]]:
        """(batch, channels, height, width), uint8 or float (see `as_float`), and int64 indices.

        Args:
            indices: of each batch's images; None gives all images, in order. An index that comes
                back may be another one than was asked for: that of an image that can be read.

        Raises:
            UserError: too many files that can't be read.
        """
        if indices is None:
            every = range(len(self))
            indices = [every[first : first + BATCH_SIZE] for first in every[::BATCH_SIZE]]
        if self._is_small():
            images, places = self._in_memory()
            for wanted in indices:
                chosen = torch.as_tensor(wanted)
                yield images[chosen], places[chosen]
            return
        subject = self._subject
        loaded = guarded_batches(
            self.source, subject.image_size, subject.channels, indices, self._num_workers
        )
        for asked, batch in zip(indices, loaded, strict=True):
            self._replaced(batch.broken, torch.as_tensor(asked), batch.indices)
            yield batch.images, batch.indices

    def load(self, limit: int | None = None, seed: int = 0) -> tuple[Tensor, Tensor]:
        """All images, or so many drawn ones, in memory, and their indices; see `batches`."""
        count = len(self)
        if count == 0:
            raise UserError(f"{self.source.name} holds no images; give data with images")
        chosen = np.arange(count)
        if limit is not None and limit < count:
            chosen = np.sort(np.random.default_rng(seed).choice(count, limit, replace=False))
        parts = [
            chosen[first : first + BATCH_SIZE].tolist()
            for first in range(0, len(chosen), BATCH_SIZE)
        ]
        return _joined(self.batches(parts))

    def _is_small(self) -> bool:
        return len(self) * int(np.prod(self.shape)) <= KEPT_BYTES

    def _in_memory(self) -> tuple[Tensor, Tensor]:
        if self._kept is None:
            loader = evaluation_batches(
                self.source,
                self._subject.image_size,
                self._subject.channels,
                BATCH_SIZE,
                self._num_workers,
            )
            loaded: list[tuple[Tensor, Tensor]] = []
            for batch in loader:
                asked = torch.arange(len(batch.indices)) + BATCH_SIZE * len(loaded)
                self._replaced(batch.broken, asked, batch.indices)
                loaded.append((batch.images, batch.indices))
            self._kept = _joined(iter(loaded))
        return self._kept

    def _replaced(self, broken: list[str], asked: Tensor, found: Tensor) -> None:
        """An image that stands in for one that can't be read brings its label along."""
        for line in self._broken.add(broken):
            LOGGER.warning("skipped: %s", line)
        if self._labels is not None and broken:
            self._labels[asked] = self._labels[found]


def _joined(batches: Iterator[tuple[Tensor, Tensor]]) -> tuple[Tensor, Tensor]:
    images, places = zip(*batches, strict=True)
    if any(part.is_floating_point() for part in images):
        images = tuple(as_float(part) for part in images)
    return torch.cat(images), torch.cat(places)


@dataclass(frozen=True)
class Parts:
    """Images to learn from and images to test on.

    Args:
        train: never holds a test image.
        test: not among what was pretrained on, as far as the run knows; ``caveat`` says otherwise.
        fit: places in ``train`` that are learned from while something is chosen.
        validation: the other places, on which it is chosen.
        caveat: goes into every row; empty where there is nothing to say.
    """

    train: Images
    test: Images
    fit: Tensor
    validation: Tensor
    caveat: str = ""

    def refuse_unlabelled(self) -> None:
        """Raise `UserError` where a part has no labels."""
        for part in (self.train, self.test):
            _ = part.labels

    def each(
        self, counts: Sequence[int | float | None], draws: int, seed: int
    ) -> list[tuple[int | float | None, list[Tensor]]]:
        """Each number of labels with its `draws`; those that a class lacks are left out.

        Raises:
            UserError: none is left.
        """
        found, problem = [], None
        for count in counts:
            try:
                found.append((count, self.draws(count, draws, seed)))
            except UserError as error:
                LOGGER.warning("%s are left out: %s", label_case(count), error)
                problem = error
        if not found and problem is not None:
            raise problem
        return found

    def draws(self, count: int | float | None, draws: int, seed: int) -> list[Tensor]:
        """Places in ``train`` of the labelled images of each draw, rising.

        They depend on the labels and the arguments alone: every contender learns from the same.

        Args:
            count: labels a class; below 1 the share of each class, rounded half up, one image at
                least; None gives all of ``fit``, once.
            draws: how often.
            seed: of all draws.

        Raises:
            UserError: a class with too few images.
        """
        if count is None:
            return [self.fit]
        labels = self.train.labels[self.fit].numpy()
        classes, members = np.unique(labels, return_counts=True)
        sizes = np.full(len(classes), count)
        if isinstance(count, float):
            sizes = np.maximum(1, np.floor(count * members + 0.5)).astype(int)
        if (sizes > members).any():
            short = int((members - sizes).argmin())
            raise UserError(
                f"class {classes[short]} has {members[short]} images to learn from beside those "
                f"that choices are made on, fewer than the {count} labels a class; ask for "
                f"{members.min()} or fewer, or add images"
            )
        found = []
        for draw in range(draws):
            generator = np.random.default_rng([seed, draw])
            drawn = [
                generator.choice(np.flatnonzero(labels == label), size, replace=False)
                for label, size in zip(classes, sizes, strict=True)
            ]
            found.append(self.fit[torch.from_numpy(np.sort(np.concatenate(drawn)))])
        return found


def label_case(count: int | float | None) -> str:
    """How many labels there were, as rows say it."""
    if count is None:
        return "all labels"
    if isinstance(count, float):
        return f"{100 * count:g} % of the labels"
    return f"{count} label{'s' if count > 1 else ''} a class"


def open_parts(
    data: str | Path | None,
    subject: Subject,
    *,
    seed: int = 0,
    num_workers: int = 0,
    limit: int | None = None,
) -> Parts:
    """Open the data and split them.

    Without a test split of their own, the test part of a run's own data is what the run held out,
    and a fifth of other data. A fifth of the training part, 10,000 images at most, is for choices.

    Args:
        data: as `open_source` takes it; None takes the run's own, else the embedded sample.
        subject: what is judged.
        seed: of the splits.
        num_workers: processes that decode.
        limit: training images that are used; None takes all.

    Raises:
        UserError: no data.
    """
    own = subject.run.config.data if subject.run is not None else None
    chosen = own if data is None else data
    train = open_source(chosen, "train", labelled=True, max_pixels=subject.max_pixels)
    test, caveat = None, ""
    with contextlib.suppress(NoTestSplit):
        test = open_source(chosen, "test", labelled=True, max_pixels=subject.max_pixels)
    if test is None and subject.run is not None and _same(chosen, own):
        train, test = _as_pretrained(subject, train)
    elif test is None:
        LOGGER.info(f"{train.name} has no test split: {TEST_SHARE:.0%} of it is set apart")
        training, kept = _split(train, TEST_SHARE, seed)
        train, test = SubsetSource(train, training), SubsetSource(train, kept)
        caveat = SEEN if subject.run is not None and _overlap(chosen, own) else ""
    elif subject.run is not None and not _same(chosen, own) and _overlap(chosen, own):
        caveat = SEEN
    if caveat:
        LOGGER.warning("%s: give data with a test split of their own", caveat)
    if limit is not None and limit < len(train):
        # Shares are rounded up: half an image less gives this number whatever float they become.
        kept = _split(train, (limit - 0.5) / len(train), seed)[1]
        train = SubsetSource(train, kept)
    learned, tested = (Images(source, subject, num_workers) for source in (train, test))
    share = min(VALIDATION_SHARE, MOST_VALIDATION / max(1, len(train)))
    fit, validation = _split(train, share, seed)
    return Parts(learned, tested, torch.from_numpy(fit), torch.from_numpy(validation), caveat)


def _as_pretrained(subject: Subject, train: ImageSource) -> tuple[ImageSource, ImageSource]:
    """The training images and those that the run held out, with their labels."""
    assert subject.run is not None
    config = subject.run.config
    own = open_source(config.data, "train", config.watch_labels, config.max_pixels)
    training, held_out = split_held_out(own, config.held_out, config.seed)
    if len(held_out) < FEW_TEST_IMAGES:
        LOGGER.warning(
            "the test part is the %d images that the run held out; give data with a test split for "
            "numbers that are surer",
            len(held_out),
        )
    return SubsetSource(train, training), SubsetSource(train, held_out)


def _split(source: ImageSource, share: float, seed: int) -> tuple[np.ndarray, np.ndarray]:
    """Places of the larger and the smaller part, of each class alike where that can be."""
    if source.labels is not None:
        try:
            return stratified_split(source.labels, share, seed)
        except UserError:  # fewer images in the part than classes
            pass
    return stratified_split(len(source), share, seed)


def _same(data: object, own: object) -> bool:
    if data is None or own is None:
        return data is own
    return str(data) == str(own) or Path(str(data)).resolve() == Path(str(own)).resolve()


def _overlap(data: object, own: object) -> bool:
    """Whether one lies within the other; the train part of data with parts has no test images."""
    if data is None or own is None:
        return _same(data, own)
    whole, pretrained = (Path(str(each)).resolve() for each in (data, own))
    if pretrained.parent == whole and pretrained.name.lower() == "train":
        return False
    return _same(data, own) or whole in pretrained.parents or pretrained in whole.parents
