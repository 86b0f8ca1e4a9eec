import importlib.util
from pathlib import Path

import numpy as np
import pyarrow.parquet as pq
import pytest

import backfold.data.source as source_module
from backfold.data.source import open_source

SCRIPT = Path(__file__).parents[2] / "scripts/cut_fashion_mnist.py"
EMBEDDED = Path(source_module.__file__).with_name("embedded")
FILES = ["fashion_mnist_train.parquet", "fashion_mnist_test.parquet"]


@pytest.fixture(scope="module")
def script():
    spec = importlib.util.spec_from_file_location("cut_fashion_mnist", SCRIPT)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.fixture
def originals(script):
    if not script.SOURCE.is_dir():
        pytest.skip("Debian's dataset-fashion-mnist is not installed")
    return script.SOURCE


@pytest.mark.parametrize(("split", "per_class"), [("train", 1000), ("test", 200)])
def test_counts_and_balance(split, per_class):
    source = open_source(None, split, labelled=True)
    assert len(source) == 10 * per_class
    assert np.bincount(source.labels).tolist() == [per_class] * 10
    assert len(set(source.class_names)) == 10
    assert source.class_names[9] == "Ankle boot"
    for index in range(0, len(source), 97):
        assert source.read(index).shape == (1, 28, 28)
    assert open_source(None, split, labelled=False).labels is None


def test_size_and_licence():
    assert sum((EMBEDDED / file).stat().st_size for file in FILES) <= 6_000_000
    licence = (EMBEDDED / "LICENSE-fashion-mnist.txt").read_text()
    assert "Copyright (c) 2017 Zalando SE" in licence
    assert "cut_fashion_mnist.py" in (EMBEDDED / "ORIGIN.md").read_text()


@pytest.mark.parametrize(("split", "prefix"), [("train", "train"), ("test", "t10k")])
def test_every_image_is_an_original_with_its_label(script, originals, split, prefix):
    images = script.read_idx(originals / f"{prefix}-images-idx3-ubyte.gz")
    labels = script.read_idx(originals / f"{prefix}-labels-idx1-ubyte.gz")
    assert images.shape == (len(labels), 28, 28)
    label_of = {image.tobytes(): label for image, label in zip(images, labels, strict=True)}
    source = open_source(None, split, labelled=True)
    for index in range(0, len(source), 7):
        assert label_of[source.read(index).numpy().tobytes()] == source.labels[index]


def test_regeneration_is_byte_identical(script, originals, tmp_path, capsys):
    for name in ("first", "second"):
        script.main(["--source", str(originals), "--out", str(tmp_path / name)])
    assert "fashion_mnist_test.parquet" in capsys.readouterr().out
    for file in FILES:
        first = (tmp_path / "first" / file).read_bytes()
        assert first == (tmp_path / "second" / file).read_bytes()


def test_regeneration_gives_the_embedded_pixels(script, originals, tmp_path):
    # Pixels, not bytes: other versions of Pillow and pyarrow compress differently.
    path = script.cut(originals, tmp_path, "test")
    new, old = source_module.ParquetSource(path), open_source(None, "test", labelled=True)
    assert np.array_equal(new.labels, old.labels)
    assert new.class_names == old.class_names
    for index in range(len(old)):
        assert np.array_equal(new.read(index), old.read(index))
    assert pq.read_schema(path) == pq.read_schema(EMBEDDED / FILES[1])


def test_missing_originals_are_named(script, tmp_path, capsys):
    with pytest.raises(SystemExit):
        script.main(["--source", str(tmp_path / "nowhere"), "--out", str(tmp_path)])
    assert "apt install dataset-fashion-mnist" in capsys.readouterr().err
