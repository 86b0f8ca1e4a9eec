"""Computing parts in this process, with processes beside it that load."""

from collections.abc import Iterator, Sequence

import pyarrow as pa
import torch
from torch.utils.data import DataLoader

from backfold.data.loading import Batch, BatchDataset
from backfold.data.source import ImageSource
from backfold.inference.jobs import Job
from backfold.inference.table import Plan, make_part, with_broken


def local_parts(
    job: Job, source: ImageSource, plan: Plan, parts: Sequence[int], num_workers: int = 0
) -> Iterator[tuple[int, pa.Table]]:
    """(part, its rows) for the parts asked for, in their order.

    An image that can't be read has no row; `broken_of` has a line on it.

    Args:
        job: what is computed.
        source: the images.
        plan: which images belong to a part.
        parts: rising numbers.
        num_workers: processes that load; 0 loads in this one.

    Raises:
        UserError: what loading raises.
    """
    job.run.energy.to(job.device)
    loader = iter(_loader(job, source, plan, parts, num_workers))
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


def _loader(
    job: Job, source: ImageSource, plan: Plan, parts: Sequence[int], num_workers: int
) -> "DataLoader[Batch]":
    # Not evaluation_loader: there an image that stands in for a broken one comes from the parts
    # asked for, and the last part may be a single image.
    keys = [[(0, index) for index in wanted] for part in parts for wanted in _batches(plan, part)]
    return DataLoader(
        BatchDataset(source, job.run.image_size, job.run.channels),
        batch_size=None,
        sampler=keys,
        num_workers=num_workers,
        collate_fn=_unchanged,
        generator=torch.Generator(),
    )


def _unchanged(batch: object) -> object:
    return batch


def _rows(job: Job, source: ImageSource, batch: Batch, wanted: range) -> pa.Table:
    """The batch's rows, without those of images that stand in for broken ones."""
    indices = batch.indices.tolist()
    columns = job(job.run.statistics.normalize(batch.images), indices)
    table = make_part(indices, [source.describe(index) for index in indices], columns)
    kept = [index == expected for index, expected in zip(indices, wanted, strict=True)]
    return table.filter(pa.array(kept))
