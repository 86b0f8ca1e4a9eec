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
import time
from collections import deque
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any, TypeVar

from torch import Tensor

from backfold.data.expendable import Expendable, FatalImage
from backfold.data.protocol import ImageSource
from backfold.errors import BrokenImage, UserError

LOGGER = logging.getLogger("backfold")
BATCH_SECONDS = 300.0
IMAGE_SECONDS = 60.0
# A loader whose waiting is timed out this often finds a dead worker outside the main thread, too.
LOOK_SECONDS = 1.0
RETRIES = 2
TIMED_OUT = "DataLoader timed out"
FAILURES = ("DataLoader worker", TIMED_OUT, "Pin memory thread exited")
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
    batch_seconds: float = 0.0,
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
        batch_seconds: a batch that takes longer counts as hanging, where the loader is a DataLoader
            whose ``timeout`` is shorter than that.

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
                guarded = GuardedSource(source, fatal)
                for batch in _batches(make_loader(guarded, number), notices, batch_seconds):
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


def _batches(
    loader: Iterable[BatchType], notices: _DeathNotices, seconds: float
) -> Iterator[BatchType]:
    batches = iter(loader)
    while True:
        with notices.waiting():
            batch = _next(batches, seconds)
        if batch is None:
            return
        notices.install()
        yield batch


def _next(batches: Iterator[BatchType], seconds: float) -> BatchType | None:
    """The next batch, or None; a DataLoader that times out is asked again for so many seconds.

    When it times out it looks after its workers, whose deaths only the main thread is told of.
    """
    start = time.monotonic()
    while True:
        try:
            return next(batches, None)
        except RuntimeError as error:
            if not seconds or not str(error).startswith(TIMED_OUT):
                raise
            if time.monotonic() - start >= seconds:
                raise RuntimeError(f"{TIMED_OUT} after {seconds:g} seconds") from error


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

    def look(index: int) -> None:
        source.read(index)

    with Expendable(look, seconds) as look_apart:
        while todo:
            index = todo.popleft()
            try:
                look_apart(index)
                continue
            except FatalImage as error:
                found[index] = str(error)
            except BrokenImage:
                pass
            except (UserError, RuntimeError):  # the loader's to tell, if it comes to this image
                continue
            following = (index + 1) % len(source)
            if following not in seen:
                seen.add(following)
                todo.append(following)
    return found
