"""The batches of a run, from files or from a stream, whatever happens to the workers."""

from collections.abc import Iterator, Sequence
from itertools import islice

from lightning.fabric import Fabric

from backfold.backbone import ImageSize
from backfold.data.loading import (
    Batch,
    default_workers,
    steps_per_epoch,
    training_loader,
    watched,
)
from backfold.data.stream import StreamBatches
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
    return steps_per_epoch(images.count, local_batch * world_size)


def stream_batches(
    config: PretrainConfig,
    images: Images,
    image_size: ImageSize,
    local_batch: int,
    fabric: Fabric,
    states: Sequence[str] = (),
) -> StreamBatches | None:
    """This process's batches of a stream; None where the images are no stream.

    Args:
        config: augmentation, seed, workers and prefetch count here.
        images: what to train on.
        image_size: (height, width) in pixels.
        local_batch: images in a batch on this device.
        fabric: knows this process's place.
        states: `StreamBatches.where` of every process when the run was saved; none begins.
    """
    if images.stream is None:
        return None
    rank, world_size = fabric.global_rank, fabric.world_size
    return StreamBatches(
        images.stream, image_size, images.channels, config.augmentation, local_batch, config.seed,
        rank, world_size, loading_workers(config, fabric), config.prefetch or PREFETCH,
        state=next(iter([*states[rank:], *states]), ""),
        pin_memory=fabric.device.type == "cuda",
    )  # fmt: skip


def training_batches(
    config: PretrainConfig,
    images: Images,
    image_size: ImageSize,
    local_batch: int,
    steps: range,
    fabric: Fabric,
    stream: StreamBatches | None = None,
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
        stream: where the batches come from, if the images are a stream.

    Raises:
        UserError: while iterating, what the loader raises.
    """
    if stream is not None:
        return (fabric.to_device(batch) for batch in islice(stream.batches(), len(steps)))
    loader = training_loader(
        images.training, image_size, images.channels, config.augmentation, local_batch,
        config.seed, steps.start, steps.stop, fabric.global_rank, fabric.world_size,
        loading_workers(config, fabric), config.prefetch or PREFETCH,
        pin_memory=fabric.device.type == "cuda",
    )  # fmt: skip
    return watched(fabric.setup_dataloaders(loader, use_distributed_sampler=False))
