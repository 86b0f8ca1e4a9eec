"""Pretraining: a run is made from its settings, then one loop of step, log, watch, save."""

import importlib.metadata
import logging
import math
import platform
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import ExitStack
from dataclasses import asdict, dataclass, field, replace
from datetime import UTC, datetime
from itertools import islice
from typing import Any, NoReturn, cast

import torch
import yaml
from rich.console import Console
from rich.progress import Progress
from torch import Tensor

from backfold.backbone import default_image_size, is_convolutional
from backfold.batch_norm import refresh_batch_norm
from backfold.conditional import check_conditional
from backfold.data import loading
from backfold.data.source import BrokenFiles, ImageSource
from backfold.data.stream import StreamBatches
from backfold.embedding import embed_batches
from backfold.errors import UserError
from backfold.files import write_atomically, write_json
from backfold.memory import keep_freed_memory, memory_advice
from backfold.pretext.corruption import Corruption, PretextTask
from backfold.sparse import running_tokens
from backfold.training import devices, log, run, signals
from backfold.training.autotune import warm_up
from backfold.training.config import (
    PretrainConfig,
    build_tasks,
    combine_tasks,
    config_to_dict,
    doubtful_settings,
    parse_image_size,
    used_tasks,
)
from backfold.training.images import load_held_out, open_images
from backfold.training.init import initialise
from backfold.training.optimizer import freeze_unreachable
from backfold.training.step import Restored, Stepper
from backfold.training.watch import describe_health, watch

LOGGER = logging.getLogger("backfold")
LOG_EVERY = 20
PREFETCH = 4
CALIBRATION_IMAGES = 32
WATCH_BATCH = 64
DECIDED = ("micro_batch", "compile")  # settings that warming up turns into decisions
PACKAGES = ("backfold", "torch", "timm", "lightning")
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
) -> run.RunFolder:
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
    console = Console(quiet=True) if not log.is_first_process() else console or log.terminal()
    with signals.stop_requests() as request, ExitStack() as stack:
        try:
            # What can be refused is refused before the folder is touched.
            run.check_available(config.out, resume=resume, overwrite=overwrite, data=config.data)
            log.check_loggers(config.loggers)
            with log.log_to(None, console) as messages, request.at_once(), memory_advice():
                made = Run(config, command, resume, source, request)
            problem = ""
            if made.is_first:
                try:
                    stack.enter_context(run.claim(config.out, resume=resume, overwrite=overwrite))
                    if resume:
                        made.refuse_stale()
                except UserError as error:
                    problem = str(error)
            if problem := made.fabric.broadcast(problem):  # or the others would wait for the first
                raise UserError(problem)
            path = made.folder.log if made.is_first else None
            stack.enter_context(log.log_to(path, console, messages))
            with memory_advice(lambda: made.stepper.micro_batch or made.local_batch):
                made.begin(stack)
                with log.progress_bar(console, "step", made.state.step, made.total_steps) as bar:
                    made.train(bar, callback)
                made.export()
        except signals.StopNow:
            raise signals.stopped(request.number, "", config.out) from None
    return made.folder


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


