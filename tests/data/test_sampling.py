import itertools

import numpy as np
import pytest

from backfold.data.sampling import InOrderSampler, StepSampler, steps_per_epoch
from backfold.errors import UserError


def steps(count=23, batch_size=5, seed=0, start_step=0, total_steps=11, **ranks):
    return list(StepSampler(count, batch_size, seed, start_step, total_steps, **ranks))


def test_every_epoch_is_a_part_of_a_permutation():
    all_steps = steps()
    assert len(all_steps) == 11
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


def test_dropped_images_return_in_other_epochs():
    seen = {index for keys in steps(total_steps=40) for _, index in keys}
    assert seen == set(range(23))


def test_seed_decides_the_order():
    assert steps(seed=1) == steps(seed=1)
    assert steps(seed=1) != steps(seed=2)
    # Epoch 1 of seed 0 is not epoch 0 of seed 1.
    plain = [[index for _, index in keys] for keys in steps(seed=0, total_steps=8)[4:]]
    assert plain != [[index for _, index in keys] for keys in steps(seed=1, total_steps=4)]


@pytest.mark.parametrize("start_step", range(12))
def test_resumption_gives_the_tail(start_step):
    assert steps(start_step=start_step) == steps()[start_step:]
    assert len(StepSampler(23, 5, 0, start_step, 11)) == 11 - start_step


def test_a_finished_run_has_no_steps():
    assert steps(start_step=12) == []
    assert len(StepSampler(23, 5, 0, 12, 11)) == 0


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


def test_order_looks_uniform():
    firsts = [
        steps(count=4, batch_size=1, seed=seed, total_steps=1)[0][0][1] for seed in range(800)
    ]
    counts = np.bincount(firsts, minlength=4)
    assert np.all(np.abs(counts - 200) < 5 * np.sqrt(200 * 0.75))


def test_steps_per_epoch():
    assert steps_per_epoch(23, 5) == 4
    assert steps_per_epoch(5, 5) == 1
    with pytest.raises(UserError, match=r"4 images are fewer .* of 5; lower --batch-size"):
        steps_per_epoch(4, 5)


def test_wrong_numbers_are_the_users_error():
    with pytest.raises(UserError, match=r"7 images are fewer .* 8; lower --batch-size"):
        StepSampler(7, 4, 0, 0, 10, world_size=2)
    with pytest.raises(UserError, match="seed is -1; give 0 or more"):
        StepSampler(7, 4, -1, 0, 10)


def test_in_order_sampler():
    sampler = InOrderSampler(7, 3)
    assert len(sampler) == 3
    assert list(sampler) == [[(0, 0), (0, 1), (0, 2)], [(0, 3), (0, 4), (0, 5)], [(0, 6)]]
