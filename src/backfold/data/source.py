"""What a source of images is, a part of one, and how many of its images may be broken."""

from abc import abstractmethod
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Literal, Protocol

import numpy as np
from numpy.typing import NDArray
from sklearn.model_selection import train_test_split
from torch import Tensor

from backfold.data.decode import decode
from backfold.errors import UserError

Labels = NDArray[np.int64]
Split = Literal["train", "test"]
LARGEST_HELD_OUT_SHARE = 0.1  # of a run's images, that watch it


class NoTestSplit(UserError):  # noqa: N818 - the caller may split the data itself and go on
    """The data have no test split of their own."""


class ImageSource(Protocol):
    """A fixed sequence of images; it can be pickled and read in forked processes."""

    name: str  # for logs and messages
    labels: Labels | None  # (length,) int64, indices into ``class_names``
    class_names: tuple[str, ...]  # empty where there are no labels

    def __len__(self) -> int: ...

    def read(self, index: int, min_side: int | None = None) -> Tensor:
        """(channels, height, width), uint8 in 0..255, or float32 (see `decode`).

        It may come smaller than it is stored, if that saves time and both sides keep ``min_side``
        pixels. What can't be read raises `BrokenImage`.
        """
        ...

    def describe(self, index: int) -> str:
        """Where the image is: a path, or ``file.parquet row 7``."""
        ...


class SubsetSource:
    """Some images of another source, in the order of ``indices``, which count in that source."""

    def __init__(self, source: ImageSource, indices: Sequence[int] | Labels) -> None:
        self._source = source
        self.indices = np.asarray(indices, dtype=np.int64)
        self.name = source.name
        self.labels = None if source.labels is None else source.labels[self.indices]
        self.class_names = source.class_names

    def __len__(self) -> int:
        return len(self.indices)

    def read(self, index: int, min_side: int | None = None) -> Tensor:
        """See `ImageSource.read`."""
        return self._source.read(int(self.indices[index]), min_side)

    def describe(self, index: int) -> str:
        """See `ImageSource.describe`."""
        return self._source.describe(int(self.indices[index]))


class EncodedSource(ImageSource):
    """An `ImageSource` of encoded files, wherever the bytes lie."""

    labels: Labels | None = None
    class_names: tuple[str, ...] = ()
    max_pixels: int  # larger images are broken

    @abstractmethod
    def content(self, index: int) -> bytes:
        """The encoded image; `BrokenImage` if there is none, or it can't be reached."""

    def read(self, index: int, min_side: int | None = None) -> Tensor:
        """See `ImageSource.read`."""
        return decode(self.content(index), min_side, self.max_pixels)


def stratified_split(labels: Labels | int, share: float, seed: int) -> tuple[Labels, Labels]:
    """Sorted (train indices, test indices), the test part holding about ``share`` of every class.

    Classes of one image stay in the train part. Images without labels are given by their count; too
    few for such a split are a `UserError`.
    """
    classes = np.zeros(labels, dtype=np.int64) if isinstance(labels, int) else labels
    names, members = np.unique(classes, return_counts=True)
    single = np.isin(classes, names[members == 1])
    many = np.flatnonzero(~single)
    try:
        train, test = train_test_split(
            many, test_size=share, random_state=seed, stratify=classes[many]
        )
    except ValueError as error:
        reason = " ".join(str(error).split())
        raise UserError(
            f"{len(classes)} images can't be split with a test share of {share:g} ({reason}); "
            "give more images or another share"
        ) from error
    return np.sort(np.concatenate([train, np.flatnonzero(single)])), np.sort(test)


def split_held_out(source: ImageSource, held_out: int, seed: int) -> tuple[Labels, Labels]:
    """Places of the training images and of those that are kept from it, a tenth at most."""
    share = min(held_out, max(1, int(LARGEST_HELD_OUT_SHARE * len(source)))) / len(source)
    try:
        labels = len(source) if source.labels is None else source.labels
        return stratified_split(labels, share, seed)
    except UserError:  # fewer held-out images than classes
        return stratified_split(len(source), share, seed)


@dataclass
class BrokenFiles:
    """Counts distinct broken files, and stops the run when there are more than are allowed."""

    allowed: int
    _seen: dict[str, None] = field(default_factory=dict)

    @classmethod
    def for_source(cls, source: ImageSource, max_broken_share: float = 0.01) -> "BrokenFiles":
        """Allow this share of the source's images, and always one."""
        return cls(max(1, int(max_broken_share * len(source))))

    @property
    def descriptions(self) -> list[str]:
        """The distinct files, in the order met."""
        return list(self._seen)

    def add(self, descriptions: Sequence[str]) -> list[str]:
        """Count a batch's broken files; returns those met for the first time."""
        new = [line for line in dict.fromkeys(descriptions) if line not in self._seen]
        self._seen.update(dict.fromkeys(new))
        if len(self._seen) > self.allowed:
            raise UserError(
                f"{len(self._seen)} images can't be read, {self.allowed} are allowed: "
                f"{'; '.join(self.descriptions[:3])}; mend or remove them"
            )
        return new
