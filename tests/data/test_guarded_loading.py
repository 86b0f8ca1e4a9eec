"""Loading in order goes on past images that crash or hang the process that decodes them."""

import signal
import time
from concurrent.futures import ThreadPoolExecutor

import pytest
import torch
from test_guarded import Trap

from backfold.data import guarded_loading
from backfold.data.guarded_loading import evaluation_batches, guarded_batches
from backfold.data.loading import evaluation_loader

pytestmark = [
    # From Python 3.12 on, forking a process with threads warns; torch has threads and forks.
    pytest.mark.filterwarnings("ignore:This process .* is multi-threaded:DeprecationWarning"),
]
SIZE = (4, 4)


@pytest.fixture(autouse=True)
def soon(monkeypatch):
    monkeypatch.setattr(guarded_loading, "BATCH_SECONDS", 2.0)
    monkeypatch.setattr(guarded_loading, "IMAGE_SECONDS", 0.5)


def contents(batches):
    return [(batch.indices.tolist(), batch.images[:, 0, 0, 0].tolist()) for batch in batches]


def lines(batches):
    return list(dict.fromkeys(line for batch in batches for line in batch.broken))


@pytest.mark.parametrize("num_workers", [0, 2])
@pytest.mark.parametrize("indices", [None, [20, 3, 4, 5, 11, 0, 23]])
def test_batches_are_those_of_the_plain_loader(num_workers, indices):
    source = Trap(broken=(4, 23))
    given = list(evaluation_batches(source, SIZE, 3, 3, num_workers, indices))
    expected = list(evaluation_loader(source, SIZE, 3, 3, 0, indices))
    assert contents(given) == contents(expected)
    assert all(torch.equal(a.images, b.images) for a, b in zip(given, expected, strict=True))
    assert lines(given) == lines(expected)


@pytest.mark.parametrize("fate", ["crash", "hang"])
def test_a_deadly_image_is_a_broken_one(fate):
    given = list(evaluation_batches(Trap(**{fate: (7,)}), SIZE, 1, 5, 2))
    as_broken = evaluation_loader(Trap(broken=(7,)), SIZE, 1, 5)
    assert contents(given) == contents(as_broken)
    (line,) = lines(given)
    assert line.startswith("image 7: ")


def test_a_deadly_image_that_stands_in_for_a_deadly_one_is_found():
    # 9 takes the place of 2, and 0, the first, that of 17, the last.
    chosen = [0, 6, 2, 9, 12, 17]
    given = list(evaluation_batches(Trap(crash=(0, 2, 9, 17)), SIZE, 1, 3, 1, chosen))
    as_broken = evaluation_loader(Trap(broken=(0, 2, 9, 17)), SIZE, 1, 3, 0, chosen)
    assert contents(given) == contents(as_broken)
    assert sorted(line.split(":")[0] for line in lines(given)) == [
        "image 0", "image 17", "image 2", "image 9",
    ]  # fmt: skip


def test_batches_may_be_any():
    batches = [[5], [23, 2], range(9, 12)]
    given = contents(guarded_batches(Trap(crash=(23,)), SIZE, 1, batches, 1))
    assert given == [([5], [5]), ([0, 2], [0, 2]), ([9, 10, 11], [9, 10, 11])]


def test_a_death_outside_the_main_thread_is_noticed_before_the_batch_takes_too_long(monkeypatch):
    monkeypatch.setattr(guarded_loading, "BATCH_SECONDS", 1e6)
    # PyTorch's handler, if an earlier loader has set it, would raise in the main thread.
    before = signal.signal(signal.SIGCHLD, signal.SIG_DFL)
    try:
        with ThreadPoolExecutor(1) as pool:
            batches = evaluation_batches(Trap(crash=(7,)), SIZE, 1, 5, 1)
            given = pool.submit(list, batches).result()
    finally:
        signal.signal(signal.SIGCHLD, before)
    assert contents(given) == contents(evaluation_batches(Trap(broken=(7,)), SIZE, 1, 5))


def test_a_slow_image_has_its_time(monkeypatch, caplog):
    class Slow(Trap):
        def read(self, index, *rest):
            time.sleep(0.5 if index == 7 else 0.0)
            return super().read(index, *rest)

    monkeypatch.setattr(guarded_loading, "BATCH_SECONDS", 1e6)
    monkeypatch.setattr(guarded_loading, "LOOK_SECONDS", 0.05)
    given = list(evaluation_batches(Slow(), SIZE, 1, 5, 1))
    assert contents(given) == contents(evaluation_batches(Trap(), SIZE, 1, 5))
    assert not caplog.messages
