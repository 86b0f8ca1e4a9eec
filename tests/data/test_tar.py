import io
import json
import pickle
import tarfile

import numpy as np
import pytest
import torch
import webdataset
from webdataset.tariterators import group_by_keys, tar_file_expander

from backfold.data.augmentation import Augmentation
from backfold.data.decode import decode
from backfold.data.loading import training_loader
from backfold.data.source import NoTestSplit, open_source
from backfold.data.tar import TarSource
from backfold.errors import BrokenImage, UserError

pytestmark = pytest.mark.filterwarnings(
    "ignore:This process .* is multi-threaded:DeprecationWarning"
)


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


@pytest.fixture
def contents(encode):
    random = np.random.default_rng(0)
    return [encode(random.integers(0, 256, (6, 7, 3), dtype=np.uint8)) for _ in range(12)]


def test_every_image_is_found_where_it_lies(tmp_path, contents):
    first = write(tmp_path / "0.tar", [(f"a/{n}.png", contents[n]) for n in range(5)])
    second = write(
        tmp_path / "1.tar", [("x.txt", b"no"), *((f"{n}.PNG", contents[n]) for n in range(5, 12))]
    )
    source = TarSource([first, second])
    assert len(source) == 12
    for index, content in enumerate(contents):
        assert source.content(index) == content
        assert torch.equal(source.read(index), decode(content))
    assert source.describe(3) == f"{first} member a/3.png"
    assert source.describe(6) == f"{second} member 6.png"
    assert source.labels is None
    copy = pickle.loads(pickle.dumps(source))
    assert copy.content(7) == contents[7]


def test_the_same_samples_as_webdataset_finds(tmp_path, contents):
    path = tmp_path / "000.tar"
    with webdataset.TarWriter(str(path)) as writer:
        for number, content in enumerate(contents):
            writer.write(
                {"__key__": f"{number:04}", "png": content, "cls": number % 3, "json": {"a": 1}}
            )
    source = TarSource([path], labelled=True)
    with path.open("rb") as stream:  # webdataset itself leaves the file open
        files = tar_file_expander([{"url": str(path), "stream": stream}])
        theirs = list(group_by_keys(files))
    assert len(theirs) == len(source)
    for index, sample in enumerate(theirs):
        assert source.content(index) == sample["png"]
        assert source.labels[index] == int(sample["cls"])
    assert source.class_names == ("0", "1", "2")


def test_long_names_and_other_formats_of_tar(tmp_path, contents):
    name = "deep/" * 60 + "picture.png"
    for kind in (tarfile.GNU_FORMAT, tarfile.PAX_FORMAT):
        path = tmp_path / f"{kind}.tar"
        with tarfile.open(path, "w", format=kind) as tar:
            member = tarfile.TarInfo(name)
            member.size = len(contents[0])
            tar.addfile(member, io.BytesIO(contents[0]))
        source = TarSource([path])
        assert source.content(0) == contents[0]
        assert source.describe(0).endswith(name)


def labelled(contents, labels, kind="cls"):
    members = []
    for number, label in enumerate(labels):
        members += [(f"{number}.png", contents[number])]
        members += [(f"{number}.{kind}", label)] if label is not None else []
    return members


def test_labels_by_name_or_number(tmp_path, contents):
    path = write(tmp_path / "a.tar", labelled(contents, [b"dog", b"cat\n", b"dog"]))
    source = TarSource([path], labelled=True)
    assert source.class_names == ("cat", "dog")
    assert source.labels.tolist() == [1, 0, 1]
    path = write(tmp_path / "b.tar", labelled(contents, [b"2", b"0", b"2"]))
    source = TarSource([path], labelled=True)
    assert (source.labels.tolist(), source.class_names) == ([2, 0, 2], ("0", "1", "2"))
    values = [json.dumps({"label": label}).encode() for label in (1, 0)]
    source = TarSource([write(tmp_path / "c.tar", labelled(contents, values, "json"))], True)
    assert source.labels.tolist() == [1, 0]


@pytest.mark.parametrize("wrong", [None, b"", b"\xff\xfe"])
def test_no_labels_where_one_is_missing_or_none_is_asked(tmp_path, contents, wrong):
    path = write(tmp_path / "a.tar", labelled(contents, [b"1", wrong, b"0"]))
    assert TarSource([path], labelled=True).labels is None
    assert TarSource([path]).labels is None


