"""The training loop.

Lightning Fabric, not its Trainer, runs devices, precision and distribution: each of the K
restoration steps has a backward pass of its own, of which only the last may reduce gradients
between processes, and a run must go on in mid-epoch with the same bits. Both are a plain loop here,
and would be overridden hooks there.
"""

import logging
import math
import signal
import time
from collections.abc import Iterator
from contextlib import ExitStack
from typing import NoReturn, cast

import torch
from rich.console import Console
from torch import Tensor

from backfold.backbone import default_image_size
from backfold.data.broken import BrokenFiles
from backfold.data.loading import Batch
from backfold.errors import UserError
from backfold.memory import keep_freed_memory
from backfold.training import setup
from backfold.training.batches import steps_in_epoch, training_batches
from backfold.training.config import (
    PretrainConfig,
    build_tasks,
    combine_tasks,
    parse_image_size,
    settings_without_effect,
    whole_images,
)
from backfold.training.config_file import config_to_dict
from backfold.training.distribution import make_fabric
from backfold.training.initial import initialise
from backfold.training.loading_plan import LoadingPlan
from backfold.training.meter import Meter, Restored
from backfold.training.metrics_log import MetricsLog
from backfold.training.optimizer import freeze_unreachable
from backfold.training.progress import (
    TrainingBar,
    describe_row,
    is_first_process,
    log_to,
    terminal,
)
from backfold.training.recorder import Recorder
from backfold.training.run_folder import (
    RunFolder,
    check_available,
    claim,
    write_yaml,
)
from backfold.training.stepper import Stepper
from backfold.training.stopping import RunStopped, StopRequest, requeue, stop_requests
from backfold.training.warm_up import plan_loading, warm_up

LOGGER = logging.getLogger("backfold")
LOG_EVERY = 20
PREVIEW_IMAGES = 6


def pretrain(
    config: PretrainConfig,
    *,
    resume: bool = False,
    overwrite: bool = False,
    command: str = "",
    console: Console | None = None,
) -> RunFolder:
    """Pretrain a backbone; everything is left in ``config.out``.

    Args:
        config: all settings.
        resume: go on from the folder's last checkpoint.
        overwrite: replace an existing run.
        command: what the user typed, for the record.
        console: where messages go; the standard error by default.

    Raises:
        UserError: bad settings or data, a folder that can't be used, a loss that is not finite.
    """
    console = console or terminal()
    if not is_first_process():
        console = Console(quiet=True)
    # What can be refused is refused before the folder is touched.
    check_available(config.out, resume=resume, overwrite=overwrite)
    build_tasks(config, config.channels or 3)
    with log_to(None, console) as messages:
        run = Run(config, RunFolder(config.out), command, resume)
    with ExitStack() as stack:
        problem = ""
        if run.fabric.is_global_zero:
            try:
                stack.enter_context(claim(config.out, resume=resume, overwrite=overwrite))
            except UserError as error:
                problem = str(error)
        problem = run.fabric.broadcast(problem)  # or the others would wait for the first
        if problem:
            raise UserError(problem)
        log = run.folder.log if run.fabric.is_global_zero else None
        stack.enter_context(log_to(log, console, messages if log else ()))
        if resume:
            run.load()
        run.train(console)
    return run.folder


