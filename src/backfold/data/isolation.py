"""A function called in a process apart, which it may crash or hang."""

import itertools
import mmap
import os
import pickle
import signal
import traceback
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from multiprocessing import Pipe
from multiprocessing.connection import Connection
from typing import Any, Generic, NoReturn, TypeVar

import torch
from torch.utils.data import get_worker_info

from backfold.errors import BrokenImage, UserError

IMAGE_SECONDS = 60.0  # an image that takes longer is broken
# For most of these PyTorch's workers and runs have handlers, which a child would inherit.
DEADLY = (signal.SIGSEGV, signal.SIGBUS, signal.SIGFPE, signal.SIGTERM, signal.SIGALRM)
TOGETHER = 8  # arguments in a message
# Bytes of memory shared with a process, taken when they are first used; a pipe would take longer.
# Its first word is the argument that the process is at, which survives it; the rest holds results.
SHARED, WORD = 2**26, 8
Argument = TypeVar("Argument")
Result = TypeVar("Result")


class FatalImage(BrokenImage):
    """An image that ended the process that read it, or kept it waiting."""


def attempt(function: Callable[[Argument], Result], argument: Argument) -> Result | BrokenImage:
    """What the function returns, or how the image is broken."""
    try:
        return function(argument)
    except BrokenImage as error:
        return error


@dataclass(frozen=True)
class _Child:
    process: int
    connection: Connection
    memory: mmap.mmap


class Expendable(Generic[Argument, Result]):
    """Calls a function in a forked process, which ends with this one.

    One process serves all calls, from the first on, and another takes its place when it dies.
    Workers of a DataLoader can use this too, though they may not start what `multiprocessing`
    starts. Arguments and results are pickled.
    """

    def __init__(self, function: Callable[[Argument], Result], seconds: float) -> None:
        self._function, self._seconds = function, seconds
        self._child: _Child | None = None

    def each_in_worker(self, arguments: Sequence[Argument]) -> list[Result | BrokenImage]:
        """As `each` in a worker of a DataLoader; elsewhere in this very process, unprotected."""
        if get_worker_info() is None:
            return [attempt(self._function, argument) for argument in arguments]
        return self.each(arguments)

    def each(self, arguments: Sequence[Argument]) -> list[Result | BrokenImage]:
        """What the function returns for each, or how the image is broken.

        It is a `FatalImage` if it takes too long or ends two processes: the first may have died of
        something else, as where memory runs out. The first `UserError` of the function is raised,
        and anything else as a RuntimeError, with its traceback as the message.
        """
        outcomes: dict[int, Result | BrokenImage] = {}
        suspects = set()
        while len(outcomes) < len(arguments):
            todo = [number for number in range(len(arguments)) if number not in outcomes][:TOGETHER]
            child = self._child = self._child or self._start()
            reply = self._ask(child, [arguments[number] for number in todo])
            if isinstance(reply, list):
                outcomes.update(zip(todo, reply, strict=True))
                continue
            number = todo[int.from_bytes(child.memory[:WORD], "little")]
            fate = f"ends the process that decodes it (exit code {reply})"
            if reply == -signal.SIGALRM:
                fate = f"takes its decoder more than {self._seconds:g} seconds"
            if reply == -signal.SIGALRM or number in suspects:
                outcomes[number] = FatalImage(fate)
            suspects.add(number)
        return [outcomes[number] for number in range(len(arguments))]

    def _ask(self, child: _Child, arguments: list[Argument]) -> list[Any] | int:
        """The outcomes, or the exit code of the process, which then is dead."""
        child.memory[:WORD] = bytes(WORD)
        try:
            child.connection.send(arguments)
            content, ends = child.connection.recv()
        except (EOFError, OSError):
            return self._end(child, kill=False)
        except BaseException:
            # Its answer would be taken for that to the next call.
            self._end(child, kill=True)
            raise
        view = memoryview(child.memory)
        buffers = [bytearray(view[start:end]) for start, end in itertools.pairwise(ends)]
        reply = pickle.loads(content, buffers=buffers)
        if isinstance(reply, Exception):
            raise reply
        return list(reply)

    def _start(self) -> _Child:
        ours, theirs = Pipe()
        memory = mmap.mmap(-1, SHARED)
        process = os.fork()
        if process == 0:
            ours.close()
            self._serve(theirs, memory)
        theirs.close()
        return _Child(process, ours, memory)

    def _end(self, child: _Child, *, kill: bool) -> int:
        """Let go of the process; returns its exit code, negative where a signal ended it."""
        self._child = None
        child.connection.close()
        if kill:
            os.kill(child.process, signal.SIGKILL)
        return os.waitstatus_to_exitcode(os.waitpid(child.process, 0)[1])

    def _serve(self, connection: Connection, memory: mmap.mmap) -> NoReturn:
        try:
            for number in DEADLY:
                signal.signal(number, signal.SIG_DFL)
            signal.pthread_sigmask(signal.SIG_UNBLOCK, DEADLY)
            signal.signal(signal.SIGINT, signal.SIG_IGN)  # it ends when whoever asks does
            torch.set_num_threads(1)
            while True:
                reply = self._reply(connection.recv(), memory)
                # A pickle, and where the arrays' contents are in the shared memory, if they fit.
                found: list[pickle.PickleBuffer] = []
                content = pickle.dumps(reply, protocol=5, buffer_callback=found.append)
                buffers = [buffer.raw() for buffer in found]
                ends = list(itertools.accumulate(map(len, buffers), initial=WORD))
                if ends[-1] > SHARED:
                    content, buffers, ends = pickle.dumps(reply), [], [WORD]
                for buffer, (start, end) in zip(buffers, itertools.pairwise(ends), strict=True):
                    memory[start:end] = buffer
                connection.send((content, ends))
        except (EOFError, OSError):  # whoever asks is gone
            os._exit(0)
        except BaseException:
            traceback.print_exc()
        finally:
            os._exit(1)

    def _reply(self, arguments: list[Argument], memory: mmap.mmap) -> list[Any] | Exception:
        results = []
        try:
            for number, argument in enumerate(arguments):
                memory[:WORD] = number.to_bytes(WORD, "little")
                # A decoder that hangs is deaf to Python, but not to a signal without a handler. Set
                # here, it works after the death of whoever asks.
                signal.setitimer(signal.ITIMER_REAL, self._seconds)
                results.append(attempt(self._function, argument))
        except UserError as error:
            return error
        except Exception:
            return RuntimeError(traceback.format_exc())
        finally:
            signal.setitimer(signal.ITIMER_REAL, 0.0)
        return results
