"""Clips: consecutive frames stacked as the channels of one image."""

import io
from collections.abc import Sequence
from itertools import groupby
from pathlib import Path

import torch
from PIL import Image
from torch import Tensor

from backfold.data.decode import MAX_PIXELS, TIFF_MAGIC, as_float, examine, open_tiff, to_channels
from backfold.data.files import IMAGE_SUFFIXES, find_files, read_file
from backfold.data.formats import folder_labels
from backfold.data.source import ImageSource
from backfold.errors import BrokenImage, UserError

PAGED = (".gif", ".tif", ".tiff")  # whose pages may be frames
LOOKED_AT = 16  # images that say how many channels frames have

Frame = tuple[str, int | None]  # a file, and the page of it; None: the file is one image


class ClipSource(ImageSource):
    """So many (2 or more) consecutive frames as one image, the latest frame's channels first.

    A clip is the image files of one folder, at any depth, in the order of their names, or one GIF
    or TIFF file of several pages. It gives as many images as fit into it one after the other: no
    two share a frame. Frames are brought to the most channels that some of them have. Labels are
    those of `folder_labels`, where a clip's own folder does not count.

    Raises:
        UserError: no clip is long enough.
    """

    def __init__(
        self, folder: Path, frames: int, labelled: bool = False, max_pixels: int = MAX_PIXELS
    ) -> None:
        self.name, self._folder, self._max_pixels = f"{folder}, {frames} frames", folder, max_pixels
        self._images: list[Sequence[Frame]] = []  # of each its frames, earliest first
        places: list[str] = []
        for clip in _clips(folder):
            starts = range(0, len(clip) - frames + 1, frames)
            self._images += [clip[start : start + frames] for start in starts]
            path, page = clip[0]
            places += [path if page is not None else Path(path).parent.as_posix()] * len(starts)
        if not self._images:
            raise UserError(
                f"{folder} holds no clip of {frames} frames; give a folder for each clip with its "
                "frames as image files, or GIF or TIFF files of several pages; or fewer --frames"
            )
        self.labels, self.class_names = folder_labels(places) if labelled else (None, ())
        step = -(-len(self._images) // LOOKED_AT)
        self._channels = max(map(self._count_channels, self._images[::step]))

    def __len__(self) -> int:
        return len(self._images)

    def _count_channels(self, image: Sequence[Frame]) -> int:
        try:
            return max(len(self._frame(path, page, None)) for path, page in image)
        except BrokenImage:  # counted when it is read
            return 1

    def read(self, index: int, min_side: int | None = None) -> Tensor:
        """(frames * channels, height, width), uint8 or float32; see `ImageSource.read`."""
        latest_first = self._images[index][::-1]
        frames = [self._frame(path, page, min_side) for path, page in latest_first]
        if len({frame.shape[1:] for frame in frames}) > 1:  # JPEG alone comes at half its size
            frames = [self._frame(path, page, None) for path, page in latest_first]
        if len({frame.shape[1:] for frame in frames}) > 1:
            sizes = ", ".join(f"{frame.shape[1]}x{frame.shape[2]}" for frame in frames)
            raise BrokenImage(f"its frames are of {sizes} pixels; make them alike")
        if len({frame.dtype for frame in frames}) > 1:
            frames = [as_float(frame) for frame in frames]
        try:
            return torch.cat([to_channels(frame, self._channels) for frame in frames])
        except UserError as error:
            raise BrokenImage(f"its frames differ: {error}") from error

    def _frame(self, path: str, page: int | None, min_side: int | None) -> Tensor:
        return examine(read_file(self._folder / path), min_side, self._max_pixels, page).image

    def describe(self, index: int) -> str:
        """The path of the earliest frame, and its page."""
        path, page = self._images[index][0]
        return f"{self._folder / path}" + (f" page {page}" if page is not None else "")


def _clips(folder: Path) -> list[list[Frame]]:
    """Every file of several pages, and the other files of every folder."""
    found = find_files(folder, (*IMAGE_SUFFIXES, ".gif"))
    found.sort(key=lambda path: (Path(path).parent.as_posix(), Path(path).name))
    clips: list[list[Frame]] = []
    for _, files in groupby(found, key=lambda path: Path(path).parent):
        single: list[Frame] = []
        for path in files:
            count = _pages(folder / path)
            if count > 1:
                clips.append([(path, page) for page in range(count)])
            else:
                single.append((path, None))
        clips += [single] if single else []
    return clips


def _pages(path: Path) -> int:
    """How many there are; 1 of what has none or can't be read."""
    if path.suffix.lower() not in PAGED:
        return 1
    try:
        content = read_file(path)
        if content.startswith(TIFF_MAGIC):
            with open_tiff(content) as file:
                return len(file.pages)
        with Image.open(io.BytesIO(content), formats=("GIF",)) as image:
            return int(getattr(image, "n_frames", 1))
    except Exception:  # counted as broken when it is read
        return 1