class Run:
    """A run's parts, made from its settings."""

    def __init__(
        self, config: PretrainConfig, folder: RunFolder, command: str, resume: bool
    ) -> None:
        self.config, self.folder = config, folder
        for line in settings_without_effect(config):
            LOGGER.warning("%s", line)
        images = self.images = setup.open_images(config)
        tasks = build_tasks(config, images.channels)
        # Watched as they are used: on whole images, whatever part of them training runs on.
        self.tasks = whole_images(tasks)
        energy = setup.build_energy(config, images.channels)
        if config.init is not None and not (resume and folder.last_checkpoint.exists()):
            initialise(energy.backbone, config.init)
        self.image_size = parse_image_size(config.image_size) or default_image_size(
            getattr(energy.backbone, "pretrained_cfg", None)
        )
        setup.check_tasks(tasks, images.channels, self.image_size, energy.backbone)
        self.broken = BrokenFiles(max(1, int(config.max_broken_share * images.count)))
        self.fabric = make_fabric(config)
        if self.fabric.device.type == "cpu":
            keep_freed_memory()
        self.local_batch = _local_batch(config, self.fabric.world_size)
        device = self.fabric.device
        self.steps_per_epoch = steps_in_epoch(images, self.local_batch, self.fabric.world_size)
        total = max(1, round(config.epochs * self.steps_per_epoch))
        self.total_steps = min(total, config.max_steps or total)
        self.watch_steps = max(1, round(config.watch_every * self.steps_per_epoch))
        energy = energy.to(device)
        self.held_out = setup.load_held_out(images, self.image_size, device, self.broken)
        setup.calibrate(energy, self.tasks, self.held_out.images)
        frozen = freeze_unreachable(energy, self.held_out.images[:2])
        if frozen:
            LOGGER.info(
                "%d parameter(s) get no gradient from restoration and stay as they are: %s",
                len(frozen),
                ", ".join(frozen[:4]) + (", ..." if len(frozen) > 4 else ""),
            )
        self.stepper = Stepper(
            config,
            energy,
            combine_tasks(config, tasks),
            images.statistics,
            self.fabric,
            self.total_steps,
            self.steps_per_epoch,
        )
        self.energy = energy
        self.recorder = Recorder(
            config,
            folder,
            command,
            images,
            self.image_size,
            self.tasks,
            energy,
            self.held_out,
            str(self.fabric.strategy.precision.precision),
            self.total_steps,
        )
        self.state = self.recorder.state

    def load(self) -> None:
        """Take up the last checkpoint.

        Raises:
            UserError: it can't be read.
        """
        optimizer = self.recorder.load()
        if optimizer is not None:
            self.stepper.optimizer.load_state_dict(optimizer)
            self.state = self.recorder.state

    def train(self, console: Console) -> None:
        """Go on to the last step, and leave the weights."""
        if self.fabric.is_global_zero:
            write_yaml(self.folder.config, config_to_dict(self.config))
        self.plan = self._prepare()
        metrics = MetricsLog(self.folder, self.state.step) if self.fabric.is_global_zero else None
        try:
            with (
                TrainingBar(console, self.state.step, self.total_steps) as bar,
                stop_requests() as request,
            ):
                self._loop(bar, metrics, request)
        finally:
            if metrics is not None:
                metrics.close()
        if self.fabric.is_global_zero:
            self.recorder.export()

    def _prepare(self) -> LoadingPlan:
        """Find out what the step costs, then how to load images fast enough for it."""
        held_out = self.held_out.images
        batch = held_out.repeat(-(-self.local_batch // len(held_out)), 1, 1, 1)[: self.local_batch]
        self.energy.train()
        seconds = warm_up(
            self.stepper, batch, self.total_steps - self.state.step, self.state.decisions
        )
        fitting = self.stepper.micro_batch or self.local_batch
        self.recorder.watch_batch = min(self.recorder.watch_batch, fitting)
        return plan_loading(
            self.config,
            self.images,
            self.image_size,
            self.local_batch,
            seconds,
            self.fabric.world_size // getattr(self.fabric.strategy, "num_nodes", 1),
            self.fabric.device,
        )

    def _loop(self, bar: TrainingBar, metrics: MetricsLog | None, request: StopRequest) -> None:
        meter = Meter(self.state.seconds)
        batches = training_batches(
            self.config,
            self.images,
            self.image_size,
            self.local_batch,
            self.plan,
            range(self.state.step, self.total_steps),
            self.fabric,
        )
        self.energy.train()
        saved = time.monotonic()
        if self.state.step == 0 and not self.recorder.history:
            if metrics is not None:
                self.recorder.watch(0.0, metrics)
            self._save()
            meter.resume()
        while self.state.step < self.total_steps:
            meter.before_batch()
            batch = self._next(batches, request)
            meter.before_step(len(batch.images) * self.fabric.world_size)
            for line in self.broken.add(batch.broken):
                LOGGER.warning("skipped: %s", line)
            losses, norm, last = self.stepper(batch.images, self.state.step)
            self.state.step += 1
            bar.advance()
            done = self.state.step
            if (
                done % LOG_EVERY == 0
                or done in (1, self.total_steps)
                or done % self.watch_steps == 0
            ):
                row = self._row(losses, norm, last, meter)
                bar.show(row)
                if metrics is not None:
                    metrics.add(row)
            self.state.seconds = meter.seconds()
            watched = done % self.watch_steps == 0 or done == self.total_steps
            if watched and metrics is not None:
                LOGGER.info("epoch %.1f: %s", self._epoch(), describe_row(row))
                meter.pause()
                self.recorder.watch(self._epoch(), metrics)
                meter.resume()
            due = watched or time.monotonic() - saved > 60 * self.config.checkpoint_minutes
            number, due = request.agreed(self.fabric, due)
            if due or number:
                self._check_finite(float(losses), float(norm))
                self._save()
                saved = time.monotonic()
            if number and done < self.total_steps:
                self._stop(number)

    def _next(self, batches: Iterator[Batch], request: StopRequest) -> Batch:
        try:
            return next(batches)
        except RuntimeError:
            # Ctrl-C reaches the workers too, and they leave.
            if request.number and self.fabric.world_size == 1:
                self._save()
                self._stop(request.number)
            raise

    def _stop(self, number: int) -> NoReturn:
        """Leave after the last step, which is saved."""
        # Lightning kills the first process when it finds that another has left.
        self.fabric.barrier()
        message = (
            f"stopped by {signal.Signals(number).name} at step {self.state.step} of "
            f"{self.total_steps}, which is saved"
        )
        if self.fabric.is_global_zero and number != signal.SIGINT and requeue():
            message += "; SLURM has queued the job again"
        raise RunStopped(
            number, f"{message}; `backfold pretrain --resume --out {self.config.out}` goes on"
        )

    def _save(self) -> None:
        # All processes: a sharded optimizer's state is gathered in the first.
        optimizer = self.stepper.optimizer.state_dict()
        if self.fabric.is_global_zero:
            self.recorder.save(self._epoch(), optimizer)

    def _row(self, loss: Tensor, norm: Tensor, last: Restored, meter: Meter) -> dict[str, float]:
        """A row of ``metrics.csv``; stops the run if the loss is not finite."""
        gain = last.psnr_gain_db(torch.tensor(self.images.statistics.std))
        here = [float(loss), gain, last.energy_gap(self.energy)]
        mean = self.fabric.all_reduce(torch.tensor(here, device=loss.device), reduce_op="mean")
        mean_loss, gain, gap = cast(Tensor, mean).tolist()
        self._check_finite(mean_loss, float(norm))
        speed, wait = meter.read()
        return {
            "step": self.state.step,
            "epoch": self._epoch(),
            "seconds": meter.seconds(),
            "images_per_second": speed,
            "data_wait": wait,
            "lr": self.stepper.optimizer.param_groups[0]["lr"],
            "loss": mean_loss,
            "gradient_norm": float(norm),
            "psnr_gain_db": gain,
            "energy_gap": gap,
        }

    def _epoch(self) -> float:
        return self.state.step / self.steps_per_epoch

    def _check_finite(self, loss: float, norm: float) -> None:
        # The norm too: where it is not finite, the weights are broken by now.
        if not (math.isfinite(loss) and math.isfinite(norm)):
            raise UserError(
                f"the loss is {loss:g} and its gradient's norm {norm:g} at step "
                f"{self.state.step}; the last good checkpoint is kept "
                f"in {self.folder.last_checkpoint}; lower optimizer.base_lr (now "
                f"{self.config.optimizer.base_lr:g}) or step_size, or set precision to 32-true"
            )


def _local_batch(config: PretrainConfig, ranks: int) -> int:
    size = config.batch_size
    if size % ranks:
        raise UserError(
            f"batch_size {size} does not divide into {ranks} devices; change batch_size or devices"
        )
    return size // ranks
