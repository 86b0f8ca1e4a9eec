"""A function called in a process apart, which it may crash or hang."""

import mmap
import os
import signal
import traceback
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from multiprocessing import Pipe
from multiprocessing.connection import Connection
from typing import Any, Generic, NoReturn, TypeVar

import torch

from backfold.errors import BrokenImage, UserError

# For most of these PyTorch's workers and runs have handlers, which a child would inherit.
DEADLY = (signal.SIGSEGV, signal.SIGBUS, signal.SIGFPE, signal.SIGTERM, signal.SIGALRM)
# Arguments in a message: enough to be worth it, and few enough to stay in the processor's caches.
TOGETHER = 8
Argument = TypeVar("Argument")
Result = TypeVar("Result")


class FatalImage(BrokenImage):
    """An image that ended the process that read it, or kept it waiting."""


@dataclass(frozen=True)
class _Reply:
    """What some calls came to: results, an exception, or the death of the process."""

    results: list[Any] | None = None
    error: Exception | None = None
    exit_code: int | None = None


def attempt(function: Callable[[Argument], Result], argument: Argument) -> Result | BrokenImage:
    """What the function returns, or how the image is broken."""
    try:
        return function(argument)
    except BrokenImage as error:
        return error


class Expendable(Generic[Argument, Result]):
    """Calls a function in a forked process; a context.

    One process serves all calls, and another takes its place when it dies. A call costs the way of
    argument and result through a pipe, least of all by `each`. Worker processes of a DataLoader can
    use this too, though they may not start what `multiprocessing` starts.

    Args:
        function: reads an image; its argument and its result are pickled.
        seconds: for each image.
    """

    def __init__(self, function: Callable[[Argument], Result], seconds: float) -> None:
        self._function, self._seconds = function, seconds
        self._child: tuple[int, Connection] | None = None
        # Which of the arguments the process is at; it survives it.
        self._place = memoryview(mmap.mmap(-1, 8)).cast("q")

    def __enter__(self) -> "Expendable[Argument, Result]":
        self._child = self._start()
        return self

    def __exit__(self, *_: object) -> None:
        if self._child is not None:
            self._end(kill=True)

    def __call__(self, argument: Argument) -> Result:
        """What the function returns.

        Raises:
            BrokenImage: the function does, or is fatal to the process.
            UserError: the function does.
            RuntimeError: the function raises anything else; its traceback is the message.
        """
        (outcome,) = self.each([argument])
        if isinstance(outcome, BrokenImage):
            raise outcome
        return outcome

    def each(self, arguments: Sequence[Argument]) -> list[Result | BrokenImage]:
        """What the function returns for each, or how the image is broken.

        It is a `FatalImage` if it takes too long or ends two processes: the first may have died of
        something else, as where memory runs out.

        Raises:
            UserError: as above, of the first that does.
            RuntimeError: as above.
        """
        outcomes: list[Result | BrokenImage] = []
        for first in range(0, len(arguments), TOGETHER):
            outcomes += self._each(arguments[first : first + TOGETHER])
        return outcomes

    def _each(self, arguments: Sequence[Argument]) -> list[Result | BrokenImage]:
        outcomes: dict[int, Result | BrokenImage] = {}
        suspects = set()
        while len(outcomes) < len(arguments):
            todo = [number for number in range(len(arguments)) if number not in outcomes]
            reply = self._ask([arguments[number] for number in todo])
            if reply.error is not None:
                raise reply.error
            if reply.results is not None:
                outcomes.update(zip(todo, reply.results, strict=True))
                continue
            number, code = todo[self._place[0]], reply.exit_code
            if code == -signal.SIGALRM:
                fate = f"takes its decoder more than {self._seconds:g} seconds"
                outcomes[number] = FatalImage(fate)
            elif number in suspects:
                fate = f"ends the process that decodes it (exit code {code})"
                outcomes[number] = FatalImage(fate)
            suspects.add(number)
        return [outcomes[number] for number in range(len(arguments))]

    def _ask(self, arguments: list[Argument]) -> _Reply:
        if self._child is None:
            self._child = self._start()
        _, connection = self._child
        self._place[0] = 0
        try:
            connection.send(arguments)
            reply: _Reply = connection.recv()
        except (EOFError, OSError):
            return _Reply(exit_code=self._end(kill=False))
        except BaseException:
            # Its answer would be taken for that to the next call.
            self._end(kill=True)
            raise
        return reply

    def _start(self) -> tuple[int, Connection]:
        ours, theirs = Pipe()
        process = os.fork()
        if process == 0:
            ours.close()
            self._serve(theirs)
        theirs.close()
        return process, ours

    def _end(self, *, kill: bool) -> int:
        """Let go of the process; returns its exit code, negative where a signal ended it."""
        assert self._child is not None
        (process, connection), self._child = self._child, None
        connection.close()
        if kill:
            os.kill(process, signal.SIGKILL)
        return os.waitstatus_to_exitcode(os.waitpid(process, 0)[1])

    def _serve(self, connection: Connection) -> NoReturn:
        try:
            for number in DEADLY:
                signal.signal(number, signal.SIG_DFL)
            signal.pthread_sigmask(signal.SIG_UNBLOCK, DEADLY)
            signal.signal(signal.SIGINT, signal.SIG_IGN)  # it ends when whoever asks does
            torch.set_num_threads(1)
            while True:
                connection.send(self._reply(connection.recv()))
        except (EOFError, OSError):  # whoever asks is gone
            os._exit(0)
        except BaseException:
            traceback.print_exc()
        finally:
            os._exit(1)

    def _reply(self, arguments: list[Argument]) -> _Reply:
        results = []
        try:
            for number, argument in enumerate(arguments):
                self._place[0] = number
                # A decoder that hangs is deaf to Python, but not to a signal without a handler. Set
                # here, it works after the death of whoever asks.
                signal.setitimer(signal.ITIMER_REAL, self._seconds)
                results.append(attempt(self._function, argument))
        except UserError as error:
            return _Reply(error=error)
        except Exception:
            return _Reply(error=RuntimeError(traceback.format_exc()))
        finally:
            signal.setitimer(signal.ITIMER_REAL, 0.0)
        return _Reply(results)
