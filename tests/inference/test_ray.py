"""Ray gives the rows of one process, also when a worker is killed."""

import os
import signal
from functools import partial
from pathlib import Path

import numpy as np
import pyarrow.parquet as pq
import pytest
import torch
from PIL import Image
from rich.console import Console

from backfold import UserError
from backfold.data.folder import FolderSource
from backfold.embedding import EmbeddingChoice
from backfold.inference.jobs import EmbeddingJob, ScoringJob
from backfold.inference.local import local_parts
from backfold.inference.ray_engine import ray_parts
from backfold.inference.run import compute
from backfold.pretext import Masking

ray = pytest.importorskip("ray", reason='Ray is not installed: pip install "backfold[ray]"')
pytestmark = [
    pytest.mark.ray,
    # Ray leaves sockets and processes to the system, and forks beside threads.
    pytest.mark.filterwarnings("ignore"),
]
CPU = torch.device("cpu")


@pytest.fixture(scope="module", autouse=True)
def cluster():
    ray.init(
        num_cpus=2, include_dashboard=False, logging_level="ERROR", log_to_driver=False,
        _system_config={"metrics_report_interval_ms": 0},
    )  # fmt: skip
    yield
    ray.shutdown()


@pytest.fixture
def folder(tmp_path):
    (tmp_path / "images").mkdir()
    random = np.random.default_rng(0)
    for number in range(22):
        pixels = random.integers(0, 256, (30, 34), dtype=np.uint8)
        Image.fromarray(pixels).save(tmp_path / "images" / f"{number:02}.png")
    (tmp_path / "images" / "05.png").write_bytes(b"torn")
    (tmp_path / "images" / "21.png").write_bytes(b"torn")  # a part of its own
    return tmp_path / "images"


def rows(engine, job, source, plan, out):
    count = compute(
        source, plan, partial(engine, job, source, plan), out, Console(quiet=True),
        max_broken_share=0.5,
    )  # fmt: skip
    table = pq.read_table(out)
    assert len(table) == count
    return table


def assert_equal_rows(given, expected):
    assert given.schema == expected.schema
    assert given["path"].to_pylist() == expected["path"].to_pylist()
    for name in given.column_names[1:]:
        torch.testing.assert_close(
            torch.tensor(given[name].to_pylist()), torch.tensor(expected[name].to_pylist())
        )


def test_two_ray_workers_give_the_rows_of_one_process(run, folder, plan_of, tmp_path):
    source = FolderSource(folder)
    tasks = {"masking": Masking(mask_patch_size=7)}
    job = ScoringJob(run, tasks, 1, 1.0, 0, CPU)
    plan = plan_of(job, source, 3, 3)
    here = rows(local_parts, job, source, plan, tmp_path / "local.parquet")
    there = rows(partial(ray_parts, actors=2), job, source, plan, tmp_path / "ray.parquet")
    assert len(here) == 20
    assert_equal_rows(there, here)


def test_a_killed_worker_loses_no_row(run, folder, plan_of, tmp_path):
    marker = tmp_path / "killed"

    # A local class travels to Ray's workers by value; they can't import this module.
    class Deadly(FolderSource):
        def read(self, index, *rest):
            if index == 13 and not marker.exists():
                marker.touch()
                os.kill(os.getppid(), signal.SIGKILL)  # Ray's worker, whose child loads
            return super().read(index, *rest)

    job = EmbeddingJob(run, EmbeddingChoice(), CPU)
    plan = plan_of(job, FolderSource(folder), 3, 3)
    expected = rows(local_parts, job, FolderSource(folder), plan, tmp_path / "local.parquet")
    given = rows(partial(ray_parts, actors=2), job, Deadly(folder), plan, tmp_path / "ray.parquet")
    assert marker.exists()
    assert_equal_rows(given, expected)


def test_an_image_that_crashes_its_decoder_costs_its_row_alone(run, folder, plan_of, tmp_path):
    class Deadly(FolderSource):
        def read(self, index, *rest):
            if index == 13:
                os._exit(3)
            return super().read(index, *rest)

    job = EmbeddingJob(run, EmbeddingChoice(), CPU)
    plan = plan_of(job, FolderSource(folder), 3, 3)
    given = rows(partial(ray_parts, actors=1), job, Deadly(folder), plan, tmp_path / "ray.parquet")
    names = [Path(path).name for path in given["path"].to_pylist()]
    assert names == [f"{number:02}.png" for number in range(22) if number not in (5, 13, 21)]


def test_a_mistake_comes_back_in_one_line(run, folder, plan_of):
    class Unfit(FolderSource):
        def read(self, index, *_):
            raise UserError(f"image {index} has 5 channels; give others")

    job = EmbeddingJob(run, EmbeddingChoice(), CPU)
    source = Unfit(folder)
    plan = plan_of(job, source, 3, 3)
    with pytest.raises(UserError, match=r"image \d+ has 5 channels; give others$") as caught:
        list(ray_parts(job, source, plan, [0, 1], actors=1))
    assert len(str(caught.value).splitlines()) == 1
