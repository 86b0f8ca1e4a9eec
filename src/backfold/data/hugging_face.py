"""Images of the ``datasets`` library: saved folders, names on the hub, parquet on disk.

Imported where it is needed: ``datasets`` takes most of a second to import.
"""

import textwrap
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

import datasets
import fsspec
import numpy as np

from backfold.data.arrays import MAX_PIXELS
from backfold.data.files import read_file
from backfold.data.formats import numbered
from backfold.data.source import EncodedSource
from backfold.errors import BrokenImage, UserError

IMAGE_COLUMNS = ("image", "img")
LABEL_COLUMNS = ("label", "labels", "fine_label")


class HuggingFaceSource(EncodedSource):
    """Images of a ``datasets.Dataset``, which lies on disk and is mapped into memory.

    The image column is the only one of images, or else ``image`` or ``img`` of bytes. Labels are
    the only column of classes, or else integers in a column ``label``.

    Args:
        dataset: the images.
        name: for logs and messages.
        folders: where a path that stands in place of bytes may lead.
        labelled: read the labels, if there are any.
        max_pixels: larger images are broken.

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
        column = image_column(dataset.features, name)
        label = label_column(dataset.features) if labelled else None
        if label is not None:
            labels = np.array(dataset[label][:], dtype=object)
            if all(isinstance(value, int) and value >= 0 for value in labels):
                self.labels = labels.astype(np.int64)
                kind = dataset.features[label]
                names = kind.names if isinstance(kind, datasets.ClassLabel) else None
                self.class_names = tuple(names or numbered(self.labels))
        self._images = undecoded(dataset, column).select_columns([column])
        self._column = column

    def __len__(self) -> int:
        return len(self._images)

    def content(self, index: int) -> bytes:
        """See `EncodedSource.content`."""
        return image_bytes(self._images[index][self._column], self._folders)

    def describe(self, index: int) -> str:
        """The data set's name and the row, counted from 0."""
        return f"{self.name} row {index}"


def image_bytes(value: Any, folders: Sequence[Path] = ()) -> bytes:
    """The encoded image in a row's image column.

    Args:
        value: bytes, or ``{"bytes": ..., "path": ...}``.
        folders: resolved; a path that leads anywhere else is not followed, whoever wrote it.

    Raises:
        BrokenImage: neither bytes nor such a path.
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
    """The data set with the column's images as encoded bytes."""
    if isinstance(dataset.features[column], datasets.Image):
        return dataset.cast_column(column, datasets.Image(decode=False))
    return dataset


def image_column(features: datasets.Features | None, name: str) -> str:
    """The column that holds the images.

    Raises:
        UserError: none, or several and none named ``image``.
    """
    columns = dict(features or {})
    images = [key for key, kind in columns.items() if isinstance(kind, datasets.Image)]
    usual = [key for key in IMAGE_COLUMNS if key in (images or columns)]
    if len(images) == 1 or usual:
        return images[0] if len(images) == 1 else usual[0]
    raise UserError(
        f"{name} has columns {', '.join(columns) or 'unknown'} and no single one of images; "
        "rename that with the images to `image`"
    )


def label_column(features: datasets.Features) -> str | None:
    """The column that holds the classes, if one can be told."""
    classes = [key for key, kind in features.items() if isinstance(kind, datasets.ClassLabel)]
    if len(classes) == 1:
        return str(classes[0])
    return next((key for key in LABEL_COLUMNS if key in features), None)


def load_saved(folder: Path) -> dict[str, datasets.Dataset]:
    """What ``save_to_disk`` wrote, by split; the only split of a single data set is "".

    Raises:
        UserError: it can't be read.
    """
    try:
        loaded = datasets.load_from_disk(str(folder))
    except Exception as error:  # pyarrow, JSON and datasets itself each raise their own
        raise UserError(
            f"{folder} is no readable saved data set ({_reason(error)}); save it again"
        ) from error
    return dict(loaded) if isinstance(loaded, datasets.DatasetDict) else {"": loaded}


def load_parquet(files: Sequence[Path], cache: Path | None = None) -> datasets.Dataset:
    """Parquet files too large for memory, converted once into a cache that is mapped.

    Raises:
        UserError: they can't be read.
    """
    try:
        return datasets.load_dataset(
            "parquet",
            data_files=[str(file) for file in files],
            split="train",
            cache_dir=None if cache is None else str(cache),
        )
    except Exception as error:
        raise UserError(
            f"{files[0]} and the files beside it can't be read ({_reason(error)}); replace them"
        ) from error


def open_builder(name: str) -> datasets.DatasetBuilder:
    """What the hub knows of ``owner/name`` or ``owner/name/configuration``.

    Raises:
        UserError: no such data set, or no connection.
    """
    owner, dataset, *configuration = name.split("/")
    try:
        return datasets.load_dataset_builder(f"{owner}/{dataset}", *configuration)
    except Exception as error:
        raise UserError(
            f"{name} is neither a path nor a data set on the Hugging Face hub that can be opened "
            f"({_reason(error)}); check --data and the connection"
        ) from error


def download(builder: datasets.DatasetBuilder) -> dict[str, datasets.Dataset]:
    """All splits, downloaded into the library's cache.

    Raises:
        UserError: the download failed.
    """
    try:
        builder.download_and_prepare()
        return dict(builder.as_dataset())
    except Exception as error:
        raise UserError(
            f"can't download {builder.dataset_name} ({_reason(error)}); try again, or download it "
            "yourself and give the folder"
        ) from error


def _reason(error: Exception) -> str:
    return textwrap.shorten(str(error), 200) or type(error).__name__
