"""Images with a class for every pixel, in parquet files."""

import io
from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, cast

import numpy as np
import torch
from numpy.typing import NDArray
from PIL import Image
from torch import Tensor
from torchvision.transforms import InterpolationMode
from torchvision.transforms.v2 import functional as TF

from backfold.data.augmentation import ImageSize
from backfold.data.decode import to_channels
from backfold.data.files import expand_pattern, find_files, is_pattern
from backfold.data.formats import TableSource, open_parquet
from backfold.data.loading import batch_loader, stack_images, watched
from backfold.data.source import split_source
from backfold.errors import BrokenImage, UserError

VOID = 255  # in masks: a pixel of no class
KEPT_BYTES = 2**29  # decoded images and masks of less stay in memory
BATCH_SIZE, TEST_SHARE = 32, 0.2
REMEDY = (
    "segmentation takes parquet files with columns `image` and `mask`, a PNG of class ids, given "
    "by --segmentation.data"
)


@dataclass(frozen=True)
class MaskedSource:
    """Images and masks, still encoded; ``indices`` are the rows of this part."""

    images: TableSource
    masks: TableSource
    indices: NDArray[np.int64]

    def read(self, row: int, channels: int) -> tuple[Tensor, Tensor]:
        """An image (channels, height, width) and its class ids (height, width), int64."""
        index = int(self.indices[row])
        try:
            image = to_channels(self.images.read(index), channels)
            mask = _read_mask(self.masks.content(index))
            if mask.shape != image.shape[1:]:
                raise UserError(
                    f"the image has shape {tuple(image.shape[1:])} and its mask {mask.shape}; "
                    "give a PNG of class ids, of the image's size"
                )
        except (BrokenImage, UserError) as error:
            raise UserError(
                f"{self.images.describe(index)}: {error}; mend or remove this row"
            ) from error
        return image, torch.from_numpy(mask.astype(np.int64))


def _read_mask(content: bytes) -> NDArray[Any]:
    try:
        with Image.open(io.BytesIO(content), formats=["PNG"]) as picture:
            # A palette's colours are for the eye: its indices are the ids.
            return np.array(picture)
    except (OSError, SyntaxError, ValueError) as error:
        raise BrokenImage("its mask is no PNG") from error


class MaskedImages:
    """A source at one size: images stretched (bilinear), masks by their nearest pixel.

    Few stay in memory, others are decoded by so many processes when they are asked for.
    """

    class_ids: tuple[int, ...] = ()  # of the classes, rising; `load_masked` sets them

    def __init__(
        self, source: MaskedSource, image_size: ImageSize, channels: int, num_workers: int
    ) -> None:
        self._source, self._image_size, self._channels = source, image_size, channels
        self._num_workers = num_workers
        self._kept: list[tuple[Tensor, Tensor]] = []
        self.pixels: Counter[int] = Counter()  # of each id that occurs, how many
        loaded, size = self._kept.copy(), 0
        for images, ids in self._loaded(torch.arange(len(self)).split(BATCH_SIZE)):
            values, counts = ids.unique(return_counts=True)
            self.pixels.update(dict(zip(values.tolist(), counts.tolist(), strict=True)))
            size += images.nbytes + ids.nbytes
            loaded += zip(images.clone(), ids.clone(), strict=True)  # out of shared memory
            if size > KEPT_BYTES:
                loaded.clear()
        self._kept = loaded

    def __len__(self) -> int:
        return len(self._source.indices)

    def __getitem__(self, places: Sequence[int]) -> tuple[Tensor, Tensor]:
        pairs = [self._kept[place] if self._kept else self._resized(place) for place in places]
        return stack_images([image for image, _ in pairs]), torch.stack([ids for _, ids in pairs])

    def _resized(self, place: int) -> tuple[Tensor, Tensor]:
        image, mask = self._source.read(place, self._channels)
        size = list(self._image_size)
        ids = TF.resize(mask[None], size, InterpolationMode.NEAREST_EXACT)[0].int()
        return TF.resize(image, size, antialias=True), ids

    def batches(self, indices: Sequence[Tensor]) -> Iterator[tuple[Tensor, Tensor]]:
        """Images (see `Batch.images`) and masks of each batch of places.

        Masks are (batch, height, width), uint8: positions in ``class_ids``, or `VOID` for any other
        id. A row that can't be read is a `UserError`.
        """
        classes = torch.tensor(self.class_ids, dtype=torch.int32)
        for images, ids in self._loaded(indices):
            places = torch.bucketize(ids, classes).clamp(max=len(classes) - 1)
            yield images, torch.where(classes[places] == ids, places, VOID).to(torch.uint8)

    def _loaded(self, indices: Sequence[Tensor]) -> Iterator[tuple[Tensor, Tensor]]:
        num_workers = 0 if self._kept else self._num_workers
        places = [part.tolist() for part in indices]
        return watched(batch_loader(cast(Any, self), places, num_workers))


