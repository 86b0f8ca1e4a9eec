"""How many processes load images, and how far ahead, so that training does not wait for them."""

import math
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from multiprocessing import get_context

import joblib
import numpy as np
import torch

from backfold.data.augmentation import Augmentation, ImageSize
from backfold.data.guarded import BATCH_SECONDS
from backfold.data.loading import BatchDataset
from backfold.data.source import ImageSource
from backfold.errors import UserError

MAX_IMAGES, MAX_SECONDS, GROUP = 64, 1.0, 4
MAX_BYTES = 512 * 2**20
MIN_PREFETCH, MAX_PREFETCH = 2, 16
# Other processes of the machine and slow stretches of the data want a share of a worker's time.
HEADROOM = 1.25
DEVIATIONS = 3.0
MAX_WAIT_SHARE = 0.05


@dataclass(frozen=True)
class LoadTime:
    """Seconds that one process on one core takes for an image.

    Attributes:
        mean: over images, above 0.
        std: standard deviation over images.
    """

    mean: float
    std: float = 0.0


@dataclass(frozen=True)
class LoadingPlan:
    """How images are loaded.

    Attributes:
        workers: processes that load; 0 loads in the training process.
        prefetch: batches that each worker loads ahead, 1 or more.
        wait_share: expected share of the time that training waits for images, 0 to 1.
    """

    workers: int
    prefetch: int
    wait_share: float


