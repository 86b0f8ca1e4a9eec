"""Labelled images of a training, a validation and a test part, decoded as they are needed."""

import contextlib
import logging
import math
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np
import torch
from torch import Tensor

from backfold.data.decode import as_float
from backfold.data.loading import evaluation_batches
from backfold.data.source import BrokenFiles, ImageSource
from backfold.errors import UserError
from backfold.evaluation.results import Row, accuracy_rows

if TYPE_CHECKING:
    from backfold.evaluation.evaluate import Evaluation
    from backfold.evaluation.subject import Subject

LOGGER = logging.getLogger("backfold")
Places = list[Tensor]  # of each draw
Learned = tuple[str, list[Tensor]]  # a note, and by draw the labels predicted for the test images
KEPT_BYTES = 2**29  # decoded images of less stay in memory
BATCH_SIZE = 256


class Images:
    """Images of a source at the backbone's size, with their labels if there are any.

    Small sources are decoded once and kept; of others every batch is decoded when it is asked for.
    A file that can't be read is replaced by the next one, label and all.
    """

    def __init__(self, source: ImageSource, subject: "Subject", num_workers: int = 0) -> None:
        self.source, self._subject, self._num_workers = source, subject, num_workers
        self.shape = (subject.channels, *subject.image_size)  # channels, height, width
        self._broken = BrokenFiles(len(source), subject.max_broken_share)
        self._kept: tuple[Tensor, Tensor] | None = None
        self._labels = None if source.labels is None else torch.tensor(source.labels)

    def __len__(self) -> int:
        return len(self.source)

    @property
    def labels(self) -> Tensor:
        """int64, (images,), with those of replacements; a `UserError` where there are none."""
        if self._labels is None:
            raise UserError(
                f"{self.source.name} has no labels; give a folder with one sub-folder a class, or "
                "parquet files with a label column"
            )
        return self._labels

    def batches(self, parts: Sequence[Tensor]) -> Iterator[tuple[Tensor, Tensor]]:
        """(batch, channels, height, width), uint8 or float (see `as_float`), and their places.

        A place may be another than was asked for: that of an image that can be read.
        """
        if len(self) * math.prod(self.shape) > KEPT_BYTES:
            yield from self._decoded(parts)
            return
        if self._kept is None:
            self._kept = _joined(self._decoded(torch.arange(len(self)).split(BATCH_SIZE)))
        images, places = self._kept
        for wanted in parts:
            yield images[wanted], places[wanted]

    def load(self, limit: int | None = None, seed: int = 0) -> tuple[Tensor, Tensor]:
        """All images, or so many drawn ones, in memory, and their places; see `batches`."""
        if len(self) == 0:
            raise UserError(f"{self.source.name} holds no images; give data with images")
        return _joined(self.batches(some(torch.arange(len(self)), limit, seed).split(BATCH_SIZE)))

    def _decoded(self, parts: Sequence[Tensor]) -> Iterator[tuple[Tensor, Tensor]]:
        size, channels = self._subject.image_size, self._subject.channels
        wanted = [part.tolist() for part in parts]
        loaded = evaluation_batches(self.source, size, channels, wanted, self._num_workers)
        for asked, batch in zip(parts, loaded, strict=True):
            for line in self._broken.add(batch.broken):
                LOGGER.warning("skipped: %s", line)
            if self._labels is not None and batch.broken:
                self._labels[asked] = self._labels[batch.indices]
            yield batch.images, batch.indices


def some(places: Tensor, most: int | None, seed: int) -> Tensor:
    """So many places at most, drawn; rising as those that are given. None takes all."""
    if most is None or len(places) <= most:
        return places
    drawn = np.random.default_rng(seed).choice(len(places), most, replace=False)
    return places[torch.from_numpy(np.sort(drawn))]


def _joined(batches: Iterator[tuple[Tensor, Tensor]]) -> tuple[Tensor, Tensor]:
    images, places = zip(*batches, strict=True)
    if any(part.is_floating_point() for part in images):
        images = tuple(as_float(part) for part in images)
    return torch.cat(images), torch.cat(places)


