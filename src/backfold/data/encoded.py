"""What all sources have in common whose images are encoded files, wherever the bytes lie."""

from abc import ABC, abstractmethod

import numpy as np
from numpy.typing import NDArray
from torch import Tensor

from backfold.data.decode import decode


class EncodedSource(ABC):
    """An `ImageSource` of encoded images.

    Attributes:
        name: for logs and messages.
        labels: (length,) int64, indices into ``class_names``; None where there are none.
        class_names: empty where there are no labels.
        max_pixels: larger images are broken.
    """

    name: str
    labels: NDArray[np.int64] | None = None
    class_names: tuple[str, ...] = ()
    max_pixels: int

    @abstractmethod
    def __len__(self) -> int: ...

    @abstractmethod
    def content(self, index: int) -> bytes:
        """The encoded image.

        Raises:
            BrokenImage: there is none, or it can't be reached.
        """

    @abstractmethod
    def describe(self, index: int) -> str:
        """See `ImageSource.describe`."""

    def read(self, index: int, min_side: int | None = None) -> Tensor:
        """See `ImageSource.read`."""
        return decode(self.content(index), min_side, self.max_pixels)
