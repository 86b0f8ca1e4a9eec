"""Images of the ``datasets`` library: saved folders, names on the hub, parquet on disk.

Imported where it is needed: ``datasets`` takes most of a second to import. What it can't read is a
`UserError`.
"""

import textwrap
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import datasets
import fsspec
import numpy as np

from backfold.data.decode import MAX_PIXELS
from backfold.data.files import read_file
from backfold.data.formats import numbered
from backfold.data.source import EncodedSource
from backfold.errors import BrokenImage, UserError

IMAGE_COLUMNS = ("image", "img")
LABEL_COLUMNS = ("label", "labels", "fine_label")


class HuggingFaceSource(EncodedSource):
    """Images of a ``datasets.Dataset``, which lies on disk and is mapped into memory.

    The image column is the only one of images, or else ``image`` or ``img`` of bytes. Labels are
    the only column of classes, or else integers in a column ``label``. A path that stands in place
    of bytes may lead into the ``folders`` only.

    Raises:
        UserError: no rows, or no single image column.
    """

    def __init__(
        self,
        dataset: datasets.Dataset,
        name: str,
        folders: Iterable[Path] = (),
        labelled: bool = False,
        max_pixels: int = MAX_PIXELS,
    ) -> None:
        self.name, self.max_pixels = name, max_pixels
        self._folders = [folder.resolve() for folder in folders]
        if not len(dataset):
            raise UserError(f"{name}: no rows; give a data set that holds images")
        self._column = image_column(dataset.features, name)
        self._images = undecoded(dataset, self._column)
        columns = dataset.features
        classes = [key for key, kind in columns.items() if isinstance(kind, datasets.ClassLabel)]
        usual = [key for key in LABEL_COLUMNS if key in columns]
        found = classes if len(classes) == 1 else usual
        if labelled and found:
            label = found[0]
            labels = np.array(dataset[label][:], dtype=object)
            if all(isinstance(value, int) and value >= 0 for value in labels):
                self.labels = labels.astype(np.int64)
                kind = columns[label]
                names = kind.names if isinstance(kind, datasets.ClassLabel) else None
                self.class_names = tuple(names or numbered(self.labels))

    def __len__(self) -> int:
        return len(self._images)

    def content(self, index: int) -> bytes:
        """See `EncodedSource.content`."""
        return image_bytes(self._images[index][self._column], self._folders)

    def describe(self, index: int) -> str:
        """The data set's name and the row, counted from 0."""
        return f"{self.name} row {index}"


def image_bytes(value: Any, folders: Sequence[Path] = ()) -> bytes:
    """The encoded image in a row: bytes, or ``{"bytes": ..., "path": ...}``.

    A path that leads out of the (resolved) folders is not followed, whoever wrote it: this and
    anything else raises `BrokenImage`.
    """
    content = value.get("bytes") if isinstance(value, dict) else value
    if isinstance(content, bytes):
        return content
    path = value.get("path") if isinstance(value, dict) else None
    if not isinstance(path, str):
        raise BrokenImage("no image in this row")
    if path.startswith("hf://"):
        with fsspec.open(path) as file:
            return bytes(file.read())
    resolved = Path(path).resolve()
    if not any(resolved.is_relative_to(folder) for folder in folders):
        raise BrokenImage("a path outside of the data set's folder")
    return read_file(resolved)


def undecoded(dataset: Any, column: str) -> Any:
    """The data set's column alone, with images as encoded bytes."""
    if isinstance(dataset.features[column], datasets.Image):
        dataset = dataset.cast_column(column, datasets.Image(decode=False))
    return dataset.select_columns([column])


def image_column(features: datasets.Features | None, name: str) -> str:
    """The column of images; a `UserError` if there is none, or several and none is ``image``."""
    columns = dict(features or {})
    images = [key for key, kind in columns.items() if isinstance(kind, datasets.Image)]
    usual = [key for key in IMAGE_COLUMNS if key in (images or columns)]
    if len(images) == 1 or usual:
        return images[0] if len(images) == 1 else usual[0]
    raise UserError(
        f"{name} has columns {', '.join(columns) or 'unknown'} and no single one of images; "
        "rename that with the images to `image`"
    )


@contextmanager
def users_error(what: str, remedy: str) -> Iterator[None]:
    """Whatever is raised inside becomes a `UserError` of one line."""
    try:
        yield
    except Exception as error:  # pyarrow, JSON and datasets itself each raise their own
        reason = textwrap.shorten(str(error), 200) or type(error).__name__
        raise UserError(f"{what} ({reason}); {remedy}") from error


def open_builder(name: str) -> datasets.DatasetBuilder:
    """What the hub knows of ``owner/name`` or ``owner/name/configuration``."""
    owner, dataset, *configuration = name.split("/")
    with users_error(
        f"{name} is neither a path nor a data set on the Hugging Face hub that can be opened",
        "check --data and the connection",
    ):
        return datasets.load_dataset_builder(f"{owner}/{dataset}", *configuration)
