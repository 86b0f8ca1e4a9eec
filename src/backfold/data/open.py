"""Opening whatever ``--data`` names, and one of its splits."""

from pathlib import Path

import fsspec

from backfold.data.clips import ClipSource
from backfold.data.decode import MAX_PIXELS
from backfold.data.files import (
    IMAGE_SUFFIXES,
    WAYS,
    expand_braces,
    expand_pattern,
    find_files,
    is_pattern,
    refuse_missing,
)
from backfold.data.formats import DatasetSource, FolderSource, MapDataset, TarSource, open_parquet
from backfold.data.source import TEST_NAMES, ImageSource, Options, Split, of_split, parts_of
from backfold.data.stream import Stream
from backfold.errors import UserError

EMBEDDED = Path(__file__).with_name("embedded")
IN_MEMORY_BYTES = 2**32  # parquet files of more are converted into a cache on disk
COMPRESSED_TARS = (".tgz", ".tar.gz", ".tar.bz2", ".tar.xz")
SAVED_FILES = ("dataset_dict.json", "state.json")


def open_source(
    data: Path | str | MapDataset | None,
    split: Split,
    labelled: bool = False,
    max_pixels: int = MAX_PIXELS,
    frames: int | None = None,
) -> ImageSource:
    """The images of one split.

    ``data`` may be

    - a folder with image files at any depth; or else with parquet files, or with tar shards;
    - parquet files or uncompressed tar shards, by wildcards (``shards/*.tar``) or brace ranges
      (``shards/{000..012}.tar``);
    - a folder that ``datasets`` saved with ``save_to_disk``;
    - a name on the Hugging Face hub, ``owner/name`` or ``owner/name/configuration``, where no such
      path exists; it is downloaded;
    - images in memory: a tensor (images, channels, height, width), or a data set of
      `torch.utils.data` (see `DatasetSource`);
    - None: the 28 x 28 grey images embedded in this package (10,000 to train and 2,000 to test, 10
      classes).

    What is compressed or elsewhere is read by `open_stream`.

    Data have splits if sub-folders, the beginnings of file names, or the splits of a data set say
    so: one ``train`` and one of `TEST_NAMES`. Otherwise all of them are the train split.

    Labels are read where they are asked for and there are any (see the classes). Images of more
    than ``max_pixels`` are broken. So many ``frames`` of clips are one image; see `ClipSource`.

    Raises:
        NoTestSplit: "test" is asked of data without splits.
        UserError: nothing there, no images, or a stream.
    """
    options = labelled, max_pixels
    if data is not None and not isinstance(data, (str, Path)):
        whole = of_split({}, split, data, type(data).__name__)
        return DatasetSource(whole, max_pixels, labelled)
    if frames is not None:
        if data is None or not Path(data).is_dir():
            what = data or "the embedded sample"
            raise UserError(f"{what} is no folder, and holds no clips of {frames} frames; give one")
        part = of_split(_sub_folders(Path(data)), split, Path(data), data)
        return ClipSource(part, frames, *options)
    if data is None:
        source = open_parquet([EMBEDDED / f"fashion_mnist_{split}.parquet"], *options)
        source.name = f"embedded Fashion-MNIST sample, {split}"
        return source
    text, path = str(data), Path(data)
    if path.is_dir():
        return _open_folder(path, split, options)
    if "://" in text:
        raise UserError(
            f"{text} is elsewhere and is only read as a stream, by pretraining; download it"
        )
    if path.is_file() or is_pattern(text):
        return _open_files(text, expand_pattern(text), split, options)
    refuse_missing(text)
    from backfold.data.hugging_face import open_hub

    return open_hub(text, split, options)


def open_stream(
    data: Path | str | None, count: int | None = None, max_pixels: int = MAX_PIXELS
) -> Stream | None:
    """The training images as a stream, where they can't be opened by `open_source`; else None.

    Streams are tar shards at addresses with ``://``, and compressed tar shards.

    Raises:
        UserError: nothing there, an unknown kind of address, or no ``count`` of the images.
    """
    text = str(data or "")
    if "://" in text:
        files = expand_braces(text)
        for file in files:
            try:
                fsspec.get_filesystem_class(file.partition("://")[0])
            except (ImportError, ValueError) as error:  # what opens it is unknown or not installed
                raise UserError(f"{file} can't be opened ({error}); download it") from error
    elif Path(text).is_dir() or not (Path(text).is_file() or is_pattern(text)):
        return None
    else:
        files = [str(file) for file in expand_pattern(text)]
        if not all(file.lower().endswith(COMPRESSED_TARS) for file in files):
            return None
    return Stream(files, count or 0, max_pixels)


def _open_folder(folder: Path, split: Split, options: Options) -> ImageSource:
    if any((folder / name).is_file() for name in SAVED_FILES):
        from backfold.data.hugging_face import open_saved

        return open_saved(folder, split, options)
    parts = _sub_folders(folder)
    files = _packed_files(parts.get(split, folder))
    if files:
        return _open_packed(files, options) if parts else _open_files(folder, files, split, options)
    # Both splits' classes, so that a class missing in one of them doesn't shift the labels.
    paths = [path for part in parts.values() for path in find_files(part, IMAGE_SUFFIXES)]
    names = sorted({path.split("/")[0] for path in paths if "/" in path})
    return FolderSource(of_split(parts, split, folder, folder), *options, names)


def _packed_files(folder: Path) -> list[Path]:
    """Parquet files or else shards below a folder; none where there are image files."""
    if find_files(folder, IMAGE_SUFFIXES):
        return []
    found = find_files(folder, (".parquet",)) or find_files(folder, (".tar",))
    return [folder / path for path in found]


def _open_files(name: object, files: list[Path], split: Split, options: Options) -> ImageSource:
    kinds = {file.suffix.lower() for file in files}
    if len(kinds) > 1 or not kinds <= {".parquet", ".tar"}:
        what = f"{len(files)} files of kind {' '.join(sorted(kinds))}"
        raise UserError(f"{name} is {'a single file' if len(files) == 1 else what}; {WAYS}")
    named = {
        start: [file for file in files if file.name.lower().startswith(start)]
        for start in ("train", *TEST_NAMES)
    }
    return _open_packed(of_split(parts_of(named), split, files, name), options)


def _open_packed(files: list[Path], options: Options) -> ImageSource:
    if files[0].suffix.lower() == ".tar":
        return TarSource(files, *options)
    if sum(file.stat().st_size for file in files) <= IN_MEMORY_BYTES:
        return open_parquet(files, *options)
    from backfold.data.hugging_face import map_parquet

    return map_parquet(files, options)


def _sub_folders(folder: Path) -> dict[Split, Path]:
    return parts_of({path.name.lower(): path for path in sorted(folder.iterdir()) if path.is_dir()})
