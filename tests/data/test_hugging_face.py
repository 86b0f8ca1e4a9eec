import pickle

import datasets
import pyarrow as pa
import pytest

from backfold.data.formats import TableSource
from backfold.data.open import open_source
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


def dataset(contents, **labels):
    """Images in a column of any name, and labels in columns of classes or numbers."""
    features = datasets.Features(
        picture=datasets.Image(),
        label=datasets.Value("int64"),
        kind=datasets.ClassLabel(names=["cat", "dog"]),
    )
    columns = {"picture": [{"bytes": content, "path": None} for content in contents], **labels}
    chosen = datasets.Features({name: features[name] for name in columns})
    return datasets.Dataset.from_dict(columns, features=chosen)


def read_all(source):
    return [source.content(index) for index in range(len(source))]


def test_a_saved_data_set_is_mapped_and_its_columns_told_by_their_types(
    tmp_path, contents, users_error
):
    labels = [0, 1, 1, 0, 1, 0]
    dataset(contents, label=range(6), kind=labels).save_to_disk(tmp_path / "saved")
    source = open_source(tmp_path / "saved", "train", labelled=True)
    assert source.labels.tolist() == labels
    assert source.class_names == ("cat", "dog")
    assert source.describe(2) == f"{tmp_path / 'saved'} row 2"
    pickled = pickle.dumps(source)
    assert contents[0] not in pickled
    for one in (source, pickle.loads(pickled)):
        assert read_all(one) == contents
    assert open_source(tmp_path / "saved", "train").labels is None
    with pytest.raises(NoTestSplit):
        open_source(tmp_path / "saved", "test")
    for file in (tmp_path / "saved").glob("*.arrow"):
        file.write_bytes(b"nonsense")
    line = users_error(lambda: open_source(tmp_path / "saved", "train"))
    assert "no readable saved data set" in line


@pytest.mark.parametrize("is_on_hub", [False, True])
def test_splits_of_a_data_set(tmp_path, contents, monkeypatch, is_on_hub):
    parts = {
        "train": dataset(contents[:4], kind=[0, 1, 0, 1]),
        "validation": dataset(contents[4:], kind=[-1, -1]),
    }
    odd = {"red": parts["train"], "blue": parts["validation"]}
    saved = {}
    for name, each in (("own/er", parts), ("own/er/odd", odd)):
        saved[name] = datasets.DatasetDict(each)
        if not is_on_hub:
            saved[name].save_to_disk(tmp_path / name)
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(datasets, "load_dataset", lambda *name: saved["/".join(name)])
    train, test = (open_source("own/er", split, labelled=True) for split in ("train", "test"))
    assert read_all(train) == contents[:4]
    assert read_all(test) == contents[4:]
    assert test.labels is None  # -1 says that there are none
    with pytest.raises(UserError, match="splits red, blue; name them train and test"):
        open_source("own/er/odd", "train")


def test_paths_in_a_row_lead_nowhere_outside(tmp_path, contents):
    inside, outside = tmp_path / "data", tmp_path / "secret"
    for place in (inside, outside):
        place.mkdir()
        (place / "x.png").write_bytes(contents[0])
    (inside / "link.png").symlink_to(outside / "x.png")
    names = [inside / "x.png", outside / "x.png", f"{inside}/../secret/x.png", inside / "link.png"]
    paths = [*map(str, names), "hf://datasets/owner/name/x.png", None]
    kind = pa.struct({"bytes": pa.binary(), "path": pa.string()})
    images = pa.array([{"bytes": None, "path": path} for path in paths], kind)
    for folders in ([], [inside]):
        source = TableSource(pa.table({"img": images}), [("x", 6)], folders=folders)
        if folders:
            assert source.content(0) == contents[0]
        for row in range(bool(folders), 5):
            with pytest.raises(BrokenImage, match="outside of the data set's folder"):
                source.content(row)
        with pytest.raises(BrokenImage, match="no image in this row"):
            source.content(5)


def test_large_parquet_files_go_through_the_cache_on_disk(tmp_path, make_parquet, monkeypatch):
    for number in range(2):
        make_parquet(tmp_path / f"{number}.parquet", 3, 3 * number, label=[0, 1, 1])
    in_memory = open_source(f"{tmp_path}/*.parquet", "train", labelled=True)
    monkeypatch.setattr("backfold.data.open.IN_MEMORY_BYTES", 10)
    mapped = open_source(f"{tmp_path}/*.parquet", "train", labelled=True)
    assert mapped.describe(4) == f"{tmp_path}/0.parquet and 1 more row 4"
    assert in_memory.content(0) not in pickle.dumps(mapped)
    assert read_all(mapped) == read_all(in_memory)
    assert mapped.labels.tolist() == in_memory.labels.tolist() == [0, 1, 1, 0, 1, 1]


def test_an_unknown_name_is_the_users_error(monkeypatch):
    def missing(*_):
        raise FileNotFoundError("no such thing\nat all")

    monkeypatch.setattr(datasets, "load_dataset", missing)
    with pytest.raises(UserError, match=r"owner/name is neither a path nor .*no such thing at all"):
        open_source("owner/name", "train")
    for name in ("name", "./owner/name", "a/b/c/d", "/owner/name"):
        with pytest.raises(UserError, match="does not exist; give"):
            open_source(name, "train")
