"""Which images are learned from, chosen on and tested on, and that they are what the files hold."""

from types import SimpleNamespace

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch
from PIL import Image

from backfold.data.source import EMBEDDED, open_source
from backfold.errors import UserError
from backfold.evaluation import images
from backfold.evaluation.images import SEEN, Images, Parts, open_parts
from backfold.evaluation.subject import Subject
from backfold.training.config import PretrainConfig
from backfold.training.setup import open_images

COUNT = 120


def subject(run_data="", size=(28, 28), **settings):
    """Grey images; of a run on ``run_data``, or of none."""
    run = None
    if run_data != "":
        run = SimpleNamespace(config=PretrainConfig(data=run_data, num_workers=0, **settings))
    return Subject("toy", {}, lambda _: None, 1, size, None, run=run)


def write(path, count=COUNT, first=0, broken=()):
    """Rows of the embedded sample; broken ones hold no image, and all have labels of their own."""
    rows = pq.read_table(EMBEDDED / "fashion_mnist_train.parquet").slice(first, count).to_pydict()
    column = next(name for name in rows if name != "label")
    for place in broken:
        old = rows[column][place]
        rows[column][place] = {**old, "bytes": b"no"} if isinstance(old, dict) else b"no"
    if broken:
        rows["label"] = [100 + place for place in range(count)]
    path.parent.mkdir(exist_ok=True)
    pq.write_table(pa.table(rows), path)
    return path


@pytest.fixture
def data(tmp_path):
    return write(tmp_path / "images.parquet")


@pytest.fixture
def split_data(tmp_path):
    write(tmp_path / "both" / "train.parquet")
    return write(tmp_path / "both" / "test.parquet", 40, COUNT).parent


def pixels(part):
    """Each image's bytes; images of the sample are all different."""
    return [image.numpy().tobytes() for image in part.load()[0]]


def source_pixels(source):
    return [source.read(place).numpy().tobytes() for place in range(len(source))]


def assert_disjoint(parts):
    assert not set(pixels(parts.train)) & set(pixels(parts.test))
    places = torch.cat([parts.fit, parts.validation])
    assert torch.equal(places.sort().values, torch.arange(len(parts.train)))


def test_a_test_split_of_their_own_is_taken(split_data):
    for judged in (subject(), subject(split_data)):
        parts = open_parts(split_data, judged)
        assert pixels(parts.train) == source_pixels(open_source(split_data, "train"))
        assert pixels(parts.test) == source_pixels(open_source(split_data, "test"))
        assert_disjoint(parts)
        assert parts.caveat == ""


@pytest.mark.parametrize(("held_out", "watch_labels"), [(12, True), (8, True), (11, False)])
def test_what_a_run_held_out_is_the_test_part_of_its_own_data(data, held_out, watch_labels):
    judged = subject(data, held_out=held_out, watch_labels=watch_labels, seed=3)
    trained = open_images(judged.run.config)
    for given in (data, None, str(data)):
        parts = open_parts(given, judged, seed=5)
        assert pixels(parts.test) == source_pixels(trained.held_out)
        assert pixels(parts.train) == source_pixels(trained.training)
        assert_disjoint(parts)
        assert parts.caveat == ""


def test_a_fifth_of_other_data_is_set_apart(data, tmp_path):
    other = write(tmp_path / "other" / "other.parquet", 100, 1000)
    for judged in (subject(), subject(data), subject(None)):
        parts = open_parts(other, judged, seed=1)
        assert (len(parts.train), len(parts.test), parts.caveat) == (80, 20, "")
        every = source_pixels(open_source(other, "train"))
        assert sorted(pixels(parts.train) + pixels(parts.test)) == sorted(every)
        assert_disjoint(parts)
        assert len(parts.validation) == 16
    again, different = (open_parts(other, subject(), seed=seed) for seed in (1, 2))
    assert pixels(again.test) == pixels(parts.test) != pixels(different.test)


