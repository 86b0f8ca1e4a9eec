import importlib.util
from pathlib import Path

import numpy as np
import pytest

from backfold.data.formats import ParquetSource
from backfold.data.open import open_source

SCRIPT = Path(__file__).parents[2] / "scripts/cut_fashion_mnist.py"


@pytest.mark.parametrize(("split", "per_class"), [("train", 1000), ("test", 200)])
def test_counts_and_balance(split, per_class):
    source = open_source(None, split, labelled=True)
    assert len(source) == 10 * per_class
    assert np.bincount(source.labels).tolist() == [per_class] * 10
    assert len(set(source.class_names)) == 10
    assert source.class_names[9] == "Ankle boot"
    for index in range(0, len(source), 97):
        assert source.read(index).shape == (1, 28, 28)


def test_the_script_gives_the_embedded_pixels(tmp_path):
    spec = importlib.util.spec_from_file_location("cut_fashion_mnist", SCRIPT)
    script = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(script)
    if not script.SOURCE.is_dir():
        pytest.skip("Debian's dataset-fashion-mnist is not installed")
    # Pixels, not bytes: other versions of Pillow and pyarrow compress differently.
    new = ParquetSource(script.cut(script.SOURCE, tmp_path, "test"))
    old = open_source(None, "test", labelled=True)
    assert np.array_equal(new.labels, old.labels)
    assert new.class_names == old.class_names
    for index in range(len(old)):
        assert np.array_equal(new.read(index), old.read(index))
