"""Where images come from, and which of them are for training and which for testing."""

from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Literal, Protocol

import numpy as np
from numpy.typing import NDArray
from sklearn.model_selection import train_test_split
from torch import Tensor

from backfold.data.folder import IMAGE_SUFFIXES, FolderSource, find_files
from backfold.data.parquet import ParquetSource
from backfold.errors import UserError

Labels = NDArray[np.int64]
Split = Literal["train", "test"]

EMBEDDED = Path(__file__).with_name("embedded")
# The first name that a data set has is its test split: a validation split comes before a test
# split because published test splits often have no labels.
TEST_NAMES = ("val", "valid", "validation", "test")


class NoTestSplit(UserError):  # noqa: N818 - the caller may split the data itself and go on
    """The data have no test split of their own."""


class ImageSource(Protocol):
    """A fixed sequence of images; it can be pickled and read in forked processes.

    Attributes:
        name: for logs and messages.
        labels: (length,) int64, indices into ``class_names``; None where there are none.
        class_names: empty where there are no labels.
    """

    name: str
    labels: Labels | None
    class_names: tuple[str, ...]

    def __len__(self) -> int: ...

    def read(self, index: int) -> Tensor:
        """(channels, height, width), uint8 in 0..255 or float32 in [0, 1].

        Raises:
            BrokenImage: the image can't be read.
        """
        ...

    def describe(self, index: int) -> str:
        """Where the image is: a path, or ``file.parquet row 7``."""
        ...


class SubsetSource:
    """Some images of another source, in the order of ``indices``."""

    def __init__(self, source: ImageSource, indices: Sequence[int] | Labels) -> None:
        self._source = source
        self._indices = np.asarray(indices, dtype=np.int64)
        self.name = source.name
        self.labels = None if source.labels is None else source.labels[self._indices]
        self.class_names = source.class_names

    def __len__(self) -> int:
        return len(self._indices)

    def read(self, index: int) -> Tensor:
        """See `ImageSource.read`."""
        return self._source.read(int(self._indices[index]))

    def describe(self, index: int) -> str:
        """As the other source says."""
        return self._source.describe(int(self._indices[index]))


def open_source(data: Path | None, split: Split, labelled: bool = False) -> ImageSource:
    """The images of one split.

    A folder has splits if sub-folders, or else the names of parquet files, say so: one ``train``
    and one of `TEST_NAMES` (sub-folders are named so, file names start so). Otherwise all of it is
    the train split. A folder with image files and parquet files is read as image files.

    Args:
        data: a folder of images or of parquet files, or one parquet file; None takes the 28 x 28
            grey images embedded in this package (10,000 to train and 2,000 to test, 10 classes).
        split: which part.
        labelled: read labels too, where there are any (see `FolderSource`, `ParquetSource`).

    Raises:
        NoTestSplit: "test" is asked of data without splits.
        UserError: the path is missing, or holds no images.
    """
    if data is None:
        name = f"embedded Fashion-MNIST sample, {split}"
        return ParquetSource(EMBEDDED / f"fashion_mnist_{split}.parquet", labelled, name)
    if not data.exists():
        raise UserError(f"{data} does not exist; give a folder of images or a parquet file")
    if data.is_dir():
        return _open_folder(data, split, labelled)
    if data.suffix.lower() != ".parquet":
        raise UserError(f"{data} is a single file; give a folder of images or a parquet file")
    if split == "test":
        raise _no_test_split(data)
    return ParquetSource(data, labelled)


def _no_test_split(data: Path) -> NoTestSplit:
    return NoTestSplit(
        f"{data} has no test split; add sub-folders `train` and `test`, or parquet files named so"
    )


def _open_folder(folder: Path, split: Split, labelled: bool) -> ImageSource:
    by_name = {path.name.lower(): path for path in sorted(folder.iterdir()) if path.is_dir()}
    test = next((by_name[name] for name in TEST_NAMES if name in by_name), None)
    if "train" in by_name and test is not None:
        folders = {"train": by_name["train"], "test": test}
        names = _class_folders(folders.values()) if labelled else None
        return _open_whole(folders[split], labelled, names)
    files = [folder / path for path in find_files(folder, (".parquet",))]
    if files and not find_files(folder, IMAGE_SUFFIXES):
        return _open_parquet(folder, files, split, labelled)
    if split == "test":
        raise _no_test_split(folder)
    return FolderSource(folder, labelled)


def _open_parquet(folder: Path, files: list[Path], split: Split, labelled: bool) -> ImageSource:
    def named(start: str) -> list[Path]:
        return [file for file in files if file.name.lower().startswith(start)]

    train, test = named("train"), next(filter(None, map(named, TEST_NAMES)), [])
    if train and test:
        return ParquetSource(train if split == "train" else test, labelled)
    if split == "test":
        raise _no_test_split(folder)
    return ParquetSource(files, labelled)


def _open_whole(folder: Path, labelled: bool, class_names: list[str] | None) -> ImageSource:
    files = [folder / path for path in find_files(folder, (".parquet",))]
    if files and not find_files(folder, IMAGE_SUFFIXES):
        return ParquetSource(files, labelled)
    return FolderSource(folder, labelled, class_names)


def _class_folders(folders: Iterable[Path]) -> list[str]:
    # Both splits' classes, so that a class missing in one of them doesn't shift the labels.
    paths = [path for folder in folders for path in find_files(folder, IMAGE_SUFFIXES)]
    return sorted({path.split("/")[0] for path in paths if "/" in path})


def stratified_split(labels: Labels | int, share: float, seed: int) -> tuple[Labels, Labels]:
    """Sorted (train indices, test indices), the test part holding about ``share`` of every class.

    Classes of one image stay in the train part.

    Args:
        labels: (length,) int64; or a count, for images without labels.
        share: the test part, above 0 and below 1.
        seed: of the random choice.

    Raises:
        UserError: too few images for such a split.
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
