import json
import pickle

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch

from backfold.data.decode import decode
from backfold.data.parquet import ParquetSource
from backfold.errors import BrokenImage, UserError


def write(path, columns, metadata=None):
    table = pa.table(columns)
    pq.write_table(table.replace_schema_metadata(metadata), path)
    return path


@pytest.fixture
def contents(encode):
    random = np.random.default_rng(0)
    return [encode(random.integers(0, 256, (6, 7, 3), dtype=np.uint8)) for _ in range(5)]


@pytest.mark.parametrize("kind", [pa.binary(), pa.large_binary()])
def test_bytes_column(tmp_path, contents, kind):
    path = write(tmp_path / "x.parquet", {"image": pa.array(contents, kind)})
    source = ParquetSource(path)
    assert len(source) == 5
    assert source.labels is None
    assert source.class_names == ()
    for index, content in enumerate(contents):
        assert torch.equal(source.read(index), decode(content))


def test_hugging_face_layout(tmp_path, contents):
    features = {"label": {"names": ["cat", "dog"], "_type": "ClassLabel"}}
    metadata = {"huggingface": json.dumps({"info": {"features": features}})}
    images = [{"bytes": content, "path": f"{n}.png"} for n, content in enumerate(contents)]
    path = write(tmp_path / "x.parquet", {"image": images, "label": [1, 0, 0, 1, 1]}, metadata)
    source = ParquetSource(path)
    assert torch.equal(source.read(3), decode(contents[3]))
    assert source.labels.tolist() == [1, 0, 0, 1, 1]
    assert source.labels.dtype == np.int64
    assert source.class_names == ("cat", "dog")


def test_several_files_and_row_groups(tmp_path, contents):
    table = pa.table({"image": contents, "label": pa.array([3, 0, 1, 2, 0], pa.int8())})
    files = [tmp_path / "a.parquet", tmp_path / "b.parquet", tmp_path / "c.parquet"]
    pq.write_table(table.slice(0, 3), files[0], row_group_size=2)
    pq.write_table(table.slice(0, 0), files[1])
    pq.write_table(table.slice(3), files[2])
    source = ParquetSource(files)
    assert [torch.equal(source.read(n), decode(c)) for n, c in enumerate(contents)] == [True] * 5
    places = [source.describe(index) for index in range(5)]
    assert places == [
        f"{file} row {row}"
        for file, row in [(files[0], 0), (files[0], 1), (files[0], 2), (files[2], 0), (files[2], 1)]
    ]
    assert source.labels.tolist() == [3, 0, 1, 2, 0]
    assert source.class_names == ("0", "1", "2", "3")


def test_labels_are_not_read_unless_asked(tmp_path, contents):
    path = write(tmp_path / "x.parquet", {"image": contents, "label": [-1] * 5})
    assert ParquetSource(path, labelled=False).labels is None
    with pytest.raises(UserError, match="`label` is int64 or has nulls or negative numbers"):
        ParquetSource(path)


@pytest.mark.parametrize("labels", [["a", "b", "c", "d", "e"], [0, 1, None, 2, 0], [0.5] * 5])
def test_labels_must_be_counting_numbers(tmp_path, contents, labels):
    path = write(tmp_path / "x.parquet", {"image": contents, "label": labels})
    with pytest.raises(UserError, match="give integers from 0"):
        ParquetSource(path)


def test_rows_without_a_readable_image_are_broken(tmp_path, contents):
    path = write(tmp_path / "x.parquet", {"image": [contents[0], None, b"nonsense"]})
    source = ParquetSource(path)
    source.read(0)
    with pytest.raises(BrokenImage, match="no image in this row"):
        source.read(1)
    with pytest.raises(BrokenImage, match="not an image"):
        source.read(2)


def test_wrong_files_are_the_users_error(tmp_path, contents):
    no_image = write(tmp_path / "a.parquet", {"picture": contents, "label": [0] * 5})
    with pytest.raises(UserError, match="columns picture, label but no `image`; rename"):
        ParquetSource(no_image)
    paths = write(tmp_path / "b.parquet", {"image": ["1.png", "2.png"]})
    with pytest.raises(UserError, match="holds string, not bytes; store"):
        ParquetSource(paths)
    empty = write(tmp_path / "c.parquet", {"image": pa.array([], pa.binary())})
    with pytest.raises(UserError, match="no rows; give"):
        ParquetSource(empty)
    garbage = tmp_path / "d.parquet"
    garbage.write_bytes(b"this is not parquet\n" * 10)
    with pytest.raises(UserError, match="no readable parquet file") as caught:
        ParquetSource(garbage)
    assert "\n" not in str(caught.value)


def test_pickle_round_trip(tmp_path, contents):
    source = ParquetSource(write(tmp_path / "x.parquet", {"image": contents, "label": [0] * 5}))
    copy = pickle.loads(pickle.dumps(source))
    assert torch.equal(copy.read(4), source.read(4))
    assert copy.describe(4) == source.describe(4)
