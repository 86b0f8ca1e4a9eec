"""Clips: consecutive frames stacked as the channels of one image."""

import io
from itertools import groupby
from pathlib import Path

import torch
from PIL import Image
from torch import Tensor

from backfold.data.decode import (
    MAX_PIXELS,
    as_float,
    check_size,
    decode,
    decode_pillow,
    to_channels,
)
from backfold.data.files import IMAGE_SUFFIXES, find_files, read_file
from backfold.data.source import ImageSource, Labels
from backfold.errors import BrokenImage, UserError

ANIMATED = (".gif", ".tif", ".tiff")  # whose pages may be frames


class ClipSource(ImageSource):
    """So many consecutive frames as one image, the latest frame's channels first.

    A clip is the image files of one folder in the order of their names, or one GIF or TIFF file of
    several pages. It gives as many images as fit into it one after the other: no two share a frame.

    Args:
        folder: with clips at any depth; hidden files and folders are left out.
        frames: of each image, 2 or more.
        max_pixels: larger frames are broken.

    Raises:
        UserError: no clip is long enough.
    """

    labels: Labels | None = None
    class_names: tuple[str, ...] = ()

    def __init__(self, folder: Path, frames: int, max_pixels: int = MAX_PIXELS) -> None:
        self.name, self._folder, self._max_pixels = f"{folder}, {frames} frames", folder, max_pixels
        # Of each image its frames, earliest first: files, and pages of them (None: all there is).
        self._images: list[list[tuple[str, int | None]]] = []
        found = find_files(folder, (*IMAGE_SUFFIXES, ".gif"))
        for _, files in groupby(found, key=lambda path: Path(path).parent):
            single: list[tuple[str, int | None]] = []
            for path in files:
                count = _pages(folder / path)
                if count > 1:
                    self._add([(path, page) for page in range(count)], frames)
                else:
                    single.append((path, None))
            self._add(single, frames)
        if not self._images:
            raise UserError(
                f"{folder} holds no clip of {frames} frames; give a folder for each clip with its "
                "frames as image files, or GIF or TIFF files of several pages; or fewer --frames"
            )

    def _add(self, clip: list[tuple[str, int | None]], frames: int) -> None:
        starts = range(0, len(clip) - frames + 1, frames)
        self._images += [clip[start : start + frames] for start in starts]

    def __len__(self) -> int:
        return len(self._images)

    def read(self, index: int, min_side: int | None = None) -> Tensor:
        """(frames * channels, height, width), uint8 or float32; see `ImageSource.read`."""
        frames = [self._frame(path, page, min_side) for path, page in self._images[index][::-1]]
        if len({frame.shape[1:] for frame in frames}) > 1:
            sizes = ", ".join(f"{frame.shape[1]}x{frame.shape[2]}" for frame in frames)
            raise BrokenImage(f"its frames are of {sizes} pixels; make them alike")
        channels = max(len(frame) for frame in frames)
        if any(frame.is_floating_point() for frame in frames):
            frames = [as_float(frame) for frame in frames]
        try:
            return torch.cat([to_channels(frame, channels) for frame in frames])
        except UserError as error:
            raise BrokenImage(str(error)) from error

    def _frame(self, path: str, page: int | None, min_side: int | None) -> Tensor:
        content = read_file(self._folder / path)
        if page is None:
            return decode(content, min_side, self._max_pixels)
        try:
            with Image.open(io.BytesIO(content), formats=("GIF", "TIFF")) as image:
                check_size((image.height, image.width, 1), self._max_pixels)
                image.seek(page)
                return decode_pillow(image).image
        except BrokenImage:
            raise
        except Exception as error:  # as in `decode`: whatever damaged bytes lead decoders to
            raise BrokenImage(" ".join(f"{type(error).__name__}: {error}".split())) from error

    def describe(self, index: int) -> str:
        """The path of the earliest frame, and its page."""
        path, page = self._images[index][0]
        return f"{self._folder / path}" + (f" page {page}" if page is not None else "")


def _pages(path: Path) -> int:
    """How many there are; 1 of what is no animation or can't be read."""
    if path.suffix.lower() not in ANIMATED:
        return 1
    try:
        with Image.open(path, formats=("GIF", "TIFF")) as image:
            return int(getattr(image, "n_frames", 1))
    except Exception:  # counted as broken when it is read
        return 1
