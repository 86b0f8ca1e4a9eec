"""Images that lie as files in a folder."""

from collections.abc import Sequence
from pathlib import Path

import numpy as np

from backfold.data.arrays import MAX_PIXELS
from backfold.data.encoded import EncodedSource
from backfold.data.files import IMAGE_SUFFIXES, find_files, read_file
from backfold.errors import UserError


class FolderSource(EncodedSource):
    """The images at any depth below a folder, in the order of their paths.

    Hidden files and folders are left out. Labels are the first-level sub-folders' names.

    Args:
        folder: where to look.
        labelled: give labels, if all images lie in sub-folders and at least two of these hold any.
        class_names: the classes, if they should not come from this folder alone.
        max_pixels: larger images are broken.

    Raises:
        UserError: there is no image.
    """

    def __init__(
        self,
        folder: Path,
        labelled: bool = False,
        class_names: Sequence[str] | None = None,
        max_pixels: int = MAX_PIXELS,
    ) -> None:
        self.name, self.max_pixels = str(folder), max_pixels
        self._folder = folder
        self._paths = find_files(folder, IMAGE_SUFFIXES)
        if not self._paths:
            raise UserError(
                f"{folder} holds no images; give a folder with files named "
                f"{' '.join('*' + suffix for suffix in IMAGE_SUFFIXES)} *.parquet or *.tar"
            )
        folders = [path.split("/")[0] if "/" in path else None for path in self._paths]
        names = class_names or sorted({name for name in folders if name is not None})
        if labelled and None not in folders and len(names) >= 2:
            self.class_names = tuple(names)
            places = {name: place for place, name in enumerate(names)}
            self.labels = np.array([places[name] for name in folders if name], dtype=np.int64)

    def __len__(self) -> int:
        return len(self._paths)

    def content(self, index: int) -> bytes:
        """See `EncodedSource.content`."""
        return read_file(self._folder / self._paths[index])

    def describe(self, index: int) -> str:
        """The file's path."""
        return str(self._folder / self._paths[index])
