"""What a run is made of: its settings turned into images, an energy, and what trains it."""

import logging

import torch

from backfold.backbone import default_image_size, is_convolutional
from backfold.data.source import BrokenFiles, ImageSource
from backfold.errors import UserError
from backfold.memory import keep_freed_memory
from backfold.training import setup
from backfold.training.batches import steps_in_epoch
from backfold.training.config import (
    PretrainConfig,
    build_tasks,
    combine_tasks,
    doubtful_settings,
    parse_image_size,
    watched_tasks,
)
from backfold.training.distribution import choose_kernels, has_fast_kernels, make_fabric
from backfold.training.initial import initialise
from backfold.training.optimizer import freeze_unreachable
from backfold.training.recorder import Recorder
from backfold.training.run_folder import RunFolder, load_statistics
from backfold.training.stepper import Stepper

LOGGER = logging.getLogger("backfold")


class RunParts:
    """A run's parts, made from its settings; nothing is written yet.

    Args:
        config: all settings.
        folder: the run's.
        command: what the user typed, for the record.
        resume: the run goes on from its last checkpoint, if it has one.
        source: the images, in place of the settings' data.

    Raises:
        UserError: bad settings or data.
    """

    def __init__(
        self,
        config: PretrainConfig,
        folder: RunFolder,
        command: str,
        resume: bool,
        source: ImageSource | None = None,
    ) -> None:
        self.config, self.folder = config, folder
        for line in doubtful_settings(config):
            LOGGER.warning("%s", line)
        continued = resume and folder.last_checkpoint.exists()
        images = self.images = setup.open_images(
            config, load_statistics(folder.last_checkpoint) if continued else None, source
        )
        tasks = build_tasks(config, images.channels)
        # Watched as they are used: on whole images, whatever part of them training runs on.
        self.tasks = watched_tasks(tasks)
        self.energy = setup.build_energy(config, images.channels)
        if config.init is not None and not continued:
            initialise(self.energy.backbone, config.init)
        self.image_size = parse_image_size(config.image_size) or default_image_size(
            getattr(self.energy.backbone, "pretrained_cfg", None)
        )
        task = combine_tasks(config, tasks)
        setup.check_tasks(
            (*tasks.values(), task), images.channels, self.image_size, self.energy.backbone
        )
        self.broken = BrokenFiles(max(1, int(config.max_broken_share * images.count)))
        self.fabric = make_fabric(config)
        if self.fabric.device.type == "cpu":
            keep_freed_memory()
        choose_kernels(config, self.fabric.device)
        self._count_steps()
        self.energy = self.energy.to(self.fabric.device)
        if has_fast_kernels(config, self.fabric.device) and is_convolutional(self.energy.backbone):
            self.energy = self.energy.to(memory_format=torch.channels_last)
        self.held_out = setup.load_held_out(
            images, self.image_size, self.fabric.device, self.broken
        )
        setup.calibrate(
            self.energy, self.tasks, self.held_out.images, batch_norm=config.init is None
        )
        _tell_frozen(
            freeze_unreachable(self.energy, self.held_out.images[:2], config.plausibility_weight)
        )
        self.stepper = Stepper(
            config, self.energy, task, images.statistics, self.fabric,
            self.total_steps, self.steps_per_epoch,
        )  # fmt: skip
        self.recorder = Recorder(
            config, folder, command, images, self.image_size, self.tasks, self.energy,
            self.held_out, str(self.fabric.strategy.precision.precision), self.total_steps,
        )  # fmt: skip

    def _count_steps(self) -> None:
        config, ranks = self.config, self.fabric.world_size
        self.local_batch = _local_batch(config, ranks)
        self.steps_per_epoch = steps_in_epoch(self.images, self.local_batch, ranks)
        total = max(1, round(config.epochs * self.steps_per_epoch))
        self.total_steps = min(total, config.max_steps or total)
        self.watch_steps = max(1, round(config.watch_every * self.steps_per_epoch))


def _tell_frozen(names: list[str]) -> None:
    if names:
        LOGGER.info(
            "%d parameter(s) get no gradient from restoration and stay as they are: %s",
            len(names),
            ", ".join(names[:4]) + (", ..." if len(names) > 4 else ""),
        )


def _local_batch(config: PretrainConfig, ranks: int) -> int:
    size = config.batch_size
    if size % ranks:
        raise UserError(
            f"batch_size {size} does not divide into {ranks} devices; change batch_size or devices"
        )
    return size // ranks