def open_masked(data: Path | str | None, seed: int = 0) -> tuple[MaskedSource, MaskedSource]:
    """The training and the test part of a folder, a file or a pattern.

    Parts are told by the files' names, or their folders' below ``data``, that start with ``train``
    and ``test``; ``val`` is taken where there is no ``test``, and a fifth of the rows is set apart,
    drawn with ``seed``, where there is neither. Files without images or masks are a `UserError`.
    """
    if data is None:
        raise UserError(f"the embedded images have no masks; {REMEDY}")
    path = Path(data)
    if path.is_dir():
        files = {path / name: name.split("/") for name in find_files(path, (".parquet",))}
    elif not path.exists() and is_pattern(data):
        files = {file: [file.name] for file in expand_pattern(str(data))}
    else:
        files = {path: [path.name]} if path.is_file() and path.suffix.lower() == ".parquet" else {}
    if not files:
        raise UserError(f"{data} holds no parquet files with masks; {REMEDY}")
    train, test, validation = (
        [file for file in files if any(name.lower().startswith(start) for name in files[file])]
        for start in ("train", "test", "val")
    )
    if train and (test or validation):
        return _open_rows(train), _open_rows(test or validation)
    whole = _open_rows(list(files))
    training, kept = split_source(whole.images, TEST_SHARE, seed)
    return replace(whole, indices=training), replace(whole, indices=kept)


def _open_rows(files: list[Path]) -> MaskedSource:
    images, masks = (open_parquet(files, False, column=name) for name in ("image", "mask"))
    return MaskedSource(images, masks, np.arange(len(masks)))


def spread(count: int, limit: int | None) -> Tensor:
    """So many of ``count`` places, evenly spread; all of them without a limit."""
    kept = count if limit is None else min(limit, count)
    return torch.linspace(0, count - 1, kept, dtype=torch.float64).round().long()


def load_masked(
    sources: Sequence[MaskedSource],
    image_size: ImageSize,
    channels: int,
    void: int = VOID,
    limit: int | None = None,
    num_workers: int = 0,
) -> list[MaskedImages]:
    """At most ``limit`` images of each part, evenly spread, with the classes of all parts.

    Fewer than 2 or more than 255 classes beside ``void``, or a part of nothing else, are a
    `UserError`.
    """
    parts = []
    for source in sources:
        kept = spread(len(source.indices), limit).numpy()
        chosen = replace(source, indices=source.indices[kept])
        parts.append(MaskedImages(chosen, image_size, channels, num_workers))
        if set(parts[-1].pixels) <= {void}:
            raise UserError(
                f"{source.images.name}: every pixel of the masks is void, {void}; give masks with "
                "classes"
            )
    classes = sorted({value for part in parts for value in part.pixels} - {void})
    if not 2 <= len(classes) <= VOID:
        raise UserError(
            f"{sources[0].images.name}: the masks hold {len(classes)} classes beside void, {void}; "
            f"give 2 to {VOID}, and the id that is no class by --segmentation.void"
        )
    for part in parts:
        part.class_ids = tuple(classes)
    return parts
