import math
from collections import deque

import numpy as np
import pytest
import torch

from backfold.data.augmentation import Augmentation
from backfold.data.decode import BrokenImage
from backfold.errors import UserError
from backfold.training import loading_plan
from backfold.training.loading_plan import (
    MAX_BYTES,
    LoadingPlan,
    LoadTime,
    describe_plan,
    loading_warning,
    measure_loading,
    plan_workers,
    usable_cores,
)

BATCH = 16
STEPS = 120


def plan(load, train, cores, on_cpu, batch_bytes=1000, **chosen):
    return plan_workers(
        load, train, cores, on_cpu, batch_size=BATCH, batch_bytes=batch_bytes, **chosen
    )


def watched_wait_share(load, train, cores, on_cpu, plan, seed=0):
    """A slow reference: a DataLoader's workers and training, followed in small slices of time.

    Batches go to the workers in turn and are taken in order; taking one sends its worker another.
    On a CPU, training goes on with the cores that busy workers leave, and waits without any.
    """
    random = np.random.default_rng(seed)
    count = STEPS + plan.workers * plan.prefetch
    images = np.full((count, BATCH), load.mean)
    if load.std:
        shape = (load.mean / load.std) ** 2
        images = random.gamma(shape, load.mean / shape, (count, BATCH))
    unloaded = images.sum(axis=1)
    queues = [deque() for _ in range(plan.workers)]
    for batch in range(plan.workers * plan.prefetch):
        queues[batch % plan.workers].append(batch)
    taken, training_left = 0, 0.0
    trained = waited = 0.0
    slice_of_time = BATCH * min(train, load.mean) / 40
    while taken < STEPS:
        busy = [queue for queue in queues if queue]
        for queue in busy:
            unloaded[queue[0]] -= slice_of_time
            if unloaded[queue[0]] <= 0:
                queue.popleft()
        counted = slice_of_time if taken >= STEPS // 4 else 0.0
        if training_left <= 0 and unloaded[taken] <= 0:
            queues[taken % plan.workers].append(taken + plan.workers * plan.prefetch)
            taken, training_left = taken + 1, training_left + BATCH * train
        if training_left > 0:
            trained += counted
            training_left -= slice_of_time * ((cores - len(busy)) / cores if on_cpu else 1.0)
        else:
            waited += counted
    return waited / (waited + trained)


@pytest.mark.parametrize("on_cpu", [False, True])
@pytest.mark.parametrize("cores", [2, 4, 12])
@pytest.mark.parametrize("train", [1.0, 3.0, 9.0])
@pytest.mark.parametrize("load", [LoadTime(0.5, 0.25), LoadTime(5.0, 4.0), LoadTime(30.0, 15.0)])
def test_waiting_is_as_expected(load, train, cores, on_cpu):
    made = plan(load, train, cores, on_cpu)
    assert 1 <= made.workers <= cores - 1
    watched = watched_wait_share(load, train, cores, on_cpu, made)
    if made.wait_share == 0.0:
        assert watched < 0.05
    else:
        assert watched == pytest.approx(made.wait_share, abs=0.05)
        assert made.workers == cores - 1  # what there is, is used


@pytest.mark.parametrize("on_cpu", [False, True])
@pytest.mark.parametrize("load", [0.4, 2.0, 7.0])
def test_no_fewer_workers_would_do_with_the_same_headroom(load, on_cpu):
    cores, train = 32, 1.0
    made = plan(LoadTime(load), train, cores, on_cpu)
    enough = [
        workers
        for workers in range(1, cores)
        # 25 % slower loading, as the plan allows for, must not make training wait either.
        if watched_wait_share(
            LoadTime(1.25 * load), train, cores, on_cpu, LoadingPlan(workers, 2, 0.0)
        )
        < 0.02
    ]
    # On a CPU slower loading also slows training, so a little less than that allowance is needed.
    assert min(enough) in ((made.workers - 1, made.workers) if on_cpu else (made.workers,))