class Run:
    """A run: what it is made of, and what it does; nothing is written before `begin`."""

    def __init__(
        self,
        config: PretrainConfig,
        command: str,
        resume: bool,
        source: ImageSource | None,
        request: signals.StopRequest,
    ) -> None:
        config = replace(config)  # what is decided on below is not the caller's
        self.config, self.folder = config, run.RunFolder(config.out)
        self.command, self.request = command, request
        self.state = State(started=datetime.now(UTC).isoformat(timespec="seconds"))
        self.history: list[dict[str, Any]] = []
        self.energies: dict[str, dict[str, list[float]]] = {}
        self.metrics: log.MetricsLog | None = None  # the first process alone has it
        self._stream: StreamBatches | None = None
        self._loss, self._norm = torch.zeros(2)  # of the last step
        content, known, self._read = None, None, self.folder.checkpoint_version()
        if resume and self.folder.last_checkpoint.exists():
            content = run.load_checkpoint(self.folder.last_checkpoint)
            known = run.statistics_of(content)
            if config.energy == "auto":
                config.energy = content["config"].get("energy", "dense")
        elif resume:
            LOGGER.info("no checkpoint yet in %s: starting from step 0", self.folder.root)
        self.images = open_images(config, known, source)
        self.broken = BrokenFiles(self.images.count, config.max_broken_share)
        self.energy = run.build_energy(config, self.images.channels)
        if config.init is not None and content is None:
            initialise(self.energy.backbone, config.init)
        self.image_size = parse_image_size(config.image_size) or default_image_size(
            getattr(self.energy.backbone, "pretrained_cfg", None)
        )
        self.shape = {"channels": self.images.channels, "image_size": self.image_size}
        self.shape |= asdict(self.images.statistics)
        task = self._settle()
        for line in doubtful_settings(config):
            LOGGER.warning("%s", line)
        # Watched as they are used: on whole images, whatever part of them training runs on.
        self.tasks = used_tasks(config, self.images.channels)
        self._place()
        self.held_out = load_held_out(self.images, self.image_size, self.fabric.device, self.broken)
        # What can't be watched is refused before anything is written.
        embed_batches(
            self.energy.backbone, [self.held_out.images[:2]], config.embedding, self.fabric.device
        )
        self._calibrate()
        tried = task(self.held_out.images[:2], torch.Generator(self.fabric.device).manual_seed(0))
        freeze_unreachable(self.energy, tried.corrupted, config.plausibility_weight, tried.running)
        self.stepper = Stepper(
            config, self.energy, task, self.images.statistics, self.fabric,
            self.total_steps, self.steps_per_epoch,
        )  # fmt: skip
        if content is not None:
            self._load(content)

    def _settle(self) -> PretextTask:
        """Decide on the energy, and try all tasks on a black image; returns training's task.

        A task may refuse such images, a backbone to run on parts of them.
        """
        config, backbone = self.config, self.energy.backbone
        tasks = build_tasks(config, self.images.channels)
        black = torch.zeros(1, self.images.channels, *self.image_size)

        def tried() -> PretextTask:
            task = combine_tasks(config, tasks)
            for each in (*tasks.values(), task) if config.energy == "dense" else (task,):
                made = each(black, torch.Generator().manual_seed(0))
                running_tokens(made.running, backbone, self.image_size)
            return task

        asked = config.energy
        if asked != "dense":
            try:
                if config.plausibility_weight:
                    raise UserError(
                        f"plausibility_weight {config.plausibility_weight:g} needs the dense "
                        "energy; give --energy dense, or no weight"
                    )
                check_conditional(backbone)
                config.energy = "conditional"
                check_conditional(backbone, config.hidden_blocks)
                return tried()
            except UserError as error:
                by_settings = config.energy == "conditional"  # the backbone alone could
                if asked == "conditional" or (by_settings and config.hidden_blocks != 1):
                    raise
                level = logging.WARNING if by_settings else logging.INFO
                LOGGER.log(level, "training the dense energy, whose steps cost more: %s", error)
        config.energy = "dense"
        self.energy.second_head = None
        return tried()

    def _place(self) -> None:
        """Start the processes, share the batch among them, count steps, and move the energy."""
        config = self.config
        self.fabric = devices.make_fabric(config)
        self.is_first = self.fabric.is_global_zero
        device, ranks = self.fabric.device, self.fabric.world_size
        if device.type == "cpu":
            keep_freed_memory()
        devices.choose_kernels(config, device)
        self.local_batch, rest = divmod(config.batch_size, ranks)
        if rest:
            raise UserError(
                f"batch_size {config.batch_size} does not divide into {ranks} devices; change "
                "batch_size or devices"
            )
        if config.invariance and (self.local_batch % 2 or self.local_batch < 4):
            raise UserError(
                f"each device gets {self.local_batch} images a step, and invariance needs an even "
                "number of 4 or more; change batch_size"
            )
        if config.invariance and self.images.stream is not None:
            raise UserError("invariance does not work on a stream; set it to 0, or store the data")
        self.steps_per_epoch = loading.steps_per_epoch(self.images.count, config.batch_size)
        total = max(1, round(config.epochs * self.steps_per_epoch))
        self.total_steps = min(total, config.max_steps or total)
        self.watch_steps = max(1, round(config.watch_every * self.steps_per_epoch))
        self.energy = self.energy.to(device)
        if devices.has_fast_kernels(config, device) and is_convolutional(self.energy.backbone):
            self.energy = self.energy.to(memory_format=torch.channels_last)

    def _calibrate(self) -> None:
        """Fit the head's scale, and batch norms, to images corrupted as in training."""
        tasks, images = list(self.tasks.values()), self.held_out.images
        generator = torch.Generator(images.device).manual_seed(0)
        parts = images[: CALIBRATION_IMAGES * len(tasks)].tensor_split(len(tasks))
        pairs = zip(tasks, parts, strict=True)
        made = Corruption.join([task(part, generator) for task, part in pairs if len(part)])
        # Existing weights have batch norms' statistics of their own.
        fresh = self.config.init is None
        self.energy.calibrate(made.corrupted, fresh, self.energy.of(made))

    def _load(self, content: Mapping[str, Any]) -> None:
        """Take up a checkpoint."""
        try:
            self.energy.load_state_dict(content["model"])
            self.stepper.optimizer.load_state_dict(content["optimizer"])
        except (RuntimeError, ValueError) as error:
            reason = " ".join(str(error).split())[:200]
            raise UserError(
                f"{self.folder.last_checkpoint} does not fit these settings: {reason}; resume with "
                "the run's own, in the version that wrote it"
            ) from error
        self.state = State(**content["state"])
        self.history, self.energies = content["history"], content["energies"]
        self.broken.add(self.state.broken)
        if any(getattr(self.config, key) != content["config"][key] for key in DECIDED):
            self.state.decisions = {}  # asked for otherwise this time
        LOGGER.info("resuming at step %d of %d", self.state.step, self.total_steps)

    def refuse_stale(self) -> None:
        """Raise UserError where another process went on with the run while this one was made."""
        if self.folder.checkpoint_version() != self._read:
            raise UserError(f"another process went on with {self.folder.root}; run it again")

    def begin(self, stack: ExitStack) -> None:
        """Write what a run starts from, and find out what fits into memory and what to compile."""
        if self.is_first:
            settings = config_to_dict(self.config)
            write_atomically(self.folder.config, yaml.safe_dump(settings, sort_keys=False).encode())
            if self.state.step:  # a run that was killed just behind a checkpoint had not yet
                self._describe()
            else:  # what evaluation holds the pretrained backbone against
                run.write_tensors(self.folder.initial, self.energy.backbone.state_dict())
            services = log.open_services(self.config.loggers, self.folder, settings)
            self.metrics = metrics = log.MetricsLog(self.folder, self.state.step, services)
            stack.push(lambda kind, *_: metrics.close(succeeded=kind is None))
        self.energy.train()
        images = self.images.statistics.denormalize(self.held_out.images)  # as batches come
        images = images.repeat(-(-self.local_batch // len(images)), 1, 1, 1)[: self.local_batch]
        with self.request.at_once():
            left = self.total_steps - self.state.step
            warm_up(self.stepper, images, left, self.state.decisions)

    def train(self, bar: Progress, callback: Callback | None) -> None:
        """Go on to the last step."""
        state, alone, unreadable = self.state, self.fabric.world_size == 1, list[str]()
        batches, meter, saved = self._batches(), log.Meter(state.seconds), time.monotonic()
        if state.step == 0 and not self.history:
            with meter.pause():
                self._watch()
                self._save()
        while state.step < self.total_steps:
            meter.before_batch()
            batch = self._next(batches)
            meter.before_step(len(batch.images) * self.fabric.world_size)
            self._loss, self._norm, last = self.stepper(batch.images, state.step)
            state.step += 1
            bar.advance(bar.task_ids[0])
            if callback is not None:
                callback(state.step, self._loss, last)
            looks = state.step % self.watch_steps == 0 or state.step == self.total_steps
            logs = looks or state.step % LOG_EVERY == 0
            unreadable += batch.broken
            if alone or logs or state.step == 1:
                # All processes stop if it is too much.
                for line in self.broken.add(devices.gather_lines(self.fabric, unreadable)):
                    LOGGER.warning("skipped: %s", line)
                unreadable = []
            if logs or state.step == 1:
                numbers = self._log(last, meter)
                bar.update(bar.task_ids[0], numbers=numbers)
            state.seconds = meter.seconds()
            if looks:
                LOGGER.info("epoch %.1f: %s", self.epoch, numbers)
                with meter.pause():
                    self._watch()
            number = self.request.number
            due = int(looks or time.monotonic() - saved > 60 * self.config.checkpoint_minutes)
            # Asking at every step would make each process wait for its device there.
            if not alone:
                number, due = devices.largest(self.fabric, number, due) if logs else (0, 0)
            if due or number:
                self._save()
                saved = time.monotonic()
            if number and state.step < self.total_steps:
                self._stop(number)

    def _batches(self) -> Iterator[loading.Batch]:
        """One batch on this device for each step that is left, from files or from a stream."""
        config, images, fabric = self.config, self.images, self.fabric
        rank, ranks, pinned = fabric.global_rank, fabric.world_size, fabric.device.type == "cuda"
        prefetch, workers = config.prefetch or PREFETCH, config.num_workers
        if workers is None:
            nodes = getattr(fabric.strategy, "num_nodes", 1)
            workers = loading.default_workers(ranks // nodes)
        if images.stream is not None:
            places = self.state.stream
            stream = self._stream = StreamBatches(
                images.stream, self.image_size, images.channels, config.augmentation,
                self.local_batch, config.seed, rank, ranks, workers, prefetch,
                state=next(iter([*places[rank:], *places]), ""), pin_memory=pinned,
            )  # fmt: skip
            left = self.total_steps - self.state.step
            return (fabric.to_device(batch) for batch in islice(stream.batches(), left))
        loader = loading.training_loader(
            images.training, self.image_size, images.channels, config.augmentation,
            self.local_batch, config.seed, self.state.step, self.total_steps, rank, ranks,
            workers, prefetch, pin_memory=pinned, views=2 if config.invariance else 1,
        )  # fmt: skip
        return loading.watched(fabric.setup_dataloaders(loader, use_distributed_sampler=False))

    def _next(self, batches: Iterator[loading.Batch]) -> loading.Batch:
        if self.fabric.world_size > 1:  # processes leave together, behind a step
            return next(batches)
        try:
            with self.request.at_once():
                return next(batches)
        except (signals.StopNow, RuntimeError):
            # A signal reaches the workers too, and they leave: that is the RuntimeError.
            if not self.request.number:
                raise
            signals.ignore_dying_workers()
            self._save()
            self._stop(self.request.number)

    def _stop(self, number: int) -> NoReturn:
        """Leave after the last step, which is saved."""
        # Lightning kills the first process when it finds that another has left.
        self.fabric.barrier()
        when = f"at step {self.state.step} of {self.total_steps}, which is saved"
        raise signals.stopped(number, when, self.config.out)

    def _log(self, last: Restored, meter: log.Meter) -> str:
        """Add a row to ``metrics.csv``, and return it in short."""
        gain = last.psnr_gain_db(torch.tensor(self.images.statistics.std))
        here = [self._loss, gain, last.energy_gap(self.energy)]
        means = torch.tensor(here, device=self.fabric.device)
        means = cast(Tensor, self.fabric.all_reduce(means, reduce_op="mean"))
        self._loss = means[0]
        self._check_finite()
        loss, gain, gap = means.tolist()
        speed, wait = meter.read()
        row = {
            "step": self.state.step,
            "epoch": self.epoch,
            "seconds": meter.seconds(),
            "images_per_second": speed,
            "data_wait": wait,
            "lr": self.stepper.optimizer.param_groups[0]["lr"],
            "loss": loss,
            "gradient_norm": float(self._norm),
            "psnr_gain_db": gain,
            "energy_gap": gap,
        }
        if self.metrics is not None:
            self.metrics.add(row)
        return (
            f"loss {loss:.4f}  gain {gain:+.2f} dB  energy gap {gap:+.3g}  {speed:.0f} images/s  "
            f"data wait {wait:.0%}"
        )

    @property
    def epoch(self) -> float:
        """The passes over the training images that are done."""
        return self.state.step / self.steps_per_epoch

    def _check_finite(self) -> None:
        # The norm, which processes share, too: where it is not finite, the weights are broken now.
        loss, norm = float(self._loss), float(self._norm)
        if not (math.isfinite(loss) and math.isfinite(norm)):
            raise UserError(
                f"the loss is {loss:g} and its gradient's norm {norm:g} at step "
                f"{self.state.step}; the last good checkpoint is kept "
                f"in {self.folder.last_checkpoint}; lower optimizer.base_lr (now "
                f"{self.config.optimizer.base_lr:g}) or step_size, or set precision to 32-true"
            )

    def _watch(self) -> None:
        """Look at the held-out images, in the first process: health, previews."""
        if self.metrics is None:
            return
        config, statistics, step = self.config, self.images.statistics, self.state.step
        at_once = min(WATCH_BATCH, config.batch_size, self.stepper.micro_batch or self.local_batch)
        pictures = self.folder.previews / f"step-{step:07d}"
        entry, self.energies = watch(
            self.energy, self.tasks, self.held_out, statistics, config, at_once, pictures
        )
        entry = {"step": step, "epoch": self.epoch, **entry}
        self.history.append(entry)
        self.metrics.add_health(entry)
        LOGGER.info("%s", describe_health(entry))

    def _save(self) -> None:
        """A checkpoint, and beside it what the report reads."""
        self._check_finite()
        state = self.state
        state.broken = self.broken.descriptions
        if self._stream is not None:
            state.stream = devices.gather_lines(self.fabric, [self._stream.where()])
        # All processes: a sharded optimizer's state is gathered in the first.
        optimizer = self.stepper.optimizer.state_dict()
        if not self.is_first:
            return
        newest = self.history[-1]
        is_best = newest["step"] == state.step and newest["psnr_gain_db"] > state.best_gain_db
        if is_best:
            state.best_gain_db = newest["psnr_gain_db"]
        content = {
            "state": vars(state).copy(),
            "config": config_to_dict(self.config),
            **self.shape,
            "model": self.energy.state_dict(),
            "optimizer": optimizer,
            "history": self.history,
            "energies": self.energies,
        }
        # The best first: a run that dies between the two takes the step, and both, again.
        if is_best:
            run.save_checkpoint(self.folder.best_checkpoint, content)
        run.add_checkpoint(self.folder, state.step, content, self.config.keep_checkpoints)
        self._describe()

    def _describe(self) -> None:
        """What the report reads, as of the last checkpoint."""
        write_json(self.folder.health, {"history": self.history, "energies": self.energies})
        images, device = self.images, self.fabric.device
        versions = {name: importlib.metadata.version(name) for name in PACKAGES}
        if device.type == "cuda":
            hardware = torch.cuda.get_device_name(device)
        else:
            processor = devices.cpu_capabilities().get("cpu_name", "") or platform.machine()
            hardware = f"{processor}, {torch.get_num_threads()} threads"
        facts = {
            "command": self.command,
            "started": self.state.started,
            "seconds": self.state.seconds,
            "versions": {"python": platform.python_version()} | versions,
            "hardware": hardware,
            "device": device.type,
            "backbone": self.config.backbone,
            "parameters": sum(p.numel() for p in self.energy.backbone.parameters()),
            **self.shape,
            "data": (images.stream or images.training).name,
            "training_images": images.count,
            "held_out_images": len(images.held_out),
            "tasks": list(self.tasks),
            "precision": str(self.fabric.strategy.precision.precision),
            "steps": self.state.step,
            "total_steps": self.total_steps,
            "epochs": self.epoch,
        }
        write_json(self.folder.facts, facts)

    def export(self) -> None:
        """The backbone's weights under timm's names, batch norms refreshed."""
        if self.is_first:
            backbone = self.energy.backbone.eval()
            refresh_batch_norm(backbone, self.held_out.images.split(self.config.batch_size))
            run.write_tensors(self.folder.backbone, backbone.state_dict())
            LOGGER.info("backbone written to %s", self.folder.backbone)
