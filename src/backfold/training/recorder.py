"""What a run leaves in its folder: checkpoints, health, previews, facts, weights."""

import copy
import logging
import math
from dataclasses import dataclass, field
from datetime import UTC, datetime
from typing import Any

import numpy as np
import torch
from torch import Tensor

from backfold.backbone import ImageSize
from backfold.batch_norm import batch_norms, refresh_batch_norm
from backfold.energy import EnergyModel
from backfold.pretext import PretextTask
from backfold.training import setup
from backfold.training.config import PretrainConfig
from backfold.training.config_file import config_to_dict
from backfold.training.health import HeldOut, describe_health, watch
from backfold.training.metrics_log import MetricsLog
from backfold.training.previews import write_preview
from backfold.training.run_folder import (
    RunFolder,
    add_checkpoint,
    load_checkpoint,
    save_checkpoint,
    write_json,
    write_tensors,
)

LOGGER = logging.getLogger("backfold")
PREVIEW_IMAGES = 6
WATCH_BATCH = 64
# Settings whose outcome depends on measurements, which a resumed run takes over.
DECIDED = ("micro_batch", "compile", "derivative")


@dataclass
class State:
    """What a run carries from step to step, and its checkpoints keep beside the tensors."""

    step: int = 0
    seconds: float = 0.0
    best_gain_db: float = -math.inf
    started: str = ""
    decisions: dict[str, Any] = field(default_factory=dict)
    broken: list[str] = field(default_factory=list)
    stream: list[str] = field(default_factory=list)  # where each process is in it


class Recorder:
    """Writes a run's folder, and reads it back when the run goes on.

    Args:
        config: all settings.
        folder: the run's.
        command: what the user typed.
        images: the data.
        image_size: (height, width) in pixels.
        tasks: by name.
        energy: what is trained.
        held_out: the images that are watched.
        precision: Lightning's name of it.
        total_steps: of the whole run.

    Attributes:
        watch_batch: held-out images that are restored at once.
    """

    def __init__(
        self,
        config: PretrainConfig,
        folder: RunFolder,
        command: str,
        images: setup.Images,
        image_size: ImageSize,
        tasks: dict[str, PretextTask],
        energy: EnergyModel,
        held_out: HeldOut,
        precision: str,
        total_steps: int,
    ) -> None:
        self.config, self.folder, self.command = config, folder, command
        self.images, self.image_size, self.tasks = images, image_size, tasks
        self.energy, self.held_out = energy, held_out
        self.precision, self.total_steps = precision, total_steps
        self.watch_batch = min(WATCH_BATCH, config.batch_size)
        self.state = State(started=datetime.now(UTC).isoformat(timespec="seconds"))
        self.history: list[dict[str, Any]] = []
        self.energies: dict[str, dict[str, list[float]]] = {}

    def load(self) -> dict[str, Any] | None:
        """Take up the last checkpoint; returns the optimizer's state, or None if there is none.

        Raises:
            UserError: it can't be read.
        """
        if not self.folder.last_checkpoint.exists():
            LOGGER.info("no checkpoint yet in %s: starting from step 0", self.folder.root)
            return None
        content = load_checkpoint(self.folder.last_checkpoint)
        self.energy.load_state_dict(content["model"])
        self.state = State(**content["state"])
        self.history, self.energies = content["history"], content["energies"]
        now = config_to_dict(self.config)
        if any(now.get(name) != content["config"].get(name) for name in DECIDED):
            self.state.decisions = {}  # asked for otherwise this time
        LOGGER.info("resuming at step %d of %d", self.state.step, self.total_steps)
        optimizer: dict[str, Any] = content["optimizer"]
        return optimizer

    def watch(self, epoch: float, metrics: MetricsLog) -> None:
        """Look at the held-out images: health, previews."""
        config = self.config
        entry, self.energies = watch(
            self.energy,
            self.tasks,
            self.held_out,
            self.images.statistics,
            config.embedding,
            num_steps=config.num_steps,
            step_size=config.step_size,
            batch_size=self.watch_batch,
        )
        entry = {"step": self.state.step, "epoch": epoch, **entry}
        self.history.append(entry)
        metrics.add_health(entry)
        LOGGER.info("%s", describe_health(entry))
        for name, task in self.tasks.items():
            write_preview(
                self.folder.previews / f"step-{self.state.step:07d}-{name}.png",
                self.energy,
                task,
                _spread(self.held_out, PREVIEW_IMAGES),
                self.images.statistics,
                num_steps=config.num_steps,
                step_size=config.step_size,
            )

    def save(self, epoch: float, optimizer: dict[str, Any]) -> None:
        """A checkpoint, and beside it what the report reads."""
        gain = self.history[-1]["psnr_gain_db"] if self.history else -math.inf
        is_best = bool(self.history) and self.history[-1]["step"] == self.state.step
        is_best = is_best and gain > self.state.best_gain_db
        if is_best:
            self.state.best_gain_db = gain
        content = {
            "state": vars(self.state).copy(),
            "config": config_to_dict(self.config),
            "channels": self.images.channels,
            "image_size": list(self.image_size),
            "mean": list(self.images.statistics.mean),
            "std": list(self.images.statistics.std),
            "model": self.energy.state_dict(),
            "optimizer": optimizer,
            "history": self.history,
            "energies": self.energies,
        }
        # The best first: a run that dies between the two takes the step, and both, again.
        if is_best:
            save_checkpoint(self.folder.best_checkpoint, content)
        add_checkpoint(self.folder, self.state.step, content, self.config.keep_checkpoints)
        self.describe(epoch)

    def describe(self, epoch: float) -> None:
        """What the report reads, as of the last checkpoint."""
        write_json(self.folder.health, {"history": self.history, "energies": self.energies})
        write_json(self.folder.facts, self._facts(epoch))

    def _facts(self, epoch: float) -> dict[str, Any]:
        described = setup.describe_run(
            self.config,
            self.energy,
            self.images,
            self.tasks,
            self.image_size,
            self.held_out.images.device,
        )
        return {
            "command": self.command,
            "started": self.state.started,
            "seconds": self.state.seconds,
            **described,
            "precision": self.precision,
            "steps": self.state.step,
            "total_steps": self.total_steps,
            "epochs": epoch,
        }

    def export(self) -> None:
        """The backbone's weights under timm's names, batch norms refreshed."""
        backbone = self.energy.backbone
        if batch_norms(backbone):
            backbone = copy.deepcopy(backbone).eval()
            refresh_batch_norm(backbone, self.held_out.images.split(self.config.batch_size))
        write_tensors(self.folder.backbone, backbone.state_dict())
        LOGGER.info("backbone written to %s", self.folder.backbone)


def _spread(held_out: HeldOut, count: int) -> Tensor:
    indices = np.linspace(0, len(held_out.images) - 1, min(count, len(held_out.images)))
    return held_out.images[torch.from_numpy(indices.round().astype(np.int64))]
