"""Images with a class for every pixel, in parquet files."""

import io
from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import torch
from numpy.typing import NDArray
from PIL import Image, UnidentifiedImageError
from torch import Tensor
from torch.nn import functional as F
from torch.utils.data import DataLoader, Dataset
from torchvision.transforms.v2 import functional as TF

from backfold.data.arrays import BrokenImage
from backfold.data.augmentation import ImageSize
from backfold.data.decode import to_channels
from backfold.data.files import PATTERN_SIGNS, expand_pattern, find_files
from backfold.data.loading import LoadingError, stack_images
from backfold.data.parquet import ParquetSource
from backfold.data.split import stratified_split
from backfold.errors import UserError

VOID = 255  # in masks: a pixel of no class
KEPT_BYTES = 2**29  # decoded images and masks of less stay in memory
BATCH_SIZE = 32
TEST_NAMES = ("test", "val")
TEST_SHARE = 0.2
REMEDY = (
    "segmentation takes parquet files with columns `image` and `mask`, a PNG of class ids, given "
    "by --segmentation.data"
)


@dataclass(frozen=True)
class MaskedSource:
    """Images and masks, decoded one at a time.

    Attributes:
        images: of all rows.
        masks: encoded, of all rows.
        indices: the rows of this part.
    """

    images: ParquetSource
    masks: pa.ChunkedArray
    indices: NDArray[np.int64]

    def __len__(self) -> int:
        return len(self.indices)

    def read(self, row: int) -> tuple[Tensor, Tensor]:
        """An image (channels, height, width) and its class ids (height, width), int64.

        Raises:
            UserError: a broken image or mask, or one larger than the other.
        """
        index = int(self.indices[row])
        where = self.images.describe(index)
        try:
            image = self.images.read(index)
        except BrokenImage as error:
            raise UserError(f"{where}: {error}; mend or remove this row") from error
        mask = _decode_mask(self.masks[index].as_py(), where)
        if mask.shape != image.shape[1:]:
            raise UserError(
                f"{where}: the image has {_sides(image)} pixels and its mask {_sides(mask)}; "
                "give masks of the images' size"
            )
        return image, mask


class MaskedRows(Dataset[tuple[Tensor, Tensor]]):
    """Rows of a source at one size: images stretched (bilinear), masks by their nearest pixel.

    Args:
        source: where they are.
        image_size: (height, width) in pixels.
        channels: see `to_channels`.
        limit: rows, spread over the source; None takes all.
    """

    def __init__(
        self, source: MaskedSource, image_size: ImageSize, channels: int, limit: int | None = None
    ) -> None:
        self._source, self._image_size, self._channels = source, image_size, channels
        count = len(source) if limit is None else min(limit, len(source))
        self._rows = np.linspace(0, len(source) - 1, count).round().astype(int).tolist()

    def __len__(self) -> int:
        return len(self._rows)

    def __getitem__(self, row: int) -> tuple[Tensor, Tensor]:
        """An image (channels, height, width) and its class ids (height, width), int32.

        Raises:
            LoadingError: what `MaskedSource.read` raises.
        """
        try:
            image, mask = self._source.read(self._rows[row])
            image = to_channels(image, self._channels)
        except UserError as error:
            raise LoadingError(str(error)) from None
        ids = F.interpolate(mask[None, None].float(), self._image_size, mode="nearest-exact")[0, 0]
        return TF.resize(image, list(self._image_size), antialias=True), ids.int()


class MaskedImages:
    """Images with a class for every pixel; few stay in memory, others are decoded when asked for.

    Args:
        rows: how they are decoded.
        num_workers: processes that decode.

    Attributes:
        class_ids: the ids of the classes, rising; those of this part alone, or as `load_masked`
            sets them.
        pixels: of each id that occurs, how many pixels it has.
    """

    def __init__(self, rows: MaskedRows, num_workers: int = 0) -> None:
        self._rows, self._num_workers = rows, num_workers
        self._kept: tuple[Tensor, Tensor] | None = None
        self.pixels: Counter[int] = Counter()
        loaded = []
        for images, ids in self._decoded(torch.arange(len(rows)).split(BATCH_SIZE)):
            values, counts = ids.unique(return_counts=True)
            self.pixels.update(dict(zip(values.tolist(), counts.tolist(), strict=True)))
            if len(rows) * (images[0].nbytes + ids[0].nbytes) <= KEPT_BYTES:
                loaded.append((images, ids))
        if sum(len(ids) for _, ids in loaded) == len(rows):
            images = stack_images([image for part, _ in loaded for image in part])
            self._kept = images, torch.cat([ids for _, ids in loaded])
        self.class_ids = tuple(sorted(self.pixels))

    def __len__(self) -> int:
        return len(self._rows)

    def batches(self, indices: Sequence[Tensor]) -> Iterator[tuple[Tensor, Tensor]]:
        """Images and masks of each batch of places.

        Images are (batch, channels, height, width), uint8, or float32 (see `Batch.images`); masks
        (batch, height, width), uint8: positions in ``class_ids``, or `VOID` for any other id.

        Raises:
            UserError: a row that can't be read.
        """
        classes = torch.tensor(self.class_ids, dtype=torch.int32)
        for images, ids in self._decoded(indices):
            places = torch.searchsorted(classes, ids).clamp(max=len(classes) - 1)
            yield images, torch.where(classes[places] == ids, places, VOID).to(torch.uint8)

    def _decoded(self, indices: Sequence[Tensor]) -> Iterator[tuple[Tensor, Tensor]]:
        if self._kept is not None:
            yield from ((self._kept[0][part], self._kept[1][part]) for part in indices)
            return
        yield from DataLoader(
            self._rows,
            batch_sampler=[part.tolist() for part in indices],
            num_workers=self._num_workers,
            collate_fn=_collated,
            pin_memory=torch.cuda.is_available(),
            # The loader's own draw (its workers' seeds, unused here) leaves the global one alone.
            generator=torch.Generator(),
        )


