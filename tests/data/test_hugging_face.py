from types import SimpleNamespace

import datasets
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch

from backfold.data.decode import decode
from backfold.data.hugging_face import HuggingFaceSource, image_bytes
from backfold.data.open import open_source, open_stream
from backfold.data.source import NoTestSplit
from backfold.errors import BrokenImage, UserError


@pytest.fixture(autouse=True)
def _quiet_and_offline(monkeypatch, tmp_path):
    datasets.disable_progress_bars()
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", str(tmp_path / "cache"))
    monkeypatch.setattr(datasets.config, "HF_HUB_OFFLINE", True)


@pytest.fixture
def contents(contents):
    return contents[:6]


def dataset(contents, labels=None, column="image", **more):
    columns = {column: [{"bytes": content, "path": None} for content in contents], **more}
    features = {column: datasets.Image(), **{key: datasets.Value("int64") for key in more}}
    if labels is not None:
        columns["label"] = labels
        features["label"] = datasets.ClassLabel(names=["cat", "dog"])
    return datasets.Dataset.from_dict(columns, features=datasets.Features(features))


def read_all(source):
    return [source.content(index) for index in range(len(source))]


def test_a_saved_data_set(tmp_path, contents):
    labels = [0, 1, 1, 0, 1, 0]
    dataset(contents, labels).save_to_disk(tmp_path / "saved")
    source = open_source(tmp_path / "saved", "train", labelled=True)
    assert read_all(source) == contents
    assert torch.equal(source.read(2), decode(contents[2]))
    assert source.labels.tolist() == labels
    assert source.class_names == ("cat", "dog")
    assert source.describe(2) == f"{tmp_path / 'saved'} row 2"
    assert open_source(tmp_path / "saved", "train").labels is None
    with pytest.raises(NoTestSplit):
        open_source(tmp_path / "saved", "test")


def test_splits_of_a_saved_data_set(tmp_path, contents):
    parts = {"train": dataset(contents[:4]), "validation": dataset(contents[4:])}
    datasets.DatasetDict(parts).save_to_disk(tmp_path / "saved")
    train, test = (open_source(str(tmp_path / "saved"), split) for split in ("train", "test"))
    assert read_all(train) == contents[:4]
    assert read_all(test) == contents[4:]
    odd = {"red": parts["train"], "blue": parts["validation"]}
    datasets.DatasetDict(odd).save_to_disk(tmp_path / "odd")
    with pytest.raises(UserError, match="splits red, blue; name them train and test"):
        open_source(tmp_path / "odd", "train")


def test_the_image_column_is_told_by_its_type():
    both = datasets.Features({"left": datasets.Image(), "right": datasets.Image()})

    def made(rows):
        return datasets.Dataset.from_dict({"left": rows, "right": rows}, features=both)

    for given, message in (
        (made([]), "no rows"),
        (made([None]), "left, right and no single one of images; rename"),
        (datasets.Dataset.from_dict({"text": ["a"]}), "columns text and no single"),
    ):
        with pytest.raises(UserError, match=message):
            HuggingFaceSource(given, "x")


def test_rows_without_an_image_are_broken(contents):
    source = HuggingFaceSource(dataset([contents[0], b"nonsense"]), "x")
    source.read(0)
    with pytest.raises(BrokenImage, match="not an image"):
        source.read(1)
    for value in (None, {"bytes": None, "path": None}, "text", 7):
        with pytest.raises(BrokenImage, match="no image in this row"):
            image_bytes(value)


def test_paths_in_a_row_lead_nowhere_outside(tmp_path, contents):
    inside, outside = tmp_path / "data", tmp_path / "secret"
    for place in (inside, outside):
        place.mkdir()
        (place / "x.png").write_bytes(contents[0])
    (inside / "link.png").symlink_to(outside / "x.png")
    folders = [inside.resolve()]
    assert image_bytes({"bytes": None, "path": str(inside / "x.png")}, folders) == contents[0]
    for path in (outside / "x.png", inside / ".." / "secret" / "x.png", inside / "link.png"):
        with pytest.raises(BrokenImage, match="outside of the data set's folder"):
            image_bytes({"bytes": None, "path": str(path)}, folders)
    with pytest.raises(BrokenImage, match="outside"):
        image_bytes({"bytes": None, "path": str(inside / "x.png")})


def test_large_parquet_files_go_through_the_cache_on_disk(tmp_path, contents, monkeypatch):
    for number in range(2):
        table = pa.table({"image": contents[3 * number :][:3], "label": [0, 1, 1]})
        pq.write_table(table, tmp_path / f"{number}.parquet")
    in_memory = open_source(f"{tmp_path}/*.parquet", "train", labelled=True)
    monkeypatch.setattr("backfold.data.open.IN_MEMORY_BYTES", 10)
    mapped = open_source(f"{tmp_path}/*.parquet", "train", labelled=True)
    assert isinstance(mapped, HuggingFaceSource)
    assert read_all(mapped) == contents
    assert read_all(in_memory) == contents
    assert mapped.labels.tolist() == in_memory.labels.tolist() == [0, 1, 1, 0, 1, 1]


def test_damaged_saved_data_sets_are_the_users_error(tmp_path, contents):
    dataset(contents).save_to_disk(tmp_path / "saved")
    for file in (tmp_path / "saved").glob("*.arrow"):
        file.write_bytes(b"nonsense")
    with pytest.raises(UserError, match="no readable saved data set") as caught:
        open_source(tmp_path / "saved", "train")
    assert "\n" not in str(caught.value)


class Builder:
    """A hub's answer, without a hub."""

    dataset_name = "made"

    def __init__(self, parts):
        self.parts = datasets.DatasetDict(parts)
        splits = {name: datasets.SplitInfo(name, num_examples=4) for name in parts}
        self.info = SimpleNamespace(splits=splits, download_size=10)
        self.download_and_prepare = list

    def as_dataset(self):
        return self.parts

    def as_streaming_dataset(self, split):
        return self.parts[split].to_iterable_dataset(num_shards=2)


def test_names_on_the_hub(contents, monkeypatch):
    asked = []
    builder = Builder({"train": dataset(contents[:4], [0, 1, 0, 1]), "test": dataset(contents[4:])})
    answer = lambda *name: asked.append(name) or builder  # noqa: E731
    monkeypatch.setattr(datasets, "load_dataset_builder", answer)
    train = open_source("owner/name", "train", labelled=True)
    test = open_source("owner/name/small", "test")
    assert asked == [("owner/name",), ("owner/name", "small")]
    assert read_all(train) == contents[:4]
    assert train.labels.tolist() == [0, 1, 0, 1]
    assert read_all(test) == contents[4:]
    assert open_stream("owner/name") is None
    builder.info.download_size = 10**15
    with pytest.raises(UserError, match="931323 GiB to download and is only read as a stream"):
        open_source("owner/name", "train")
    stream = open_stream("owner/name")
    assert stream.count == 4
    assert [row["content"] for row in stream.rows([0, 1])] == contents[:4]


def test_an_unknown_name_is_the_users_error(monkeypatch):
    def missing(*_):
        raise FileNotFoundError("no such thing\nat all")

    monkeypatch.setattr(datasets, "load_dataset_builder", missing)
    with pytest.raises(UserError, match=r"owner/name is neither a path nor .*no such thing at all"):
        open_source("owner/name", "train")
    for name in ("name", "./owner/name", "a/b/c/d", "/owner/name"):
        with pytest.raises(UserError, match="does not exist; give"):
            open_source(name, "train")
