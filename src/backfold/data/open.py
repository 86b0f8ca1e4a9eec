"""Opening whatever ``--data`` names, and one of its splits."""

from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any, TypeVar

import fsspec

from backfold.data.clips import ClipSource
from backfold.data.decode import MAX_PIXELS
from backfold.data.files import (
    HUB_NAME,
    IMAGE_SUFFIXES,
    WAYS,
    expand_braces,
    expand_pattern,
    find_files,
    is_pattern,
    refuse_missing,
)
from backfold.data.formats import (
    DatasetSource,
    FolderSource,
    MapDataset,
    ParquetSource,
    TarSource,
    first_and_more,
)
from backfold.data.source import ImageSource, NoTestSplit, Split
from backfold.data.stream import Stream, hub_stream, tar_stream
from backfold.errors import UserError

EMBEDDED = Path(__file__).with_name("embedded")
# The first name that a data set has is its test split: a validation split comes before a test
# split because published test splits often have no labels.
TEST_NAMES = ("val", "valid", "validation", "test")
IN_MEMORY_BYTES = 2**32  # parquet files of more are converted into a cache on disk
STREAMED_BYTES = 50 * 2**30  # data sets on the hub of more are not downloaded
COMPRESSED_TARS = (".tgz", ".tar.gz", ".tar.bz2", ".tar.xz")
SAVED_FILES = ("dataset_dict.json", "state.json")
Options = tuple[bool, int]  # labelled and max_pixels
Part = TypeVar("Part")


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
      `torch.utils.data` (see `DatasetSource`), which are the train split.

    What is compressed, elsewhere or too large for that is read by `open_stream`.

    Data have splits if sub-folders, the names of parquet files or shards, or the splits of a data
    set say so: one ``train`` and one of `TEST_NAMES` (sub-folders are named so, file names start
    so). Otherwise all of them are the train split. A folder with image files and other files is
    read as image files.

    Args:
        data: see above; None takes the 28 x 28 grey images embedded in this package (10,000 to
            train and 2,000 to test, 10 classes).
        split: which part.
        labelled: read labels too, where there are any (see the classes).
        max_pixels: larger images are counted as broken.
        frames: of clips, in a folder, that are stacked as channels; see `ClipSource`.

    Raises:
        NoTestSplit: "test" is asked of data without splits.
        UserError: nothing there, no images, or a stream.
    """
    if data is not None and not isinstance(data, (str, Path)):
        if split == "test":
            raise _no_test_split(type(data).__name__)
        return DatasetSource(data, max_pixels, labelled)
    options = labelled, max_pixels
    if data is None:
        if frames is not None:
            raise UserError(
                f"frames is {frames}, and the embedded images are no clips; give --data"
            )
        name = f"embedded Fashion-MNIST sample, {split}"
        return ParquetSource([EMBEDDED / f"fashion_mnist_{split}.parquet"], *options, name)
    text, path = str(data), Path(data)
    if frames is not None:
        if not path.is_dir():
            raise UserError(f"{text} is no folder, and clips ({frames} frames) lie in one; give it")
        found = _split_folders(path)
        if split == "test" and not found:
            raise _no_test_split(path)
        return ClipSource(found[split] if found else path, frames, *options)
    if path.is_dir():
        return _open_folder(path, split, options)
    if path.is_file():
        return _open_files(text, [path], split, options)
    if "://" in text:
        raise UserError(
            f"{text} is elsewhere and is only read as a stream, by pretraining; download it"
        )
    if is_pattern(text):
        return _open_files(text, expand_pattern(text), split, options)
    refuse_missing(text)
    import datasets
    import huggingface_hub

    from backfold.data.hugging_face import open_builder, users_error

    builder = open_builder(text)
    size = builder.info.download_size or 0
    if size > STREAMED_BYTES:
        raise UserError(
            f"{text} takes {size / 2**30:.0f} GiB to download and is only read as a stream; "
            "save what you need of it with `datasets` and give that folder"
        )
    caches = [datasets.config.HF_DATASETS_CACHE, huggingface_hub.constants.HF_HUB_CACHE]
    remedy = "try again, or download it yourself and give the folder"
    with users_error(f"can't download {builder.dataset_name}", remedy):
        builder.download_and_prepare()
        parts = builder.as_dataset()
    return _open_datasets(parts, text, map(Path, caches), split, options)


def open_stream(
    data: Path | str | None, count: int | None = None, max_pixels: int = MAX_PIXELS
) -> Stream | None:
    """The training images as a stream, where they can't be opened by `open_source`; else None.

    Streams are tar shards at addresses with ``://``, compressed tar shards, and data sets on the
    Hugging Face hub of more than `STREAMED_BYTES`.

    Raises:
        UserError: nothing there, no images, an unknown kind of address, or no ``count`` of the
            images where the data don't say it.
    """
    text = "" if data is None else str(data)
    path = Path(text)
    if not text or path.is_dir():
        return None
    if "://" in text:
        files = expand_braces(text)
        for file in files:
            try:
                fsspec.get_filesystem_class(file.partition("://")[0])
            except (ImportError, ValueError) as error:  # what opens it is unknown or not installed
                raise UserError(f"{file} can't be opened ({error}); download it") from error
    elif path.is_file() or is_pattern(text):
        files = [text] if path.is_file() else [str(file) for file in expand_pattern(text)]
        if not all(file.lower().endswith(COMPRESSED_TARS) for file in files):
            return None
    elif HUB_NAME.fullmatch(text):
        from backfold.data.hugging_face import open_builder

        builder = open_builder(text)
        if (builder.info.download_size or 0) <= STREAMED_BYTES:
            return None
        splits = builder.info.splits or {}
        chosen = "train" if "train" in splits else next(iter(splits), "train")
        count = count or (splits[chosen].num_examples if chosen in splits else None)
        dataset, files = builder.as_streaming_dataset(split=chosen), []
    else:
        return None
    if count is None:
        raise UserError(f"{text} is a stream that does not say its length; give the image count")
    if files:
        return tar_stream(files, count, max_pixels)
    return hub_stream(dataset, f"{text} {chosen}", count, max_pixels)


def _open_folder(folder: Path, split: Split, options: Options) -> ImageSource:
    if any((folder / name).is_file() for name in SAVED_FILES):
        import datasets

        from backfold.data.hugging_face import users_error

        with users_error(f"{folder} is no readable saved data set", "save it again"):
            saved = datasets.load_from_disk(str(folder))
        parts = saved if isinstance(saved, datasets.DatasetDict) else {"": saved}
        return _open_datasets(parts, str(folder), [folder], split, options)
    folders = _split_folders(folder)
    if folders:
        files = _packed_files(folders[split])
        if files:
            return _open_packed(files, options)
        # Both splits' classes, so that a class missing in one of them doesn't shift the labels.
        paths = [path for each in folders.values() for path in find_files(each, IMAGE_SUFFIXES)]
        names = sorted({path.split("/")[0] for path in paths if "/" in path})
        return FolderSource(folders[split], *options, names)
    files = _packed_files(folder)
    if files:
        return _open_files(str(folder), files, split, options)
    if split == "test":
        raise _no_test_split(folder)
    return FolderSource(folder, *options)


def _split_folders(folder: Path) -> dict[Split, Path]:
    """The sub-folders of both splits; empty where there are none."""
    by_name = {path.name.lower(): path for path in sorted(folder.iterdir()) if path.is_dir()}
    test = next((by_name[name] for name in TEST_NAMES if name in by_name), None)
    return {"train": by_name["train"], "test": test} if "train" in by_name and test else {}


def _packed_files(folder: Path) -> list[Path]:
    """Parquet files or else shards below a folder; none where there are image files."""
    if find_files(folder, IMAGE_SUFFIXES):
        return []
    found = find_files(folder, (".parquet",)) or find_files(folder, (".tar",))
    return [folder / path for path in found]


def _open_files(name: str, files: list[Path], split: Split, options: Options) -> ImageSource:
    kinds = {file.suffix.lower() for file in files}
    if len(kinds) > 1 or not kinds <= {".parquet", ".tar"}:
        what = f"{len(files)} files of kind {' '.join(sorted(kinds))}"
        raise UserError(f"{name} is {'a single file' if len(files) == 1 else what}; {WAYS}")
    named = {
        start: [file for file in files if file.name.lower().startswith(start)]
        for start in ("train", *TEST_NAMES)
    }
    return _open_packed(_choose(named, files, split, name), options)


def _open_packed(files: list[Path], options: Options) -> ImageSource:
    if files[0].suffix.lower() == ".tar":
        return TarSource(files, *options)
    if sum(file.stat().st_size for file in files) <= IN_MEMORY_BYTES:
        return ParquetSource(files, *options)
    import datasets

    from backfold.data.hugging_face import HuggingFaceSource, users_error

    with users_error(f"{files[0]} and the files beside it can't be read", "replace them"):
        # Converted once into a cache that is mapped.
        rows = datasets.load_dataset("parquet", data_files=list(map(str, files)), split="train")
    return HuggingFaceSource(rows, first_and_more(files), (), *options)


def _open_datasets(
    parts: Mapping[str, Any], name: str, folders: Iterable[Path], split: Split, options: Options
) -> ImageSource:
    from backfold.data.hugging_face import HuggingFaceSource

    if len(parts) > 1 and not ("train" in parts and set(parts) & set(TEST_NAMES)):
        raise UserError(
            f"{name} has splits {', '.join(parts)}; name them train and test, or save one alone"
        )
    chosen = _choose({key: key for key in parts}, next(iter(parts)), split, name)
    return HuggingFaceSource(parts[chosen], f"{name} {chosen}".rstrip(), folders, *options)


def _choose(by_name: Mapping[str, Part | None], whole: Part, split: Split, data: object) -> Part:
    train = by_name.get("train")
    test = next((part for part in map(by_name.get, TEST_NAMES) if part), None)
    if train and test:
        return train if split == "train" else test
    if split == "test":
        raise _no_test_split(data)
    return whole


def _no_test_split(data: object) -> NoTestSplit:
    return NoTestSplit(
        f"{data} has no test split; add sub-folders `train` and `test`, or files named so"
    )
