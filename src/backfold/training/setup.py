"""What a run needs before its first step: images, statistics, the energy, and the run's facts."""

import importlib.metadata
import logging
import platform
from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any, Literal

import numpy as np
import torch
from torch import Tensor, nn

from backfold.backbone import ImageSize
from backfold.data.loading import evaluation_batches
from backfold.data.open import open_source, open_stream
from backfold.data.source import BrokenFiles, ImageSource, Labels, SubsetSource, stratified_split
from backfold.data.statistics import ChannelStatistics, count_channels
from backfold.data.stream import Stream
from backfold.data.survey import survey
from backfold.energy import EnergyModel
from backfold.errors import UserError
from backfold.pretext import PretextTask
from backfold.sparse import running_tokens, token_size
from backfold.training.config import PretrainConfig, has_second_head, parse_image_size
from backfold.training.health import HeldOut

LOGGER = logging.getLogger("backfold")
LARGEST_HELD_OUT_SHARE = 0.1
SURVEYED_IMAGES = 1000
KNN_IMAGES = 2000
CALIBRATION_IMAGES = 32
WATCHED_BYTES = 2**28  # of held-out and of labelled images each, kept on the device


@dataclass(frozen=True)
class Images:
    """The training images, and what was found out about them.

    Of a stream, ``training`` and ``held_out`` are its first images, on which nothing is trained.
    ``reading_workers`` read the held-out images.
    """

    training: ImageSource
    held_out: ImageSource
    statistics: ChannelStatistics
    count: int
    stream: Stream | None = None
    reading_workers: int = 0

    @property
    def channels(self) -> int:
        """That all images are brought to."""
        return len(self.statistics.mean)


def open_images(
    config: PretrainConfig,
    known: ChannelStatistics | None = None,
    source: ImageSource | None = None,
) -> Images:
    """Open the data, split off the held-out images, count channels and measure statistics.

    Args:
        config: all settings.
        known: what a resumed run measured when it began; nothing is measured again.
        source: the images, in place of the settings' data.

    Raises:
        UserError: no data, too few images, or too many unreadable ones.
    """
    stream = None
    if source is None:
        stream = open_stream(config.data, config.stream_images, config.max_pixels)
    if stream is not None:
        return _open_stream(config, stream, known)
    if source is None:
        source = open_source(config.data, "train", config.watch_labels, config.max_pixels)
    if len(source) < 2:
        raise UserError(f"{source.name} holds {len(source)} image; give at least 2")
    training, kept = split_held_out(source, config.held_out, config.seed)
    workers = _reading_workers(config)
    statistics = known or _measure(config, source, workers)
    _describe(source.name, len(training), len(kept), statistics)
    if source.labels is not None:
        LOGGER.info(
            "labels of %d classes are there: used to watch kNN, never to train",
            len(source.class_names) or len(np.unique(source.labels)),
        )
    return Images(
        SubsetSource(source, training),
        SubsetSource(source, kept),
        statistics,
        len(training),
        reading_workers=workers,
    )


def split_held_out(source: ImageSource, held_out: int, seed: int) -> tuple[Labels, Labels]:
    """Places of the training images and of those that are kept from it, a tenth at most."""
    share = min(held_out, max(1, int(LARGEST_HELD_OUT_SHARE * len(source)))) / len(source)
    try:
        labels = len(source) if source.labels is None else source.labels
        return stratified_split(labels, share, seed)
    except UserError:  # fewer held-out images than classes
        return stratified_split(len(source), share, seed)


def _reading_workers(config: PretrainConfig) -> int:
    """One process, so that a decoder that crashes or hangs does not end the run; 0 if asked for."""
    return 0 if config.num_workers == 0 else 1


def _measure(config: PretrainConfig, source: ImageSource, workers: int) -> ChannelStatistics:
    """Mean and deviation of some images; says what is done to them in reading."""
    channels = config.channels or count_channels(source, apart=workers > 0)
    found = survey(source, channels, SURVEYED_IMAGES, config.seed, workers)
    for line in found.notes():
        LOGGER.info("%s", line)
    return found.statistics


def _open_stream(config: PretrainConfig, stream: Stream, known: ChannelStatistics | None) -> Images:
    held_out = min(config.held_out, max(1, int(LARGEST_HELD_OUT_SHARE * stream.count)))
    head, stream = stream.hold_out(held_out)
    workers = _reading_workers(config)
    statistics = known or _measure(config, head, workers)
    _describe(stream.name, stream.count, len(head), statistics)
    return Images(head, head, statistics, stream.count, stream, workers)


def _describe(name: str, training: int, held_out: int, statistics: ChannelStatistics) -> None:
    LOGGER.info(
        f"{name}: {training} images to train, {held_out} held out, {len(statistics.mean)} "
        f"channel(s), mean {_rounded(statistics.mean)}, deviation {_rounded(statistics.std)}"
    )


def _rounded(values: tuple[float, ...]) -> str:
    return "[" + ", ".join(f"{value:.3f}" for value in values) + "]"


def build_energy(config: PretrainConfig, channels: int) -> EnergyModel:
    """The energy with random weights; the seed alone decides them.

    Raises:
        UserError: what `EnergyModel` raises.
    """
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(config.seed)
        return EnergyModel(
            config.backbone,
            image_size=parse_image_size(config.image_size),
            channels=channels,
            second_head=has_second_head(config),
            backbone_options=config.backbone_options,
            seed=config.seed,
        )


