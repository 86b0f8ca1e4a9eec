import itertools
import pickle
import re

import numpy as np
import pytest
import torch

from backfold.data import loading
from backfold.data.augmentation import Augmentation, cover
from backfold.data.decode import to_channels
from backfold.data.formats import FolderSource
from backfold.data.loading import (
    BatchDataset,
    StepSampler,
    default_workers,
    evaluation_batches,
    steps_per_epoch,
    training_loader,
)
from backfold.errors import UserError

PLAIN = Augmentation(random_crop=False, horizontal_flip=False)


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


@pytest.mark.parametrize(("start_step", "num_workers"), [(0, 2), (1, 0), (6, 2)])
def test_workers_and_resumption_change_no_bit(source, start_step, num_workers):
    whole = train(source)
    torch.manual_seed(start_step)
    before = torch.get_rng_state()
    tail = train(source, start_step=start_step, num_workers=num_workers)
    assert same(tail, whole[start_step:])
    assert torch.equal(torch.get_rng_state(), before)


def test_augmentation_changes_with_epoch_and_seed_only(source):
    dataset = BatchDataset(source, (8, 8), 3, Augmentation(), seed=3)
    alone = dataset[[(1, 7)]].images[0]
    in_company = dataset[[(0, 2), (1, 7), (1, 2)]].images
    assert torch.equal(in_company[1], alone)
    assert not torch.equal(in_company[0], in_company[2])
    other_seed = BatchDataset(source, (8, 8), 3, Augmentation(), seed=4)
    assert not torch.equal(other_seed[[(1, 7)]].images[0], alone)


def test_evaluation_is_in_order_and_complete(source):
    for num_workers in (0, 2):
        batches = list(
            evaluation_batches(source, (8, 8), 1, batch_size=10, num_workers=num_workers)
        )
        assert [len(batch.images) for batch in batches] == [10, 10, 3]
        assert torch.cat([batch.indices for batch in batches]).tolist() == list(range(23))
        images = torch.cat([batch.images for batch in batches])
        for index in range(23):
            expected = cover(to_channels(source.read(index), 1), (8, 8))
            assert torch.equal(images[index], expected)


@pytest.fixture
def partly_broken(tmp_path, make_folder):
    names = [f"{number}.png" for number in range(8)]
    return FolderSource(make_folder(tmp_path, names, broken=("3.png", "4.png", "7.png")))


def test_the_next_readable_image_replaces_a_broken_one(partly_broken):
    (batch,) = evaluation_batches(partly_broken, (8, 8), 3, batch_size=8)
    assert batch.indices.tolist() == [0, 1, 2, 5, 5, 5, 6, 0]
    assert torch.equal(batch.images[3], batch.images[5])
    assert {line.split(": ")[0] for line in batch.broken} == {
        partly_broken.describe(index) for index in (3, 4, 7)
    }
    assert all("not an image" in line for line in batch.broken)
    chosen = evaluation_batches(partly_broken, (8, 8), 3, batch_size=3, indices=[3, 6, 1])
    assert next(iter(chosen)).indices.tolist() == [6, 6, 1]


@pytest.mark.parametrize("num_workers", [0, 2])
@pytest.mark.parametrize(
    ("broken", "channels", "message"),
    [
        (("1.png", "2.png"), 3, r"2 images in a row can't .*2\.png: not an image .*; mend or"),
        ((), 2, r"1\.png: an image of 3 channels can't be given 2; set --channels to 1 or 3"),
    ],
)
def test_unfit_images_are_the_users_error_in_one_line(
    tmp_path, make_folder, users_error, num_workers, broken, channels, message
):
    source = FolderSource(make_folder(tmp_path, ["1.png", "2.png"], broken))
    loader = evaluation_batches(source, (8, 8), channels, batch_size=2, num_workers=num_workers)
    assert re.search(message, users_error(lambda: list(loader)))


def test_images_of_several_kinds_share_a_batch(tmp_path, encode):
    random = np.random.default_rng(0)
    deep = random.integers(0, 65536, (8, 8)).astype(np.uint16)
    grey = random.integers(0, 256, (8, 8), dtype=np.uint8)
    (tmp_path / "a.png").write_bytes(encode(deep))
    (tmp_path / "b.png").write_bytes(encode(grey))
    (batch,) = evaluation_batches(FolderSource(tmp_path), (8, 8), 1, batch_size=2)
    expected = np.stack([deep / 65535, grey / 255]).astype(np.float32)
    np.testing.assert_allclose(batch.images[:, 0].numpy(), expected, atol=1e-7)


def test_the_dataset_can_be_pickled(source):
    dataset = BatchDataset(source, (8, 8), 3, Augmentation(), seed=3)
    copy = pickle.loads(pickle.dumps(dataset))
    assert torch.equal(copy[[(0, 1)]].images, dataset[[(0, 1)]].images)


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


def steps(count=23, batch_size=5, seed=0, start_step=0, total_steps=11, **ranks):
    return list(StepSampler(count, batch_size, seed, start_step, total_steps, **ranks))


def test_every_epoch_is_a_part_of_a_permutation():
    all_steps = steps()
    assert len(all_steps) == 11
    assert {index for keys in steps(total_steps=40) for _, index in keys} == set(range(23))
    assert {len(keys) for keys in all_steps} == {5}
    keys_of_epoch = {}
    for step, keys in enumerate(all_steps):
        assert {epoch for epoch, _ in keys} == {step // 4}  # 23 images make 4 batches of 5
        keys_of_epoch.setdefault(step // 4, []).extend(index for _, index in keys)
    for indices in keys_of_epoch.values():
        assert len(set(indices)) == len(indices)
        assert set(indices) <= set(range(23))
    first, second = keys_of_epoch[0], keys_of_epoch[1]
    assert first != second
    assert first != sorted(first)


def test_seed_decides_the_order():
    assert steps(seed=1) == steps(seed=1)
    assert steps(seed=1) != steps(seed=2)
    # Epoch 1 of seed 0 is not epoch 0 of seed 1.
    plain = [[index for _, index in keys] for keys in steps(seed=0, total_steps=8)[4:]]
    assert plain != [[index for _, index in keys] for keys in steps(seed=1, total_steps=4)]


@pytest.mark.parametrize("world_size", [2, 3])
def test_ranks_share_each_global_batch(world_size):
    one_rank = steps(count=40, batch_size=4 * world_size)
    ranks = [
        steps(count=40, batch_size=4, rank=rank, world_size=world_size)
        for rank in range(world_size)
    ]
    for step, whole in enumerate(one_rank):
        shares = [rank[step] for rank in ranks]
        assert {len(share) for share in shares} == {4}
        for left, right in itertools.combinations(shares, 2):
            assert not set(left) & set(right)
        assert set().union(*shares) == set(whole)


def test_wrong_numbers_are_the_users_error():
    with pytest.raises(UserError, match=r"7 images are fewer .* 8; lower --batch-size"):
        StepSampler(7, 4, 0, 0, 10, world_size=2)
    assert steps_per_epoch(23, 5) == 4
    with pytest.raises(UserError, match="seed is -1; give 0 or more"):
        StepSampler(7, 4, -1, 0, 10)
