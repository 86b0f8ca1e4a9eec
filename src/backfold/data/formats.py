"""Images of a folder, of parquet files, of WebDataset tar shards, of a Python ``Dataset``."""

import itertools
import json
import re
import tarfile
from collections.abc import Iterable, Iterator, Mapping, Sequence
from operator import itemgetter
from pathlib import Path
from typing import Any, BinaryIO, Protocol, TypeVar

import numpy as np
import pyarrow as pa
import pyarrow.dataset as ds
import torch
from PIL import Image
from torch import Tensor

from backfold.data.decode import (
    MAX_PIXELS,
    channels_last,
    check_size,
    decode_array,
    decode_pillow,
)
from backfold.data.files import IMAGE_SUFFIXES, find_files, read_file
from backfold.data.source import EncodedSource, ImageSource, Labels
from backfold.errors import BrokenImage, UserError

IMAGE_KINDS = tuple(suffix[1:] for suffix in IMAGE_SUFFIXES)
LARGEST_LABEL = 2**20  # bytes
IMAGE_KEYS = ("image", "img", "pixel_values")  # of an item that is a mapping
LABEL_COLUMNS = ("label", "labels", "fine_label")
MEMBER = re.compile(r"((?:.*/)?[^./]+)\.([^/]*)")  # a sample's key, and what the member is of it
Data = TypeVar("Data")
Place = tuple[int, int, int]  # number of a shard, offset and size


class FolderSource(EncodedSource):
    """The images at any depth below a folder, in the order of their paths.

    Hidden files and folders are left out. Labels are those of `folder_labels`.

    Raises:
        UserError: there is no image.
    """

    def __init__(
        self,
        folder: Path,
        labelled: bool = False,
        max_pixels: int = MAX_PIXELS,
        class_names: Sequence[str] = (),
    ) -> None:
        self.name, self.max_pixels, self._folder = str(folder), max_pixels, folder
        self._paths = find_files(folder, IMAGE_SUFFIXES)
        if not self._paths:
            raise UserError(
                f"{folder} holds no images; give a folder with files named "
                f"{' '.join('*' + suffix for suffix in IMAGE_SUFFIXES)} *.parquet or *.tar"
            )
        if labelled:
            self.labels, self.class_names = folder_labels(self._paths, class_names)

    def __len__(self) -> int:
        return len(self._paths)

    def content(self, index: int) -> bytes:
        """See `EncodedSource.content`."""
        return read_file(self._folder / self._paths[index])

    def describe(self, index: int) -> str:
        """The file's path."""
        return str(self._folder / self._paths[index])


def folder_labels(
    paths: Sequence[str], class_names: Sequence[str] = ()
) -> tuple[Labels | None, tuple[str, ...]]:
    """Labels and their names: the first folder of each path, if all have one and two differ.

    The names are given where other paths have labels too.
    """
    folders = [path.partition("/")[0] if "/" in path else "" for path in paths]
    names = sorted(class_names or set(folders))
    if "" in folders or len(names) < 2:
        return None, ()
    return np.searchsorted(names, folders), tuple(names)


