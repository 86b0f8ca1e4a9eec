"""Images of the ``datasets`` library: saved folders, names on the hub, parquet on disk.

Imported where it is needed: ``datasets`` takes most of a second to import. What it can't read is a
`UserError`.
"""

import textwrap
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import datasets
import fsspec
import huggingface_hub
import numpy as np

from backfold.data.decode import MAX_PIXELS
from backfold.data.files import read_file
from backfold.data.formats import first_and_more, numbered
from backfold.data.isolation import attempt
from backfold.data.source import EncodedSource, Options, Split, of_split, parts_of
from backfold.data.stream import Found, Stream
from backfold.errors import BrokenImage, UserError

IMAGE_COLUMNS = ("image", "img")
LABEL_COLUMNS = ("label", "labels", "fine_label")
STREAMED_BYTES = 50 * 2**30  # data sets on the hub of more are not downloaded


class HuggingFaceSource(EncodedSource):
    """Images of a ``datasets.Dataset``, which lies on disk and is mapped into memory.

    The image column is the only one of images, or else ``image`` or ``img`` of bytes. Labels are
    the only column of classes, or else integers in a column ``label``. A path that stands in place
    of bytes may lead into the ``folders`` only. A data set without images is a `UserError`.
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
        self._images = _encoded_images(dataset, name)
        label = _only_or_usual(dataset.features, datasets.ClassLabel, LABEL_COLUMNS)
        if not labelled or label is None:
            return
        values = dataset[label][:]
        if all(isinstance(value, int) and value >= 0 for value in values):
            self.labels = np.array(values, dtype=np.int64)
            names = getattr(dataset.features[label], "names", None)
            self.class_names = tuple(names or numbered(self.labels))

    def __len__(self) -> int:
        return len(self._images)

    def content(self, index: int) -> bytes:
        """See `EncodedSource.content`."""
        (value,) = self._images[index].values()
        return image_bytes(value, self._folders)

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


def _encoded_images(dataset: Any, name: str) -> Any:
    """The data set's one column of images alone, still encoded."""
    columns = dataset.features or {}
    column = _only_or_usual(columns, datasets.Image, IMAGE_COLUMNS)
    if column is None:
        raise UserError(
            f"{name} has columns {', '.join(columns) or 'unknown'} and no single one of images; "
            "rename that with the images to `image`"
        )
    if isinstance(columns[column], datasets.Image):
        dataset = dataset.cast_column(column, datasets.Image(decode=False))
    return dataset.select_columns([column])


def _only_or_usual(columns: Mapping[str, Any], kind: type, names: Sequence[str]) -> str | None:
    found = [key for key, each in columns.items() if isinstance(each, kind)]
    usual = [name for name in names if name in (found or columns)]
    return next(iter(found if len(found) == 1 else usual), None)


def open_saved(folder: Path, split: Split, options: Options) -> HuggingFaceSource:
    """What ``save_to_disk`` has left."""
    with _users_error(f"{folder} is no readable saved data set", "save it again"):
        saved = datasets.load_from_disk(str(folder))
    parts = saved if isinstance(saved, datasets.DatasetDict) else {"": saved}
    return _open_split(parts, str(folder), [folder], split, options)


def open_parquet(files: Sequence[Path], options: Options) -> HuggingFaceSource:
    """Parquet files of any size, converted once into a cache that is mapped."""
    with _users_error(f"{files[0]} and the files beside it can't be read", "replace them"):
        rows = datasets.load_dataset("parquet", data_files=list(map(str, files)), split="train")
    return HuggingFaceSource(rows, first_and_more(files), (), *options)


def open_hub(name: str, split: Split, options: Options) -> HuggingFaceSource:
    """A data set on the hub, downloaded."""
    builder = _open_builder(name)
    size = builder.info.download_size or 0
    if size > STREAMED_BYTES:
        raise UserError(
            f"{name} takes {size / 2**30:.0f} GiB to download and is only read as a stream; "
            "save what you need of it with `datasets` and give that folder"
        )
    remedy = "try again, or download it yourself and give the folder"
    with _users_error(f"can't download {builder.dataset_name}", remedy):
        builder.download_and_prepare()
        parts = builder.as_dataset()
    caches = datasets.config.HF_DATASETS_CACHE, huggingface_hub.constants.HF_HUB_CACHE
    return _open_split(parts, name, map(Path, caches), split, options)


def stream_hub(name: str, count: int | None, max_pixels: int) -> Stream | None:
    """A data set on the hub that is too large to download; None if it is not."""
    builder = _open_builder(name)
    if (builder.info.download_size or 0) <= STREAMED_BYTES:
        return None
    splits = builder.info.splits or {}
    chosen = "train" if "train" in splits else next(iter(splits), "train")
    count = count or (splits[chosen].num_examples if chosen in splits else None)
    dataset = builder.as_streaming_dataset(split=chosen)
    return hub_stream(dataset, f"{name} {chosen}", count, max_pixels)


def hub_stream(dataset: Any, name: str, count: int | None, max_pixels: int = MAX_PIXELS) -> Stream:
    """A ``datasets.IterableDataset``, whose shards are its files."""
    # Where nothing else tells its columns, the first row does.
    images = _encoded_images(dataset if dataset.features else dataset._resolve_features(), name)
    shards = [f"{name} shard {shard}" for shard in range(images.num_shards)]

    def open_shard(shard: int) -> Iterator[Found]:
        # Iterated over in a worker, a data set would share even this one shard among the workers.
        rows = images.shard(len(shards), shard).iter(batch_size=1)
        for number, row in enumerate(rows):
            ((value,),) = row.values()
            yield f"{shards[shard]} row {number}", attempt(image_bytes, value)

    return Stream(name, count or 0, shards, open_shard, max_pixels)


def _open_builder(name: str) -> datasets.DatasetBuilder:
    """What the hub knows of ``owner/name`` or ``owner/name/configuration``."""
    owner, dataset, *configuration = name.split("/")
    what = f"{name} is neither a path nor a data set on the Hugging Face hub that can be opened"
    with _users_error(what, "check --data and the connection"):
        return datasets.load_dataset_builder(f"{owner}/{dataset}", *configuration)


def _open_split(
    parts: Mapping[str, Any], name: str, folders: Iterable[Path], split: Split, options: Options
) -> HuggingFaceSource:
    named = parts_of({key: key for key in parts})
    if len(parts) > 1 and not named:
        raise UserError(
            f"{name} has splits {', '.join(parts)}; name them train and test, or save one alone"
        )
    chosen = of_split(named, split, next(iter(parts)), name)
    return HuggingFaceSource(parts[chosen], f"{name} {chosen}".rstrip(), folders, *options)


@contextmanager
def _users_error(what: str, remedy: str) -> Iterator[None]:
    try:
        yield
    except Exception as error:  # pyarrow, JSON and datasets itself each raise their own
        reason = textwrap.shorten(str(error), 200) or type(error).__name__
        raise UserError(f"{what} ({reason}); {remedy}") from error
