from types import SimpleNamespace

import datasets
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


def dataset(contents, labels=None):
    columns = {"image": [{"bytes": content, "path": None} for content in contents]}
    features = {"image": datasets.Image()}
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
    odd = datasets.DatasetDict(red=parts["train"], blue=parts["validation"])
    odd.save_to_disk(tmp_path / "odd")
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


@pytest.mark.parametrize("value", [None, {"bytes": None, "path": None}, "text", 7])
def test_rows_without_an_image_are_broken(value):
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


def test_large_parquet_files_go_through_the_cache_on_disk(tmp_path, make_parquet, monkeypatch):
    for number in range(2):
        make_parquet(tmp_path / f"{number}.parquet", 3, 3 * number, label=[0, 1, 1])
    in_memory = open_source(f"{tmp_path}/*.parquet", "train", labelled=True)
    monkeypatch.setattr("backfold.data.open.IN_MEMORY_BYTES", 10)
    mapped = open_source(f"{tmp_path}/*.parquet", "train", labelled=True)
    assert isinstance(mapped, HuggingFaceSource)
    assert read_all(mapped) == read_all(in_memory)
    assert mapped.labels.tolist() == in_memory.labels.tolist() == [0, 1, 1, 0, 1, 1]


def test_damaged_saved_data_sets_are_the_users_error(tmp_path, contents):
    dataset(contents).save_to_disk(tmp_path / "saved")
    for file in (tmp_path / "saved").glob("*.arrow"):
        file.write_bytes(b"nonsense")
    with pytest.raises(UserError, match="no readable saved data set") as caught:
        open_source(tmp_path / "saved", "train")
    assert "\n" not in str(caught.value)


def test_names_on_the_hub(contents, monkeypatch):
    parts = {"train": dataset(contents[:4], [0, 1, 0, 1]), "test": dataset(contents[4:])}
    splits = {name: datasets.SplitInfo(name, num_examples=4) for name in parts}
    builder = SimpleNamespace(
        dataset_name="made",
        info=SimpleNamespace(splits=splits, download_size=10),
        download_and_prepare=list,
        as_dataset=lambda: datasets.DatasetDict(parts),
        as_streaming_dataset=lambda split: parts[split].to_iterable_dataset(num_shards=2),
    )
    asked = []
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
