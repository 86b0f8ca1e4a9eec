"""Worker processes that crash or hang, in earnest."""

import os
import signal
import time

import pytest
import torch
from torch.utils.data._utils import MP_STATUS_CHECK_INTERVAL

from backfold.data import guarded
from backfold.data.augmentation import Augmentation
from backfold.data.guarded import GuardedSource, find_fatal, survive
from backfold.data.loading import training_loader
from backfold.data.sampling import StepSampler
from backfold.errors import BrokenImage

pytestmark = [
    # From Python 3.12 on, forking a process with threads warns; torch has threads and forks.
    pytest.mark.filterwarnings("ignore:This process .* is multi-threaded:DeprecationWarning"),
]


class Trap:
    """Images of one value each; some are broken, end the process, or never return."""

    name, labels, class_names = "trap", None, ()

    def __init__(self, crash=(), segfault=(), hang=(), broken=()):
        self.crash, self.segfault, self.hang, self.broken = crash, segfault, hang, broken

    def __len__(self):
        return 24

    def read(self, index, _=None):
        if index in self.crash:
            os._exit(3)
        if index in self.segfault:
            signal.signal(signal.SIGSEGV, signal.SIG_DFL)
            os.kill(os.getpid(), signal.SIGSEGV)
        if index in self.hang:
            time.sleep(1000)
        if index in self.broken:
            raise BrokenImage("broken")
        return torch.full((1, 4, 4), index, dtype=torch.uint8)

    def describe(self, index):
        return f"image {index}"


def test_fatal_images_are_found_and_told_apart():
    source = Trap(crash=(2,), segfault=(7,), hang=(9,), broken=(4,))
    found = find_fatal(source, range(12), seconds=0.5)
    assert found == {
        2: "ends the process that decodes it (exit code 3)",
        7: "ends the process that decodes it (exit code -11)",
        9: "takes its decoder more than 0.5 seconds",
    }


def test_those_that_take_a_broken_ones_place_are_looked_at_too():
    source = Trap(crash=(4, 6), broken=(3, 5, 23))
    assert set(find_fatal(source, [3], seconds=5.0)) == {4, 6}
    assert find_fatal(source, [0, 1, 2, 7], seconds=5.0) == {}
    assert find_fatal(source, [23], seconds=5.0) == {}


def run(source, total=9, timeout=0.0, start=0, num_workers=2):
    def make(guarded_source, step):
        return training_loader(
            guarded_source, (4, 4), 1, Augmentation(False, horizontal_flip=False), 4, 0, step,
            total, num_workers=num_workers, timeout=timeout,
        )  # fmt: skip

    plan = list(StepSampler(len(source), 4, 0, 0, total))
    return list(
        survive(source, make, lambda step: [index for _, index in plan[step]], start, total, 4, 0.5)
    )


def values(batches):
    return [batch.images[:, 0, 0, 0].tolist() for batch in batches]


@pytest.mark.parametrize(
    ("trap", "timeout"), [({"crash": (5,)}, 0.0), ({"segfault": (5,)}, 0.0), ({"hang": (5,)}, 2.0)]
)
def test_a_run_goes_on_as_if_the_file_were_broken(trap, timeout):
    batches = run(Trap(**trap), timeout=timeout)
    as_broken = run(Trap(broken=(5,)), num_workers=0)
    assert values(batches) == values(as_broken)
    lines = {line for batch in batches for line in batch.broken}
    assert len(lines) == 1
    assert lines.pop().startswith("image 5: ")


def test_two_neighbours_that_crash(caplog):
    batches = run(Trap(crash=(5, 6, 13), broken=(4,)))
    assert values(batches) == values(run(Trap(broken=(4, 5, 6, 13)), num_workers=0))
    assert "looking for the image" in caplog.text


def test_resumption_gives_the_tail():
    whole = values(run(Trap(crash=(5,))))
    assert values(run(Trap(crash=(5,)), start=4)) == whole[4:]


def test_deaths_without_a_culprit_end_the_run_after_some_tries(monkeypatch):
    calls = []

    def loader(_, number):
        calls.append(number)
        yield 10 + number
        raise RuntimeError("DataLoader worker (pid 7) is killed by signal: Killed.")

    batches = survive(Trap(), loader, lambda number: [number], 0, 9, 2)
    # Each restart gets one batch further, so none of them is in vain.
    assert [next(batches) for _ in range(4)] == [10, 11, 12, 13]
    monkeypatch.setattr(guarded, "RETRIES", 2)
    calls.clear()

    def dead(_, number):
        calls.append(number)
        raise RuntimeError("DataLoader worker (pid 7) is killed by signal: Killed.")

    with pytest.raises(RuntimeError, match="killed by signal"):
        list(survive(Trap(), dead, lambda number: [number], 3, 9, 2))
    assert calls == [3, 3, 3]


def test_other_errors_pass():
    def loader(*_):
        raise RuntimeError("CUDA error: out of luck")

    with pytest.raises(RuntimeError, match="out of luck"):
        list(survive(Trap(), loader, lambda number: [number], 0, 9, 2))


def test_a_death_is_told_when_a_batch_is_waited_for_and_not_before():
    source = Trap(crash=(5,))
    plan = list(StepSampler(24, 4, 0, 0, 9))
    step_of_five = next(step for step, keys in enumerate(plan) if (0, 5) in keys)
    before = signal.getsignal(signal.SIGCHLD)

    def make(guarded_source, step):
        return training_loader(
            guarded_source, (4, 4), 1, Augmentation(False), 4, 0, step, 9, num_workers=1
        )

    batches = survive(source, make, lambda step: [index for _, index in plan[step]], 0, 9, 2, 5.0)
    taken = 0
    for batch in batches:
        taken += 1
        if taken == step_of_five:
            deadline = time.monotonic() + 3 * MP_STATUS_CHECK_INTERVAL
            for _ in range(100):  # the worker dies meanwhile: nothing may be raised here
                time.sleep(0.01)
            assert time.monotonic() < deadline
        assert len(batch.images) == 4
    assert taken == 9
    handler = signal.getsignal(signal.SIGCHLD)
    assert handler is before or handler.__module__ == guarded.TORCH_HANDLERS


def test_a_guarded_source_is_the_other_one_without_the_fatal_images():
    source = GuardedSource(Trap(), {3: "ends the process"})
    assert len(source) == 24
    assert source.describe(3) == "image 3"
    assert int(source.read(4)[0, 0, 0]) == 4
    with pytest.raises(BrokenImage, match="ends the process"):
        source.read(3)
