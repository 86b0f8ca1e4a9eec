"""A whole job: what is read, kept, resumed, left out, joined."""

import logging
import os
import time
from functools import partial

import numpy as np
import pyarrow.parquet as pq
import pytest
import torch
from rich.console import Console

from backfold import UserError
from backfold.data import loading
from backfold.embedding import embed
from backfold.inference.parts import check_out, claim, compute, local_parts


def start(parts, num_workers=0, **options):
    engine = partial(local_parts, parts, num_workers=num_workers)
    return compute(parts, engine, Console(quiet=True), **options)


def stop_at(parts, index):
    parts.source.stop = index
    with pytest.raises(KeyboardInterrupt):
        start(parts, overwrite=True)
    parts.source.stop = None
    parts.source.seen.clear()
    assert not parts.out.exists()


def assert_rows(parts, indices):
    """Paths and vectors are these images', computed all at once."""
    run, source = parts.job.run, parts.source
    images = torch.stack([source.pixels(index) for index in indices]) / 255
    with torch.no_grad():
        expected = embed(run.energy.backbone, run.statistics.normalize(images))
    if parts.out.suffix == ".npz":
        with np.load(parts.out) as arrays:
            assert sorted(arrays) == ["path", "vector"]
            paths, vectors = arrays["path"].tolist(), torch.from_numpy(arrays["vector"])
    else:
        table = pq.read_table(parts.out)
        assert table.column_names == ["path", "vector"]
        paths, vectors = table["path"].to_pylist(), torch.tensor(table["vector"].to_pylist())
    assert paths == [source.describe(index) for index in indices]
    torch.testing.assert_close(vectors, expected)


@pytest.mark.parametrize("sizes", [(4, 8), (50, 1), (1, 7, "v.npz")])
def test_rows_are_the_images_in_order_whatever_the_parts(parts_of, pictures, sizes):
    parts, seen = parts_of(pictures(21), *sizes), []
    assert start(parts, finish=lambda given: seen.extend(map(len, given.tables()))) == 21
    assert sum(seen) == 21  # before the parts go
    assert_rows(parts, range(21))
    assert [path.name for path in parts.out.parent.iterdir()] == [parts.out.name]


def test_broken_images_before_a_stop_count_and_too_many_end_the_job(run, parts_of, pictures):
    run.config.max_broken_share = 0.1
    parts = parts_of(pictures(16, broken=(2, 9)))
    stop_at(parts, 8)
    with pytest.raises(UserError, match="2 images can't be read, 1 are allowed"):
        start(parts)
    assert parts.source.seen[0] == 8  # it goes on with what is missing
    assert not parts.out.exists()


def test_other_weights_images_or_parts_are_another_job(run, parts_of, pictures, monkeypatch):
    stop_at(parts_of(pictures(16)), 8)
    renamed = pictures(16)
    monkeypatch.setattr(renamed, "describe", lambda index: f"other/{index}.png")
    for other, difference in [
        (parts_of(renamed), "paths"),
        (parts_of(pictures(17)), "paths, count"),
        (parts_of(pictures(16), part_size=4), "part_size"),
    ]:
        with pytest.raises(UserError, match=rf"\(they differ in {difference}\); give --overwrite"):
            start(other)
    with torch.no_grad():
        run.energy.head.weight.mul_(1.01)
    parts = parts_of(pictures(16))
    with pytest.raises(UserError, match="differ in weights"):
        start(parts)
    assert start(parts, overwrite=True) == 16
    assert parts.source.seen == list(range(16))


def test_a_folder_in_use_or_of_somebody_else_and_a_damaged_part_are_refused(parts_of, pictures):
    parts, foreign = parts_of(pictures(10)), parts_of(pictures(10), out="foreign.csv")
    with claim(parts, overwrite=False):
        with pytest.raises(UserError, match=r"out\.parquet\.parts is in use by another process"):
            start(parts, overwrite=True)
        parts.path(0).write_bytes(b"PAR1 half")
        with pytest.raises(UserError, match=r"part-0000000\.parquet can't be read .*; remove it"):
            parts.read(0)
    foreign.folder.mkdir()
    with pytest.raises(UserError, match="is no folder of parts; choose another --out"):
        start(foreign, overwrite=True)
    assert list(foreign.folder.iterdir()) == []


@pytest.mark.parametrize("out", ["v.parquet", "v.npz"])
def test_a_full_disk_at_the_end_leaves_the_old_file_and_all_parts(parts_of, pictures, out):
    parts = parts_of(pictures(10), out=out)
    parts.out.write_text("old")
    parts.out.with_name(f".{out}.tmp").symlink_to("/dev/full")
    with pytest.raises(UserError, match=r"can't write .*No space left on device; free space or"):
        start(parts)
    assert parts.out.read_text() == "old"
    parts.source.seen.clear()
    assert start(parts) == 10
    assert parts.source.seen == []
    assert_rows(parts, range(10))


def test_a_job_that_comes_to_nothing_leaves_nothing(parts_of, pictures):
    class Unfit(pictures):
        def read(self, *_):
            raise UserError("an image of 3 channels")

    parts = parts_of(Unfit(9))
    with pytest.raises(UserError, match="3 channels"):
        start(parts)
    assert list(parts.out.parent.iterdir()) == []


def test_no_images_and_no_file_are_refused(parts_of, pictures, tmp_path):
    with pytest.raises(UserError, match="holds no images"):
        parts_of(pictures(0))
    with pytest.raises(UserError, match=" is a folder; choose another --out"):
        check_out(tmp_path, ("",), (), overwrite=True)


@pytest.mark.parametrize(
    ("fates", "out"),
    [({}, "v.npz"), ({5: "crash", 16: "crash"}, "v.parquet"), ({5: "hang", 16: "crash"}, "v.npz")],
)
def test_broken_and_deadly_images_have_no_row_and_are_named(
    parts_of, pictures, caplog, monkeypatch, fates, out
):
    monkeypatch.setattr(loading, "IMAGE_SECONDS", 0.5)

    class Deadly(pictures):
        def read(self, index, min_side=None):
            if fates.get(index) == "crash":
                os._exit(3)
            if fates.get(index) == "hang":
                time.sleep(1000)
            return super().read(index, min_side)

    lost = (0, 5, 6, 16)  # the last image is a part of its own
    parts = parts_of(Deadly(17, broken=[index for index in lost if index not in fates]), out=out)
    with caplog.at_level(logging.INFO, "backfold"):
        assert start(parts, num_workers=2 if fates else 0) == 13
    assert_rows(parts, [index for index in range(17) if index not in lost])
    named = [line.split(": ")[1] for line in caplog.messages if line.startswith("skipped: ")]
    assert sorted(named) == [parts.source.describe(index) for index in lost]
    assert "4 of 17 images could not be read" in caplog.messages
