"""Ray gives the rows of one process, also when a worker is killed."""

import os
import signal
from functools import partial

import numpy as np
import pyarrow.parquet as pq
import pytest
import torch
from PIL import Image
from rich.console import Console

from backfold import UserError
from backfold.data.formats import FolderSource
from backfold.inference.jobs import ScoringJob
from backfold.inference.parts import compute, local_parts, ray_parts
from backfold.pretext import Masking

ray = pytest.importorskip("ray", reason='Ray is not installed: pip install "backfold[ray]"')
pytestmark = [
    pytest.mark.ray,
    # Ray leaves sockets and processes to the system, and forks beside threads.
    pytest.mark.filterwarnings("ignore"),
]
TORN, CRASHES, KILLS = (5, 21), 9, 13  # 21 is a part of its own


@pytest.fixture(scope="module", autouse=True)
def cluster():
    ray.init(
        num_cpus=2, include_dashboard=False, logging_level="ERROR", log_to_driver=False,
        object_store_memory=80 * 2**20, _system_config={"metrics_report_interval_ms": 0},
    )  # fmt: skip
    yield
    ray.shutdown()


@pytest.fixture
def folder(tmp_path):
    folder = tmp_path / "images"
    folder.mkdir()
    images = np.random.default_rng(0).integers(0, 256, (22, 30, 34), dtype=np.uint8)
    for number, pixels in enumerate(images):
        Image.fromarray(pixels).save(folder / f"{number:02}.png")
    for number in TORN:
        (folder / f"{number:02}.png").write_bytes(b"torn")
    return folder


def rows(engine, parts, **options):
    count = compute(parts, partial(engine, parts, **options), Console(quiet=True), overwrite=True)
    table = pq.read_table(parts.out)
    assert len(table) == count
    return table


def test_two_workers_lose_no_row_to_a_kill_and_one_to_a_decoder_that_crashes(
    run, folder, parts_of, tmp_path
):
    marker = tmp_path / "killed"

    # A local class travels to Ray's workers by value; they can't import this module.
    class Deadly(FolderSource):
        def __setstate__(self, state):  # in Ray's worker, whose child loads
            self.__dict__.update(state, actor=os.getpid())

        def read(self, index, *rest):
            if index == CRASHES:
                os._exit(3)
            if index == KILLS and not marker.exists():
                marker.touch()
                os.kill(self.actor, signal.SIGKILL)
            return super().read(index, *rest)

    job = ScoringJob(run, {"masking": Masking(mask_patch_size=7)}, 1, 1.0, 0, torch.device("cpu"))
    here = rows(local_parts, parts_of(FolderSource(folder), 3, 3, job=job))
    there = rows(ray_parts, parts_of(Deadly(folder), 3, 3, job=job), actors=2)
    assert marker.exists()
    assert len(here) == 20
    crashes = f"{CRASHES:02}.png"
    expected = here.filter([not path.endswith(crashes) for path in here["path"].to_pylist()])
    assert there.schema == expected.schema
    assert there["path"].equals(expected["path"])
    for name in ("energy", "error_masking"):
        np.testing.assert_allclose(there[name], expected[name], rtol=1.3e-6, atol=1e-5)


def test_a_mistake_comes_back_in_one_line(folder, parts_of):
    class Unfit(FolderSource):
        def read(self, index, *_):
            raise UserError(f"image {index} has 5 channels; give others")

    parts = parts_of(Unfit(folder), 3, 3)
    with pytest.raises(UserError, match=r"image \d+ has 5 channels; give others$") as caught:
        list(ray_parts(parts, [0, 1], actors=1))
    assert len(str(caught.value).splitlines()) == 1