def test_workers_on_a_cpu_are_fewer_as_training_slows_down_with_them():
    load, cores = LoadTime(20.0), 8
    on_gpu, on_cpu = (plan(load, 5.0, cores, where).workers for where in (False, True))
    assert on_gpu == 5  # 4 to keep up, a quarter more to spare
    assert on_cpu == 4  # 8 cores do 20 + 8 * 5 core seconds an image: 2.7 of them load


@pytest.mark.parametrize(("on_cpu", "workers"), [(True, 0), (False, 1)])
def test_one_core(on_cpu, workers):
    made = plan(LoadTime(1.0), 3.0, 1, on_cpu)
    assert made.workers == workers
    # On the CPU nothing overlaps; a GPU trains while the one core loads.
    assert made.wait_share == (0.25 if on_cpu else 0.0)


def test_uneven_loading_is_loaded_further_ahead():
    train, cores = 1.0, 3
    even, uneven = LoadTime(1.9, 0.0), LoadTime(1.9, 1.3)
    assert plan(even, train, cores, on_cpu=False).prefetch == 2
    made = plan(uneven, train, cores, on_cpu=False)
    assert made.workers == 2
    assert 2 < made.prefetch <= 16
    short = LoadingPlan(made.workers, 1, 0.0)
    watched = [
        np.mean([watched_wait_share(uneven, train, cores, False, p, seed) for seed in range(4)])
        for p in (short, made)
    ]
    assert watched[0] > watched[1] + 0.02
    assert watched[1] < 0.05


