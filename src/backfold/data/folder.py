"""Images that lie as files in a folder."""

import os
from collections.abc import Sequence
from pathlib import Path

import numpy as np
from numpy.typing import NDArray
from torch import Tensor

from backfold.data.decode import BrokenImage, decode
from backfold.errors import UserError

IMAGE_SUFFIXES = (".jpg", ".jpeg", ".png", ".webp", ".bmp", ".tif", ".tiff")


class FolderSource:
    """The images at any depth below a folder, in the order of their paths.

    Hidden files and folders are left out. Labels are the first-level sub-folders' names.

    Args:
        folder: where to look.
        labelled: give labels, if all images lie in sub-folders and at least two of these hold any.
        class_names: the classes, if they should not come from this folder alone.

    Raises:
        UserError: there is no image.
    """

    def __init__(
        self, folder: Path, labelled: bool = False, class_names: Sequence[str] | None = None
    ) -> None:
        self.name = str(folder)
        self._folder = folder
        self._paths = find_files(folder, IMAGE_SUFFIXES)
        if not self._paths:
            raise UserError(
                f"{folder} holds no images; give a folder with files named "
                f"{' '.join('*' + suffix for suffix in IMAGE_SUFFIXES)} or *.parquet"
            )
        self.labels: NDArray[np.int64] | None = None
        self.class_names: tuple[str, ...] = ()
        folders = [path.split("/")[0] if "/" in path else None for path in self._paths]
        names = class_names or sorted({name for name in folders if name is not None})
        if labelled and None not in folders and len(names) >= 2:
            self.class_names = tuple(names)
            self.labels = np.array([names.index(name) for name in folders if name], dtype=np.int64)

    def __len__(self) -> int:
        return len(self._paths)

    def read(self, index: int) -> Tensor:
        """See `ImageSource.read`."""
        try:
            content = (self._folder / self._paths[index]).read_bytes()
        except OSError as error:
            raise BrokenImage(error.strerror or type(error).__name__) from error
        return decode(content)

    def describe(self, index: int) -> str:
        """The file's path."""
        return str(self._folder / self._paths[index])


def find_files(folder: Path, suffixes: tuple[str, ...]) -> list[str]:
    """Sorted paths, relative and with slashes, of the files below a folder; hidden ones left out.

    Suffixes are compared in lower case. Linked folders are followed.
    """
    found = []
    for place, folders, names in os.walk(folder, followlinks=True):
        folders[:] = [name for name in folders if not name.startswith(".")]
        relative = Path(place).relative_to(folder)
        found += [
            (relative / name).as_posix()
            for name in names
            if name.lower().endswith(suffixes) and not name.startswith(".")
        ]
    return sorted(found)
