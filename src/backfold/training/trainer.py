"""The training loop.

Lightning Fabric, not its Trainer, runs devices, precision and distribution: each of the K
restoration steps has a backward pass of its own, of which only the last may reduce gradients
between processes, and a run must go on in mid-epoch with the same bits. Both are a plain loop here,
and would be overridden hooks there.
"""

import logging
import math
import time
from collections.abc import Callable, Iterator
from contextlib import ExitStack
from typing import NoReturn, cast

import torch
from rich.console import Console
from torch import Tensor

from backfold.data.loading import Batch
from backfold.data.source import ImageSource
from backfold.data.stream import StreamBatches
from backfold.errors import UserError
from backfold.memory import memory_advice
from backfold.training.batches import loading_workers, stream_batches, training_batches
from backfold.training.config import PretrainConfig, build_tasks
from backfold.training.config_file import config_to_dict
from backfold.training.distribution import gather_lines
from backfold.training.loggers import ServiceLoggers, check_loggers
from backfold.training.meter import Meter, Restored
from backfold.training.metrics_log import MetricsLog
from backfold.training.progress import (
    TrainingBar,
    describe_row,
    is_first_process,
    log_to,
    terminal,
)
from backfold.training.run_folder import (
    RunFolder,
    check_available,
    claim,
    write_tensors,
    write_yaml,
)
from backfold.training.run_parts import RunParts
from backfold.training.stopping import (
    StopNow,
    StopRequest,
    ignore_dying_workers,
    stop_requests,
    stopped,
    stopped_early,
)
from backfold.training.warm_up import warm_up

LOGGER = logging.getLogger("backfold")
LOG_EVERY = 20
# (steps done, loss on the device, what the last part of the batch came to).
Callback = Callable[[int, Tensor, Restored], None]


def pretrain(
    config: PretrainConfig,
    *,
    resume: bool = False,
    overwrite: bool = False,
    command: str = "",
    console: Console | None = None,
    source: ImageSource | None = None,
    callback: Callback | None = None,
) -> RunFolder:
    """Pretrain a backbone; everything is left in ``config.out``.

    Args:
        config: all settings.
        resume: go on from the folder's last checkpoint.
        overwrite: replace an existing run.
        command: what the user typed, for the record.
        console: where messages go; the standard error by default.
        source: the images, in place of ``config.data``, which is then no more than their name.
        callback: called after every optimizer step.

    Raises:
        UserError: bad settings or data, a folder that can't be used, a loss that is not finite.
    """
    console = console or terminal()
    if not is_first_process():
        console = Console(quiet=True)
    with stop_requests() as request:
        try:
            return _pretrain(config, resume, overwrite, command, console, request, source, callback)
        except StopNow:
            raise stopped_early(request.number, config.out) from None


def _pretrain(
    config: PretrainConfig,
    resume: bool,
    overwrite: bool,
    command: str,
    console: Console,
    request: StopRequest,
    source: ImageSource | None,
    callback: Callback | None,
) -> RunFolder:
    # What can be refused is refused before the folder is touched.
    check_available(config.out, resume=resume, overwrite=overwrite)
    build_tasks(config, config.channels or 3)
    check_loggers(config.loggers)
    with log_to(None, console) as messages, request.at_once(), memory_advice():
        run = Run(config, RunFolder(config.out), command, resume, source)
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
        with memory_advice(lambda: run.stepper.micro_batch or run.local_batch):
            if resume:
                run.load()
            run.train(console, request, callback)
    return run.folder


