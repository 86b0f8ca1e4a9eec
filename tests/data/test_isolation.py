"""Images that crash or hang whoever reads them, in earnest: loading goes on without them."""

import multiprocessing
import os
import re
import select
import signal
import time
from concurrent.futures import ThreadPoolExecutor

import numpy as np
import pytest
import torch
from torch.utils.data import get_worker_info

from backfold.data import isolation, loading
from backfold.data.augmentation import Augmentation
from backfold.data.isolation import Expendable, FatalImage
from backfold.data.loading import (
    DeadWorker,
    evaluation_batches,
    training_loader,
    watched,
)
from backfold.errors import BrokenImage, UserError


def act(what):
    """What a decoder may come to."""
    if what == "exit":
        os._exit(3)
    if what == "segfault":
        signal.signal(signal.SIGSEGV, signal.SIG_DFL)
        os.kill(os.getpid(), signal.SIGSEGV)
    if what == "sleep":
        time.sleep(1000)
    if what == "compute":  # in C, with Python's lock held
        re.match(r"(a+)+$", "a" * 60 + "b")
    if what == "broken":
        raise BrokenImage("torn")
    if what == "unfit":
        raise UserError("an image of 3 channels")
    if what == "bug":
        raise KeyError("nothing there")
    return os.getpid(), what


def test_fatal_calls_cost_themselves_alone():
    fates = {
        "exit": r"ends the process that decodes it \(exit code 3\)",
        "segfault": r"ends the process that decodes it \(exit code -11\)",
        "sleep": r"takes its decoder more than 0\.5 seconds",
        "compute": r"takes its decoder more than 0\.5 seconds",
    }
    whats = [*"abc", "exit", "broken", *"def", "sleep", "compute", "segfault", *"ghijk", "exit"]
    outcomes = Expendable(act, 0.5).each(whats)
    for what, outcome in zip(whats, outcomes, strict=True):
        if what in fates:
            assert isinstance(outcome, FatalImage)
            assert re.fullmatch(fates[what], str(outcome))
        elif what == "broken":
            assert type(outcome) is BrokenImage
        else:
            assert outcome[1] == what
            assert outcome[0] != os.getpid()


def test_a_process_that_dies_once_is_no_images_fault(tmp_path):
    def die_once(number):
        if number % 3 == 2 and not (tmp_path / f"{number}").exists():
            (tmp_path / f"{number}").touch()
            os.kill(os.getpid(), signal.SIGKILL)
        return number

    assert Expendable(die_once, 60.0).each(range(20)) == list(range(20))


@pytest.mark.parametrize("shared", [isolation.SHARED, 100])
def test_arrays_and_exceptions_come_back(monkeypatch, shared):
    monkeypatch.setattr(isolation, "SHARED", shared)
    arrays = [np.full((2, 3, 5), value, "f4")[:, ::step] for value, step in ((0, 1), (7, -1))]
    apart = Expendable(lambda number: arrays[number], 60.0)
    first, second = apart.each([1, 0]), apart.each([0, 1])
    for found, expected in zip([*first, *second], [1, 0, 0, 1], strict=True):
        assert np.array_equal(found, arrays[expected])
        assert found.flags.writeable
    acting = Expendable(act, 60.0)
    with pytest.raises(UserError, match=r"^an image of 3 channels$"):
        acting.each(["unfit"])
    with pytest.raises(RuntimeError, match=r"in act\n(.*\n)*KeyError: 'nothing there'"):
        acting.each(["bug"])
    assert acting.each(["x"])[0][1] == "x"


def test_an_interrupted_call_gives_no_answer_to_the_next():
    def interrupt(*_):
        raise KeyboardInterrupt

    def late(number):
        time.sleep(0.3 if number == 0 else 0.0)
        return number

    apart = Expendable(late, 60.0)
    apart.each([1])  # forking may take longer than the interruption
    before = signal.signal(signal.SIGALRM, interrupt)
    signal.setitimer(signal.ITIMER_REAL, 0.1)
    try:
        with pytest.raises(KeyboardInterrupt):
            apart.each([0])
    finally:
        signal.setitimer(signal.ITIMER_REAL, 0.0)
        signal.signal(signal.SIGALRM, before)
    assert apart.each([1]) == [1]


