"""Folders, parquet files and tar shards as sources of images."""

import io
import json
import pickle
import tarfile

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch
import webdataset
from PIL import Image
from webdataset.tariterators import group_by_keys, tar_file_expander

from backfold.data.decode import decode
from backfold.data.formats import FolderSource, TarSource, open_parquet
from backfold.data.open import open_source
from backfold.data.source import NoTestSplit
from backfold.errors import BrokenImage, UserError


def test_images_at_any_depth_in_path_order(tmp_path, make_folder):
    expected = ["a.png", "b/10.PNG", "b/deep/er/2.tif", "c.jpeg", "d.webp", "e.bmp", "f.tiff"]
    folder = make_folder(tmp_path, [*expected[::-1], "b/.hidden.png", ".cache/x.png"])
    (folder / "notes.txt").write_text("no image")
    source = FolderSource(folder)
    described = [source.describe(index) for index in range(len(source))]
    assert described == [str(folder / name) for name in expected]
    for index, path in enumerate(described):
        pixels = np.array(Image.open(path))
        assert torch.equal(source.read(index), torch.from_numpy(pixels).permute(2, 0, 1))


def test_labels_are_first_level_folders_if_asked_and_possible(tmp_path, make_folder):
    folder = make_folder(tmp_path, ["dog/1.png", "cat/x/2.png", "cat/3.png", "emu/4.png"])
    (folder / "ant").mkdir()  # without images it is no class
    source = FolderSource(folder, labelled=True)
    assert (source.labels.tolist(), source.class_names) == ([0, 0, 1, 2], ("cat", "dog", "emu"))
    assert source.labels.dtype == np.int64
    copy = pickle.loads(pickle.dumps(source))
    assert torch.equal(copy.read(1), source.read(1))
    assert FolderSource(folder).labels is None
    assert FolderSource(folder / "cat", labelled=True).labels is None
    make_folder(tmp_path, ["loose.png"])
    assert FolderSource(folder, labelled=True).class_names == ()


def write_table(path, columns, metadata=None):
    table = pa.table(columns)
    pq.write_table(table.replace_schema_metadata(metadata), path)
    return path


@pytest.fixture
def few(contents):
    return contents[:5]


def test_hugging_face_layout(tmp_path, few):
    features = {"kind": {"names": ["cat", "dog"], "_type": "ClassLabel"}, "more": [{}]}
    metadata = {"huggingface": json.dumps({"info": {"features": features}})}
    images = [{"bytes": content, "path": f"{n}.png"} for n, content in enumerate(few)]
    columns = {"image": images, "kind": [1, 0, 0, 1, 1], "label": [2] * 5}
    source = open_parquet([write_table(tmp_path / "x.parquet", columns, metadata)])
    assert torch.equal(source.read(3), decode(few[3]))
    assert source.labels.tolist() == [1, 0, 0, 1, 1]
    assert source.class_names == ("cat", "dog")


@pytest.mark.parametrize("kind", [pa.binary(), pa.large_binary()])
def test_several_files_and_row_groups(tmp_path, few, kind):
    labels = pa.array([3, 0, 1, 2, 0], pa.int8())
    table = pa.table({"image": pa.array(few, kind), "label": labels})
    files = [tmp_path / "a.parquet", tmp_path / "b.parquet", tmp_path / "c.parquet"]
    pq.write_table(table.slice(0, 3), files[0], row_group_size=2)
    pq.write_table(table.slice(0, 0), files[1])
    pq.write_table(table.slice(3), files[2])
    source = open_parquet(files)
    files[1].with_name("d.parquet").write_bytes(b"no parquet")
    with pytest.raises(UserError, match=r"no readable parquet file .*d\.parquet"):
        open_parquet([*files, tmp_path / "d.parquet"])
    write_table(tmp_path / "d.parquet", {"picture": few})
    with pytest.raises(UserError, match=r"d\.parquet has columns picture but no `image`; rename"):
        open_parquet([*files, tmp_path / "d.parquet"])
    assert [torch.equal(source.read(n), decode(c)) for n, c in enumerate(few)] == [True] * 5
    places = [source.describe(index) for index in range(5)]
    rows = [(0, 0), (0, 1), (0, 2), (2, 0), (2, 1)]
    assert places == [f"{files[number]} row {row}" for number, row in rows]
    assert source.labels.tolist() == [3, 0, 1, 2, 0]
    assert source.class_names == ("0", "1", "2", "3")


