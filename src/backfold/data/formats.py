"""Images of a folder, of parquet files, of WebDataset tar shards, of a Python ``Dataset``."""

import itertools
import json
import re
import tarfile
from collections.abc import Iterable, Iterator, Mapping, Sequence
from operator import itemgetter
from pathlib import Path
from typing import Any, Protocol, TypeVar

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq
import torch
from PIL import Image
from torch import Tensor

from backfold.data.arrays import (
    MAX_CHANNELS,
    MAX_PIXELS,
    channels_last,
    check_size,
    in_range,
    to_tensor,
)
from backfold.data.decode import decode_pillow
from backfold.data.files import IMAGE_SUFFIXES, find_files, read_file
from backfold.data.source import EncodedSource, Labels
from backfold.errors import BrokenImage, UserError

IMAGE_KINDS = tuple(suffix[1:] for suffix in IMAGE_SUFFIXES)
IMAGE_KEYS = ("image", "img", "pixel_values")  # of an item that is a mapping
LABEL_KINDS = ("cls", "json")
LARGEST_LABEL = 2**20  # bytes
MEMBER = re.compile(r"((?:.*/)?[^./]+)\.([^/]*)")  # a sample's key, and what the member is of it
Data = TypeVar("Data")
Place = tuple[int, int]  # offset and size


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


class ParquetSource(EncodedSource):
    """Images in parquet files, held in memory in their compressed form.

    Column ``image``: bytes of an image file, or a struct with such ``bytes`` (as Hugging Face
    datasets writes). Column ``label``, optional: integers from 0. Class names are taken from
    Hugging Face's schema metadata, or else are the numbers.

    Args:
        files: one file or more with the same columns.
        labelled: read the labels, if there are any.
        name: for logs; the files' paths by default.
        max_pixels: larger images are broken.

    Raises:
        UserError: no parquet file, no images, or labels that are no integers from 0.
    """

    def __init__(
        self,
        files: Path | Sequence[Path],
        labelled: bool = True,
        name: str | None = None,
        max_pixels: int = MAX_PIXELS,
    ) -> None:
        self.max_pixels = max_pixels
        self._files = [files] if isinstance(files, Path) else list(files)
        self.name = name or first_and_more(self._files)
        tables = [read_parquet(file, ("image", "label")) for file in self._files]
        self._ends = np.cumsum([len(table) for table in tables])
        if not self._ends[-1]:
            raise UserError(f"{self.name}: no rows; give parquet files that hold images")
        pairs = list(zip(tables, self._files, strict=True))
        columns = [encoded_column(table, "image", file) for table, file in pairs]
        self._images = pa.chunked_array([chunk for column in columns for chunk in column.chunks])
        if labelled and all("label" in table.column_names for table in tables):
            self.labels = np.concatenate([_label_column(table, file) for table, file in pairs])
            metadata = json.loads((tables[0].schema.metadata or {}).get(b"huggingface", b"{}"))
            label = metadata.get("info", {}).get("features", {}).get("label", {})
            self.class_names = tuple(label.get("names") or numbered(self.labels))

    def __len__(self) -> int:
        return len(self._images)

    def content(self, index: int) -> bytes:
        """See `EncodedSource.content`; a path beside the bytes is never followed."""
        content = self._images[index].as_py()
        if content is None:
            raise BrokenImage("no image in this row")
        return bytes(content)

    def describe(self, index: int) -> str:
        """The file's path and the row, counted from 0."""
        file = int(np.searchsorted(self._ends, index, side="right"))
        start = int(self._ends[file - 1]) if file else 0
        return f"{self._files[file]} row {index - start}"


def first_and_more(names: Sequence[object]) -> str:
    """The first name, and how many follow."""
    return f"{names[0]} and {len(names) - 1} more" if len(names) > 1 else str(names[0])


def numbered(labels: Labels) -> tuple[str, ...]:
    """Names for classes without any: the numbers up to the largest label."""
    return tuple(map(str, range(int(labels.max()) + 1)))