@pytest.mark.parametrize(("inner", "outer"), [("run", "data"), ("data", "run")])
def test_folders_within_each_other_have_a_caveat(tmp_path, inner, outer, caplog):
    where = {outer: tmp_path, inner: tmp_path / "a"}
    random = np.random.default_rng(0)
    for number in range(40):
        folder = tmp_path / "ab"[number % 2] / "cd"[number // 2 % 2]
        folder.mkdir(parents=True, exist_ok=True)
        Image.fromarray(random.integers(0, 255, (9, 9), np.uint8)).save(folder / f"{number}.png")
    parts = open_parts(where["data"], subject(where["run"]))
    assert parts.caveat == SEEN
    assert SEEN in caplog.text
    assert_disjoint(parts)
    assert open_parts(tmp_path / "b", subject(tmp_path / "a")).caveat == ""


def test_fewer_training_images(tmp_path):
    data = write(tmp_path / "images.parquet", 49)
    for limit in (7, 25, 38, 50):  # 25 of 39 as a share, times 39, is a little more than 25
        parts = open_parts(data, subject(), limit=limit)
        assert (len(parts.train), len(parts.test)) == (min(39, limit), 10)
        assert_disjoint(parts)


def parts_of(members, validation=5):
    """Labels alone: so many of each class, of which the first of all images are for choices."""
    labels = np.concatenate([np.full(count, label) for label, count in members.items()])
    labels = labels[np.random.default_rng(0).permutation(len(labels))]
    part = SimpleNamespace(labels=torch.from_numpy(labels))
    places = torch.arange(len(labels))
    return Parts(part, part, places[validation:], places[:validation])


@pytest.mark.parametrize("count", [1, 7, 0.01, 0.1, 0.5])
def test_draws_hold_so_many_images_of_every_class(count):
    parts = parts_of({4: 15, 0: 195, 7: 250})
    labels = parts.train.labels
    drawn = parts.draws(count, draws=3, seed=2)
    for places in drawn:
        assert not torch.isin(places, parts.validation).any()
        assert torch.equal(places, places.unique())  # rising
        for label in (0, 4, 7):
            # Half up, by whole numbers; one at least.
            share = (round(200 * count) * int((labels[parts.fit] == label).sum()) + 100) // 200
            expected = count if isinstance(count, int) else max(1, share)
            assert int((labels[places] == label).sum()) == expected
    assert all(torch.equal(*pair) for pair in zip(drawn, parts.draws(count, 3, 2), strict=True))
    assert torch.equal(parts.draws(count, 1, 2)[0], drawn[0])
    others = [*drawn[1:], *parts.draws(count, 3, 3)]
    assert not any(torch.equal(drawn[0], places) for places in others)
    with pytest.raises(UserError, match=r"class 4 has \d+ images .* than the 16 labels a class"):
        parts.draws(16, 3, 2)
    (every,) = parts.draws(None, 3, 2)
    assert torch.equal(every, parts.fit)


@pytest.mark.parametrize("workers", [0, 1])
@pytest.mark.parametrize("kept", [0, 2**29])
def test_broken_files_are_replaced_label_and_all(tmp_path, monkeypatch, workers, kept):
    monkeypatch.setattr(images, "KEPT_BYTES", kept)
    source = open_source(write(tmp_path / "a.parquet", 20, broken=[4]), "train", labelled=True)
    given = Images(source, subject(), workers)
    truth = [source.read(place) for place in range(20) if place != 4]
    truth.insert(4, source.read(5))
    asked = [[3, 4], [19, 0, 5, 4], list(range(8, 12))]
    found = list(given.batches(asked))
    for wanted, (batch, places) in zip(asked, found, strict=True):
        assert batch.dtype == torch.uint8
        assert torch.equal(batch, torch.stack([truth[place] for place in wanted]))
        assert places.tolist() == [5 if place == 4 else place for place in wanted]
    replaced = torch.from_numpy(source.labels)[[5 if place == 4 else place for place in range(20)]]
    assert torch.equal(given.labels, replaced)
    assert source.labels[4] != replaced[4]
    every = given.load()[0]
    assert torch.equal(every, torch.stack(truth))
    few, places = given.load(limit=6, seed=1)
    assert len(few) == len(places) == 6
    assert torch.equal(few, every[places])
    again, other = (given.load(limit=6, seed=seed)[1] for seed in (1, 2))
    assert torch.equal(places, again)
    assert not torch.equal(places, other)


def test_mixed_depths_become_floats_of_the_subjects_size(tmp_path):
    for number in range(3):
        np.save(tmp_path / f"{number}.npy", np.full((28, 28), 51, np.uint8))
    np.save(tmp_path / "3.npy", np.full((28, 28), 0.7, np.float32))
    loaded, _ = Images(open_source(tmp_path, "train"), subject(size=(14, 21))).load()
    assert loaded.shape == (4, 1, 14, 21)
    assert loaded[:, 0, 0, 0].tolist() == pytest.approx([0.2, 0.2, 0.2, 0.7])


def test_bad_images_are_refused(tmp_path):
    path = write(tmp_path / "a.parquet", 40, broken=range(0, 40, 4))
    with pytest.raises(UserError, match="10 images can't be read, 1 are allowed"):
        Images(open_source(path, "train"), subject()).load()
    pq.write_table(pq.read_table(write(path, 40)).drop_columns(["label"]), path)
    parts = open_parts(path, subject())
    with pytest.raises(UserError, match=r"a\.parquet has no labels; give"):
        parts.refuse_unlabelled()
    assert (len(parts.train), len(parts.test), len(parts.validation)) == (32, 8, 7)
    assert_disjoint(parts)
