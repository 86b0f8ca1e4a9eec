from types import SimpleNamespace

import numpy as np
import pytest
import torch
from toys import ArraySource

from backfold.data.open import open_source
from backfold.errors import UserError
from backfold.evaluation.evaluate import SEEN, EvaluateSettings, open_parts
from backfold.evaluation.images import Images, Parts
from backfold.evaluation.subject import Subject
from backfold.training.config import PretrainConfig
from backfold.training.images import open_images


def subject(own=None, size=(28, 28), **settings):
    """Of a run on its own data, or of none."""
    run = own and SimpleNamespace(config=PretrainConfig(data=own, num_workers=0, **settings))
    return Subject("toy", {}, lambda _: None, 1, size, None, run=run)


def noise(folder, count=40, seed=0):
    """Images of 28 x 28, half of them in a folder each; as bytes (count, 1, 28, 28)."""
    images = np.random.default_rng(seed).integers(0, 256, (count, 1, 28, 28), np.uint8)
    for number, image in enumerate(images):
        path = folder / "ab"[2 * number // count] / f"{number:02}.npy"
        path.parent.mkdir(parents=True, exist_ok=True)
        np.save(path, image[0])
    return torch.from_numpy(images)


def parts_of(data, judged, **settings):
    return open_parts(EvaluateSettings(data=data, **settings), judged)


def pixels(source):
    return [source.read(place).numpy().tobytes() for place in range(len(source))]


def check(parts, train, test):
    """These are the parts, without a common image; what is chosen on is not learned from."""
    found = pixels(parts.train.source), pixels(parts.test.source)
    assert found == (pixels(train), pixels(test))
    assert not set(found[0]) & set(found[1])
    assert sorted(torch.cat([parts.fit, parts.validation]).tolist()) == [*range(len(train))]
    assert parts.caveat == ""


def test_a_test_split_of_their_own_is_taken(tmp_path):
    noise(tmp_path / "train")
    noise(tmp_path / "test", seed=1)
    for judged in (subject(), subject(tmp_path)):
        expected = (open_source(tmp_path, split) for split in ("train", "test"))
        check(parts_of(tmp_path, judged), *expected)


def test_what_a_run_held_out_is_the_test_part_of_its_own_data(tmp_path):
    noise(tmp_path)
    for given, watch_labels in ((None, True), (str(tmp_path), False)):
        judged = subject(tmp_path, held_out=3, watch_labels=watch_labels, seed=3)
        trained = open_images(judged.run.config)
        check(parts_of(given, judged, seed=5), trained.training, trained.held_out)


def test_a_fifth_of_other_data_is_set_apart(tmp_path):
    noise(tmp_path, 49)
    parts = parts_of(tmp_path, subject(tmp_path.parent / "own"), seed=1)
    assert (len(parts.train), len(parts.test), len(parts.validation)) == (39, 10, 8)
    check(parts_of(tmp_path, subject(), seed=1), parts.train.source, parts.test.source)
    other = parts_of(tmp_path, subject(), seed=2)
    assert pixels(other.test.source) != pixels(parts.test.source)
    for limit in (25, 38, 50):  # 25 of 39 as a share, times 39, is a little more than 25
        assert len(parts_of(tmp_path, subject(), train_images=limit).train) == min(39, limit)


def test_folders_within_each_other_have_a_caveat(tmp_path, caplog):
    noise(tmp_path)
    for run, given in (("", "a"), ("a", "")):
        assert parts_of(tmp_path / given, subject(tmp_path / run)).caveat == SEEN
        assert SEEN in caplog.messages[-1]
    assert parts_of(tmp_path / "b", subject(tmp_path / "a")).caveat == ""


@pytest.mark.parametrize("count", [7, 0.01, 0.1])
def test_draws_hold_so_many_images_of_every_class(count):
    labels = torch.tensor([4] * 15 + [0] * 195 + [7] * 250)
    fit = torch.arange(460)[torch.arange(460) % 7 != 3]
    source = SimpleNamespace(class_names=[*"abcdefgh"])
    parts = Parts(SimpleNamespace(labels=labels, source=source), None, fit, None)
    first, *others = parts.draws(count, 3, 2)
    assert torch.equal(first, fit[torch.isin(fit, first)])  # rising
    for label in (0, 4, 7):  # half up, one at least
        members, drawn = ((labels[places] == label).sum().item() for places in (fit, first))
        assert drawn == (7 if count == 7 else max(1, int(count * members + 0.5)))
    assert torch.equal(parts.draws(count, 1, 2)[0], first)
    assert not any(torch.equal(each, first) for each in (*others, *parts.draws(count, 1, 3)))
    with pytest.raises(UserError, match=r"class e has 1\d images .* than the 16 labels a class"):
        parts.draws(16, 3, 2)
    assert torch.equal(parts.draws(None, 3, 2)[0], fit)


@pytest.mark.parametrize("kept_bytes", [0, 2**29])
def test_broken_files_are_replaced_label_and_all(tmp_path, monkeypatch, kept_bytes):
    monkeypatch.setattr("backfold.evaluation.images.KEPT_BYTES", kept_bytes)
    stands_in = torch.tensor([*range(9), 10, *range(10, 20)])
    truth = noise(tmp_path, 20)[stands_in]
    (tmp_path / "a" / "09.npy").write_bytes(b"torn")
    given = Images(open_source(tmp_path, "train", labelled=True), subject())
    asked = [torch.tensor(each) for each in ([8, 9], [19, 0, 10, 9], [8])]
    for wanted, found in zip(asked, given.batches(asked), strict=True):
        torch.testing.assert_close(found, (truth[wanted], stands_in[wanted]), rtol=0, atol=0)
    assert torch.equal(given.labels, (stands_in >= 10).long())
    few, places = given.load(limit=6)
    assert torch.equal(few, truth[places])


def test_deadly_files_are_counted_and_skipped_until_they_are_too_many(caplog, monkeypatch):
    monkeypatch.setattr("backfold.data.loading.IMAGE_SECONDS", 0.5)
    grey = np.random.default_rng(0).integers(0, 256, (200, 1, 28, 28), np.uint8)

    def loaded(num_workers, count=200, **fates):
        source = ArraySource(grey[:count], np.arange(count) % 2, **fates)
        images = Images(source, subject(), num_workers)
        return images.load()[0], images.labels

    found = loaded(2, crash=(7,), hang=(9,))
    assert [line[:18] for line in caplog.messages] == ["skipped: image 7: ", "skipped: image 9: "]
    assert all(map(torch.equal, found, loaded(0, broken=(7, 9))))
    with pytest.raises(UserError, match="2 images can't be read, 1 are allowed: image 3: ends the"):
        loaded(1, count=24, crash=(3, 7))


def test_mixed_depths_become_floats_of_the_subjects_size(tmp_path):
    for name, value in (("0.npy", np.uint8(51)), ("1.npy", np.float32(0.7))):
        np.save(tmp_path / name, np.full((28, 28), value))
    loaded, _ = Images(open_source(tmp_path, "train"), subject(size=(14, 21))).load()
    assert loaded.sum(dim=(1, 2, 3)).tolist() == pytest.approx([0.2 * 14 * 21, 0.7 * 14 * 21])
