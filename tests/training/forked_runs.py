"""The command line in processes of its own, which get signals at chosen moments.

Starting Python and importing torch takes seconds: a fork server does that once for all runs.
"""

import atexit
import errno
import multiprocessing
import os
import resource
import signal
import sys
import time
import traceback
from dataclasses import dataclass, field
from fnmatch import fnmatch
from multiprocessing.connection import Connection, wait
from pathlib import Path
from typing import Any, NamedTuple, NoReturn
from unittest.mock import patch

import yaml

# The commands are loaded when they are used; here each fork would load them again.
from backfold.cli import commands  # noqa: F401
from backfold.cli.main import main
from backfold.data import loading
from backfold.data.formats import TableSource
from backfold.training import pretrain as trainer
from backfold.training.log import Meter
from backfold.training.run import RunFolder, load_checkpoint
from backfold.training.step import Stepper

LIMIT = 120.0  # seconds after which a run counts as hanging
FOREVER = 10 * LIMIT
FORKS = multiprocessing.get_context("forkserver")
FORKS.set_forkserver_preload([__name__])


@dataclass
class Request:
    """A run of the command line, and what happens to it at a moment.

    Events are ``step`` and ``stepped`` (before and after an optimizer step), ``batch`` (before
    waiting for one), ``warm-up``, ``watch``; and for every file NAME that is renamed from a
    temporary name ``write NAME`` (before it), ``torn NAME`` (before it, and half of it is cut off:
    a kill amid writing) and ``written NAME``.
    """

    argv: list[str]
    err: str  # the file that its output is appended to
    moment: str = ""  # pattern of the event, which has happened ``count`` times by then
    count: int = 1
    hold: float = 0.0  # seconds that the run stays there, unless a signal ends it
    # (seconds to wait, number, whether the process's group gets it), one after the other
    signals: list[tuple[float, int, bool]] = field(default_factory=list)
    full: str = ""  # folder whose disk is full from then on
    largest_file: int = 0  # bytes beyond which no file grows from then on
    image_seconds: float = 0.0  # added to the time that reading an image takes
    env: dict[str, str] = field(default_factory=dict)  # added to the environment


class Outcome(NamedTuple):
    """The exit code (negative: the signal that killed it), and whether the moment came."""

    code: int
    reached: bool


class Runner:
    """Starts and resumes one run."""

    def __init__(self, settings: dict[str, Any]) -> None:
        out = Path(settings["out"])
        self.folder, self.settings = RunFolder(out), out.with_suffix(".yaml")
        self.err = out.with_suffix(".err")
        self.settings.write_text(yaml.safe_dump(settings))

    def start(self, **wanted: Any) -> Outcome:
        """A new run."""
        return self._run([f"--config={self.settings}"], wanted)

    def resume(self, **wanted: Any) -> Outcome:
        """Go on."""
        return self._run(["--resume", f"--out={self.folder.root}"], wanted)

    def _run(self, options: list[str], wanted: dict[str, Any]) -> Outcome:
        self.err.unlink(missing_ok=True)
        return run(Request(["pretrain", *options], str(self.err), **wanted))

    @property
    def step(self) -> int:
        """Of the last checkpoint."""
        return load_checkpoint(self.folder.last_checkpoint)["state"]["step"]

    @property
    def said(self) -> str:
        """On the standard error, by the last start."""
        return self.err.read_text()


def run(request: Request) -> Outcome:
    """Start it, wait for the moment, send the signals, wait for the end."""
    reader, writer = FORKS.Pipe(duplex=False)
    process = FORKS.Process(target=run_here, args=(request, writer))
    # Forking a process whose OpenMP threads have run hangs.
    with patch.dict(os.environ, OMP_NUM_THREADS="1", PYTHONPATH=os.pathsep.join(sys.path)):
        process.start()
    reader.recv_bytes()  # the first time it may take long to import torch
    reached = reader in wait([reader, process.sentinel], LIMIT)
    for seconds, number, to_group in request.signals if reached else ():
        time.sleep(seconds)
        (os.killpg if to_group else os.kill)(process.pid, number)
    process.join(LIMIT)
    if process.exitcode is None:
        os.killpg(process.pid, signal.SIGKILL)
        raise TimeoutError(f"{request} hangs")
    return Outcome(process.exitcode, reached)


def run_here(request: Request, writer: Connection) -> NoReturn:
    """The run itself, in the forked process."""
    os.setpgid(0, 0)
    multiprocessing.set_start_method("fork", force=True)  # of loading workers
    writer.send_bytes(b"started")
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

    def __init__(self, request: Request, writer: Connection) -> None:
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
        self._writer.send_bytes(b"!")
        time.sleep(self._request.hold)

    def told_by(self, owner: Any, name: str, before: str = "", after: str = "") -> None:
        """Let a function tell of its start and its end."""
        function = getattr(owner, name)

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
    rename, read, make_loader = os.replace, TableSource.read, loading.training_loader

    def replace(source: Any, target: Any) -> None:
        name = os.path.basename(target)  # noqa: PTH119
        happens(f"write {name}", source)
        happens(f"torn {name}", source)
        rename(source, target)
        happens(f"written {name}", target)

    def slow_loader(*args: Any, **kwargs: Any) -> Any:
        TableSource.read = lambda *given: time.sleep(image_seconds) or read(*given)
        return make_loader(*args, **kwargs)

    os.replace = replace
    loading.training_loader = slow_loader  # its workers are forked behind the first ``batch``


def fill_disk(folder: Path) -> None:
    """No open file in this folder takes more bytes, and none can be synced."""

    def full(_: int) -> None:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    os.fsync = full
    for link in Path("/proc/self/fd").iterdir():
        path = link.resolve()
        if path.is_file() and folder in path.parents:
            os.dup2(os.open("/dev/full", os.O_WRONLY), int(link.name))