def test_links_and_odd_names_reach_nothing_outside(tmp_path, contents, monkeypatch):
    secret = tmp_path / "secret.png"
    secret.write_bytes(contents[1])
    folder = tmp_path / "shards"
    folder.mkdir()
    path = write(
        folder / "0.tar",
        [
            ("link.png", str(secret)),
            ("../../outside.png", contents[0]),
            ("/absolute.png", contents[2]),
            ("real.png", contents[3]),
        ],
    )
    before = sorted(tmp_path.rglob("*"))
    monkeypatch.setattr(tarfile.TarFile, "extract", lambda *_: pytest.fail("extracted"))
    monkeypatch.setattr(tarfile.TarFile, "extractall", lambda *_: pytest.fail("extracted"))
    source = TarSource([path])
    found = [source.content(index) for index in range(len(source))]
    assert contents[1] not in found
    assert contents[3] in found
    assert sorted(tmp_path.rglob("*")) == before


def test_wrong_shards_are_the_users_error(tmp_path, contents):
    whole = write(tmp_path / "whole.tar", [(f"{n}.png", contents[n]) for n in range(4)])
    content = whole.read_bytes()
    middle = content.index(b"2.png")
    cases = {
        "no whole, uncompressed tar": write(tmp_path / "z.tar", [("1.png", contents[0])], "w:gz"),
        "no images; give shards": write(tmp_path / "none.tar", [("1.txt", b"x")]),
        "has images png and jpg": write(
            tmp_path / "two.tar", [("1.png", contents[0]), ("1.jpg", contents[1])]
        ),
    }
    for name, damaged in {
        "short.tar": content[: middle + 600],
        "empty.tar": b"",
        "text.tar": b"this is not a tar\n" * 99,
        "hole.tar": content[:middle] + b"\xff" * 8 + content[middle + 8 :],
    }.items():
        (tmp_path / name).write_bytes(damaged)
    for name in ("short.tar", "empty.tar", "text.tar"):
        with pytest.raises(UserError, match="no whole, uncompressed tar"):
            TarSource([tmp_path / name])
    with pytest.raises(UserError, match="damaged at byte"):
        TarSource([tmp_path / "hole.tar"])
    for message, path in cases.items():
        with pytest.raises(UserError, match=message) as caught:
            TarSource([path])
        assert "\n" not in str(caught.value)


def test_a_shard_that_changes_later_has_broken_images(tmp_path, contents):
    path = write(tmp_path / "0.tar", [(f"{n}.png", contents[n]) for n in range(4)])
    source = TarSource([path])
    path.write_bytes(path.read_bytes()[:700])
    with pytest.raises(BrokenImage, match="shorter"):
        source.read(3)
    path.unlink()
    with pytest.raises(BrokenImage, match="No such file"):
        source.read(3)


@pytest.fixture
def split_shards(tmp_path, contents):
    for name, first in [("train-0", 0), ("train-1", 4), ("val-0", 8)]:
        write(
            tmp_path / f"{name}.tar", [(f"{n}.png", contents[n]) for n in range(first, first + 4)]
        )
    return tmp_path


@pytest.mark.parametrize("data", ["{}", "{}/*.tar", "{}/{{train-0,train-1,val-0}}.tar"])
def test_splits_by_names_however_the_shards_are_given(split_shards, contents, data):
    data = data.format(split_shards)
    train, test = open_source(data, "train"), open_source(data, "test")
    assert [train.content(n) for n in range(len(train))] == contents[:8]
    assert [test.content(n) for n in range(len(test))] == contents[8:]


def test_a_brace_range_without_splits(split_shards):
    data = f"{split_shards}/train-{{0..1}}.tar"
    assert len(open_source(data, "train")) == 8
    with pytest.raises(NoTestSplit):
        open_source(data, "test")


def test_training_resumes_exactly_and_ranks_share(split_shards):
    source = open_source(split_shards, "train")

    def run(start=0, num_workers=0, **ranks):
        loader = training_loader(
            source, (4, 4), 3, Augmentation(), 2, 0, start, 9, num_workers=num_workers, **ranks
        )
        return [(batch.indices.tolist(), batch.images) for batch in loader]

    whole = run()
    tail = run(start=5, num_workers=2)
    assert [a for a, _ in tail] == [a for a, _ in whole[5:]]
    assert all(torch.equal(a, b) for (_, a), (_, b) in zip(tail, whole[5:], strict=True))
    left, right = run(rank=0, world_size=2), run(rank=1, world_size=2)
    for (one, _), (other, _) in zip(left, right, strict=True):
        assert not set(one) & set(other)
