"""An image that crashes or hangs its decoder costs a job that image's row, and no more."""

import logging
import os
import time
from functools import partial

import pyarrow.parquet as pq
import pytest
import torch
from rich.console import Console

from backfold import UserError
from backfold.data import guarded_loading
from backfold.embedding import EmbeddingChoice
from backfold.inference.jobs import EmbeddingJob, ScoringJob
from backfold.inference.local import local_parts
from backfold.inference.run import compute
from backfold.pretext import Masking

pytestmark = [
    # From Python 3.12 on, forking a process with threads warns; torch has threads and forks.
    pytest.mark.filterwarnings("ignore:This process .* is multi-threaded:DeprecationWarning"),
]
CPU = torch.device("cpu")


class Deadly:
    """Another source, in which some images end or hang whoever reads them."""

    labels, class_names = None, ()

    def __init__(self, source, crash=(), hang=()):
        self.source, self.crash, self.hang, self.name = source, crash, hang, source.name
        self.describe = source.describe

    def __len__(self):
        return len(self.source)

    def read(self, index, min_side=None):
        if index in self.crash:
            os._exit(3)
        if index in self.hang:
            time.sleep(1000)
        return self.source.read(index, min_side)


@pytest.fixture
def start(plan_of, out):
    def start(job, source, share):
        plan = plan_of(job, source, 4, 8)
        engine = partial(local_parts, job, source, plan, num_workers=2)
        return compute(source, plan, engine, out, Console(quiet=True), max_broken_share=share)

    return start


@pytest.mark.parametrize("fates", [{"crash": (5, 16)}, {"hang": (5,), "crash": (16,)}])
def test_it_has_no_row_and_is_named(start, run, pictures, out, caplog, monkeypatch, fates):
    monkeypatch.setattr(guarded_loading, "BATCH_SECONDS", 2.0)
    monkeypatch.setattr(guarded_loading, "IMAGE_SECONDS", 0.5)
    job = EmbeddingJob(run, EmbeddingChoice(), CPU)
    # The last image is a part of its own.
    source = Deadly(pictures(17, broken=(4,)), **fates)
    with caplog.at_level(logging.INFO, "backfold"):
        assert start(job, source, share=0.5) == 14
    rows = pq.read_table(out)
    assert rows["path"].to_pylist() == [
        source.describe(index) for index in range(17) if index not in (4, 5, 16)
    ]
    named = [line for line in caplog.messages if line.startswith("skipped: ")]
    assert sorted(line.split(": ")[1] for line in named) == [
        "dir/004.png", "dir/005.png", "dir/016.png",
    ]  # fmt: skip
    out.unlink()
    assert start(job, pictures(17, broken=(4, 5, 16)), share=0.5) == 14
    assert pq.read_table(out).equals(rows)


def test_too_many_stop_a_job(start, run, pictures):
    job = ScoringJob(run, {"masking": Masking(mask_patch_size=7)}, 1, 1.0, 0, CPU)
    with pytest.raises(
        UserError, match=r"2 images can't be read, 1 are allowed: dir/005\.png: ends"
    ):
        start(job, Deadly(pictures(17), crash=(5, 6)), share=0.01)
