"""Computing parts on a Ray cluster, or on Ray processes of this machine.

Ray Data hands part numbers to a pool of actors, each of which holds the model and reads the images
itself: the data must lie at the same path on every machine. A part comes back whole, as a parquet
file's content, and this process keeps it. Ray gives a part that a killed actor was working on to
another one.
"""

import logging
import os
from collections.abc import Iterator, Sequence
from typing import Any

import numpy as np
import pyarrow as pa

from backfold.data.source import ImageSource
from backfold.errors import UserError
from backfold.inference.jobs import Job
from backfold.inference.local import local_parts
from backfold.inference.table import Plan, from_bytes, to_bytes

MOST_BLOCKS = 10_000
LOADERS = 1  # of each actor: a process apart, for a decoder that crashes or hangs


class PartWorker:
    """One actor: part numbers to the parts' contents.

    Args:
        job: what is computed.
        source: the images.
        plan: which images belong to a part.
    """

    def __init__(self, job: Job, source: ImageSource, plan: Plan) -> None:
        self._job, self._source, self._plan = job, source, plan

    def __call__(self, batch: dict[str, np.ndarray]) -> dict[str, list[Any]]:
        """Columns ``part``, ``content`` and ``error``, which is empty if all went well."""
        parts = [int(part) for part in batch["part"]]
        try:
            done = [
                to_bytes(table)
                for _, table in local_parts(self._job, self._source, self._plan, parts, LOADERS)
            ]
        except UserError as error:
            return {
                "part": parts,
                "content": [b""] * len(parts),
                "error": [str(error)] * len(parts),
            }
        return {"part": parts, "content": done, "error": [""] * len(parts)}


def ray_parts(
    job: Job, source: ImageSource, plan: Plan, parts: Sequence[int], actors: int, gpus: float = 0
) -> Iterator[tuple[int, pa.Table]]:
    """(part, its rows) for the parts asked for, in whatever order they are done.

    Joins the cluster that ``RAY_ADDRESS`` names; without it, Ray starts on this machine.

    Args:
        job: what is computed.
        source: the images; it is pickled.
        plan: which images belong to a part.
        parts: which ones.
        actors: how many, each with one CPU.
        gpus: of an actor, fractions allowed.

    Raises:
        UserError: Ray is not installed or can't start, or what loading raises.
    """
    data = _start_ray()
    numbers = data.from_items(
        [{"part": part} for part in parts], override_num_blocks=min(len(parts), MOST_BLOCKS)
    )
    contents = numbers.map_batches(
        PartWorker,
        batch_size=1,
        fn_constructor_args=(job, source, plan),
        compute=data.ActorPoolStrategy(size=min(actors, len(parts))),
        num_cpus=1,
        num_gpus=gpus,
    )
    for row in contents.iter_rows():
        if row["error"]:
            raise UserError(row["error"])
        yield int(row["part"]), from_bytes(row["content"])


def _start_ray() -> Any:
    """`ray.data`, with Ray running."""
    os.environ.setdefault("RAY_USAGE_STATS_ENABLED", "0")  # nothing is reported to anybody
    try:
        import ray
        import ray.data
    except ImportError as error:
        raise UserError(
            'the ray engine needs Ray; pip install "backfold[ray]", or leave --engine out'
        ) from error
    context = ray.data.DataContext.get_current()
    context.enable_progress_bars = False
    if not ray.is_initialized():
        try:
            ray.init(logging_level=logging.WARNING)
        except (ConnectionError, RuntimeError, ValueError) as error:
            reason = str(error).strip().splitlines()[0]
            raise UserError(f"Ray can't start: {reason}; check RAY_ADDRESS") from error
    return ray.data