@pytest.mark.parametrize("labels", [["a", "b", "c", "d", "e"], [0, 1, None, 2, 0], [-1] * 5])
def test_labels_must_be_counting_numbers_where_they_are_asked_for(tmp_path, few, labels):
    path = write_table(tmp_path / "x.parquet", {"image": few, "label": labels})
    assert open_parquet([path], labelled=False).labels is None
    with pytest.raises(UserError, match=r"`label` is .* or has nulls or .*give integers from 0"):
        open_parquet([path])


def test_files_and_rows_without_a_readable_image_are_broken(tmp_path, few):
    path = write_table(tmp_path / "x.parquet", {"image": [few[0], None, b"nonsense"]})
    rows = open_parquet([path])
    assert (rows.labels, rows.class_names) == (None, ())
    for name, content in (("1.png", few[0]), ("2.png", few[1]), ("3.png", b"nonsense")):
        (tmp_path / name).write_bytes(content)
    files = FolderSource(tmp_path)
    (tmp_path / "2.png").unlink()
    for source, missing in ((rows, "no image in this row"), (files, "No such file")):
        source.read(0)
        for index, message in ((1, missing), (2, "not an image")):
            with pytest.raises(BrokenImage, match=message):
                source.read(index)


@pytest.mark.parametrize(
    ("columns", "message"),
    [
        ({"picture": [b"x"], "label": [0]}, "columns picture, label but no `image`; rename"),
        ({"image": ["1.png"]}, "holds string, not bytes; store"),
        ({"image": pa.array([], pa.binary())}, "no rows; give"),
        (None, "no readable parquet file"),
    ],
)
def test_wrong_files_are_the_users_error(tmp_path, users_error, columns, message):
    path = tmp_path / "x.parquet"
    if columns is None:
        path.write_bytes(b"this is not parquet\n" * 10)
    else:
        write_table(path, columns)
    assert message in users_error(lambda: open_parquet([path]))


def write(path, members, mode="w"):
    """A tar of (name, bytes or link target) members."""
    with tarfile.open(path, mode) as tar:
        for name, content in members:
            member = tarfile.TarInfo(name)
            if isinstance(content, str):
                member.type, member.linkname = tarfile.SYMTYPE, content
                tar.addfile(member)
            else:
                member.size = len(content)
                tar.addfile(member, io.BytesIO(content))
    return path


def test_the_same_samples_as_webdataset_finds(tmp_path, contents):
    path = tmp_path / "000.tar"
    with webdataset.TarWriter(str(path)) as writer:
        for number, content in enumerate(contents):
            writer.write({"__key__": f"{number:04}", "png": content, "cls": number % 3})
    source = TarSource([path], labelled=True)
    with path.open("rb") as stream:  # webdataset itself leaves the file open
        theirs = list(group_by_keys(tar_file_expander([{"url": str(path), "stream": stream}])))
    ours = [source.content(index) for index in range(len(source))]
    assert ours == [sample["png"] for sample in theirs]
    assert source.labels.tolist() == [int(sample["cls"]) for sample in theirs]
    assert source.class_names == ("0", "1", "2")


def labelled(contents, labels, kind="cls"):
    members = []
    for number, label in enumerate(labels):
        members += [(f"{number}.png", contents[number])]
        members += [(f"{number}.{kind}", label)] if label is not None else []
    return members