class Run(RunParts):
    """A run's parts at work."""

    def __init__(
        self,
        config: PretrainConfig,
        folder: RunFolder,
        command: str,
        resume: bool,
        source: ImageSource | None = None,
    ) -> None:
        super().__init__(config, folder, command, resume, source)
        self.state = self.recorder.state
        self._unreadable: list[str] = []  # lines that are not counted yet
        self._told_of_waiting = False
        self._stream: StreamBatches | None = None

    def load(self) -> None:
        """Take up the last checkpoint.

        Raises:
            UserError: it can't be read.
        """
        optimizer = self.recorder.load()
        if optimizer is not None:
            self.stepper.optimizer.load_state_dict(optimizer)
            self.state = self.recorder.state
            self.broken.add(self.state.broken)

    def train(
        self, console: Console, request: StopRequest, callback: Callback | None = None
    ) -> None:
        """Go on to the last step, and leave the weights."""
        if self.fabric.is_global_zero:
            write_yaml(self.folder.config, config_to_dict(self.config))
            if not self.state.step:  # what evaluation holds the pretrained backbone against
                write_tensors(self.folder.initial, self.energy.backbone.state_dict())
            if self.state.step:  # a run that was killed just behind a checkpoint had not yet
                self.recorder.describe(self._epoch())
        with request.at_once():
            self._prepare()
        metrics = self._open_metrics() if self.fabric.is_global_zero else None
        succeeded = False
        try:
            with TrainingBar(console, self.state.step, self.total_steps) as bar:
                self._loop(bar, metrics, request, callback)
            succeeded = True
        finally:
            if metrics is not None:
                metrics.close(succeeded=succeeded)
        if self.fabric.is_global_zero:
            self.recorder.export()

    def _open_metrics(self) -> MetricsLog:
        settings = config_to_dict(self.config)
        services = ServiceLoggers(self.config.loggers, self.folder, settings)
        return MetricsLog(self.folder, self.state.step, services)

    def _prepare(self) -> None:
        """Find out what fits into memory, and what to compile."""
        held_out = self.images.statistics.denormalize(self.held_out.images)  # as batches come
        batch = held_out.repeat(-(-self.local_batch // len(held_out)), 1, 1, 1)[: self.local_batch]
        self.energy.train()
        warm_up(self.stepper, batch, self.total_steps - self.state.step, self.state.decisions)
        fitting = self.stepper.micro_batch or self.local_batch
        self.recorder.watch_batch = min(self.recorder.watch_batch, fitting)

    def _loop(
        self,
        bar: TrainingBar,
        metrics: MetricsLog | None,
        request: StopRequest,
        callback: Callback | None,
    ) -> None:
        meter = Meter(self.state.seconds)
        what = (self.config, self.images, self.image_size, self.local_batch)
        self._stream = stream_batches(*what, self.fabric, self.state.stream)
        steps = range(self.state.step, self.total_steps)
        batches = training_batches(*what, steps, self.fabric, self._stream)
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
            self._unreadable += batch.broken
            if self.fabric.world_size == 1:
                self._count_unreadable()
            losses, norm, last = self.stepper(batch.images, self.state.step)
            self.state.step += 1
            bar.advance()
            done = self.state.step
            if callback is not None:
                callback(done, losses, last)
            watched = done % self.watch_steps == 0 or done == self.total_steps
            if done % LOG_EVERY == 0 or done == 1 or watched:
                self._count_unreadable()
                row = self._row(losses, norm, last, meter)
                bar.show(row)
                if metrics is not None:
                    metrics.add(row)
            self.state.seconds = meter.seconds()
            if watched and metrics is not None:
                LOGGER.info("epoch %.1f: %s", self._epoch(), describe_row(row))
                meter.pause()
                self.recorder.watch(self._epoch(), metrics)
                meter.resume()
            due = watched or time.monotonic() - saved > 60 * self.config.checkpoint_minutes
            number, due = self._agreed(request, due, exchange=done % LOG_EVERY == 0 or watched)
            if due or number:
                self._check_finite(float(losses), float(norm))
                self._count_unreadable()
                self._save()
                saved = time.monotonic()
            if number and done < self.total_steps:
                self._stop(number)

    def _agreed(self, request: StopRequest, due: bool, exchange: bool) -> tuple[int, bool]:
        """The signal to leave by, or 0, and whether to save; processes ask each other now and then.

        Asking at every step would make each of them wait for its device there.
        """
        if self.fabric.world_size == 1:
            return request.number, due
        return request.agreed(self.fabric, due) if exchange else (0, False)

    def _next(self, batches: Iterator[Batch], request: StopRequest) -> Batch:
        if self.fabric.world_size > 1:  # processes leave together, behind a step
            return next(batches)
        try:
            with request.at_once():
                return next(batches)
        except (StopNow, RuntimeError):
            # A signal reaches the workers too, and they leave: that is the RuntimeError.
            if not request.number:
                raise
            ignore_dying_workers()
            self._save()
            self._stop(request.number)

    def _count_unreadable(self) -> None:
        """Tell and count what any process could not read; all of them stop if it is too much."""
        lines = gather_lines(self.fabric, self._unreadable)
        self._unreadable = []
        for line in self.broken.add(lines):
            LOGGER.warning("skipped: %s", line)

    def _stop(self, number: int) -> NoReturn:
        """Leave after the last step, which is saved."""
        # Lightning kills the first process when it finds that another has left.
        self.fabric.barrier()
        done = f"at step {self.state.step} of {self.total_steps}, which is saved"
        first = self.fabric.is_global_zero
        raise stopped(number, done, self.config.out, may_requeue=first)

    def _save(self) -> None:
        self.state.broken = self.broken.descriptions
        if self._stream is not None:
            self.state.stream = gather_lines(self.fabric, [self._stream.where()])
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
        self._tell_of_waiting(meter)
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

    def _tell_of_waiting(self, meter: Meter) -> None:
        """Warn once of loading that is too slow for the steps."""
        share = meter.long_wait()
        if share is None or self._told_of_waiting:
            return
        self._told_of_waiting = True
        LOGGER.warning(
            "waiting for images takes %.0f %% of the time; raise --num-workers (now %d), or store "
            "the images smaller",
            100 * share,
            loading_workers(self.config, self.fabric),
        )

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
