"""Images in WebDataset tar shards."""

import json
import tarfile
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray
from webdataset.tariterators import group_by_keys

from backfold.data.arrays import MAX_PIXELS
from backfold.data.encoded import EncodedSource
from backfold.data.files import IMAGE_SUFFIXES
from backfold.errors import BrokenImage, UserError

IMAGE_KINDS = tuple(suffix[1:] for suffix in IMAGE_SUFFIXES)
LABEL_KINDS = ("cls", "json")
LARGEST_LABEL = 2**20  # bytes


class TarSource(EncodedSource):
    """Images in uncompressed tar shards, in any order.

    WebDataset's convention: neighbouring members that share their name up to its first dot are one
    sample, as ``0001.jpg``, ``0001.cls`` (a class's number or name) and ``0001.json`` (read for
    ``"label"`` where there is no ``.cls``).

    Opening reads every member's header, a few microseconds each, and remembers where each image
    lies. That makes shards as good as a folder: the whole set is shuffled rather than a buffer of
    it, ranks and workers share it without overlap, and a run resumes exactly in mid-epoch, all by
    `StepSampler` alone. Shards that can't be indexed, because they are compressed or elsewhere, are
    read as a `StreamSource`.

    Nothing is ever extracted, and links in a tar are not followed.

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
        more = f" and {len(self._files) - 1} more" if len(self._files) > 1 else ""
        self.name = f"{self._files[0]}{more}"
        index = _Index()
        for number, file in enumerate(self._files):
            _index_shard(index, number, file, labelled)
        if not index.names:
            raise UserError(
                f"{self.name}: no images; give shards with members named *.jpg, *.png and so on"
            )
        self._shards = np.array(index.shards, dtype=np.int32)
        self._places = np.array(index.places, dtype=np.int64)
        self._names = np.array([name.encode(errors="surrogateescape") for name in index.names])
        if labelled and None not in index.labels:
            given = [label for label in index.labels if label is not None]
            self.labels, self.class_names = number_labels(given, class_names)

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


@dataclass
class _Index:
    shards: list[int] = field(default_factory=list)
    places: list[tuple[int, int]] = field(default_factory=list)  # offset and size
    names: list[str] = field(default_factory=list)
    labels: list[str | None] = field(default_factory=list)


def _index_shard(index: _Index, number: int, file: Path, labelled: bool) -> None:
    try:
        with tarfile.open(file, "r:") as tar:  # "r:" takes no compression
            for sample in group_by_keys(_members(tar, file)):
                kind = image_kind(sample, str(file))
                if kind is None:
                    continue
                index.shards.append(number)
                index.places.append(sample[kind])
                index.names.append(f"{sample['__key__']}.{kind}")
                index.labels.append(_read_label(tar, sample) if labelled else None)
            _check_end(tar, file)
    except UserError:
        raise
    except (tarfile.TarError, ValueError, OSError, EOFError) as error:
        raise UserError(
            f"{file} is no whole, uncompressed tar ({_first_line(error)}); replace or unpack it"
        ) from error


def _first_line(error: Exception) -> str:
    text = str(error.args[0]) if error.args else type(error).__name__
    return text.strip().splitlines()[0] if text.strip() else type(error).__name__


def _members(tar: tarfile.TarFile, file: Path) -> Iterator[dict[str, Any]]:
    """Regular members in the form that webdataset groups, with places instead of contents."""
    size = file.stat().st_size
    for member in tar:
        tar.members = []  # type: ignore[attr-defined]
        if member.offset_data + member.size > size:
            raise tarfile.ReadError("truncated")
        if member.isreg() and not member.issparse():
            place = (member.offset_data, member.size)
            yield {"fname": member.name, "data": place, "__url__": str(file)}


def _check_end(tar: tarfile.TarFile, file: Path) -> None:
    # tarfile takes a damaged header for the end, and would leave out all that follows.
    with file.open("rb") as raw:
        raw.seek(tar.offset)
        rest = raw.read(tarfile.BLOCKSIZE)
    if rest.strip(b"\0"):
        raise UserError(f"{file} is damaged at byte {tar.offset}; replace it")


def image_kind(sample: dict[str, Any], shard: str) -> str | None:
    """The suffix of a sample's image; None where it has none.

    Raises:
        UserError: it has two.
    """
    kinds = [kind for kind in sample if kind in IMAGE_KINDS]
    if len(kinds) > 1:
        raise UserError(
            f"{shard}: sample {sample['__key__']} has images {' and '.join(kinds)}; "
            "give one image a sample"
        )
    return kinds[0] if kinds else None


def _read_label(tar: tarfile.TarFile, sample: dict[str, Any]) -> str | None:
    kind = next((kind for kind in LABEL_KINDS if kind in sample), None)
    if kind is None or sample[kind][1] > LARGEST_LABEL:
        return None
    assert tar.fileobj is not None
    before = tar.fileobj.tell()
    tar.fileobj.seek(sample[kind][0])
    content = tar.fileobj.read(sample[kind][1])
    tar.fileobj.seek(before)
    return parse_label({kind: content})


def parse_label(sample: dict[str, Any]) -> str | None:
    """The class that a sample's ``cls`` or else ``json`` bytes name; None where there is none."""
    try:
        if "cls" in sample:
            return str(sample["cls"].decode().strip()) or None
        values = json.loads(sample["json"]) if "json" in sample else {}
        label = values.get("label") if isinstance(values, dict) else None
        return None if label is None else str(label)
    except (UnicodeDecodeError, ValueError, RecursionError):
        return None


def number_labels(
    labels: Sequence[str], class_names: Sequence[str] | None = None
) -> tuple[NDArray[np.int64], tuple[str, ...]]:
    """(labels as int64, class names): numbers stay, names are numbered in their order.

    Raises:
        UserError: a class that ``class_names`` lacks.
    """
    if class_names is None:
        if all(label.isdecimal() and len(label) < 7 for label in labels):
            numbers = np.array([int(label) for label in labels], dtype=np.int64)
            return numbers, tuple(str(number) for number in range(int(numbers.max()) + 1))
        class_names = sorted(set(labels))
    position = {name: number for number, name in enumerate(class_names)}
    unknown = sorted(set(labels) - set(position))
    if unknown:
        raise UserError(
            f"classes {', '.join(unknown[:3])} are in one split only; name them in both"
        )
    return np.array([position[label] for label in labels], dtype=np.int64), tuple(class_names)
