"""The one loop that every contender is pretrained by, in parts that resume."""

import time
from collections.abc import Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import torch

from backfold.training.run_folder import load_checkpoint, save_checkpoint, write_tensors
from racing.methods import Method

SAVE_SECONDS = 120.0
LOSSES_KEPT = 50


class OutOfTimeError(Exception):
    """The race's time is over; what was done is saved."""


@dataclass
class Progress:
    """How far a pretraining is.

    Attributes:
        step: next one.
        seconds: that each step took, views and evaluation not counted.
        view_seconds: that making all views took.
        losses: of each step.
    """

    step: int = 0
    seconds: list[float] = field(default_factory=list)
    view_seconds: float = 0.0
    losses: list[float] = field(default_factory=list)


def point_file(folder: Path, step: int) -> Path:
    """Where the backbone is kept as it was after so many steps."""
    return folder / f"after-{step}.safetensors"


def pretrain(
    method: Method, total_steps: int, points: Sequence[int], folder: Path, deadline: float
) -> Progress:
    """Take all steps, or go on where the folder's checkpoint says.

    Args:
        method: at its first step.
        total_steps: of the run.
        points: steps after which the backbone is kept.
        folder: for the backbones and the checkpoint.
        deadline: by ``time.monotonic``.

    Raises:
        OutOfTimeError: the deadline has come before the last step.
    """
    checkpoint = folder / "checkpoint.pt"
    progress = _resume(method, checkpoint)
    saved = begun = time.monotonic()
    for step, batch in zip(
        steps := range(progress.step, total_steps), method.batches(steps), strict=True
    ):
        started = time.monotonic()
        progress.view_seconds += started - begun
        loss = float(method.step(batch, step))  # waits for the device
        progress.seconds.append(time.monotonic() - started)
        progress.losses.append(loss)
        progress.step = step + 1
        if progress.step in points:
            write_tensors(point_file(folder, progress.step), method.backbone())
        begun = time.monotonic()
        is_over = begun > deadline and progress.step < total_steps
        if is_over or begun - saved > SAVE_SECONDS:
            _save(method, progress, checkpoint)
            begun = saved = time.monotonic()
        if is_over:
            raise OutOfTimeError
    checkpoint.unlink(missing_ok=True)
    return progress


def _resume(method: Method, checkpoint: Path) -> Progress:
    if not checkpoint.exists():
        return Progress()
    content = load_checkpoint(checkpoint)
    method.module.load_state_dict(content["module"])
    method.optimizer.load_state_dict(content["optimizer"])
    return Progress(**content["progress"])


def _save(method: Method, progress: Progress, checkpoint: Path) -> None:
    save_checkpoint(
        checkpoint,
        {
            "module": method.module.state_dict(),
            "optimizer": method.optimizer.state_dict(),
            "progress": asdict(progress),
        },
    )


def describe(progress: Progress) -> dict[str, Any]:
    """For a run's JSON."""
    every = max(1, len(progress.losses) // LOSSES_KEPT)
    return {
        "steps": progress.step,
        "seconds_per_step": float(torch.tensor(progress.seconds, dtype=torch.double).median()),
        "seconds": sum(progress.seconds),
        "view_seconds": progress.view_seconds,
        "losses": [round(loss, 5) for loss in progress.losses[every - 1 :: every]],
        "loss_every": every,
    }
