"""The settings of a pretraining run, and what can be said about them before it starts."""

import difflib
import json
from argparse import ArgumentError
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any, Literal

from jsonargparse import ArgumentParser

from backfold.backbone import ImageSize
from backfold.data.augmentation import Augmentation
from backfold.data.decode import MAX_PIXELS
from backfold.embedding import EmbeddingChoice
from backfold.errors import UserError, at_least, check_ranges, fraction, not_negative, positive
from backfold.pretext.corruption import Identity, PretextTask
from backfold.pretext.hidden import HiddenPatches
from backfold.pretext.masking import Masking
from backfold.pretext.mixture import Excerpt, ExcerptSettings, Mixture
from backfold.pretext.pixels import Bands, Colorization, Denoising, SuperResolution
from backfold.pretext.sorting import Sorting

PAPER_TASKS = ("masking", "sorting", "superresolution", "denoising", "colorization")
FRAMES = "frames"
TASK_NAMES = (*PAPER_TASKS, "bands", FRAMES)
OF_CHANNELS = ("colorization", "bands", FRAMES)  # which need more than one
MIXTURE, IDENTITY = "mixture", "identity"
NOT_DENSE = (
    "the run trained the conditional energy, and whole images are judged by a dense one, which it "
    "was not trained as; pretrain with --energy dense to judge images"
)
RANGES = (
    positive("num_steps hidden_blocks step_size batch_size epochs watch_every held_out"),
    at_least(1, "max_steps micro_batch prefetch keep_checkpoints max_pixels stream_images"),
    at_least(1, "num_nodes channels"),
    not_negative("seed num_workers invariance plausibility_weight checkpoint_minutes"),
    fraction("max_broken_share"),
)
LoggerName = Literal["wandb", "mlflow"]


@dataclass
class TaskSettings:
    """The pretext tasks' own settings.

    Args:
        masking: hide random squares.
        sorting: permute patches.
        superresolution: scale down and up.
        denoising: add noise.
        colorization: take colours away.
        bands: hide bands (channels).
        mixture: weight of each task where the pretext is "mixture", by the tasks' names; tasks that
            are not named are left out, and "identity" leaves its share of the images clean
            (default: all but bands and frames, those that the images allow, equally).
        excerpt: whatever the task, run on a random part of each image's squares alone.
    """

    masking: Masking = field(default_factory=Masking)
    sorting: Sorting = field(default_factory=Sorting)
    superresolution: SuperResolution = field(default_factory=SuperResolution)
    denoising: Denoising = field(default_factory=Denoising)
    colorization: Colorization = field(default_factory=Colorization)
    bands: Bands = field(default_factory=Bands)
    mixture: dict[str, float] = field(default_factory=dict)
    excerpt: ExcerptSettings = field(default_factory=ExcerptSettings)


@dataclass
class OptimizerSettings:
    """AdamW with a linear warm-up and a cosine by step.

    Args:
        base_lr: learning rate for a global batch of 256; the rate used is base_lr x batch / 256.
        weight_decay: of all weights but norms and biases (default: 0.05).
        betas: of AdamW (default: 0.9 and 0.95).
        warmup_epochs: epochs of linear warm-up, fractions allowed; at most a third of the run.
        final_lr_share: the last step's learning rate as a share of the highest.
        max_gradient_norm: gradients are scaled down to this norm; 0 switches that off.
    """

    base_lr: float = 1.5e-3
    weight_decay: float = 0.05
    betas: tuple[float, float] = (0.9, 0.95)
    warmup_epochs: float = 5.0
    final_lr_share: float = 0.0
    max_gradient_norm: float = 1.0

    def __post_init__(self) -> None:
        ranges = (
            positive("base_lr"),
            not_negative("weight_decay warmup_epochs max_gradient_norm"),
            fraction("final_lr_share"),
            ("betas", lambda betas: all(0 <= beta < 1 for beta in betas), "two of 0 to below 1"),
        )
        check_ranges(self, ranges)