def read_parquet(file: Path, columns: Sequence[str], remedy: str = "") -> pa.Table:
    """Those of the columns that there are; the first must be there.

    Raises:
        UserError: it is not, with what to do about it, or this is no parquet file.
    """
    try:
        names = pq.read_schema(file).names
        if columns[0] not in names:
            remedy = remedy or "rename the column that holds the images' bytes to `image`"
            raise UserError(
                f"{file} has columns {', '.join(names)} but no `{columns[0]}`; {remedy}"
            )
        return pq.read_table(file, columns=[name for name in columns if name in names])
    except (pa.ArrowException, OSError) as error:
        reason = " ".join(str(error).split())
        raise UserError(f"{file} is no readable parquet file ({reason}); replace it") from error


def encoded_column(table: pa.Table, name: str, file: Path) -> pa.ChunkedArray:
    """A column's bytes, where it has such or a struct with ``bytes``; else a `UserError`."""
    column = table[name]
    if pa.types.is_struct(column.type) and column.type.get_field_index("bytes") >= 0:
        column = pc.struct_field(column, "bytes")
    if not (pa.types.is_binary(column.type) or pa.types.is_large_binary(column.type)):
        raise UserError(
            f"{file}: column `{name}` holds {table[name].type}, not bytes; store each image's "
            "encoded file there"
        )
    return column.cast(pa.large_binary())


def _label_column(table: pa.Table, file: Path) -> Labels:
    column = table["label"]
    counting = pa.types.is_integer(column.type) and not column.null_count
    if not counting or (pc.min(column).as_py() or 0) < 0:
        raise UserError(
            f"{file}: column `label` is {column.type} or has nulls or negative numbers; "
            "give integers from 0, or drop the column"
        )
    return np.asarray(column.to_numpy(), dtype=np.int64)


class TarSource(EncodedSource):
    """Images in uncompressed tar shards, in any order.

    WebDataset's convention: neighbouring members that share their name up to its first dot are one
    sample, as ``0001.jpg``, ``0001.cls`` (a class's number or name) and ``0001.json`` (read for
    ``"label"`` where there is no ``.cls``).

    Opening reads every member's header, a few microseconds each, and remembers where each image
    lies: shards are then as good as a folder. Nothing is ever extracted, and links are not
    followed.

    Args:
        files: the shards.
        labelled: read labels, if every sample has one.
        class_names: the classes' names, where other shards have more of them.
        max_pixels: larger images are broken.

    Raises:
        UserError: a compressed, damaged or truncated shard; no images; two images in one sample.
    """

    def __init__(
        self,
        files: Sequence[Path],
        labelled: bool = False,
        class_names: Sequence[str] | None = None,
        max_pixels: int = MAX_PIXELS,
    ) -> None:
        self._files = list(files)
        self.max_pixels = max_pixels
        self.name = first_and_more(self._files)
        index = [
            (number, *found)
            for number, file in enumerate(self._files)
            for found in _index_shard(file, labelled)
        ]
        if not index:
            raise UserError(
                f"{self.name}: no images; give shards with members named *.jpg, *.png and so on"
            )
        shards, places, names, labels = zip(*index, strict=True)
        self._shards = np.array(shards, dtype=np.int32)
        self._places = np.array(places, dtype=np.int64)
        self._names = np.array([name.encode(errors="surrogateescape") for name in names])
        if labelled and None not in labels:
            self.labels, self.class_names = number_labels(labels, class_names)

    def __len__(self) -> int:
        return len(self._shards)

    def content(self, index: int) -> bytes:
        """See `EncodedSource.content`."""
        offset, size = self._places[index].tolist()
        try:
            with self._files[self._shards[index]].open("rb") as shard:
                shard.seek(offset)
                content: bytes = shard.read(size)
        except OSError as error:
            raise BrokenImage(error.strerror or type(error).__name__) from error
        if len(content) < size:
            raise BrokenImage("the shard has become shorter")
        return content

    def describe(self, index: int) -> str:
        """The shard's path and the member's name."""
        name = bytes(self._names[index]).decode(errors="replace")
        return f"{self._files[self._shards[index]]} member {name}"


def _index_shard(file: Path, labelled: bool) -> Iterator[tuple[Place, str, str | None]]:
    """Where each image lies, its member's name, and its label."""
    try:
        with tarfile.open(file, "r:") as tar:  # "r:" takes no compression
            for key, sample in group_members(_members(tar, file.stat().st_size)):
                kind = image_kind(key, sample, str(file))
                if kind is not None:
                    label = _read_label(tar, sample) if labelled else None
                    yield sample[kind], f"{key}.{kind}", label
            _check_end(tar, file)
    except UserError:
        raise
    except (tarfile.TarError, ValueError, OSError, EOFError) as error:
        text = str(error.args[0] if error.args else "").strip() or type(error).__name__
        raise UserError(
            f"{file} is no whole, uncompressed tar ({text.splitlines()[0]}); replace or unpack it"
        ) from error


