"""What a source of images is."""

from collections.abc import Sequence
from typing import Literal, Protocol

import numpy as np
from numpy.typing import NDArray
from torch import Tensor

from backfold.errors import UserError

Labels = NDArray[np.int64]
Split = Literal["train", "test"]


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

    def read(self, index: int, min_side: int | None = None) -> Tensor:
        """(channels, height, width), uint8 in 0..255, or float32 (see `decode`).

        Args:
            index: of the image, from 0.
            min_side: the image may come smaller than it is stored, if that saves time and both
                sides keep this many pixels; None asks for all pixels.

        Raises:
            BrokenImage: the image can't be read.
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
        """As the other source says."""
        return self._source.describe(int(self.indices[index]))
