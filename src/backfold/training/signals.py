"""Leaving a run early without losing a step: Ctrl-C, SIGTERM, and a cluster's preemption."""

import logging
import os
import shutil
import signal
import subprocess
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from types import FrameType

from backfold.errors import RunStopped
from backfold.training.log import is_first_process
from backfold.training.run import RunFolder

LOGGER = logging.getLogger("backfold")
JOB = "SLURM_JOB_ID"


class StopNow(BaseException):
    """A signal came while the process could leave at once; no ``except Exception`` catches it."""


class StopRequest:
    """By which signal this process was asked to stop: 0 is none."""

    def __init__(self) -> None:
        self.number = 0
        self._at_once = False

    @contextmanager
    def at_once(self) -> Iterator[None]:
        """Within, where nothing is lost by leaving, a signal raises `StopNow`."""
        self._at_once = True
        try:
            self.note(self.number)
            yield
        finally:
            self._at_once = False

    def note(self, number: int) -> None:
        """A signal has come."""
        self.number = self.number or number
        if self._at_once and self.number:
            raise StopNow


@contextmanager
def stop_requests() -> Iterator[StopRequest]:
    """Within, signals to stop are kept for the loop to find; a second Ctrl-C acts at once.

    SIGINT (Ctrl-C), SIGTERM and, in a SLURM job, SIGUSR1, which `sbatch --signal` sends ahead of
    the time limit. Outside the main thread Python takes no signals.
    """
    request = StopRequest()
    if threading.current_thread() is not threading.main_thread():
        yield request
        return
    numbers = [signal.SIGINT, signal.SIGTERM, *([signal.SIGUSR1] if os.environ.get(JOB) else [])]
    process = os.getpid()
    before = {number: signal.getsignal(number) for number in numbers}

    def note(number: int, frame: FrameType | None) -> None:  # noqa: ARG001
        if os.getpid() != process:  # a loading worker leaves when the process that uses it does
            return
        if number == signal.SIGINT:
            signal.signal(number, before[signal.SIGINT])
        request.note(number)

    for number in numbers:
        signal.signal(number, note)
    try:
        yield request
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


def ignore_dying_workers() -> None:
    """From now on PyTorch raises nothing for loading workers that a signal has reached too.

    Loaders made later still find a dead worker by themselves, some seconds later.
    """
    if threading.current_thread() is threading.main_thread():
        signal.signal(signal.SIGCHLD, signal.SIG_DFL)


def was_requeued(out: Path) -> bool:
    """Whether SLURM repeats this job's command, and its first time has left a run to go on with."""
    return os.environ.get("SLURM_RESTART_COUNT", "0") != "0" and RunFolder(out).config.exists()


def stopped(number: int, when: str, out: Path) -> RunStopped:
    """What to raise for a signal, and ``when`` in the run it came: empty before the first step."""
    message = f"stopped by {signal.Signals(number).name}"
    if not when and not RunFolder(out).config.exists():
        return RunStopped(number, f"{message} before anything was done; start it again")
    message = f"{message} {when or 'before a step'}"
    # Only signals of the cluster call for this: who presses Ctrl-C wants the run to end.
    if is_first_process() and number != signal.SIGINT and _requeue():
        message += "; SLURM has queued the job again"
    return RunStopped(number, f"{message}; `backfold pretrain --resume --out {out}` goes on")


def _requeue() -> bool:
    job = os.environ.get(JOB)
    if not job or shutil.which("scontrol") is None:
        return False
    command = ["scontrol", "requeue", job]
    answer = subprocess.run(command, capture_output=True, text=True, check=False)
    if answer.returncode != 0:
        LOGGER.warning("SLURM did not requeue job %s: %s", job, answer.stderr.strip())
    return answer.returncode == 0