def _members(tar: tarfile.TarFile, size: int) -> Iterator[tuple[str, Place]]:
    """Names and places of regular members."""
    for member in tar:
        tar.members = []  # type: ignore[attr-defined]
        if member.offset_data + member.size > size:
            raise tarfile.ReadError("truncated")
        if member.isreg() and not member.issparse():
            yield member.name, (member.offset_data, member.size)


def _check_end(tar: tarfile.TarFile, file: Path) -> None:
    # tarfile takes a damaged header for the end, and would leave out all that follows.
    with file.open("rb") as raw:
        raw.seek(tar.offset)
        rest = raw.read(tarfile.BLOCKSIZE)
    if rest.strip(b"\0"):
        raise UserError(f"{file} is damaged at byte {tar.offset}; replace it")


def group_members(members: Iterable[tuple[str, Data]]) -> Iterator[tuple[str, dict[str, Data]]]:
    """The key of each sample, and its members by what follows the key and a dot, in lower case.

    Raises:
        UserError: a sample with two members of one name.
    """
    named = (
        (match[1], match[2].lower(), data)
        for name, data in members
        if (match := MEMBER.fullmatch(name))
    )
    for key, neighbours in itertools.groupby(named, itemgetter(0)):
        sample: dict[str, Data] = {}
        for _, kind, data in neighbours:
            if kind in sample:
                raise UserError(f"sample {key} has two members {kind}; give shards with one each")
            sample[kind] = data
        yield key, sample


def image_kind(key: str, sample: dict[str, Data], shard: str) -> str | None:
    """The suffix of a sample's image; None where it has none.

    Raises:
        UserError: it has two.
    """
    kinds = [kind for kind in sample if kind in IMAGE_KINDS]
    if len(kinds) > 1:
        raise UserError(
            f"{shard}: sample {key} has images {' and '.join(kinds)}; give one image a sample"
        )
    return kinds[0] if kinds else None


def _read_label(tar: tarfile.TarFile, sample: dict[str, Place]) -> str | None:
    """The class that a sample's ``cls`` or else ``json`` names; None where there is none."""
    kind = next((kind for kind in LABEL_KINDS if kind in sample), None)
    if kind is None or sample[kind][1] > LARGEST_LABEL:
        return None
    assert tar.fileobj is not None
    before = tar.fileobj.tell()
    tar.fileobj.seek(sample[kind][0])
    content = tar.fileobj.read(sample[kind][1])
    tar.fileobj.seek(before)
    try:
        if kind == "cls":
            return str(content.decode().strip()) or None
        values = json.loads(content)
    except (UnicodeDecodeError, ValueError, RecursionError):
        return None
    label = values.get("label") if isinstance(values, dict) else None
    return None if label is None else str(label)


def number_labels(
    labels: Sequence[str], class_names: Sequence[str] | None = None
) -> tuple[Labels, tuple[str, ...]]:
    """(labels as int64, class names): numbers stay, names are numbered in their order.

    Raises:
        UserError: a class that ``class_names`` lacks.
    """
    if class_names is None:
        if all(label.isdecimal() and len(label) < 7 for label in labels):
            numbers = np.array([int(label) for label in labels], dtype=np.int64)
            return numbers, numbered(numbers)
        class_names = sorted(set(labels))
    position = {name: number for number, name in enumerate(class_names)}
    unknown = sorted(set(labels) - set(position))
    if unknown:
        raise UserError(
            f"classes {', '.join(unknown[:3])} are in one split only; name them in both"
        )
    return np.array([position[label] for label in labels], dtype=np.int64), tuple(class_names)


class MapDataset(Protocol):
    """What ``torch.utils.data.Dataset`` is when it has a length."""

    def __len__(self) -> int: ...

    def __getitem__(self, index: int, /) -> Any: ...