def test_batches_ahead_are_bounded_in_memory():
    load = LoadTime(1.9, 1.3)
    free = plan(load, 1.0, 3, on_cpu=False)
    bounded = plan(load, 1.0, 3, on_cpu=False, batch_bytes=MAX_BYTES // 7)
    assert free.prefetch > 3
    assert bounded.prefetch == 3  # 2 workers x 3 of the 7 batches that fit
    # Keeping up goes before memory: one batch a worker is the least.
    huge = plan(load, 1.0, 3, on_cpu=False, batch_bytes=2 * MAX_BYTES)
    assert (huge.workers, huge.prefetch) == (2, 1)


def test_the_users_choice_is_kept():
    load = LoadTime(6.0)
    made = plan(load, 1.0, 16, on_cpu=False, workers=3, prefetch=5)
    assert (made.workers, made.prefetch) == (3, 5)
    assert made.wait_share == pytest.approx(0.5)  # 3 workers give half an image in a second's time
    assert plan(load, 1.0, 16, on_cpu=False, workers=0).wait_share == pytest.approx(6 / 7)
    assert plan(load, 1.0, 2, on_cpu=True, workers=64).workers == 64


def test_usable_cores_are_shared_by_processes(monkeypatch):
    monkeypatch.setattr(loading_plan.joblib, "cpu_count", lambda: 10)
    assert [usable_cores(), usable_cores(4), usable_cores(99)] == [10, 2, 1]


def test_the_log_says_what_was_measured():
    load = LoadTime(0.0123)
    made = plan(load, 0.034, 8, on_cpu=False)
    line = describe_plan(made, load, 0.034)
    assert line == (
        "an image takes 12 ms to load, on 1 worker(s), 2 batches ahead each, and 34 ms to train"
    )
    alone = describe_plan(LoadingPlan(0, 2, 0.0), load, 0.034)
    assert "in the training process" in alone
    assert loading_warning(made, load, 0.034, 8, on_cpu=False) is None


@pytest.mark.parametrize("on_cpu", [False, True])
def test_the_warning_names_cores_that_are_enough(on_cpu):
    load, train, cores = LoadTime(0.200), 0.004, 4
    made = plan(load, train, cores, on_cpu)
    warning = loading_warning(made, load, train, cores, on_cpu)
    assert f"about {made.wait_share:.0%} of the time" in warning
    assert "store the images smaller" in warning
    assert "\n" not in warning
    needed = int(warning.split("give ")[1].split(" cores")[0])

    def wait_share(cores_then):
        # On a CPU, training gets faster with the cores.
        train_then = train * cores / cores_then if on_cpu else train
        return plan(load, train_then, cores_then, on_cpu).wait_share

    assert wait_share(needed) == 0.0
    # On a GPU a quarter of the workers are there to spare.
    assert wait_share(needed - 1 if on_cpu else round(0.75 * needed)) > 0.0


def test_the_warning_without_workers():
    load = LoadTime(0.050)
    made = plan(load, 0.010, 1, on_cpu=True)
    warning = loading_warning(made, load, 0.010, 1, on_cpu=True)
    assert "50 ms in the training process, training 10 ms" in warning
    assert "give 6 cores instead of 1" in warning


def test_the_warning_names_a_better_num_workers():
    load, cores = LoadTime(0.050), 16
    made = plan(load, 0.010, cores, on_cpu=False, workers=2)
    warning = loading_warning(made, load, 0.010, cores, on_cpu=False)
    assert "set num_workers to 7, or leave it out" in warning
    better = plan(load, 0.010, cores, on_cpu=False, workers=7)
    assert loading_warning(better, load, 0.010, cores, on_cpu=False) is None


class Images:
    """Images in memory; reading one lets the clock go on by its own number of seconds."""

    name, labels, class_names = "images", None, ()

    def __init__(self, seconds, clock):
        self.seconds, self.clock, self.reads, self.threads = seconds, clock, [], set()

    def __len__(self):
        return len(self.seconds)

    def read(self, index, min_side):
        assert min_side >= 8
        self.reads.append(index)
        self.threads.add(torch.get_num_threads())
        if self.seconds[index] is None:
            raise BrokenImage("broken")
        self.clock.now += self.seconds[index]
        return torch.zeros(3, 9, 9, dtype=torch.uint8)

    def describe(self, index):
        return f"image {index}"


class Clock:
    now = 0.0

    def perf_counter(self):
        return self.now


@pytest.fixture
def clock(monkeypatch):
    clock = Clock()
    monkeypatch.setattr(loading_plan, "time", clock)
    return clock


def measure(source):
    return measure_loading(source, (8, 8), 3, Augmentation(), seed=1)


def test_loading_is_measured_on_a_few_images(clock):
    source = Images([0.001] * 5000, clock)
    threads = torch.get_num_threads()
    time = measure(source)
    assert time.mean == pytest.approx(0.001)
    assert time.std == pytest.approx(0.0, abs=1e-9)
    assert len(source.reads) == 65  # one to warm up
    assert len(set(source.reads)) == 64
    assert max(source.reads) > 2500
    assert source.threads == {1}
    assert torch.get_num_threads() == threads


def test_measuring_is_limited_in_time(clock):
    source = Images([0.4] * 100, clock)
    assert measure(source).mean == pytest.approx(0.4)
    assert len(source.reads) == 5  # one to warm up, then one group is past the second
    small = Images([0.001] * 3, Clock())
    assert measure(small).mean == pytest.approx(0.0, abs=1e-9)  # the other clock stands still


def test_spread_is_that_of_single_images(clock):
    random = np.random.default_rng(0)
    spreads = []
    for _ in range(60):
        source = Images(random.gamma(4.0, 0.0025, 64).tolist(), clock)
        time = measure(source)
        assert time.mean == pytest.approx(np.mean(source.seconds))
        spreads.append(time.std**2)
    assert math.sqrt(np.mean(spreads)) == pytest.approx(0.005, rel=0.1)


def test_broken_images_are_passed_over(clock):
    seconds = [0.01] * 60
    seconds[::7] = [None] * len(seconds[::7])
    assert measure(Images(seconds, clock)).mean == pytest.approx(0.01)
    with pytest.raises(UserError, match="3 images in a row can't be read"):
        measure(Images([None] * 3, clock))


def test_measuring_leaves_the_global_generator_alone(clock):
    torch.manual_seed(3)
    before = torch.get_rng_state()
    measure(Images([0.01] * 8, clock))
    assert torch.equal(torch.get_rng_state(), before)
