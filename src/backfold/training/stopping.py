"""Leaving a run early without losing a step: Ctrl-C, SIGTERM, and a cluster's preemption."""

import logging
import os
import shutil
import signal
import subprocess
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from types import FrameType

from lightning.fabric import Fabric

from backfold.training.distribution import largest

LOGGER = logging.getLogger("backfold")
JOB = "SLURM_JOB_ID"


class RunStopped(Exception):  # noqa: N818 (nothing went wrong)
    """The run was asked to stop, and did so behind a checkpoint.

    Args:
        number: the signal's.
        message: one line for the user.
    """

    def __init__(self, number: int, message: str) -> None:
        super().__init__(message)
        self.exit_code = 128 + number


class StopRequest:
    """Whether this process was asked to stop, and by which signal."""

    def __init__(self) -> None:
        self.number = 0

    def agreed(self, fabric: Fabric, due: bool) -> tuple[int, bool]:
        """What all processes do after a step; all must ask at the same one.

        Args:
            fabric: joins the processes.
            due: this process wants a checkpoint.

        Returns:
            The signal that any of them got, or 0, and whether any wants a checkpoint.
        """
        if fabric.world_size == 1:
            return self.number, due
        number, wanted = largest(fabric, self.number, int(due))
        return number, bool(wanted)


@contextmanager
def stop_requests() -> Iterator[StopRequest]:
    """Within, the first signal to stop is kept for the loop to find; the second acts at once.

    SIGINT (Ctrl-C), SIGTERM and, in a SLURM job, SIGUSR1, which `sbatch --signal` sends ahead of
    the time limit. Outside the main thread, where Python takes no signals, nothing changes.
    """
    request = StopRequest()
    numbers = [signal.SIGINT, signal.SIGTERM]
    if os.environ.get(JOB):
        numbers.append(signal.SIGUSR1)
    if threading.current_thread() is not threading.main_thread():
        yield request
        return

    def note(number: int, frame: FrameType | None) -> None:  # noqa: ARG001
        request.number = number
        for each, handler in before.items():
            signal.signal(each, handler)

    before = {number: signal.getsignal(number) for number in numbers}
    for number in numbers:
        signal.signal(number, note)
    try:
        yield request
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


def requeue() -> bool:
    """Ask SLURM to queue this job again; returns whether it was asked, and took it.

    Only signals of the cluster call for this: who presses Ctrl-C wants the run to end.
    """
    job = os.environ.get(JOB)
    if not job or shutil.which("scontrol") is None:
        return False
    answer = subprocess.run(
        ["scontrol", "requeue", job], capture_output=True, text=True, check=False
    )
    if answer.returncode != 0:
        LOGGER.warning("SLURM did not requeue job %s: %s", job, answer.stderr.strip())
    return answer.returncode == 0