def usable_cores(processes: int = 1) -> int:
    """Cores that one of ``processes`` training processes on this machine may use, at least 1.

    A process's affinity and a container's limit count, not only what the machine has.
    """
    return max(1, int(joblib.cpu_count()) // processes)


def measure_loading(
    source: ImageSource,
    image_size: ImageSize,
    channels: int,
    augmentation: Augmentation | None,
    seed: int = 0,
) -> LoadTime:
    """Load up to `MAX_IMAGES` images here as a worker would, for about `MAX_SECONDS`.

    The images are drawn at random and loaded once, after one that is not counted.

    Args:
        source: the images.
        image_size: (height, width) in pixels.
        channels: see `backfold.data.to_channels`.
        augmentation: random changes; None for none.
        seed: of the choice.

    Raises:
        UserError: what `BatchDataset` raises.
    """
    dataset = BatchDataset(source, image_size, channels, augmentation, seed)
    count = min(MAX_IMAGES, len(source))
    chosen = np.random.default_rng(seed).choice(len(source), count, replace=False).tolist()
    seconds, sizes = [], []
    with _one_thread():
        _load(dataset, chosen[:1])
        start = time.perf_counter()
        for first in range(0, count, GROUP):
            group = chosen[first : first + GROUP]
            seconds.append(_load(dataset, group))
            sizes.append(len(group))
            if time.perf_counter() - start > MAX_SECONDS:
                break
    mean = sum(seconds) / sum(sizes)
    # The variance of a group's sum is its size times that of one image.
    squares = [(s - size * mean) ** 2 / size for s, size in zip(seconds, sizes, strict=True)]
    return LoadTime(mean, math.sqrt(sum(squares) / max(1, len(squares) - 1)))


def measure_loading_elsewhere(
    source: ImageSource,
    image_size: ImageSize,
    channels: int,
    augmentation: Augmentation | None,
    seed: int = 0,
) -> LoadTime | None:
    """As `measure_loading`, in a process of its own; None if an image crashes or hangs it.

    Raises:
        UserError: as there.
    """
    context = get_context("fork")
    receiver, sender = context.Pipe(duplex=False)

    def run() -> None:
        try:
            sender.send(measure_loading(source, image_size, channels, augmentation, seed))
        except UserError as error:
            sender.send(error)

    process = context.Process(target=run, daemon=True)
    process.start()
    sender.close()
    try:
        answer: LoadTime | UserError | None = (
            receiver.recv() if receiver.poll(BATCH_SECONDS) else None
        )
    except EOFError:
        answer = None
    finally:
        process.kill()
        process.join()
    if isinstance(answer, UserError):
        raise answer
    return answer


def _load(dataset: BatchDataset, positions: list[int]) -> float:
    """Seconds to load a batch and to put it where another process can read it."""
    start = time.perf_counter()
    dataset[[(0, position) for position in positions]].images.share_memory_()
    return time.perf_counter() - start


@contextmanager
def _one_thread() -> Iterator[None]:
    """As in a DataLoader's workers."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        yield
    finally:
        torch.set_num_threads(threads)


def plan_workers(
    load: LoadTime,
    train_seconds: float,
    cores: int,
    on_cpu: bool,
    *,
    batch_size: int,
    batch_bytes: int,
    workers: int | None = None,
    prefetch: int | None = None,
) -> LoadingPlan:
    """As many workers as keep up with training, and batches enough to hide their unevenness.

    Training on a GPU leaves all cores but one to the workers. On a CPU, training uses all cores
    and workers take theirs from it: they need fewer, as training then asks for fewer images.

    Args:
        load: what an image costs a worker.
        train_seconds: what it costs training that has the device, and on a CPU all cores, for
            itself; above 0.
        cores: for this training process and its workers; see `usable_cores`.
        on_cpu: training computes on these cores too.
        batch_size: images in this process's batch.
        batch_bytes: of one loaded batch; the batches ahead stay within `MAX_BYTES` together, or
            are one a worker.
        workers: the user's choice, which is kept.
        prefetch: the user's choice, which is kept.
    """
    if workers is None:
        limit = cores - 1 if on_cpu else max(1, cores - 1)
        wanted = math.ceil(HEADROOM * _busy_workers(load.mean, train_seconds, cores, on_cpu))
        workers = min(max(1, wanted), limit)
    if prefetch is None:
        hiding = _hiding_prefetch(load, train_seconds, cores, on_cpu, workers, batch_size)
        prefetch = min(hiding, max(1, MAX_BYTES // (batch_bytes * max(1, workers))))
    share = _wait_share(load.mean, train_seconds, cores, on_cpu, workers)
    return LoadingPlan(workers, prefetch, share)


def _busy_workers(load: float, train: float, cores: int, on_cpu: bool) -> float:
    """Workers that are busy, on average, when training never waits."""
    # On a CPU an image costs load + cores x train core seconds, which all cores share.
    return cores * load / (load + cores * train) if on_cpu else load / train


def _cores_to_keep_up(load: float, train: float, cores: int, on_cpu: bool) -> int:
    # On a CPU one core is left to training, and trains cores times slower than all of them.
    return 1 + math.ceil(load / (cores * train) if on_cpu else HEADROOM * load / train)


def _training_period(load: float, train: float, cores: int, on_cpu: bool, workers: int) -> float:
    """Seconds an image takes training beside these workers, when it never waits."""
    if not on_cpu:
        return train
    busy = min(workers, _busy_workers(load, train, cores, on_cpu))
    # More workers than cores: all share, and training keeps what one thread would.
    return train * cores / max(cores - busy, 1.0)


def _wait_share(load: float, train: float, cores: int, on_cpu: bool, workers: int) -> float:
    if workers == 0:
        return load / (load + train)
    return max(0.0, 1.0 - _training_period(load, train, cores, on_cpu, workers) * workers / load)


def _hiding_prefetch(
    load: LoadTime, train: float, cores: int, on_cpu: bool, workers: int, batch_size: int
) -> int:
    """Batches ahead at which a worker's slow stretch is over before they are used up.

    A worker has prefetch x workers steps for its prefetch batches. Their time varies by the root
    of their number, the time to spare grows with their number: from some number on it is enough.
    """
    step = _training_period(load.mean, train, cores, on_cpu, workers)
    spare = batch_size * (workers * step - load.mean)
    if spare <= 0.0:
        return MIN_PREFETCH  # a queue that is empty anyhow gains nothing from its length
    needed = (DEVIATIONS * math.sqrt(batch_size) * load.std / spare) ** 2
    return min(MAX_PREFETCH, max(MIN_PREFETCH, math.ceil(needed)))


def describe_plan(plan: LoadingPlan, load: LoadTime, train_seconds: float) -> str:
    """One line for the log."""
    where = (
        f"on {plan.workers} worker(s), {plan.prefetch} batches ahead each"
        if plan.workers
        else "in the training process"
    )
    return (
        f"an image takes {1e3 * load.mean:.2g} ms to load, {where}, "
        f"and {1e3 * train_seconds:.2g} ms to train"
    )


def loading_warning(
    plan: LoadingPlan, load: LoadTime, train_seconds: float, cores: int, on_cpu: bool
) -> str | None:
    """One line that says what helps, where training will wait; None where it won't."""
    if plan.wait_share <= MAX_WAIT_SHARE:
        return None
    wanted = math.ceil(HEADROOM * _busy_workers(load.mean, train_seconds, cores, on_cpu))
    useful = min(wanted, cores - 1)
    if plan.workers < useful:
        remedy = f"set num_workers to {useful}, or leave it out"
    else:
        needed = _cores_to_keep_up(load.mean, train_seconds, cores, on_cpu)
        remedy = f"store the images smaller, or give {needed} cores instead of {cores}"
    where = f"on each of {plan.workers} worker(s)" if plan.workers else "in the training process"
    return (
        f"training will wait for images about {plan.wait_share:.0%} of the time: loading one takes "
        f"{1e3 * load.mean:.2g} ms {where}, training "
        f"{1e3 * train_seconds:.2g} ms; {remedy}"
    )
