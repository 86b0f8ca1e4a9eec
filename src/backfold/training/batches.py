"""The batches of a run, from files or from a stream, whatever happens to the workers."""

from collections.abc import Iterable, Iterator
from typing import Any, cast

from lightning.fabric import Fabric

from backfold.backbone import ImageSize
from backfold.data.guarded import BATCH_SECONDS, survive
from backfold.data.loading import Batch, default_workers, training_loader
from backfold.data.protocol import ImageSource
from backfold.data.sampling import StepSampler, steps_per_epoch
from backfold.data.stream_loading import plan_stream, stream_loader
from backfold.training.config import PretrainConfig
from backfold.training.setup import Images

PREFETCH = 4


def loading_workers(config: PretrainConfig, fabric: Fabric) -> int:
    """Processes that load images for this one."""
    if config.num_workers is not None:
        return config.num_workers
    return default_workers(fabric.world_size // getattr(fabric.strategy, "num_nodes", 1))


def steps_in_epoch(images: Images, local_batch: int, world_size: int) -> int:
    """Optimizer steps in one pass over the images.

    Raises:
        UserError: fewer images than one global batch.
    """
    if images.stream is None:
        return steps_per_epoch(len(images.training), local_batch * world_size)
    return plan_stream(images.stream, local_batch, world_size, images.head).steps_per_epoch


def training_batches(
    config: PretrainConfig,
    images: Images,
    image_size: ImageSize,
    local_batch: int,
    steps: range,
    fabric: Fabric,
) -> Iterator[Batch]:
    """One batch on this device for each step.

    An image at which a decoder crashes or hangs is counted as broken, where there are workers.

    Args:
        config: augmentation, seed, workers and prefetch count here.
        images: what to train on.
        image_size: (height, width) in pixels.
        local_batch: images in a batch on this device.
        steps: from the next step to the last.
        fabric: moves batches to its device.

    Raises:
        UserError: while iterating, what the loader raises.
    """
    rank, world_size = fabric.global_rank, fabric.world_size
    channels, augmentation, seed = images.channels, config.augmentation, config.seed
    source, stream = images.training, images.stream
    workers, prefetch = loading_workers(config, fabric), config.prefetch or PREFETCH

    def make_loader(guarded: ImageSource, step: int) -> Iterable[Batch]:
        if stream is not None:
            loader = stream_loader(
                stream, image_size, channels, augmentation, local_batch, seed, step, steps.stop,
                rank, world_size, workers, prefetch, head=images.head,
            )  # fmt: skip
        else:
            loader = training_loader(
                guarded, image_size, channels, augmentation, local_batch, seed, step, steps.stop,
                rank, world_size, workers, prefetch, timeout=BATCH_SECONDS,
            )  # fmt: skip
        return _on_device(fabric, loader)

    def indices_of(step: int) -> list[int]:
        if stream is not None:
            return []  # its workers outlive what their images do
        sampler = StepSampler(len(source), local_batch, seed, step, step + 1, rank, world_size)
        return [index for _, index in next(iter(sampler))]

    yield from survive(source, make_loader, indices_of, steps.start, steps.stop, workers * prefetch)


def _on_device(fabric: Fabric, loader: Any) -> Iterable[Batch]:
    prepared = fabric.setup_dataloaders(loader, use_distributed_sampler=False)
    return cast("Iterable[Batch]", prepared)