@dataclass
class PretrainConfig:
    """Everything that a pretraining run depends on, but for the machine.

    Args:
        data: folder of images (any depth), parquet files, tar shards, or a Hugging Face data set;
            none takes the embedded images.
        out: the run's folder.
        backbone: name of a timm model.
        backbone_options: further keyword arguments of the timm model, such as patch_size.
        image_size: N or HxW in pixels; none takes the backbone's own.
        channels: channels of the images; none counts them in the data.
        frames: of clips, how many consecutive ones are stacked as an image's channels, the latest
            first: files of one folder by name, or pages of a GIF or TIFF.
        pretext: masking, sorting, superresolution, denoising, colorization, bands, frames (the
            latest frame of a clip is hidden) or mixture.
        tasks: the pretext tasks' own settings.
        energy: "conditional" trains hidden patches given the visible ones, at less cost (timm's
            ViTs and EVAs); "dense" whole images, with any backbone; "auto" takes the conditional
            one where backbone and settings allow it.
        hidden_blocks: how many of the last blocks the conditional energy runs hidden patches
            through, 1 to all.
        invariance: weight of a loss by which two crops of an image embed alike, within each
            micro-batch; a batch holds half as many images, twice. Give an augmentation.color_jitter
            with it: what crops have alike at once is their colours.
        num_steps: restoration steps K in training.
        step_size: factor of the energy gradient in a restoration step.
        plausibility_weight: of a second loss, by which the energy itself tells clean images from
            corrupted ones, for scoring images; needs "identity" in the mixture.
        contrast_epochs: last epochs, in which alone the plausibility_weight counts; 0 is all.
        epochs: passes over the training images.
        batch_size: images in an optimizer step, over all devices.
        micro_batch: most images that a device handles at once, to save memory; none takes its share
            of the batch whole, "auto" halves it on a GPU until it fits. Only rounding differs.
        compile: the restoration step, with torch.compile; "auto" does so where the run is long
            enough to pay for it.
        fast_kernels: on CUDA: matrix products in TF32, channels-last convolutions, and compiled
            steps as CUDA graphs.
        deterministic: only algorithms whose bits repeat, where torch has them, at some loss of
            speed; on a CPU they do in any case.
        optimizer: learning rate and its schedule.
        augmentation: random crop, flip and colours.
        precision: "32-true", "bf16-mixed", or "auto": bf16 where the hardware has it.
        accelerator: Lightning's name of the hardware: auto, cpu, cuda, mps.
        devices: of each machine, or "auto": all, or as torchrun or srun says.
        num_nodes: how many machines, or "auto": as torchrun or srun says, or one.
        shard_optimizer: share its state out over all devices, which saves each of them up to 8
            bytes a parameter, and costs half as much communication again.
        num_workers: that load images for each device; none takes its share of the cores less one, 8
            at most.
        prefetch: batches that each of them keeps ready; none takes 4.
        seed: of weights, order, augmentation and corruption.
        held_out: images kept from training to watch the run; at most a tenth of the data.
        watch_every: epochs between looks at the held-out images.
        watch_labels: take first-level sub-folders for classes, or a label column, to watch the
            accuracy of kNN on held-out images; labels never train.
        loggers: services that get the run's numbers too, "wandb" or "mlflow"; their own environment
            variables say where they send them.
        checkpoint_minutes: after so many since the last a checkpoint is written, and after each
            look at the held-out images.
        keep_checkpoints: the newest checkpoints that are kept, 1 or more.
        init: existing weights to start from: a safetensors or torch file, the folder of a run or of
            an export, or "timm" for timm's own; none starts at random.
        max_steps: stop after this many optimizer steps, if the epochs come to more.
        max_pixels: larger images are counted as unreadable, as they may be made to fill the memory.
        stream_images: how many images a stream holds.
        max_broken_share: share of unreadable files at which the run stops.
        embedding: layer and pooling of the embeddings that are watched.
    """

    data: str | Path | None = None
    out: Path = Path("runs/pretrain")
    backbone: str = "vit_small_patch16_224"
    backbone_options: dict[str, Any] = field(default_factory=dict)
    image_size: int | str | None = None
    channels: int | None = None
    frames: int | None = None
    pretext: str = "masking"
    tasks: TaskSettings = field(default_factory=TaskSettings)
    energy: Literal["auto", "conditional", "dense"] = "auto"
    hidden_blocks: int = 1
    invariance: float = 0.0
    num_steps: int = 1
    step_size: float = 1.0
    plausibility_weight: float = 0.0
    contrast_epochs: float = 0.0
    epochs: float = 100.0
    batch_size: int = 256
    micro_batch: int | Literal["auto"] | None = None
    compile: bool | Literal["auto"] = "auto"
    fast_kernels: bool = True
    deterministic: bool = False
    optimizer: OptimizerSettings = field(default_factory=OptimizerSettings)
    augmentation: Augmentation = field(default_factory=Augmentation)
    precision: Literal["auto", "32-true", "bf16-mixed"] = "auto"
    accelerator: str = "auto"
    devices: int | str = "auto"
    num_nodes: int | Literal["auto"] = "auto"
    shard_optimizer: bool = False
    num_workers: int | None = None
    prefetch: int | None = None
    seed: int = 0
    held_out: int = 512
    watch_every: float = 1.0
    watch_labels: bool = False
    loggers: list[LoggerName] = field(default_factory=list)
    checkpoint_minutes: float = 10.0
    keep_checkpoints: int = 2
    init: str | None = None
    max_steps: int | None = None
    max_pixels: int = MAX_PIXELS
    stream_images: int | None = None
    max_broken_share: float = 0.01
    embedding: EmbeddingChoice = field(default_factory=EmbeddingChoice)

    def __post_init__(self) -> None:
        check_ranges(self, RANGES)
        if self.frames is not None and self.frames < 2:
            raise UserError(f"frames is {self.frames}; give 2 or more, or leave it out")
        if self.frames is not None and self.channels is not None and self.channels % self.frames:
            raise UserError(
                f"channels is {self.channels} and frames {self.frames}; give channels that all "
                "frames together have, or leave them out"
            )
        if self.frames is not None and self.augmentation.color_jitter:
            raise UserError(
                f"frames is {self.frames}, and their colours would change each by its own; set "
                "augmentation.color_jitter to 0"
            )
        self._check_plausibility()
        parse_image_size(self.image_size)

    def _check_plausibility(self) -> None:
        weight, names = self.plausibility_weight, task_names(self)
        given = f"plausibility_weight is {weight:g}"
        if not 0 <= self.contrast_epochs <= self.epochs:
            raise UserError(
                f"contrast_epochs is {self.contrast_epochs:g}; give 0 to epochs ({self.epochs:g})"
            )
        if weight and IDENTITY not in names:
            raise UserError(
                f"{given}, which needs clean images beside corrupted ones; use the mixture with "
                "identity, such as --mixture masking=3,identity=1"
            )
        if weight and self.num_steps != 1:
            # From the second step on, clean images are no longer bit for bit what they were.
            raise UserError(
                f"{given} and num_steps {self.num_steps}; it tells clean from corrupted images "
                "before the first step alone; set it to 0, or num_steps to 1"
            )