@dataclass(frozen=True)
class Parts:
    """Images to learn from and images to test on."""

    train: Images
    test: Images  # not pretrained on, as far as the run knows; the caveat says otherwise
    fit: Tensor  # places in train that are learned from while something is chosen
    validation: Tensor  # the other places, on which it is chosen
    caveat: str = ""  # goes into every row

    def draws(self, count: int | float | None, draws: int, seed: int) -> list[Tensor]:
        """Places in ``train`` of the labelled images of each draw, rising, alike for everyone.

        The count is that of labels a class; a float is the share of each class, rounded half up,
        one image at least; None gives all of ``fit``, once. Too many raise a `UserError`.
        """
        if count is None:
            return [self.fit]
        labels = self.train.labels[self.fit].numpy()
        found = []
        generators = [np.random.default_rng([seed, draw]) for draw in range(draws)]
        for label in np.unique(labels):
            members = np.flatnonzero(labels == label)
            share = math.floor(count * len(members) + 0.5)
            size = max(1, share) if isinstance(count, float) else count
            if size > len(members):
                name = self.train.source.class_names[label]
                raise UserError(
                    f"class {name} has {len(members)} images to learn from, beside those "
                    f"that choices are made on, fewer than the {count} labels a class; ask for "
                    f"{len(members)} or fewer, or add images"
                )
            found.append([each.choice(members, size, replace=False) for each in generators])
        return [self.fit[np.sort(np.concatenate(drawn))] for drawn in zip(*found, strict=True)]


def rows_by_labels(
    given: "Evaluation",
    protocol: str,
    contenders: Iterable[str],
    learn: Callable[[str, str, Places, Places], Learned],
) -> list[Row]:
    """Accuracies with each number of labels; numbers that a class lacks are left out, if any stay.

    The first contender is compared with each other one. ``learn`` is given a contender, the case,
    the draws' places, on which choices are made, and those to learn from (all training images where
    all labels count); it returns a note, and the test images' labels as predicted after each.
    """
    rows: list[Row] = []
    parts, settings, counts = given.parts, given.settings, given.settings.label_counts()
    for count in counts:
        case = label_case(count)
        try:
            draws = parts.draws(count, settings.draws, settings.seed)
        except UserError as error:
            LOGGER.warning("%s are left out: %s", case, error)
            if not rows and count == counts[-1]:
                raise
            continue
        learned = [torch.arange(len(parts.train))] if count is None else draws
        correct, notes = {}, {}
        for name in contenders:
            notes[name], predicted = learn(name, case, draws, learned)
            correct[name] = [labels == parts.test.labels for labels in predicted]
        rows += accuracy_rows(protocol, case, correct, notes)
    return rows


def label_case(count: int | float | None) -> str:
    """How many labels there were, as rows say it."""
    if isinstance(count, float):
        return f"{100 * count:g} % of the labels"
    return "all labels" if count is None else f"{count} label{'s' if count > 1 else ''} a class"


def normalised(
    given: "Evaluation", images: Images, places: Tensor | Sequence[Tensor]
) -> Iterator[tuple[Tensor, Tensor]]:
    """Images as backbones take them, on the device, and their places, in batches."""
    parts = places.split(BATCH_SIZE) if isinstance(places, Tensor) else places
    for part, (batch, _) in zip(parts, images.batches(parts), strict=True):
        yield given.statistics.normalize(batch.to(given.device, non_blocking=True)), part


def batch_indices(count: int, batch_size: int, steps: int) -> Tensor:
    """Which of ``count`` images each step takes, (steps, batch): all once before any come again."""
    needed = steps * batch_size
    passes = [torch.randperm(count) for _ in range(math.ceil(needed / count))]
    return torch.cat(passes)[:needed].view(steps, batch_size)


@contextlib.contextmanager
def seeded(seed: int, device: torch.device) -> Iterator[None]:
    """Seed PyTorch's generators within; afterwards put the CPU's and the device's back."""
    with torch.random.fork_rng(devices=[device] if device.type == "cuda" else []):
        torch.manual_seed(seed)
        yield
