"""Loading that outlives its decoders: a file that crashes or hangs one is a broken file.

Images are decoded by C libraries. A damaged file can end the worker process that decodes it, or
keep it busy for ever. Then the images in question are read once more, one by one, in a process that
is expendable; those that end it or keep it waiting are taken for broken from then on, and loading
goes on at the batch where it stopped. Without worker processes there is no such protection.
"""

import gc
import logging
import signal
import threading
from collections import deque
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from multiprocessing.connection import Connection
from typing import Any, TypeVar

import torch.multiprocessing
from torch import Tensor

from backfold.data.arrays import BrokenImage
from backfold.data.protocol import ImageSource

LOGGER = logging.getLogger("backfold")
BATCH_SECONDS = 300.0
IMAGE_SECONDS = 60.0
START_SECONDS = 120.0  # a process that is not forked imports torch first
RETRIES = 2
FAILURES = ("DataLoader worker", "DataLoader timed out", "Pin memory thread exited")
TORCH_HANDLERS = "torch.utils.data._utils.signal_handling"
BatchType = TypeVar("BatchType")


class GuardedSource:
    """Another source, but for images that are known to end or hang a decoder.

    Args:
        source: the images.
        fatal: why these indices are never read.
    """

    def __init__(self, source: ImageSource, fatal: dict[int, str]) -> None:
        self.source, self._fatal = source, dict(fatal)
        self.name, self.labels, self.class_names = source.name, source.labels, source.class_names

    def __len__(self) -> int:
        return len(self.source)

    def check(self, index: int) -> None:
        """Raise `BrokenImage` if this image must not be read."""
        if index in self._fatal:
            raise BrokenImage(self._fatal[index])

    def read(self, index: int, min_side: int | None = None) -> Tensor:
        """See `ImageSource.read`."""
        self.check(index)
        return self.source.read(index, min_side)

    def describe(self, index: int) -> str:
        """As the other source says."""
        return self.source.describe(index)


def survive(
    source: ImageSource,
    make_loader: Callable[[ImageSource, int], Iterable[BatchType]],
    indices_of: Callable[[int], Sequence[int]],
    start: int,
    total: int,
    ahead: int,
    image_seconds: float = IMAGE_SECONDS,
) -> Iterator[BatchType]:
    """A loader's batches, whatever happens to its worker processes.

    Args:
        source: the images.
        make_loader: from a source like this one and a number to the batches from this number on; a
            ``timeout`` of the DataLoader decides when a batch counts as hanging.
        indices_of: the source's images that make a batch, by its number.
        start: the first batch's number.
        total: one more than the last batch's number.
        ahead: how many batches may be in the making at once: workers times prefetched ones.
        image_seconds: an image that takes longer is broken.

    Raises:
        RuntimeError: workers die again and again though each image can be read, as where memory
            runs out; and what the loader raises.
    """
    fatal: dict[int, str] = {}
    retries = 0
    number = start
    notices = _DeathNotices()
    try:
        while number < total:
            try:
                for batch in _batches(make_loader(GuardedSource(source, fatal), number), notices):
                    yield batch
                    number, retries = number + 1, 0
                return
            except (RuntimeError, OSError, EOFError) as error:
                if not _is_failed_worker(error) or retries == RETRIES:
                    raise
                LOGGER.warning("loading failed (%s): looking for the image", _first_line(error))
            # The loader that failed and its error hold each other; its workers end when it does.
            gc.collect()
            stop = min(total, number + max(1, ahead))
            suspects = [index for batch in range(number, stop) for index in indices_of(batch)]
            found = find_fatal(GuardedSource(source, fatal), suspects, image_seconds)
            retries = 0 if found else retries + 1
            fatal.update(found)
    finally:
        notices.remove()


def _is_failed_worker(error: Exception) -> bool:
    # A worker that dies takes along the batches that lie in its shared memory.
    lost = isinstance(error, (ConnectionError, EOFError, FileNotFoundError))
    return lost or str(error).startswith(FAILURES)


def _first_line(error: Exception) -> str:
    return (str(error).strip() or type(error).__name__).splitlines()[0].strip()


class _DeathNotices:
    """Holds the news of a worker's death back until a batch is waited for.

    torch raises it from a signal handler, wherever the main thread is: in the midst of a step too.
    """

    def __init__(self) -> None:
        self._torch_handler: Any = None
        self._waiting = self._pending = False

    def install(self) -> None:
        """Take the place of torch's handler, once torch has set it."""
        if self._torch_handler is None and threading.current_thread() is threading.main_thread():
            handler = signal.getsignal(signal.SIGCHLD)
            if getattr(handler, "__module__", None) == TORCH_HANDLERS:
                self._torch_handler = handler
                signal.signal(signal.SIGCHLD, self)

    def remove(self) -> None:
        """Give torch's handler its place back."""
        if self._torch_handler is not None:
            signal.signal(signal.SIGCHLD, self._torch_handler)
            self._torch_handler = None

    def __call__(self, number: int, frame: Any) -> None:
        """A child process ended: torch finds out whether it was a worker that failed."""
        if self._waiting:
            self._torch_handler(number, frame)
        else:
            self._pending = True

    @contextmanager
    def waiting(self) -> Iterator[None]:
        """While this lasts, a failed worker raises RuntimeError at once."""
        self._waiting = True
        try:
            if self._pending and self._torch_handler is not None:
                self._torch_handler(signal.SIGCHLD, None)
            self._pending = False
            yield
        finally:
            self._waiting = False


def _batches(loader: Iterable[BatchType], notices: _DeathNotices) -> Iterator[BatchType]:
    batches = iter(loader)
    while True:
        with notices.waiting():
            batch = next(batches, None)
        if batch is None:
            return
        notices.install()
        yield batch


def find_fatal(source: ImageSource, indices: Sequence[int], seconds: float) -> dict[int, str]:
    """Which images end the process that reads them, or take longer than this, and how.

    As a batch takes the next image in place of a broken one, so does this.

    Args:
        source: the images.
        indices: those in question.
        seconds: for each image.
    """
    found: dict[int, str] = {}
    todo = deque(dict.fromkeys(indices))
    seen = set(todo)
    while todo:
        broken, fate = _read_apart(source, list(todo), seconds)
        for was_broken in [*broken, *([True] if fate else [])]:
            index = todo.popleft()
            following = (index + 1) % len(source)
            if was_broken and following not in seen:
                seen.add(following)
                todo.append(following)
        if fate is not None:
            found[index] = fate
    return found


def _read_apart(
    source: ImageSource, indices: list[int], seconds: float
) -> tuple[list[bool], str | None]:
    """(whether each was broken, up to a fatal one; what that did, None where there is none)."""
    context = torch.multiprocessing.get_context()
    receiver, sender = context.Pipe(duplex=False)
    child = context.Process(target=_read_all, args=(source, indices, sender), daemon=True)
    child.start()
    sender.close()
    broken: list[bool] = []
    fate: str | None = None
    try:
        if receiver.poll(START_SECONDS):
            receiver.recv()
        for _ in indices:
            if not receiver.poll(seconds):
                fate = f"takes its decoder more than {seconds:g} seconds"
                break
            broken.append(receiver.recv())
    except EOFError:
        child.join()
        fate = f"ends the process that decodes it (exit code {child.exitcode})"
    finally:
        child.kill()
        child.join()
        receiver.close()
    return broken, fate


def _read_all(source: ImageSource, indices: list[int], sender: Connection) -> None:
    sender.send(True)
    for index in indices:
        broken = False
        try:
            source.read(index)
        except BrokenImage:
            broken = True
        sender.send(broken)
