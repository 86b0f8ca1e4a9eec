import pickle

import numpy as np
import pytest
import torch

from backfold.data import loading
from backfold.data.augmentation import Augmentation, cover
from backfold.data.decode import to_channels
from backfold.data.folder import FolderSource
from backfold.data.loading import (
    BatchDataset,
    LoadingError,
    default_workers,
    evaluation_loader,
    training_loader,
)
from backfold.data.source import open_source
from backfold.errors import UserError

PLAIN = Augmentation(random_crop=False, horizontal_flip=False)

# From Python 3.12 on, forking a process with threads warns; torch has threads and forks workers.
pytestmark = pytest.mark.filterwarnings(
    "ignore:This process .* is multi-threaded:DeprecationWarning"
)


@pytest.fixture
def source(tmp_path, make_folder):
    return FolderSource(make_folder(tmp_path, [f"{number:02}.png" for number in range(23)]))


def train(source, start_step=0, total_steps=9, num_workers=0, batch_size=5, **options):
    arguments = {"augmentation": Augmentation(), "seed": 3, **options}
    return list(
        training_loader(
            source,
            (8, 8),
            3,
            batch_size=batch_size,
            start_step=start_step,
            total_steps=total_steps,
            num_workers=num_workers,
            **arguments,
        )
    )


def same(left, right):
    return len(left) == len(right) and all(
        torch.equal(a.images, b.images)
        and torch.equal(a.indices, b.indices)
        and a.broken == b.broken
        for a, b in zip(left, right, strict=True)
    )


def test_batches_hold_the_images_that_their_indices_say(source):
    for batch in train(source, augmentation=PLAIN):
        assert batch.images.shape == (5, 3, 8, 8)
        assert batch.images.dtype == torch.uint8
        assert batch.images.is_contiguous()
        assert batch.indices.dtype == torch.int64
        assert batch.broken == []
        for image, index in zip(batch.images, batch.indices.tolist(), strict=True):
            assert torch.equal(image, cover(source.read(index), (8, 8)))


def test_same_bits_with_and_without_workers(source):
    assert same(train(source), train(source, num_workers=2))


@pytest.mark.parametrize("start_step", [1, 4, 6])
def test_resumption_gives_the_tail(source, start_step):
    whole = train(source)
    assert same(train(source, start_step=start_step), whole[start_step:])
    assert same(train(source, start_step=start_step, num_workers=2), whole[start_step:])


def test_ranks_together_see_what_one_rank_sees(source):
    whole = train(source, batch_size=10)
    ranks = [train(source, batch_size=5, rank=rank, world_size=2) for rank in range(2)]
    for step, batch in enumerate(whole):
        parts = [rank[step] for rank in ranks]
        assert torch.equal(torch.cat([part.indices for part in parts]), batch.indices)
        assert torch.equal(torch.cat([part.images for part in parts]), batch.images)


def test_augmentation_changes_with_epoch_and_seed_only(source):
    dataset = BatchDataset(source, (8, 8), 3, Augmentation(), seed=3)
    alone = dataset[[(1, 7)]].images[0]
    in_company = dataset[[(0, 2), (1, 7), (1, 2)]].images
    assert torch.equal(in_company[1], alone)
    assert not torch.equal(in_company[0], in_company[2])
    other_seed = BatchDataset(source, (8, 8), 3, Augmentation(), seed=4)
    assert not torch.equal(other_seed[[(1, 7)]].images[0], alone)


@pytest.mark.parametrize("num_workers", [0, 2])
def test_the_global_generator_is_left_alone(source, num_workers):
    torch.manual_seed(0)
    before = torch.get_rng_state()
    first = train(source, total_steps=2, num_workers=num_workers)
    assert torch.equal(torch.get_rng_state(), before)
    torch.manual_seed(1)
    assert same(train(source, total_steps=2, num_workers=num_workers), first)


def test_evaluation_is_in_order_and_complete(source):
    for num_workers in (0, 2):
        batches = list(evaluation_loader(source, (8, 8), 1, batch_size=10, num_workers=num_workers))
        assert [len(batch.images) for batch in batches] == [10, 10, 3]
        assert torch.cat([batch.indices for batch in batches]).tolist() == list(range(23))
        images = torch.cat([batch.images for batch in batches])
        for index in range(23):
            expected = cover(to_channels(source.read(index), 1), (8, 8))
            assert torch.equal(images[index], expected)


def test_evaluation_of_some_indices(source):
    indices = np.array([20, 3, 11])
    loader = evaluation_loader(source, (8, 8), 3, batch_size=2, indices=indices)
    assert len(loader) == 2
    batches = list(loader)
    assert torch.cat([batch.indices for batch in batches]).tolist() == [20, 3, 11]
    assert torch.equal(batches[1].images[0], cover(source.read(11), (8, 8)))


def users_error(loader):
    """The message of the UserError that iterating raises."""
    try:
        list(loader)
    except UserError as error:
        # torch's own frames tie the error and the loader's iterator into a cycle; left to the
        # garbage collector, the iterator would wait five seconds for each worker.
        return str(error.with_traceback(None))
    pytest.fail("no UserError was raised")


