"""A whole job: what is read, kept, resumed, left out."""

import io
import logging
from functools import partial

import pyarrow.parquet as pq
import pytest
import torch
from rich.console import Console

from backfold import UserError
from backfold.embedding import EmbeddingChoice, embed
from backfold.inference.jobs import EmbeddingJob
from backfold.inference.local import local_parts
from backfold.inference.run import compute


@pytest.fixture
def job(run):
    return EmbeddingJob(run, EmbeddingChoice(), torch.device("cpu"))


@pytest.fixture
def run_job(job, plan_of, out):
    def start(source, sizes=(4, 8), console=None, **options):
        plan = plan_of(job, source, *sizes)
        engine = partial(local_parts, job, source, plan)
        return compute(source, plan, engine, out, console or Console(quiet=True), **options)

    return start


def expected_vectors(run, source, indices):
    images = torch.stack([source.pixels(index) for index in indices]) / 255
    with torch.no_grad():
        return embed(run.energy.backbone, run.statistics.normalize(images))


@pytest.mark.parametrize("sizes", [(4, 8), (3, 3), (50, 1), (1, 7)])
def test_rows_are_the_images_in_order_whatever_the_parts(run, run_job, pictures, out, sizes):
    source = pictures(21)
    assert run_job(source, sizes) == 21
    table = pq.read_table(out)
    assert table["path"].to_pylist() == [source.describe(index) for index in range(21)]
    torch.testing.assert_close(
        torch.tensor(table["vector"].to_pylist()), expected_vectors(run, source, range(21))
    )
    assert [path.name for path in out.parent.iterdir()] == [out.name]


def test_broken_images_have_no_row_and_are_named(run, run_job, pictures, out, caplog):
    source = pictures(17, broken=(0, 6, 7, 16))
    with caplog.at_level(logging.INFO, "backfold"):
        assert run_job(source, max_broken_share=0.5) == 13
    kept = [index for index in range(17) if index not in source.broken]
    table = pq.read_table(out)
    assert table["path"].to_pylist() == [source.describe(index) for index in kept]
    torch.testing.assert_close(
        torch.tensor(table["vector"].to_pylist()), expected_vectors(run, source, kept)
    )
    for index in source.broken:
        assert f"skipped: dir/{index:03}.png: torn" in caplog.messages
    assert "4 of 17 images could not be read" in caplog.messages


def test_too_many_broken_images_stop_the_job(run_job, pictures, out):
    with pytest.raises(UserError, match="2 images can't be read, 1 are allowed"):
        run_job(pictures(17, broken=(2, 9)))
    assert not out.exists()


def test_broken_images_before_a_stop_count_after_it(run_job, pictures, monkeypatch):
    source = pictures(16, broken=(2, 9))
    real_read = source.read

    def stops(index, min_side=None):
        if index == 8:
            raise KeyboardInterrupt
        return real_read(index, min_side)

    monkeypatch.setattr(source, "read", stops)
    with pytest.raises(KeyboardInterrupt):
        run_job(source)
    monkeypatch.setattr(source, "read", real_read)
    with pytest.raises(UserError, match="2 images can't be read, 1 are allowed"):
        run_job(source)


def test_a_stopped_job_goes_on_with_what_is_missing(run, run_job, pictures, out, monkeypatch):
    source = pictures(30)
    real_read = source.read

    def stops(index, min_side=None):
        if index == 19:
            raise KeyboardInterrupt
        return real_read(index, min_side)

    monkeypatch.setattr(source, "read", stops)
    with pytest.raises(KeyboardInterrupt):
        run_job(source)
    assert not out.exists()
    monkeypatch.setattr(source, "read", real_read)
    source.seen.clear()
    assert run_job(source) == 30
    assert source.seen == list(range(16, 30))
    torch.testing.assert_close(
        torch.tensor(pq.read_table(out)["vector"].to_pylist()),
        expected_vectors(run, source, range(30)),
    )


def test_other_weights_or_other_images_are_another_job(run, run_job, pictures, monkeypatch):
    def leave_one_part():
        source = pictures(16)
        monkeypatch.setattr(source, "read", broken_after(8, source.read))
        with pytest.raises(KeyboardInterrupt):
            run_job(source, overwrite=True)

    def broken_after(limit, read):
        def stops(index, min_side=None):
            if index >= limit:
                raise KeyboardInterrupt
            return read(index, min_side)

        return stops

    leave_one_part()
    renamed = pictures(16)
    monkeypatch.setattr(renamed, "describe", lambda index: f"other/{index}.png")
    with pytest.raises(UserError, match=r"another job \(they differ in paths\)"):
        run_job(renamed)
    with torch.no_grad():
        run.energy.head.weight.mul_(1.01)
    with pytest.raises(UserError, match=r"another job \(they differ in weights\)"):
        run_job(pictures(16))
    source = pictures(16)
    assert run_job(source, overwrite=True) == 16
    assert source.seen == list(range(16))


def test_the_last_step_runs_on_all_parts_before_they_go(run_job, pictures, out):
    seen = []
    run_job(pictures(20), finish=lambda parts: seen.append(sum(map(len, parts.tables()))))
    assert seen == [20]
    assert out.exists()


def test_progress_counts_images_on_a_terminal(run_job, pictures):
    written = io.StringIO()
    console = Console(file=written, force_terminal=True, width=100)
    run_job(pictures(20), console=console)
    assert "20/20" in written.getvalue()
    assert "images/s" in written.getvalue()


@pytest.mark.parametrize("sizes", [(0, 8), (4, 0)])
def test_sizes_below_one_are_refused(run_job, pictures, sizes):
    with pytest.raises(UserError, match="give 1 or more"):
        run_job(pictures(3), sizes)


def test_a_source_without_images_is_refused(run_job, pictures):
    with pytest.raises(UserError, match="pictures holds no images"):
        run_job(pictures(0))
