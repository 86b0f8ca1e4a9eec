"""The command line in processes of its own, which get signals at chosen moments.

Starting Python and importing torch takes seconds. So one process does that and forks another for
each run; the tests talk to it in lines of JSON.
"""

import atexit
import errno
import functools
import gc
import json
import os
import resource
import select
import signal
import subprocess
import sys
import time
import traceback
from dataclasses import asdict, dataclass, field
from fnmatch import fnmatch
from pathlib import Path
from typing import Any, NamedTuple, NoReturn

import yaml
from torch.utils.data import get_worker_info

# The commands are loaded when they are used; here each fork would load them again.
from backfold.cli import commands  # noqa: F401
from backfold.cli.main import main
from backfold.data.formats import ParquetSource
from backfold.training import pretrain as trainer
from backfold.training.log import Meter
from backfold.training.run import RunFolder, load_checkpoint
from backfold.training.step import Stepper

LIMIT = 120.0  # seconds after which a run counts as hanging
FOREVER = 10 * LIMIT


@dataclass
class Request:
    """A run of the command line.

    Attributes:
        argv: arguments of ``backfold``.
        err: file that its output is appended to.
        moment: pattern of the event at which something happens: ``step`` and ``stepped`` (before
            and after an optimizer step), ``batch`` (before waiting for one), ``warm-up``,
            ``watch``; and for every file NAME that is renamed from a temporary name, ``write NAME``
            (before it), ``torn NAME`` (before it, and half of it is cut off: a kill amid writing)
            and ``written NAME``.
        count: how often the event must have happened, from 1.
        hold: seconds that the run stays in this moment, unless a signal ends it.
        signals: (seconds to wait, number, whether the process's group gets it) one after the other.
        full: folder whose disk is full from then on.
        largest_file: bytes beyond which no file grows from then on.
        image_seconds: added to the time that a worker takes for reading an image.
        env: added to the environment.
    """

    argv: list[str]
    err: str
    moment: str = ""
    count: int = 1
    hold: float = 0.0
    signals: list[tuple[float, int, bool]] = field(default_factory=list)
    full: str = ""
    largest_file: int = 0
    image_seconds: float = 0.0
    env: dict[str, str] = field(default_factory=dict)


class Outcome(NamedTuple):
    """The exit code (negative: the signal that killed it), and whether the moment came."""

    code: int
    reached: bool


class Forge:
    """The process that forks runs; a context."""

    def __enter__(self) -> "Forge":
        self._process = subprocess.Popen(
            [sys.executable, __file__],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
            # Forking a process whose OpenMP threads have run hangs.
            env={**os.environ, "OMP_NUM_THREADS": "1"},
        )
        return self

    def __exit__(self, *_: object) -> None:
        with self._process:
            self._process.stdin.close()

    def run(self, request: Request) -> Outcome:
        """Start it, send its signals, wait for its end."""
        self._process.stdin.write(json.dumps(asdict(request)) + "\n")
        self._process.stdin.flush()
        return Outcome(*json.loads(self._process.stdout.readline()))


class Runner:
    """Starts and resumes one run."""

    def __init__(self, forge: Forge, settings: dict[str, Any]) -> None:
        out = Path(settings["out"])
        self.forge, self.folder = forge, RunFolder(out)
        self.settings, self.err = out.with_suffix(".yaml"), out.with_suffix(".err")
        self.settings.write_text(yaml.safe_dump(settings))

    def start(self, **wanted: Any) -> Outcome:
        """A new run."""
        return self._run([f"--config={self.settings}"], wanted)

    def resume(self, **wanted: Any) -> Outcome:
        """Go on."""
        return self._run(["--resume", f"--out={self.folder.root}"], wanted)

    def _run(self, options: list[str], wanted: dict[str, Any]) -> Outcome:
        self.err.unlink(missing_ok=True)
        return self.forge.run(Request(["pretrain", *options], str(self.err), **wanted))

    @property
    def step(self) -> int:
        """Of the last checkpoint."""
        return load_checkpoint(self.folder.last_checkpoint)["state"]["step"]

    @property
    def said(self) -> str:
        """On the standard error, by the last start."""
        return self.err.read_text()


def serve() -> None:
    """Fork a run for every line on the standard input."""
    # Collecting garbage would copy all pages that parent and child share.
    gc.collect()
    gc.freeze()
    for line in sys.stdin:
        request = Request(**json.loads(line))
        reader, writer = os.pipe()
        pid = os.fork()
        if pid == 0:
            os.close(reader)
            run(request, writer)
        os.close(writer)
        outcome = supervise(pid, reader, request)
        os.close(reader)
        print(json.dumps(outcome), flush=True)