class DatasetSource:
    """An `ImageSource` of the items of a Python data set.

    An item is an image, a tuple or list that starts with one, as (image, label), or a mapping with
    the key ``image``. An image is

    - of Pillow, read as a file of the same kind would be (see `decode`);
    - a tensor, (height, width) or (channels, height, width);
    - a NumPy array, (height, width), (height, width, channels) or (channels, height, width): see
      `channels_last` for how these are told apart;

    with values as in files: uint8, uint16 (65535 is 1), or floats and other integers, kept as they
    are. Random transforms make a run differ from its continuation: let them be done here, after
    reading. An item that raises is broken.

    Args:
        dataset: has ``len`` and items by number; pickled for worker processes that are not forked.
        labels: integers from 0, one an item; ``dataset.targets`` by default, where it has them.
        class_names: of the labels; ``dataset.classes`` by default, where it has them.
        name: for logs and messages.
        max_pixels: larger images are broken.

    Raises:
        UserError: an empty or unsized data set, or labels that don't fit it.
    """

    def __init__(
        self,
        dataset: MapDataset,
        labels: Sequence[int] | Labels | None = None,
        class_names: Sequence[str] = (),
        name: str | None = None,
        max_pixels: int = MAX_PIXELS,
    ) -> None:
        self._dataset, self._max_pixels = dataset, max_pixels
        self.name = name or type(dataset).__name__
        if not hasattr(dataset, "__len__") or not hasattr(dataset, "__getitem__"):
            raise UserError(f"{self.name} has no length or no items; give a map-style Dataset")
        if not len(dataset):
            raise UserError(f"{self.name} is empty; give at least one image")
        self.labels: Labels | None = None
        self.class_names: tuple[str, ...] = ()
        given = getattr(dataset, "targets", None) if labels is None else labels
        if given is not None:
            self.labels = self._check_labels(given)
            names = tuple(class_names) or tuple(getattr(dataset, "classes", ()))
            self.class_names = names or numbered(self.labels)
            if len(self.class_names) <= self.labels.max():
                raise UserError(
                    f"{self.name} has {len(self.class_names)} class names and labels to "
                    f"{self.labels.max()}; name every class"
                )

    def _check_labels(self, given: Any) -> Labels:
        labels = np.asarray(given)
        if labels.shape != (len(self),) or labels.dtype.kind not in "iu" or labels.min() < 0:
            raise UserError(
                f"{self.name}: labels are {labels.dtype} of shape {labels.shape}; give "
                f"{len(self)} integers from 0 or none"
            )
        return labels.astype(np.int64)

    def __len__(self) -> int:
        return len(self._dataset)

    def read(self, index: int, min_side: int | None = None) -> Tensor:  # noqa: ARG002
        """See `ImageSource.read`."""
        try:
            return image_tensor(_image_of(self._dataset[index]), self._max_pixels)
        except BrokenImage:
            raise
        except Exception as error:  # the data set is the user's own: it may raise anything
            raise BrokenImage(" ".join(f"{type(error).__name__}: {error}".split())) from error

    def describe(self, index: int) -> str:
        """The data set's name and the item's number, from 0."""
        return f"{self.name} item {index}"


def _image_of(item: Any) -> Any:
    if isinstance(item, Mapping):
        return next((item[key] for key in IMAGE_KEYS if key in item), item)
    return item[0] if isinstance(item, (tuple, list)) and item else item


def image_tensor(image: Any, max_pixels: int = MAX_PIXELS) -> Tensor:
    """(channels, height, width) of uint8 or float32 from an image of Pillow, a tensor or an array.

    Raises:
        BrokenImage: anything else, too large, or numbers that are not finite.
    """
    if isinstance(image, Image.Image):
        check_size(image.height, image.width, 1, max_pixels)
        return decode_pillow(image).image
    if isinstance(image, Tensor):
        image = image.detach().cpu()
        image = (image.float() if image.dtype == torch.bfloat16 else image).numpy()
        array = np.moveaxis(image, 0, -1) if image.ndim == 3 else image
        if array.ndim == 2:
            array = array[..., None]
        if array.ndim != 3 or array.shape[2] > MAX_CHANNELS:
            raise BrokenImage(f"a tensor of {tuple(image.shape)}; give (channels, height, width)")
    elif isinstance(image, np.ndarray):
        array = channels_last(image)
    else:
        raise BrokenImage(f"a {type(image).__name__}; give an image of Pillow, a tensor or array")
    height, width, channels = array.shape
    check_size(height, width, channels, max_pixels)
    return to_tensor(in_range(array))