def config_to_dict(config: PretrainConfig) -> dict[str, Any]:
    """Nested mappings, lists, strings and numbers; `config_from_dict` is the inverse."""
    return dict(json.loads(json.dumps(asdict(config), default=str)))  # paths as text


def config_from_dict(values: Mapping[str, Any]) -> PretrainConfig:
    """Check and convert every value; unknown keys and values of another type are a `UserError`."""
    parser = ArgumentParser(exit_on_error=False)
    parser.add_class_arguments(PretrainConfig)
    try:
        checked = parser.instantiate(parser.parse_object(dict(values)))
    except ArgumentError as error:
        raise UserError(f"bad settings: {' '.join(str(error).split())}") from error
    return PretrainConfig(**vars(checked))


def doubtful_settings(config: PretrainConfig) -> list[str]:
    """A line for each setting that the others make idle, and for what is known to do harm."""
    tasks, names, lines = config.tasks, task_names(config), []
    if names == ("denoising",) and tasks.denoising.octaves == 1:
        lines.append(
            "denoising noise of single pixels alone makes features worse than untrained ones, as "
            "the backbone need not look at anything coarse; set tasks.denoising.octaves to 4 or 5, "
            "or train on a mixture"
        )
    jitter = config.augmentation.color_jitter
    if config.invariance and not jitter:
        lines.append(
            "invariance makes features worse where crops can agree in their colours; set "
            "augmentation.color_jitter to 0.4"
        )
    if jitter and {"colorization", "bands"} & {*names}:
        lines.append(
            f"color_jitter takes all colour from {jitter / 2:.0%} of the images, which then have "
            "none to restore; set it to 0 for colorization and bands"
        )
    is_dense = config.energy == "dense"
    idle = {
        "tasks.mixture": (tasks.mixture and config.pretext != MIXTURE, "without pretext mixture"),
        "tasks.masking.hidden_share": (
            is_dense and tasks.masking.hidden_share < 1 and "masking" not in names,
            "without the masking task",
        ),
        "tasks.sorting": (
            config.energy == "conditional" and "sorting" in names and tasks.sorting != Sorting(),
            "on the conditional energy, where tasks.masking says which patches are hidden",
        ),
        "hidden_blocks": (is_dense and config.hidden_blocks != 1, "on the dense energy"),
        "contrast_epochs": (
            config.contrast_epochs and not config.plausibility_weight,
            "without a plausibility_weight",
        ),
        "tasks.excerpt.excerpt_patch_size": (
            tasks.excerpt.share == 1 and tasks.excerpt != ExcerptSettings(),
            "with a share of 1",
        ),
        "prefetch": (config.num_workers == 0 and config.prefetch, "without worker processes"),
    }
    found = [f"{name} has no effect {why}" for name, (is_idle, why) in idle.items() if is_idle]
    return lines + found


