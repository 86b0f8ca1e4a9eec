import numpy as np
import pytest
import torch
from torch.utils.data import TensorDataset

from backfold.data.formats import DatasetSource, FolderSource
from backfold.data.open import open_source
from backfold.data.source import BrokenFiles, NoTestSplit, SubsetSource, split_source
from backfold.errors import UserError


@pytest.mark.parametrize(("split", "per_class"), [("train", 1000), ("test", 200)])
def test_the_embedded_sample_is_balanced(split, per_class):
    source = open_source(None, split, labelled=True)
    assert np.bincount(source.labels).tolist() == [per_class] * 10
    assert len(set(source.class_names)) == 10
    assert source.class_names[9] == "Ankle boot"
    for index in range(0, len(source), 97):
        assert source.read(index).shape == (1, 28, 28)


def places(source):
    return [source.describe(index) for index in range(len(source))]


@pytest.mark.parametrize("name", ["val", "validation", "Test"])
def test_split_folders(tmp_path, make_folder, name):
    names = ["train/cat/1.png", "train/dog/2.png", f"{name}/dog/3.png", "demo/4.png"]
    make_folder(tmp_path, names if name == "Test" else [*names, "test/5.png"])
    train = open_source(tmp_path, "train", labelled=True)
    test = open_source(tmp_path, "test", labelled=True)
    assert places(train) == [str(tmp_path / f"train/{end}") for end in ("cat/1.png", "dog/2.png")]
    assert places(test) == [str(tmp_path / name / "dog/3.png")]
    assert train.labels.tolist() == [0, 1]
    assert test.labels.tolist() == [1]  # the number that the train split gave to "dog"
    assert train.class_names == test.class_names == ("cat", "dog")


@pytest.mark.parametrize("names", [["1.png", "sub/2.png"], ["train/1.png", "car/2.png"]])
def test_folders_without_splits(tmp_path, make_folder, names):
    make_folder(tmp_path, names)
    assert len(open_source(tmp_path, "train", False)) == 2
    with pytest.raises(NoTestSplit, match="no test split; add sub-folders"):
        open_source(tmp_path, "test", False)


@pytest.mark.parametrize(
    ("train", "test"),
    [
        (("data/train-0.parquet", "data/train-1.parquet"), "data/test-0.parquet"),
        (("train/a.parquet", "train/b.parquet"), "valid/0.parquet"),
    ],
)
def test_parquet_files_with_and_without_splits(tmp_path, make_parquet, train, test):
    first = make_parquet(tmp_path / train[0], 3, 0, label=[0, 1, 0])
    make_parquet(tmp_path / train[1], 2, 3, label=[1, 1])
    for data, count in ((first.parent, 5), (first, 3)):
        assert len(open_source(data, "train")) == count
        with pytest.raises(NoTestSplit):
            open_source(data, "test")
    make_parquet(tmp_path / test, 4, 5, label=[0, 1, 1, 1])
    for split, labels in (("train", [0, 1, 0, 1, 1]), ("test", [0, 1, 1, 1])):
        assert open_source(tmp_path, split, labelled=True).labels.tolist() == labels
    assert open_source(tmp_path, "train").labels is None


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("empty", "holds no images; give"),
        ("one.png", "is a single file; give"),
    ],
)
def test_wrong_paths_are_the_users_error(tmp_path, make_folder, users_error, name, message):
    (tmp_path / "empty").mkdir()
    make_folder(tmp_path, ["one.png"])
    line = users_error(lambda: open_source(tmp_path / name, "train"))
    assert f"{tmp_path / name} {message}" in line


def test_subset(tmp_path, make_folder):
    folder = make_folder(tmp_path, ["a/0.png", "a/1.png", "b/2.png", "b/3.png"])
    whole = FolderSource(folder, labelled=True)
    subset = SubsetSource(whole, [3, 0])
    assert subset.labels.tolist() == [1, 0]
    assert subset.class_names == ("a", "b")
    assert places(subset) == [whole.describe(3), whole.describe(0)]
    assert torch.equal(subset.read(0), whole.read(3))
    nested = SubsetSource(subset, np.array([1]))
    assert torch.equal(nested.read(0), whole.read(0))
    assert SubsetSource(FolderSource(folder), [1]).labels is None


def labelled(*labels):
    images = TensorDataset(torch.zeros(len(labels), 1, 2, 2))
    images.targets = labels
    return DatasetSource(images)


def test_a_split_keeps_every_class_share():
    labels = np.random.default_rng(0).permutation(np.repeat([0, 1, 2], [100, 50, 10]))
    source = labelled(*labels)
    train, test = split_source(source, 0.2, seed=3)
    assert np.array_equal(np.sort(np.concatenate([train, test])), np.arange(160))
    assert np.bincount(labels[test]).tolist() == [20, 10, 2]
    assert np.array_equal(split_source(source, 0.2, seed=3)[1], test)
    assert not np.array_equal(split_source(source, 0.2, seed=4)[1], test)


@pytest.mark.parametrize("labels", [None, range(50)])  # no classes, and as many as images
def test_a_split_without_classes(labels):
    source = labelled(*labels) if labels else DatasetSource([None] * 50)
    train, test = split_source(source, 0.1, seed=0)
    assert len(test) == 5
    assert np.array_equal(np.sort(np.concatenate([train, test])), np.arange(50))


def test_the_only_image_of_a_class_is_trained_on():
    train, test = split_source(labelled(*[0] * 10, 1, *[2] * 10), 0.2, seed=0)
    assert 10 in train
    assert len(train) + len(test) == 21


@pytest.mark.parametrize(("count", "share"), [(1, 0.5), (10, 1.5)])
def test_too_few_images_to_split_are_the_users_error(count, share):
    with pytest.raises(UserError, match="give more images or another share"):
        split_source(DatasetSource([None] * count), share, seed=0)


def test_each_broken_file_counts_once_and_one_too_many_stops_the_run():
    broken = BrokenFiles(20, 0.1)
    assert broken.add(["a: empty", "b: empty", "a: empty"]) == ["a: empty", "b: empty"]
    assert broken.add(["b: empty"]) == []
    assert broken.descriptions == ["a: empty", "b: empty"]
    with pytest.raises(UserError, match="3 images can't be read, 2 are allowed: a: empty; b"):
        broken.add(["c: empty"])
    assert BrokenFiles(5, 0.0).add(["a: empty"])  # one is always allowed