def _collated(rows: Sequence[tuple[Tensor, Tensor]]) -> tuple[Tensor, Tensor]:
    return stack_images([image for image, _ in rows]), torch.stack([ids for _, ids in rows])


def open_masked(data: Path | str | None, seed: int = 0) -> tuple[MaskedSource, MaskedSource]:
    """The training and the test part; without a test split, a fifth of the rows is set apart.

    Parts are told by the files' names, or their folders', that start with ``train`` and ``test``;
    ``val`` is taken where there is no ``test``.

    Args:
        data: a folder, a file or a pattern.
        seed: of what is set apart.

    Raises:
        UserError: no such files, or files without images or masks.
    """
    files = _parquet_files(data)
    root = Path(data) if data is not None and Path(data).is_dir() else None
    train, test = _named(files, root, ("train",)), _named(files, root, TEST_NAMES)
    if train and test:
        return _open(train), _open(test)
    whole = _open(files)
    training, kept = stratified_split(len(whole), TEST_SHARE, seed)
    return (
        MaskedSource(whole.images, whole.masks, training),
        MaskedSource(whole.images, whole.masks, kept),
    )


def load_masked(
    parts: Sequence[MaskedSource],
    image_size: ImageSize,
    channels: int,
    void: int = VOID,
    limit: int | None = None,
    num_workers: int = 0,
) -> list[MaskedImages]:
    """Parts at one size, all with the same classes: those that occur in any of them.

    Args:
        parts: as `open_masked` gives them.
        image_size: (height, width) in pixels.
        channels: see `to_channels`.
        void: the id that is no class.
        limit: images a part, spread over it; None takes all.
        num_workers: processes that decode.

    Raises:
        UserError: fewer than 2 or more than 255 classes, a part of nothing but void, or what
            reading raises.
    """
    loaded = [
        MaskedImages(MaskedRows(part, image_size, channels, limit), num_workers) for part in parts
    ]
    classes = sorted({value for part in loaded for value in part.class_ids} - {void})
    if not 2 <= len(classes) <= VOID:
        raise UserError(
            f"{parts[0].images.name}: the masks hold {len(classes)} classes beside void, {void}; "
            f"give 2 to {VOID}, and the id that is no class by --segmentation.void"
        )
    for part, source in zip(loaded, parts, strict=True):
        if set(part.class_ids) <= {void}:
            raise UserError(
                f"{source.images.name}: every pixel of the masks is void, {void}; give masks with "
                "classes"
            )
        part.class_ids = tuple(classes)
    return loaded


def _parquet_files(data: Path | str | None) -> list[Path]:
    if data is None:
        raise UserError(f"the embedded images have no masks; {REMEDY}")
    path = Path(data)
    if path.is_dir():
        files = [path / name for name in find_files(path, (".parquet",))]
    elif not path.exists() and any(sign in str(data) for sign in PATTERN_SIGNS):
        files = expand_pattern(str(data))
    else:
        files = [path] if path.suffix.lower() == ".parquet" and path.is_file() else []
    if not files:
        raise UserError(f"{data} holds no parquet files with masks; {REMEDY}")
    return files


def _named(files: list[Path], root: Path | None, starts: Sequence[str]) -> list[Path]:
    """The files of the first of these names that any of them, or its folder, starts with."""
    for start in starts:
        found = [file for file in files if _is_named(file, root, start)]
        if found:
            return found
    return []


def _is_named(file: Path, root: Path | None, start: str) -> bool:
    names = (file.name,) if root is None else file.relative_to(root).parts
    return any(name.lower().startswith(start) for name in names)


def _open(files: list[Path]) -> MaskedSource:
    tables = [_read_masks(file) for file in files]
    images = ParquetSource(files, labelled=False)
    masks = pa.chunked_array([chunk for table in tables for chunk in table.chunks])
    return MaskedSource(images, masks, np.arange(len(images)))


def _read_masks(file: Path) -> pa.ChunkedArray:
    try:
        schema = pq.read_schema(file)
        if "mask" not in schema.names:
            raise UserError(f"{file} has columns {', '.join(schema.names)} but no `mask`; {REMEDY}")
        column = pq.read_table(file, columns=["mask"])["mask"].combine_chunks()
    except (pa.ArrowException, OSError) as error:
        reason = " ".join(str(error).split())
        raise UserError(f"{file} is no readable parquet file ({reason}); replace it") from error
    if pa.types.is_struct(column.type) and column.type.get_field_index("bytes") >= 0:
        column = column.field("bytes")
    if not (pa.types.is_binary(column.type) or pa.types.is_large_binary(column.type)):
        raise UserError(
            f"{file}: column `mask` holds {column.type}, not bytes; store encoded PNG files there"
        )
    return pa.chunked_array([column.cast(pa.large_binary())])


def _decode_mask(content: bytes | None, where: str) -> Tensor:
    try:
        with Image.open(io.BytesIO(content or b""), formats=["PNG"]) as picture:
            # A palette's colours are for the eye: its indices are the ids.
            array = np.array(picture)
    except (OSError, SyntaxError, ValueError, UnidentifiedImageError) as error:
        raise UserError(f"{where}: its mask is no PNG; mend or remove this row") from error
    if array.ndim != 2:
        raise UserError(
            f"{where}: its mask has {array.shape[2]} channels; give a PNG of one, of class ids"
        )
    return torch.from_numpy(array.astype(np.int64))


def _sides(image: Tensor) -> str:
    return f"{image.shape[-2]} x {image.shape[-1]}"