def parse_image_size(value: int | str | None) -> ImageSize | None:
    """(height, width) of ``N`` or ``HxW``; anything else is a `UserError`."""
    if value is None:
        return None
    sides = str(value).lower().split("x")
    if len(sides) in (1, 2) and all(side.isdecimal() and int(side) > 0 for side in sides):
        return int(sides[0]), int(sides[-1])
    raise UserError(f"image size {value!r} is neither N nor HxW; give for instance 224 or 192x320")


def task_names(config: PretrainConfig) -> tuple[str, ...]:
    """The tasks that the pretext names, before the data's channels are known."""
    weights = config.tasks.mixture
    for name in (config.pretext, *weights):
        known = (*TASK_NAMES, IDENTITY if name in weights else MIXTURE)
        if name not in known:
            nearest = difflib.get_close_matches(name, known, n=2, cutoff=0.4)
            hint = f"nearest: {', '.join(nearest)}; " if nearest else ""
            raise UserError(f"unknown pretext task {name!r}; {hint}choose from {', '.join(known)}")
    if any(weight < 0 for weight in weights.values()) or (weights and not any(weights.values())):
        raise UserError(f"mixture weights are {weights}; give numbers of 0 or more, not all 0")
    if config.pretext != MIXTURE:
        return (config.pretext,)
    drawn = tuple(name for name in (*TASK_NAMES, IDENTITY) if weights.get(name, 0) > 0)
    if drawn == (IDENTITY,):
        raise UserError(
            "the mixture holds identity alone, which corrupts nothing; add another task"
        )
    return drawn or PAPER_TASKS


def build_tasks(config: PretrainConfig, channels: int) -> dict[str, PretextTask]:
    """The pretext tasks by name; the default mixture has those that the images allow."""
    names = task_names(config)
    refused = [name for name in names if channels == 1 and name in OF_CHANNELS]
    if refused and (config.pretext != MIXTURE or config.tasks.mixture):
        raise UserError(
            f"{refused[0]} needs more than 1 channel, and the images have 1; "
            f"choose another pretext, or leave {refused[0]} out of the mixture"
        )
    made: dict[str, PretextTask] = {}
    for name in names:
        if name == FRAMES:  # the latest one, from the rest
            if config.frames is None or channels % config.frames:
                raise UserError(
                    f"the task frames has frames {config.frames} and images of {channels} "
                    "channel(s); give --frames a number that divides the channels, such as 4, and "
                    "--data with clips"
                )
            made[name] = Bands(groups=(tuple(range(channels // config.frames)),))
        elif name not in refused:
            made[name] = Identity() if name == IDENTITY else getattr(config.tasks, name)
    return made


def used_task(task: PretextTask, config: PretrainConfig) -> PretextTask:
    """The task as it is watched and used: on all of each image, restored to its pixels.

    For the conditional energy that is `HiddenPatches`, for the dense one the task itself.
    """
    if config.energy == "conditional":
        masking = task if isinstance(task, Masking) else config.tasks.masking
        return HiddenPatches(
            (task,), (1.0,), replace(masking, hidden_share=1.0, normalised_share=0.0)
        )
    return replace(task, hidden_share=1.0) if isinstance(task, Masking) else task


def used_tasks(config: PretrainConfig, channels: int) -> dict[str, PretextTask]:
    """Those that corrupt, each as `used_task` has it."""
    tasks = build_tasks(config, channels)
    return {name: used_task(task, config) for name, task in tasks.items() if name != IDENTITY}


def combine_tasks(config: PretrainConfig, tasks: dict[str, PretextTask]) -> PretextTask:
    """The one task that training calls: the only one or their weighted mixture, on an excerpt."""
    excerpt, given = config.tasks.excerpt, config.tasks.mixture or dict.fromkeys(tasks, 1.0)
    made, weights = tuple(tasks.values()), tuple(given.get(name, 1.0) for name in tasks)
    if config.energy == "conditional":
        return HiddenPatches(made, weights, config.tasks.masking, excerpt.share)
    task = made[0] if len(made) == 1 else Mixture(made, weights)
    return task if excerpt.share == 1 else Excerpt(task, excerpt)