@pytest.mark.parametrize("what", ["x", "compute"])
def test_it_does_not_outlive_who_asks(what):
    reader, writer = os.pipe()  # that all of them hold open

    def ask():
        apart = Expendable(act, 0.5)
        apart.each(["x"])
        os.write(writer, b"!")
        apart.each([what])
        time.sleep(1000)

    asking = multiprocessing.get_context("fork").Process(target=ask)
    asking.start()
    os.close(writer)
    assert os.read(reader, 1) == b"!"
    asking.kill()
    asking.join()
    assert select.select([reader], [], [], 30.0)[0]
    assert os.read(reader, 1) == b""
    os.close(reader)


class Trap:
    """Images of one value each; of some, what `act` does."""

    name, labels, class_names = "trap", None, ()

    def __init__(self, **fates):
        self.fates = {index: what for what, indices in fates.items() for index in indices}

    def __len__(self):
        return 24

    def read(self, index, _=None):
        act(self.fates.get(index))
        return torch.full((1, 4, 4), index, dtype=torch.uint8)

    def describe(self, index):
        return f"image {index}"


def train(source, start=0, num_workers=2):
    plain = Augmentation(False, horizontal_flip=False)
    return training_loader(source, (4, 4), 1, plain, 4, 0, start, 13, num_workers=num_workers)


def contents(batches):
    return [(batch.indices.tolist(), batch.images[:, 0, 0, 0].tolist()) for batch in batches]


def test_a_run_goes_on_as_if_the_files_were_broken(monkeypatch):
    monkeypatch.setattr(loading, "IMAGE_SECONDS", 0.5)
    source = Trap(exit=(5, 6), segfault=(13,), sleep=(18,), broken=(4,))
    batches = list(train(source))
    assert contents(batches) == contents(train(Trap(broken=(4, 5, 6, 13, 18)), num_workers=0))
    lines = {line for batch in batches for line in batch.broken}
    assert {int(line.split()[1][:-1]) for line in lines} == {4, 5, 6, 13, 18}
    assert contents(train(source, start=5)) == contents(batches)[5:]


def test_an_image_that_hung_once_is_not_tried_again(monkeypatch, tmp_path):
    class Noted(Trap):
        def read(self, index, _=None):
            with (tmp_path / "tried").open("a") as file:
                print(index, file=file)
            return super().read(index)

    monkeypatch.setattr(loading, "IMAGE_SECONDS", 2.0)
    batches = evaluation_batches(Noted(sleep=(3,)), (4, 4), 1, [[3]] * 9, 1)
    assert contents(batches) == [([4], [4])] * 9
    assert (tmp_path / "tried").read_text().split() == ["3", *["4"] * 9]


class Killed(Trap):
    def describe(self, index):  # in the worker itself, not in the process beside it
        if get_worker_info() is not None:
            os.kill(os.getpid(), signal.SIGKILL)
        return super().describe(index)


def load_slowly(seen):
    for batch in watched(train(Killed(broken=(5,)), num_workers=1)):
        seen.append(batch)
        time.sleep(0.5)  # the worker dies meanwhile: nothing may be raised here


@pytest.mark.parametrize("in_main_thread", [True, False])
def test_a_dead_worker_is_one_line(in_main_thread):
    seen = []
    with ThreadPoolExecutor(1) as pool:
        load = (
            load_slowly if in_main_thread else lambda seen: pool.submit(load_slowly, seen).result()
        )
        with pytest.raises(DeadWorker, match="a process that loads images died") as caught:
            load(seen)
    assert isinstance(caught.value, UserError)
    assert "\n" not in str(caught.value)
    assert seen
    handler = signal.getsignal(signal.SIGCHLD)
    assert not getattr(handler, "__module__", "").startswith("torch.")


def test_other_errors_pass():
    def loader():
        yield 1
        raise RuntimeError("CUDA error: out of luck")

    with pytest.raises(RuntimeError, match=r"^CUDA error: out of luck$"):
        list(watched(loader()))