class TableSource(EncodedSource):
    """Images in an Arrow table, encoded, in memory or mapped from a disk.

    Their column holds bytes of an image file, or a struct with such ``bytes``; a ``path`` in the
    place of bytes is followed into the ``folders`` only, whoever wrote it. Labels are read where
    their column (see `find_column`) has integers from 0. Class names are Hugging Face's, in the
    schema's metadata, or else the numbers.

    Raises:
        UserError: no rows, or a column of something else.
    """

    def __init__(
        self,
        table: Any,  # of pyarrow, or of ``datasets``, which is pickled without what it maps
        rows: Sequence[tuple[object, int]],  # of each part of the table: where from, and how many
        labelled: bool = False,
        max_pixels: int = MAX_PIXELS,
        folders: Iterable[Path] = (),
        column: str | None = None,  # see `image_column`
    ) -> None:
        self._places, self._ends = [place for place, _ in rows], np.cumsum([n for _, n in rows])
        self.name, self.max_pixels = first_and_more(self._places), max_pixels
        self._table, self._column = table, image_column(table.schema, self.name, column)
        self._folders = [folder.resolve() for folder in folders]
        if not table.num_rows:
            raise UserError(f"{self.name}: no rows; give data that hold images")
        kind = given = table.schema.field(self._column).type
        if pa.types.is_struct(kind) and kind.get_field_index("bytes") >= 0:
            kind = kind.field("bytes").type
        if not (pa.types.is_binary(kind) or pa.types.is_large_binary(kind)):
            raise UserError(
                f"{self.name}: column `{self._column}` holds {given}, not bytes; store each "
                "image's encoded file there"
            )
        label = find_column(table.schema, "ClassLabel", LABEL_COLUMNS)
        labels = table.column(label).to_numpy() if labelled and label else np.empty(0)
        if label and labels.dtype.kind in "iu" and labels.min() >= 0:
            self.labels = labels.astype(np.int64)
            names = _features(table.schema).get(label, {}).get("names")
            self.class_names = tuple(names or numbered(self.labels))

    def __len__(self) -> int:
        return int(self._table.num_rows)

    def content(self, index: int) -> bytes:
        """See `EncodedSource.content`."""
        value = self._table.column(self._column)[index].as_py()
        found = value if isinstance(value, dict) else {"bytes": value}
        if found["bytes"] is not None:
            return bytes(found["bytes"])
        if not isinstance(found.get("path"), str):
            raise BrokenImage("no image in this row")
        path = Path(found["path"]).resolve()
        if not any(path.is_relative_to(folder) for folder in self._folders):
            raise BrokenImage("a path outside of the data set's folder")
        return read_file(path)

    def describe(self, index: int) -> str:
        """Where the row is from, and its number there, counted from 0."""
        part = int(np.searchsorted(self._ends, index, side="right"))
        start = int(self._ends[part - 1]) if part else 0
        return f"{self._places[part]} row {index - start}"


def open_parquet(
    files: Sequence[Path],
    labelled: bool = True,
    max_pixels: int = MAX_PIXELS,
    column: str | None = None,
) -> TableSource:
    """Parquet files of the same columns, read into memory; see `image_column`.

    Files that are none, and labels that are no integers from 0, are a `UserError` too.
    """
    name = first_and_more(files)
    try:
        found = ds.dataset([str(file) for file in files], format="parquet")
        image = image_column(found.schema, name, column)
        label = find_column(found.schema, "ClassLabel", LABEL_COLUMNS)
        for fragment in found.get_fragments():  # the data set's schema is that of the first
            image_column(fragment.physical_schema, fragment.path, image)
        table = found.to_table([each for each in (image, label) if each])
        rows = [fragment.count_rows() for fragment in found.get_fragments()]
    except (pa.ArrowException, OSError) as error:
        reason = " ".join(str(error).split())
        raise UserError(f"{name}: no readable parquet file ({reason}); replace it") from error
    parts = list(zip(files, rows, strict=True))
    source = TableSource(table, parts, labelled, max_pixels, column=image)
    if labelled and label and source.labels is None:
        raise UserError(
            f"{name}: column `{label}` is {table[label].type} or has nulls or negative numbers; "
            "give integers from 0, or drop the column"
        )
    return source


def image_column(schema: pa.Schema, name: str, column: str | None) -> str:
    """The column given, or else that of images (see `find_column`); none is a `UserError`."""
    found = column or find_column(schema, "Image", IMAGE_KEYS[:2])
    if found not in schema.names:
        raise UserError(
            f"{name} has columns {', '.join(schema.names)} but no `{column or 'image'}`; rename "
            "the column of encoded images so"
        )
    return str(found)


def find_column(schema: pa.Schema, kind: str, names: Sequence[str]) -> str | None:
    """The only column of a kind in Hugging Face's schema metadata, or else one with such a name."""
    features = _features(schema)
    found = [name for name in schema.names if features.get(name, {}).get("_type") == kind]
    usual = [name for name in names if name in (found or schema.names)]
    return next(iter(found if len(found) == 1 else usual), None)


def _features(schema: pa.Schema) -> dict[str, Any]:
    """Hugging Face's own description of each column that is no list."""
    metadata = json.loads((schema.metadata or {}).get(b"huggingface", b"{}"))
    features = metadata.get("info", {}).get("features", {})
    return {name: each for name, each in features.items() if isinstance(each, dict)}


