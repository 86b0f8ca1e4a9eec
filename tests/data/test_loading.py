import itertools
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
    default_workers,
    evaluation_batches,
    step_keys,
    steps_per_epoch,
    training_loader,
)
from backfold.data.source import SubsetSource
from backfold.errors import UserError


@pytest.fixture
def source(tmp_path, make_folder):
    return FolderSource(make_folder(tmp_path, [f"{number:02}.png" for number in range(23)]))


def train(source, start_step=0, workers=0):
    changes = Augmentation()
    return list(training_loader(source, (8, 8), 3, changes, 5, 3, start_step, 9, 0, 1, workers))


def contents(batches):
    return [(batch.images.tolist(), batch.indices.tolist(), batch.broken) for batch in batches]


@pytest.mark.parametrize(("start_step", "num_workers"), [(0, 2), (1, 0), (6, 2)])
def test_workers_and_resumption_change_no_bit(source, start_step, num_workers):
    whole = contents(train(source))
    torch.manual_seed(start_step)
    before = torch.get_rng_state()
    assert contents(train(source, start_step, num_workers)) == whole[start_step:]
    assert torch.equal(torch.get_rng_state(), before)


def test_augmentation_changes_with_epoch_and_seed_only(source):
    dataset, other = (BatchDataset(source, (8, 8), 3, Augmentation(), seed) for seed in (3, 4))
    alone = dataset[[(1, 7)]].images[0]
    in_company = dataset[[(0, 2), (1, 7), (1, 2)]].images
    assert torch.equal(in_company[1], alone)
    assert not torch.equal(in_company[0], in_company[2])
    assert not torch.equal(other[[(1, 7)]].images[0], alone)


@pytest.mark.parametrize("num_workers", [0, 2])
def test_evaluation_is_in_order_and_complete(source, num_workers):
    batches = list(evaluation_batches(source, (8, 8), 1, 10, num_workers))
    assert [len(batch.images) for batch in batches] == [10, 10, 3]
    assert torch.cat([batch.indices for batch in batches]).tolist() == list(range(23))
    images = torch.cat([batch.images for batch in batches])
    assert images.dtype == torch.uint8
    for index, image in enumerate(images):
        assert torch.equal(image, cover(to_channels(source.read(index), 1), (8, 8)))


def test_the_next_readable_image_replaces_a_broken_one(tmp_path, make_folder):
    names = [f"{number}.png" for number in range(8)]
    source = FolderSource(make_folder(tmp_path, names, broken=("3.png", "4.png", "7.png")))
    (batch,) = evaluation_batches(source, (8, 8), 3, 8)
    assert batch.indices.tolist() == [0, 1, 2, 5, 5, 5, 6, 0]
    assert torch.equal(batch.images[3], batch.images[5])
    reason = "not an image in a known format"
    assert set(batch.broken) == {f"{source.describe(index)}: {reason}" for index in (3, 4, 7)}
    (chosen,) = evaluation_batches(SubsetSource(source, [3, 6, 1]), (8, 8), 3, [[0, 1, 2]])
    assert chosen.indices.tolist() == [1, 1, 2]


@pytest.mark.parametrize("num_workers", [0, 2])
@pytest.mark.parametrize(
    ("broken", "channels", "message"),
    [
        (("1.png", "2.png"), 3, r"2 images in a row can't .*2\.png: not an image .*; mend or"),
        (
            (),
            2,
            r"1\.png: an image of 3 channels can't be given 2; it fits runs of",
        ),
    ],
)
def test_unfit_images_are_the_users_error_in_one_line(
    tmp_path, make_folder, users_error, num_workers, broken, channels, message
):
    source = FolderSource(make_folder(tmp_path, ["1.png", "2.png"], broken))
    loader = evaluation_batches(source, (8, 8), channels, 2, num_workers)
    assert re.search(message, users_error(lambda: list(loader)))


def test_images_of_several_kinds_share_a_batch(tmp_path, encode):
    random = np.random.default_rng(0)
    deep = random.integers(0, 65536, (8, 8)).astype(np.uint16)
    grey = random.integers(0, 256, (8, 8), dtype=np.uint8)
    (tmp_path / "a.png").write_bytes(encode(deep))
    (tmp_path / "b.png").write_bytes(encode(grey))
    (batch,) = evaluation_batches(FolderSource(tmp_path), (8, 8), 1, 2)
    expected = np.stack([deep / 65535, grey / 255]).astype(np.float32)
    np.testing.assert_allclose(batch.images[:, 0].numpy(), expected, atol=1e-7)


def test_all_cores_but_one_load_up_to_eight_at_least_one(monkeypatch):
    for cores, processes, workers in ((1, 1, 1), (4, 1, 3), (64, 1, 8), (8, 2, 3), (8, 8, 1)):
        monkeypatch.setattr(loading.joblib, "cpu_count", lambda cores=cores: cores)
        assert default_workers(processes) == workers


def steps(count=23, batch_size=5, seed=0, total_steps=11, **ranks):
    return list(step_keys(count, batch_size, seed, 0, total_steps, **ranks))


def test_every_epoch_is_a_part_of_a_permutation():
    all_steps = steps(total_steps=40)
    assert {index for keys in all_steps for _, index in keys} == set(range(23))
    epochs = []
    for epoch in range(10):  # 23 images make 4 batches of 5
        keys = all_steps[4 * epoch :][:4]
        assert [len(batch) for batch in keys] == [5] * 4
        assert {number for batch in keys for number, _ in batch} == {epoch}
        epochs.append([index for batch in keys for _, index in batch])
        assert len(set(epochs[-1])) == 20
    assert epochs[0] != epochs[1]
    assert epochs[0] != sorted(epochs[0])


def test_seed_decides_the_order():
    assert steps(seed=1) == steps(seed=1)
    assert steps(seed=1) != steps(seed=2)
    # Epoch 1 of seed 0 is not epoch 0 of seed 1.
    plain = [[index for _, index in keys] for keys in steps(seed=0, total_steps=8)[4:]]
    assert plain != [[index for _, index in keys] for keys in steps(seed=1, total_steps=4)]


@pytest.mark.parametrize("world_size", [2, 3])
def test_ranks_share_each_global_batch(world_size):
    one_rank = steps(count=40, batch_size=4 * world_size)
    ranks = [steps(40, 4, rank=rank, world_size=world_size) for rank in range(world_size)]
    for whole, *shares in zip(one_rank, *ranks, strict=True):
        assert {len(share) for share in shares} == {4}
        assert sorted(itertools.chain(*shares)) == sorted(whole)


def test_too_few_images_for_a_batch_are_the_users_error():
    with pytest.raises(UserError, match=r"7 images are fewer .* 8; lower --batch-size"):
        steps(7, 4, world_size=2)
    assert steps_per_epoch(23, 5) == 4
