"""Runs outlive decoders that crash, and go on counting what is broken."""

import itertools
import json
import os
import tarfile

import numpy as np
import pytest
from PIL import Image
from test_resume import StopError, stop_at

from backfold import UserError
from backfold.data import source
from backfold.data.open import open_source
from backfold.data.source import split_held_out
from backfold.data.stream import StreamBatches
from backfold.pictures import png_bytes
from backfold.training import pretrain as trainer
from backfold.training.pretrain import pretrain
from backfold.training.run import RunFolder, load_checkpoint

pytestmark = pytest.mark.filterwarnings("ignore:This DataLoader will create:UserWarning")
COUNT, HELD_OUT = 80, 8


def png(number):
    pixels = np.random.default_rng(number).integers(0, 256, (28, 28), dtype=np.uint8)
    return png_bytes(Image.fromarray(pixels))


@pytest.fixture
def data(tmp_path):
    folder = tmp_path / "data"
    folder.mkdir()
    for number in range(COUNT):
        (folder / f"{number:02}.png").write_bytes(png(number))
    return folder


@pytest.fixture
def stream(tiny, data):
    """Settings of a run on 4 shards of 20 images."""
    for shard in range(4):
        with tarfile.open(data.with_name(f"{shard}.tar.gz"), "w:gz") as tar:
            for number in range(20 * shard, 20 * shard + 20):
                tar.add(data / f"{number:02}.png", f"{number:02}.png")

    def make(**changes):
        settings = {"stream_images": COUNT, "held_out": HELD_OUT, "max_steps": 9, **changes}
        pattern = f"{data.parent}/{{0..3}}.tar.gz"
        return tiny(data=pattern, num_workers=1, checkpoint_minutes=0, **settings)

    return make


@pytest.fixture
def deadly(monkeypatch):
    """Let the decoder be ended by images of these numbers."""

    def make(*numbers):
        contents = {png(number) for number in numbers}
        decode = source.decode

        def decode_or_die(content, *rest):
            if content in contents:
                os._exit(3)
            return decode(content, *rest)

        monkeypatch.setattr(source, "decode", decode_or_die)

    return make


def test_a_run_on_files_starts_and_ends_beside_a_held_out_one(tiny, quiet, data, deadly):
    config = tiny(data=data, num_workers=1, max_broken_share=0.5)
    crash = int(split_held_out(open_source(data, "train"), HELD_OUT, config.seed)[1][0])
    deadly(crash)
    folder = pretrain(config, console=quiet)
    assert folder.backbone.exists()
    assert f"skipped: {data / f'{crash:02}.png'}" in folder.log.read_text()


def test_a_run_on_a_stream_goes_on_and_resumes(stream, quiet, monkeypatch, tmp_path, deadly):
    monkeypatch.setattr(trainer, "LOG_EVERY", 1)
    deadly(0, 30, 33, 77)  # the first is held out
    seen = []
    batches = StreamBatches.batches

    def watched(self):
        for batch in batches(self):
            seen.append(batch.indices.tolist())
            yield batch

    monkeypatch.setattr(StreamBatches, "batches", watched)
    settings = stream(max_broken_share=0.5)
    with monkeypatch.context() as patch:
        stop_at(patch, 5)
        with pytest.raises(StopError):
            pretrain(settings, console=quiet)
    assert len(set(itertools.chain(*seen))) == 6 * 8
    seen.clear()
    folder = pretrain(settings, resume=True, console=quiet)
    state = load_checkpoint(folder.last_checkpoint)["state"]
    assert state["step"] == 9
    assert len(seen) == 9 - 5
    # The buffers held the rest of the first epoch.
    assert len(set(itertools.chain(*seen))) == 4 * 8
    assert json.loads(state["stream"][0])["epoch"] == 1
    log = folder.log.read_text()
    assert "goes on without what was being shuffled" in log
    for shard, number in ((0, 0), (1, 30), (1, 33), (3, 77)):
        place = f"{tmp_path}/{shard}.tar.gz member {number:02}.png: ends the process"
        assert f"skipped: {place}" in log
    assert len(state["broken"]) == 4


def test_what_was_broken_before_a_resumption_counts(stream, quiet, tmp_path, deadly):
    deadly(30, 33, 77)
    settings = stream(out=tmp_path / "run", max_broken_share=2 / (COUNT - HELD_OUT))
    for resume in (False, True):
        with pytest.raises(UserError, match="3 images can't be read, 2 are allowed"):
            pretrain(settings, resume=resume, console=quiet)
        last = load_checkpoint(RunFolder(settings.out).last_checkpoint)
        assert len(last["state"]["broken"]) == 2