def first_and_more(names: Sequence[object]) -> str:
    """The first name, and how many follow."""
    return f"{names[0]} and {len(names) - 1} more" if len(names) > 1 else str(names[0])


def numbered(labels: Labels) -> tuple[str, ...]:
    """Names for classes without any: the numbers up to the largest label."""
    return tuple(map(str, range(int(labels.max()) + 1)))


class TarSource(EncodedSource):
    """Images in uncompressed tar shards, in any order.

    WebDataset's convention: neighbouring members that share their name up to its first dot are one
    sample, as ``0001.jpg``, ``0001.cls`` (a class's number or name) and ``0001.json`` (read for
    ``"label"`` where there is no ``.cls``).

    Opening reads every member's header, and remembers where each image lies: shards are then as
    good as a folder. Nothing is ever extracted, links are not followed, and labels are read if
    every sample has one.

    Raises:
        UserError: a compressed, damaged or truncated shard; no images; two images in one sample.
    """

    def __init__(
        self, files: Sequence[Path], labelled: bool = False, max_pixels: int = MAX_PIXELS
    ) -> None:
        self._files, self.max_pixels = list(files), max_pixels
        self.name = first_and_more(self._files)
        places: list[Place] = []
        names: list[bytes] = []
        labels: list[str] = []  # "" where there is none
        for number, file in enumerate(self._files):
            try:
                # "r:" takes no compression.
                with tarfile.open(file, "r:") as tar, file.open("rb") as raw:
                    members = (
                        (member.name, (number, member.offset_data, member.size))
                        for member in regular_members(tar)
                    )
                    for name, place, sample in image_samples(members, str(file)):
                        places.append(place)
                        names.append(name.encode(errors="surrogateescape"))
                        labels.append(_read_label(raw, sample) if labelled else "")
                    raw.seek(tar.offset)
                    # tarfile takes a damaged header for the end, and would leave out what follows.
                    if raw.read(tarfile.BLOCKSIZE).strip(b"\0"):
                        raise UserError(f"{file} is damaged at byte {tar.offset}; replace it")
            except UserError:
                raise
            except (tarfile.TarError, ValueError, OSError, EOFError) as error:
                reason = " ".join(str(error).split()) or type(error).__name__
                raise UserError(
                    f"{file} is no whole, uncompressed tar ({reason}); replace or unpack it"
                ) from error
        if not places:
            raise UserError(
                f"{self.name}: no images; give shards with members named *.jpg, *.png and so on"
            )
        self._places, self._names = np.array(places, dtype=np.int64), np.array(names)
        if labelled and "" not in labels:
            classes = sorted(set(labels))
            counting = all(name.isdecimal() and len(name) < 7 for name in classes)
            numbers = {name: int(name) if counting else at for at, name in enumerate(classes)}
            self.labels = np.array([numbers[name] for name in labels], dtype=np.int64)
            self.class_names = numbered(self.labels) if counting else tuple(classes)

    def __len__(self) -> int:
        return len(self._places)

    def content(self, index: int) -> bytes:
        """See `EncodedSource.content`."""
        number, offset, size = self._places[index].tolist()
        content = read_file(self._files[number], offset, size)
        if len(content) < size:
            raise BrokenImage("the shard has become shorter")
        return content

    def describe(self, index: int) -> str:
        """The shard's path and the member's name."""
        name = bytes(self._names[index]).decode(errors="replace")
        return f"{self._files[self._places[index, 0]]} member {name}"


def regular_members(tar: tarfile.TarFile) -> Iterator[tarfile.TarInfo]:
    """Its files, none of which it remembers; links are left out."""
    for member in tar:
        tar.members = []  # type: ignore[attr-defined]
        if member.isreg() and not member.issparse():
            yield member


def image_samples(
    members: Iterable[tuple[str, Data]], shard: str
) -> Iterator[tuple[str, Data, dict[str, Data]]]:
    """The name and the data of each sample's image, and all data of the sample by suffix.

    A sample with two images is a `UserError`.
    """
    named = (
        (match[1], match[2].lower(), data)
        for name, data in members
        if (match := MEMBER.fullmatch(name))
    )
    for key, neighbours in itertools.groupby(named, itemgetter(0)):
        parts = [(kind, data) for _, kind, data in neighbours]
        images = [kind for kind, _ in parts if kind in IMAGE_KINDS]
        if len(images) > 1:
            raise UserError(
                f"{shard}: sample {key} has images {' and '.join(images)}; give one image a sample"
            )
        if images:
            sample = dict(parts)
            yield f"{key}.{images[0]}", sample[images[0]], sample