@pytest.mark.parametrize(
    ("values", "kind", "labels", "names"),
    [
        ([b"dog", b"cat\n", b"dog"], "cls", [1, 0, 1], ("cat", "dog")),
        ([b"2", b"0", b"2"], "cls", [2, 0, 2], ("0", "1", "2")),
        ([b'{"label": 1}', b'{"label": 0}'], "json", [1, 0], ("0", "1")),
    ],
)
def test_labels_by_name_or_number_unless_one_is_missing(
    tmp_path, contents, values, kind, labels, names
):
    source = TarSource([write(tmp_path / "a.tar", labelled(contents, values, kind))], labelled=True)
    assert (source.labels.tolist(), source.class_names) == (labels, names)
    for wrong in (None, b"", b"\xff\xfe"):
        path = write(tmp_path / "b.tar", labelled(contents, [*values, wrong], kind))
        assert TarSource([path], labelled=True).labels is None


def test_links_and_odd_names_reach_nothing_outside(tmp_path, contents):
    (tmp_path / "secret.png").write_bytes(contents[1])
    members = [
        ("link.png", str(tmp_path / "secret.png")), ("../../outside.png", contents[0]),
        ("/absolute.png", contents[2]), ("deep/" * 60 + "real.png", contents[3]),
    ]  # fmt: skip
    path = write(tmp_path / "0.tar", members)
    before = sorted(tmp_path.rglob("*"))
    source = TarSource([path])
    assert [source.content(index) for index in range(len(source))] == [
        contents[number] for number in (0, 2, 3)
    ]
    assert source.describe(2).endswith(members[-1][0])
    assert sorted(tmp_path.rglob("*")) == before


def test_wrong_shards_are_the_users_error(tmp_path, users_error, contents):
    whole = write(tmp_path / "whole.tar", [(f"{n}.png", contents[n]) for n in range(4)])
    content = whole.read_bytes()
    middle = content.index(b"2.png")
    zipped = write(tmp_path / "z.tar", [("1.png", contents[0])], "w:gz").read_bytes()
    none = write(tmp_path / "none.tar", [("1.txt", b"x")]).read_bytes()
    two = [("1.png", contents[0]), ("1.jpg", contents[1])]
    for damaged, message in [
        (content[: middle + 600], "no whole, uncompressed tar"),
        (b"", "no whole, uncompressed tar"),
        (b"this is not a tar\n" * 99, "no whole, uncompressed tar"),
        (zipped, "no whole, uncompressed tar"),
        (content[:middle] + b"\xff" * 8 + content[middle + 8 :], "damaged at byte"),
        (none, "no images; give shards"),
        (write(tmp_path / "two.tar", two).read_bytes(), "has images png and jpg"),
    ]:
        whole.write_bytes(damaged)
        assert message in users_error(lambda: TarSource([whole]))


def test_a_shard_that_changes_later_has_broken_images(tmp_path, contents):
    path = write(tmp_path / "0.tar", [(f"{n}.png", contents[n]) for n in range(4)])
    source = TarSource([path])
    path.write_bytes(path.read_bytes()[:700])
    with pytest.raises(BrokenImage, match="shorter"):
        source.read(3)
    path.unlink()
    with pytest.raises(BrokenImage, match="No such file"):
        source.read(3)


@pytest.mark.parametrize("data", ["{}", "{}/*.tar", "{}/{{train-0,train-1,val-0}}.tar"])
def test_splits_by_names_however_the_shards_are_given(tmp_path, contents, data):
    for name, first in [("train-0", 0), ("train-1", 4), ("val-0", 8)]:
        members = [(f"{n}.PNG", contents[n]) for n in range(first, first + 4)]
        write(tmp_path / f"{name}.tar", [("x.txt", b"no"), *members])
    data = data.format(tmp_path)
    train, test = open_source(data, "train"), open_source(data, "test")
    assert [train.content(n) for n in range(len(train))] == contents[:8]
    assert [test.content(n) for n in range(len(test))] == contents[8:]
    assert train.describe(6) == f"{tmp_path}/train-1.tar member 6.png"
    copy = pickle.loads(pickle.dumps(train))
    assert torch.equal(copy.read(6), decode(contents[6]))
    with pytest.raises(NoTestSplit):
        open_source(f"{tmp_path}/train-{{0..1}}.tar", "test")