def supervise(pid: int, reader: int, request: Request) -> Outcome:
    """Wait for the moment, send the signals, wait for the end."""
    deadline = time.monotonic() + LIMIT
    reached = False
    while time.monotonic() < deadline:
        if not reached and select.select([reader], [], [], 0.01)[0]:
            reached = os.read(reader, 1) != b""
            for seconds, number, to_group in request.signals if reached else ():
                time.sleep(seconds)
                (os.killpg if to_group else os.kill)(pid, number)
        ended, status = os.waitpid(pid, os.WNOHANG)
        if ended:
            return Outcome(os.waitstatus_to_exitcode(status), reached)
        time.sleep(0.005)
    os.killpg(pid, signal.SIGKILL)
    os.waitpid(pid, 0)
    raise TimeoutError(f"{request} hangs")


def run(request: Request, writer: int) -> NoReturn:
    """The run itself, in the forked process."""
    os.setpgid(0, 0)
    os.environ.update(request.env)
    os.dup2(os.open(os.devnull, os.O_RDONLY), 0)
    os.dup2(os.open(request.err, os.O_WRONLY | os.O_CREAT | os.O_APPEND), 1)
    os.dup2(1, 2)
    # Whoever runs the tests in the background of a script has it ignored.
    signal.signal(signal.SIGINT, signal.default_int_handler)
    install(Moment(request, writer), request.image_seconds)
    try:
        code = main(request.argv)
    except BaseException:
        traceback.print_exc()
        code = 1
    # As a Python process ends, but for taking its modules apart.
    atexit._run_exitfuncs()
    sys.stdout.flush()
    os._exit(code)


class Moment:
    """Counts events, and acts when the chosen one is due."""

    def __init__(self, request: Request, writer: int) -> None:
        self._request, self._writer, self._seen = request, writer, 0

    def __call__(self, event: str, path: Any = None) -> None:
        """An event happens."""
        if not event or not fnmatch(event, self._request.moment):
            return
        self._seen += 1
        if self._seen != self._request.count:
            return
        if event.startswith("torn "):
            os.truncate(path, os.path.getsize(path) // 2)  # noqa: PTH202
        if self._request.full:
            fill_disk(Path(self._request.full))
        if self._request.largest_file:
            resource.setrlimit(resource.RLIMIT_FSIZE, (self._request.largest_file,) * 2)
        os.write(self._writer, b"!")
        time.sleep(self._request.hold)

    def told_by(self, owner: Any, name: str, before: str = "", after: str = "") -> None:
        """Let a function tell of its start and its end."""
        function = getattr(owner, name)

        @functools.wraps(function)
        def call(*args: Any, **kwargs: Any) -> Any:
            self(before)
            result = function(*args, **kwargs)
            self(after)
            return result

        setattr(owner, name, call)


def install(happens: Moment, image_seconds: float) -> None:
    """Tell ``happens`` of every event."""
    trainer.LOG_EVERY = 1
    happens.told_by(trainer, "warm_up", "warm-up")
    happens.told_by(trainer, "watch", "watch")
    happens.told_by(Stepper, "__call__", "step", "stepped")
    happens.told_by(Meter, "before_batch", "batch")
    rename, read = os.replace, ParquetSource.read

    def replace(source: Any, target: Any) -> None:
        name = os.path.basename(target)  # noqa: PTH119
        happens(f"write {name}", source)
        happens(f"torn {name}", source)
        rename(source, target)
        happens(f"written {name}", target)

    def slow(*args: Any) -> Any:
        if get_worker_info() is not None and training:
            time.sleep(image_seconds)
        return read(*args)

    # Workers that train are forked behind the first ``batch``; those before it read the start.
    training: list[bool] = []
    wait = Meter.before_batch

    def before_batch(meter: Any) -> None:
        training.append(True)
        wait(meter)

    os.replace = replace
    Meter.before_batch = before_batch
    ParquetSource.read = slow


def fill_disk(folder: Path) -> None:
    """No open file in this folder takes more bytes, and none can be synced."""

    def full(_: int) -> None:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    os.fsync = full
    for link in Path("/proc/self/fd").iterdir():
        path = link.resolve()
        if path.is_file() and folder in path.parents:
            os.dup2(os.open("/dev/full", os.O_WRONLY), int(link.name))


if __name__ == "__main__":
    serve()