@pytest.fixture
def partly_broken(tmp_path, make_folder):
    names = [f"{number}.png" for number in range(8)]
    return FolderSource(make_folder(tmp_path, names, broken=("3.png", "4.png", "7.png")))


def test_the_next_readable_image_replaces_a_broken_one(partly_broken):
    (batch,) = evaluation_loader(partly_broken, (8, 8), 3, batch_size=8)
    assert batch.indices.tolist() == [0, 1, 2, 5, 5, 5, 6, 0]
    assert torch.equal(batch.images[3], batch.images[5])
    assert {line.split(": ")[0] for line in batch.broken} == {
        partly_broken.describe(index) for index in (3, 4, 7)
    }
    assert all("not an image" in line for line in batch.broken)
    chosen = evaluation_loader(partly_broken, (8, 8), 3, batch_size=3, indices=[3, 6, 1])
    assert next(iter(chosen)).indices.tolist() == [6, 6, 1]


def test_broken_images_are_replaced_the_same_in_workers(partly_broken):
    alone = train(partly_broken, batch_size=4)
    assert any(batch.broken for batch in alone)
    assert same(alone, train(partly_broken, batch_size=4, num_workers=2))


@pytest.mark.parametrize("num_workers", [0, 2])
def test_nothing_readable_is_the_users_error_in_one_line(tmp_path, make_folder, num_workers):
    names = ["1.png", "2.png"]
    source = FolderSource(make_folder(tmp_path, names, broken=tuple(names)))
    loader = evaluation_loader(source, (8, 8), 3, batch_size=2, num_workers=num_workers)
    reason = f"{source.describe(1)}: not an image in a known format"
    assert users_error(loader) == (
        f"{tmp_path}: 2 images in a row can't be read, the last is {reason}; mend or remove them"
    )


@pytest.mark.parametrize("num_workers", [0, 2])
def test_unfit_channels_are_the_users_error_in_one_line(source, num_workers):
    loader = evaluation_loader(source, (8, 8), 2, batch_size=2, num_workers=num_workers)
    expected = "an image of 3 channels can't be given 2; set --channels to 1 or 3"
    assert users_error(loader) == f"{source.describe(0)}: {expected}"


def test_too_few_images_are_the_users_error(source):
    with pytest.raises(UserError, match=r"23 images are fewer .* 24; lower --batch-size"):
        train(source, batch_size=12, world_size=2)


def test_images_of_several_kinds_share_a_batch(tmp_path, encode):
    random = np.random.default_rng(0)
    deep = random.integers(0, 65536, (8, 8)).astype(np.uint16)
    grey = random.integers(0, 256, (8, 8), dtype=np.uint8)
    (tmp_path / "a.png").write_bytes(encode(deep))
    (tmp_path / "b.png").write_bytes(encode(grey))
    (batch,) = evaluation_loader(FolderSource(tmp_path), (8, 8), 1, batch_size=2)
    expected = np.stack([deep / 65535, grey / 255]).astype(np.float32)
    np.testing.assert_allclose(batch.images[:, 0].numpy(), expected, atol=1e-7)


def test_embedded_images_with_workers():
    source = open_source(None, "train", labelled=True)
    batches = [
        list(training_loader(source, (28, 28), 1, PLAIN, 16, 0, 700, 702, num_workers=workers))
        for workers in (0, 1)
    ]
    assert same(*batches)
    index = int(batches[0][0].indices[3])
    assert torch.equal(batches[0][0].images[3], source.read(index))


def test_dataset_and_error_can_be_pickled(source):
    dataset = BatchDataset(source, (8, 8), 3, Augmentation(), seed=3)
    copy = pickle.loads(pickle.dumps(dataset))
    assert torch.equal(copy[[(0, 1)]].images, dataset[[(0, 1)]].images)
    error = LoadingError("x.png: too blue; paint it")
    assert str(pickle.loads(pickle.dumps(error))) == "x.png: too blue; paint it"


def test_pin_memory_keeps_the_contents(source, monkeypatch):
    # Page-locked memory needs an accelerator: here each tensor's pinning is made visible instead.
    monkeypatch.setattr(torch.Tensor, "pin_memory", lambda tensor: tensor + 1)
    batch = train(source, total_steps=1)[0]
    pinned = batch.pin_memory()
    assert torch.equal(pinned.images, batch.images + 1)
    assert torch.equal(pinned.indices, batch.indices + 1)
    assert pinned.broken == batch.broken


def test_all_cores_but_one_load_up_to_eight_at_least_one(monkeypatch):
    for cores, processes, workers in ((1, 1, 1), (4, 1, 3), (64, 1, 8), (8, 2, 3), (8, 8, 1)):
        monkeypatch.setattr(loading.joblib, "cpu_count", lambda cores=cores: cores)
        assert default_workers(processes) == workers