def check_tasks(
    tasks: Iterable[PretextTask], channels: int, image_size: ImageSize, backbone: nn.Module
) -> None:
    """Try every task on one black image.

    Raises:
        UserError: a task can't take such images, or the backbone can't run on parts of them.
    """
    image = torch.zeros(1, channels, *image_size)
    for task in tasks:
        corruption = task(image, torch.Generator().manual_seed(0))
        if corruption.running is not None:
            running_tokens(corruption.running, token_size(backbone), image_size)


def load_images(
    source: ImageSource, image_size: ImageSize, images: Images, count: int, broken: BrokenFiles
) -> tuple[Tensor, Tensor | None]:
    """Up to ``count`` images spread over the source, normalised, and their labels if any."""
    bytes_each = 4 * images.channels * image_size[0] * image_size[1]
    count = max(1, min(count, len(source), WATCHED_BYTES // bytes_each))
    indices = np.linspace(0, len(source) - 1, count).round().astype(int).tolist()
    parts, positions = [], []
    batches = evaluation_batches(
        source, image_size, images.channels, 64, images.reading_workers, indices
    )
    for batch in batches:
        for line in broken.add(batch.broken):
            LOGGER.warning("skipped: %s", line)
        parts.append(images.statistics.normalize(batch.images))
        positions.append(batch.indices)
    labels = source.labels
    chosen = None if labels is None else torch.from_numpy(labels[torch.cat(positions).numpy()])
    return torch.cat(parts), chosen


def load_held_out(
    images: Images, image_size: ImageSize, device: torch.device, broken: BrokenFiles
) -> HeldOut:
    """The held-out images, and labelled training images for kNN where there are labels."""
    watched, labels = load_images(images.held_out, image_size, images, len(images.held_out), broken)
    if labels is None:
        return HeldOut(watched.to(device), None)
    bank, bank_labels = load_images(images.training, image_size, images, KNN_IMAGES, broken)
    return HeldOut(watched.to(device), labels, bank.to(device), bank_labels)


def calibrate(
    energy: EnergyModel, tasks: dict[str, PretextTask], images: Tensor, batch_norm: bool
) -> None:
    """Fit the head's scale to real images, corrupted as training will have them.

    Args:
        energy: on the images' device.
        tasks: corrupt the images.
        images: normalised, (images, channels, height, width).
        batch_norm: fit batch norms, too; existing weights have their own statistics.
    """
    generator = torch.Generator(images.device).manual_seed(0)
    parts = images[: CALIBRATION_IMAGES * len(tasks)].tensor_split(len(tasks))
    corrupted = [
        task(part, generator).corrupted
        for task, part in zip(tasks.values(), parts, strict=True)
        if len(part)
    ]
    energy.calibrate(torch.cat(corrupted), batch_norm)


def describe_run(
    config: PretrainConfig,
    energy: EnergyModel,
    images: Images,
    tasks: dict[str, PretextTask],
    image_size: ImageSize,
    device: torch.device,
) -> dict[str, Any]:
    """What was run, on what: for ``run.json``."""
    on_gpu = device.type == "cuda"
    return {
        "versions": {
            "python": platform.python_version(),
            **{
                name: importlib.metadata.version(name)
                for name in ("backfold", "torch", "timm", "lightning")
            },
        },
        "hardware": torch.cuda.get_device_name(device) if on_gpu else _processor(),
        "device": device.type,
        "backbone": config.backbone,
        "parameters": sum(p.numel() for p in energy.backbone.parameters()),
        "image_size": list(image_size),
        "channels": images.channels,
        "mean": list(images.statistics.mean),
        "std": list(images.statistics.std),
        "data": (images.stream or images.training).name,
        "training_images": images.count,
        "held_out_images": len(images.held_out),
        "tasks": list(tasks),
    }


def _processor() -> str:
    name = torch.cpu.get_capabilities().get("cpu_name", "") if _tells_capabilities() else ""
    return f"{name or platform.machine()}, {torch.get_num_threads()} threads"


def _tells_capabilities() -> bool:
    return hasattr(torch.cpu, "get_capabilities")


def choose_precision(
    config: PretrainConfig, device: torch.device
) -> Literal["32-true", "bf16-mixed"]:
    """Lightning's name of the precision: bf16 autocast where the hardware computes in bf16.

    Raises:
        UserError: bf16 is asked for with the finite-difference step.
    """
    if config.derivative == "finite-difference":
        if config.precision == "bf16-mixed":
            raise UserError(
                "precision is bf16-mixed, and the finite-difference step needs float32: in bf16 "
                "rounding is larger than the difference; give --precision 32-true"
            )
        return "32-true"
    if config.precision != "auto":
        return config.precision
    if device.type == "cuda":
        has_bf16 = torch.cuda.get_device_capability(device) >= (8, 0)
    elif device.type == "cpu" and _tells_capabilities():
        has_bf16 = bool(torch.cpu.get_capabilities().get("avx512_bf16", False))
    else:
        has_bf16 = False
    return "bf16-mixed" if has_bf16 else "32-true"