def _read_label(shard: BinaryIO, sample: dict[str, Place]) -> str:
    """The class that a sample's ``cls`` or else ``json`` names; empty where there is none."""
    _, offset, size = sample.get("cls") or sample.get("json") or (0, 0, 0)
    if size > LARGEST_LABEL:
        return ""
    shard.seek(offset)
    content = shard.read(size)
    try:
        if "cls" in sample:
            return str(content.decode().strip())
        label = json.loads(content)["label"]
    except (ValueError, RecursionError, TypeError, LookupError):
        return ""
    return "" if label is None else str(label)


class MapDataset(Protocol):
    """What ``torch.utils.data.Dataset`` is when it has a length."""

    def __len__(self) -> int: ...

    def __getitem__(self, index: int, /) -> Any: ...


class DatasetSource(ImageSource):
    """The items of a Python data set.

    An item is an image, a tuple or list that starts with one, as (image, label), or a mapping with
    the key ``image``. An image is of Pillow; a tensor, (height, width) or (channels, height,
    width); or a NumPy array, which may have its channels last too (see `channels_last`). Values are
    as in files (see `decode`). Random transforms make a run differ from its continuation: let them
    be done here, after reading. An item that raises is broken. Labels, if ``labelled``, are
    ``dataset.targets``, integers from 0, and their names ``dataset.classes``, where it has them.

    Raises:
        UserError: an empty or unsized data set, or labels that don't fit it.
    """

    def __init__(
        self, dataset: MapDataset, max_pixels: int = MAX_PIXELS, labelled: bool = True
    ) -> None:
        self._dataset, self._max_pixels, self.name = dataset, max_pixels, type(dataset).__name__
        if not (hasattr(dataset, "__len__") and hasattr(dataset, "__getitem__") and len(dataset)):
            raise UserError(f"{self.name} is empty, or has no length; give a map-style Dataset")
        given = getattr(dataset, "targets", None) if labelled else None
        if given is None:
            return
        values = np.asarray(given)
        if values.shape != (len(dataset),) or values.dtype.kind not in "iu" or values.min() < 0:
            raise UserError(
                f"{self.name}: labels are {values.dtype} of shape {values.shape}; give "
                f"{len(dataset)} integers from 0 or none"
            )
        self.labels = values.astype(np.int64)
        self.class_names = tuple(getattr(dataset, "classes", ())) or numbered(self.labels)
        if len(self.class_names) <= self.labels.max():
            raise UserError(
                f"{self.name} has {len(self.class_names)} class names and labels to "
                f"{self.labels.max()}; name every class"
            )

    def __len__(self) -> int:
        return len(self._dataset)

    def read(self, index: int, min_side: int | None = None) -> Tensor:  # noqa: ARG002
        """See `ImageSource.read`."""
        try:
            image = self._dataset[index]
            if isinstance(image, Mapping):
                image = next((image[key] for key in IMAGE_KEYS if key in image), image)
            elif isinstance(image, (tuple, list)) and image:
                image = image[0]
            if isinstance(image, Image.Image):
                check_size((image.height, image.width, 1), self._max_pixels)
                return decode_pillow(image).image
            if isinstance(image, Tensor):
                image = image.detach().cpu()
                array = (image.float() if image.dtype == torch.bfloat16 else image).numpy()
                array = np.moveaxis(array, 0, -1) if array.ndim == 3 else channels_last(array)
            elif isinstance(image, np.ndarray):
                array = channels_last(image)
            else:
                kind = type(image).__name__
                raise BrokenImage(f"a {kind}; give an image of Pillow, a tensor or array")
            return decode_array(array, self._max_pixels)
        except BrokenImage:
            raise
        except Exception as error:  # the data set is the user's own: it may raise anything
            raise BrokenImage(" ".join(f"{type(error).__name__}: {error}".split())) from error

    def describe(self, index: int) -> str:
        """The data set's name and the item's number, from 0."""
        return f"{self.name} item {index}"
