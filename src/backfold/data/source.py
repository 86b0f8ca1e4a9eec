"""What a source of images is, a part of one, and how many of its images may be broken."""

from abc import abstractmethod
from collections.abc import Mapping, Sequence
from typing import Literal, Protocol, TypeVar

import numpy as np
from numpy.typing import NDArray
from sklearn.model_selection import train_test_split
from torch import Tensor

from backfold.data.decode import decode
from backfold.errors import UserError

# The first name that a data set has is its test split: a validation split comes before a test
# split because published test splits often have no labels.
TEST_NAMES = ("val", "valid", "validation", "test")
Labels = NDArray[np.int64]
Split = Literal["train", "test"]
Options = tuple[bool, int]  # whether labels are read, and the pixels that an image may have
Part = TypeVar("Part")
LARGEST_HELD_OUT_SHARE = 0.1  # of a run's images, that watch it


class NoTestSplit(UserError):  # noqa: N818 - the caller may split the data itself and go on
    """The data have no test split of their own."""


class ImageSource(Protocol):
    """A fixed sequence of images; it can be pickled and read in forked processes."""

    name: str  # for logs and messages
    labels: Labels | None = None  # (length,) int64, indices into ``class_names``
    class_names: tuple[str, ...] = ()  # empty where there are no labels

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
        self._source, self.indices = source, np.asarray(indices, dtype=np.int64)
        self.name, self.class_names = source.name, source.class_names
        self.labels = None if source.labels is None else source.labels[self.indices]

    def __len__(self) -> int:
        return len(self.indices)

    def read(self, index: int, min_side: int | None = None) -> Tensor:
        """See `ImageSource.read`."""
        return self._source.read(int(self.indices[index]), min_side)

    def describe(self, index: int) -> str:
        """See `ImageSource.describe`."""
        return self._source.describe(int(self.indices[index]))


def spread(source: ImageSource, count: int) -> SubsetSource:
    """So many of a source's images, or all that there are, evenly spread."""
    places = np.linspace(0, len(source) - 1, min(count, len(source))).round().astype(int)
    return SubsetSource(source, places)


class EncodedSource(ImageSource):
    """An `ImageSource` of encoded files, wherever the bytes lie."""

    max_pixels: int  # larger images are broken

    @abstractmethod
    def content(self, index: int) -> bytes:
        """The encoded image; `BrokenImage` if there is none, or it can't be reached."""

    def read(self, index: int, min_side: int | None = None) -> Tensor:
        """See `ImageSource.read`."""
        return decode(self.content(index), min_side, self.max_pixels)


def parts_of(by_name: Mapping[str, Part]) -> dict[Split, Part]:
    """The train and the test part among these; none of them where one is missing."""
    train = by_name.get("train")
    test = next((by_name[name] for name in TEST_NAMES if by_name.get(name)), None)
    return {"train": train, "test": test} if train and test else {}


def of_split(parts: Mapping[Split, Part], split: Split, whole: Part, data: object) -> Part:
    """One of the parts; the whole is the train part where there are none."""
    if split == "test" and not parts:
        raise NoTestSplit(
            f"{data} has no test split; add sub-folders `train` and `test`, or files named so"
        )
    return parts.get(split, whole)


def split_source(
    source: ImageSource, share: float, seed: int, by_class: bool = True
) -> tuple[Labels, Labels]:
    """Sorted places of a larger and of a smaller part, which holds ``share`` of the images.

    It holds as much of every class but those of one image, if there are labels, and it has as many
    images as there are classes. A `UserError` if there are too few images for such a split.
    """
    labels = source.labels if by_class else None
    classes = np.zeros(len(source), dtype=np.int64) if labels is None else labels
    single = np.bincount(classes)[classes] == 1
    many = np.flatnonzero(~single)
    try:
        larger, smaller = train_test_split(
            many, test_size=share, random_state=seed, stratify=classes[many]
        )
    except ValueError as error:
        if labels is not None:
            return split_source(source, share, seed, by_class=False)
        reason = " ".join(str(error).split())
        raise UserError(
            f"{len(source)} images can't be split with a test share of {share:g} ({reason}); "
            "give more images or another share"
        ) from error
    return np.sort(np.concatenate([larger, np.flatnonzero(single)])), np.sort(smaller)


def held_out_count(asked: int, count: int) -> int:
    """How many of a run's images are kept from training: a tenth at most."""
    return min(asked, max(1, int(LARGEST_HELD_OUT_SHARE * count)))


def split_held_out(source: ImageSource, held_out: int, seed: int) -> tuple[Labels, Labels]:
    """Places of the training images and of those that are kept from it."""
    return split_source(source, held_out_count(held_out, len(source)) / len(source), seed)


class BrokenFiles:
    """Counts distinct broken files among ``count``, and stops the run where they are too many.

    That is more than one, and more than ``max_share`` of all.
    """

    def __init__(self, count: int, max_share: float) -> None:
        self._allowed = max(1, int(max_share * count))
        self.descriptions: list[str] = []  # the distinct files, in the order met

    def add(self, descriptions: Sequence[str]) -> list[str]:
        """Count a batch's broken files; returns those met for the first time."""
        new = [line for line in dict.fromkeys(descriptions) if line not in self.descriptions]
        self.descriptions += new
        if len(self.descriptions) > self._allowed:
            raise UserError(
                f"{len(self.descriptions)} images can't be read, {self._allowed} are allowed: "
                f"{'; '.join(self.descriptions[:3])}; mend or remove them"
            )
        return new
