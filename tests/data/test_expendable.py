"""A process that may be lost, in earnest."""

import contextlib
import multiprocessing
import os
import re
import select
import signal
import time

import pytest

from backfold.data.expendable import Expendable, FatalImage
from backfold.data.loading import LoadingError
from backfold.errors import BrokenImage

pytestmark = [
    # From Python 3.12 on, forking a process with threads warns; torch has threads.
    pytest.mark.filterwarnings("ignore:This process .* is multi-threaded:DeprecationWarning"),
]


def act(what):
    """What a decoder may come to."""
    if what == "exit":
        os._exit(3)
    if what == "segfault":
        os.kill(os.getpid(), signal.SIGSEGV)
    if what == "sleep":
        time.sleep(1000)
    if what == "compute":  # in C, with Python's lock held
        re.match(r"(a+)+$", "a" * 60 + "b")
    if what == "broken":
        raise BrokenImage("torn")
    if what == "unfit":
        raise LoadingError("an image of 3 channels")
    if what == "bug":
        raise KeyError("nothing there")
    return os.getpid(), what


def test_one_process_serves_all_calls_and_ends_with_the_context():
    with Expendable(act, 60.0) as apart:
        answers = [*(apart(number) for number in range(20)), *apart.each(range(20, 53))]
        assert apart.each([]) == []
    (process,) = {process for process, _ in answers}
    assert process != os.getpid()
    assert [number for _, number in answers] == list(range(53))
    with pytest.raises(ChildProcessError):
        os.waitpid(process, 0)


@pytest.mark.parametrize(
    ("what", "fate"),
    [
        ("exit", r"^ends the process that decodes it \(exit code 3\)$"),
        ("segfault", r"^ends the process that decodes it \(exit code -11\)$"),
        ("sleep", r"^takes its decoder more than 0\.5 seconds$"),
        ("compute", r"^takes its decoder more than 0\.5 seconds$"),
    ],
)
def test_a_call_that_is_fatal_costs_itself(what, fate):
    with Expendable(act, 0.5) as apart:
        before, _ = apart("x")
        for _ in range(2):
            with pytest.raises(FatalImage, match=fate):
                apart(what)
        after, said = apart("y")
    assert said == "y"
    assert after not in (before, os.getpid())


def test_fatal_ones_among_many_cost_themselves():
    whats = [*"abc", "exit", "broken", *"def", "sleep", "exit", "segfault", *"ghijklmnopq", "exit"]
    with Expendable(act, 0.5) as apart:
        outcomes = apart.each(whats)
    assert len(outcomes) == len(whats)
    fates = {"exit": "code 3", "segfault": "code -11", "sleep": "more than 0.5 seconds"}
    for what, outcome in zip(whats, outcomes, strict=True):
        if what in fates:
            assert isinstance(outcome, FatalImage)
            assert fates[what] in str(outcome)
        elif what == "broken":
            assert type(outcome) is BrokenImage
        else:
            assert outcome[1] == what


def test_a_process_that_dies_once_is_no_images_fault(tmp_path):
    def die_once(number):
        if number % 3 == 2 and not (tmp_path / f"{number}").exists():
            (tmp_path / f"{number}").touch()
            os.kill(os.getpid(), signal.SIGKILL)
        return number

    with Expendable(die_once, 60.0) as apart:
        assert apart(2) == 2
        assert apart.each(range(20)) == list(range(20))
    assert len(list(tmp_path.iterdir())) == 6


def test_exceptions_come_back():
    with Expendable(act, 60.0) as apart:
        process, _ = apart("x")
        with pytest.raises(BrokenImage, match=r"^torn$") as caught:
            apart("broken")
        assert type(caught.value) is BrokenImage
        with pytest.raises(LoadingError, match=r"^an image of 3 channels$"):
            apart("unfit")
        with pytest.raises(RuntimeError, match=r"in act\n(.*\n)*KeyError: 'nothing there'"):
            apart("bug")
        assert apart("x") == (process, "x")


def test_an_interrupted_call_gives_no_answer_to_the_next():
    def interrupt(*_):
        raise KeyboardInterrupt

    def late(number):
        time.sleep(0.3 if number == 0 else 0.0)
        return number

    with Expendable(late, 60.0) as apart:
        before = signal.signal(signal.SIGALRM, interrupt)
        signal.setitimer(signal.ITIMER_REAL, 0.1)
        try:
            with pytest.raises(KeyboardInterrupt):
                apart(0)
        finally:
            signal.setitimer(signal.ITIMER_REAL, 0.0)
            signal.signal(signal.SIGALRM, before)
        assert [apart(number) for number in (1, 2)] == [1, 2]


@pytest.mark.parametrize("what", ["x", "compute"])
def test_it_does_not_outlive_who_asks(what):
    reader, writer = os.pipe()  # that all of them hold open

    def ask():
        with Expendable(act, 0.5) as apart:
            apart("x")
            os.write(writer, b"!")
            with contextlib.suppress(FatalImage):
                apart(what)
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
