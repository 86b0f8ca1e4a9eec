"""Images of the ``datasets`` library: saved folders, names on the hub, large parquet files.

Imported where it is needed: ``datasets`` takes most of a second to import. What it can't read is a
`UserError`.
"""

import textwrap
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import datasets
import huggingface_hub

from backfold.data.formats import TableSource, first_and_more
from backfold.data.source import Options, Split, of_split, parts_of
from backfold.errors import UserError


def open_saved(folder: Path, split: Split, options: Options) -> TableSource:
    """What ``save_to_disk`` has left."""
    with _users_error(f"{folder} is no readable saved data set", "save it again"):
        saved = datasets.load_from_disk(str(folder))
    parts = saved if isinstance(saved, datasets.DatasetDict) else {"": saved}
    return _open_split(parts, str(folder), [folder], split, options)


def map_parquet(files: Sequence[Path], options: Options) -> TableSource:
    """Parquet files of any size, converted once into a cache that is mapped into memory."""
    with _users_error(f"{files[0]} and the files beside it can't be read", "replace them"):
        rows = datasets.load_dataset("parquet", data_files=list(map(str, files)), split="train")
    return TableSource(rows.data, [(first_and_more(files), len(rows))], *options)


def open_hub(name: str, split: Split, options: Options) -> TableSource:
    """The data set ``owner/name`` or ``owner/name/configuration`` on the hub, downloaded."""
    owner, dataset, *configuration = name.split("/")
    what = f"{name} is neither a path nor a data set on the Hugging Face hub that can be loaded"
    with _users_error(what, "check --data and the connection, or download it and give the folder"):
        parts = datasets.load_dataset(f"{owner}/{dataset}", *configuration)
    caches = datasets.config.HF_DATASETS_CACHE, huggingface_hub.constants.HF_HUB_CACHE
    return _open_split(parts, name, map(Path, caches), split, options)


def _open_split(
    parts: Mapping[str, Any], name: str, folders: Iterable[Path], split: Split, options: Options
) -> TableSource:
    named = parts_of({key: key for key in parts})
    if len(parts) > 1 and not named:
        raise UserError(
            f"{name} has splits {', '.join(parts)}; name them train and test, or save one alone"
        )
    chosen = of_split(named, split, next(iter(parts)), name)
    rows = [(f"{name} {chosen}".rstrip(), len(parts[chosen]))]
    return TableSource(parts[chosen].data, rows, *options, folders)


@contextmanager
def _users_error(what: str, remedy: str) -> Iterator[None]:
    try:
        yield
    except Exception as error:  # pyarrow, JSON and datasets itself each raise their own
        reason = textwrap.shorten(str(error), 200) or type(error).__name__
        raise UserError(f"{what} ({reason}); {remedy}") from error
