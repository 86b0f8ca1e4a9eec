"""Computing parts in this process, with processes beside it that load."""

from collections.abc import Iterator, Sequence

import pyarrow as pa

from backfold.data.guarded_loading import guarded_batches
from backfold.data.loading import Batch
from backfold.data.source import ImageSource
from backfold.inference.jobs import Job
from backfold.inference.table import Plan, make_part, with_broken


def local_parts(
    job: Job, source: ImageSource, plan: Plan, parts: Sequence[int], num_workers: int = 0
) -> Iterator[tuple[int, pa.Table]]:
    """(part, its rows) for the parts asked for, in their order.

    An image that can't be read, or that crashes or hangs the process that loads it, has no row;
    `broken_of` has a line on it.

    Args:
        job: what is computed.
        source: the images.
        plan: which images belong to a part.
        parts: rising numbers.
        num_workers: processes that load; 0 loads in this one, which a decoder can then crash.

    Raises:
        UserError: what loading raises.
    """
    job.run.energy.to(job.device)
    # Not evaluation_batches: there an image that stands in for a broken one comes from the parts
    # asked for, and the last part may be a single image.
    wanted_batches = [wanted for part in parts for wanted in _batches(plan, part)]
    loader = guarded_batches(
        source, job.run.image_size, job.run.channels, wanted_batches, num_workers
    )
    for part in parts:
        tables, broken = [], []
        for wanted in _batches(plan, part):
            batch = next(loader)
            tables.append(_rows(job, source, batch, wanted))
            broken += batch.broken
        yield part, with_broken(pa.concat_tables(tables), list(dict.fromkeys(broken)))


def _batches(plan: Plan, part: int) -> list[range]:
    indices = plan.indices(part)
    return [
        indices[start : start + plan.batch_size]
        for start in range(0, len(indices), plan.batch_size)
    ]


def _rows(job: Job, source: ImageSource, batch: Batch, wanted: range) -> pa.Table:
    """The batch's rows, without those of images that stand in for broken ones."""
    indices = batch.indices.tolist()
    columns = job(batch.images, indices)
    table = make_part(indices, [source.describe(index) for index in indices], columns)
    kept = [index == expected for index, expected in zip(indices, wanted, strict=True)]
    return table.filter(pa.array(kept))
