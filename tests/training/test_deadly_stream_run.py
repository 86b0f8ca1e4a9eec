"""A run on a stream outlives decoders that crash, and goes on counting what is broken."""

import io
import os
import signal
import tarfile

import numpy as np
import pytest
from PIL import Image
from test_resume import StopError, assert_equal, assert_same_run, stop_at

from backfold import UserError
from backfold.data import encoded, stream_loading
from backfold.training import trainer
from backfold.training.run_folder import RunFolder, load_checkpoint
from backfold.training.trainer import pretrain

pytestmark = [
    # From Python 3.12 on, forking a process with threads warns; torch has threads and forks.
    pytest.mark.filterwarnings("ignore:This process .* is multi-threaded:DeprecationWarning"),
    pytest.mark.filterwarnings("ignore:This DataLoader will create:UserWarning"),
]
COUNT, HELD_OUT = 80, 8


def png(number):
    pixels = np.random.default_rng(number).integers(0, 256, (28, 28), dtype=np.uint8)
    buffer = io.BytesIO()
    Image.fromarray(pixels).save(buffer, "PNG")
    return buffer.getvalue()


@pytest.fixture
def stream(tiny, tmp_path):
    """Settings of a run on 4 shards of 20 images."""
    for shard in range(4):
        with tarfile.open(tmp_path / f"{shard}.tar.gz", "w:gz") as tar:
            for number in range(20 * shard, 20 * shard + 20):
                member = tarfile.TarInfo(f"{number:02}.png")
                member.size = len(png(number))
                tar.addfile(member, io.BytesIO(png(number)))

    def make(**changes):
        data = f"{tmp_path}/{{0..3}}.tar.gz"
        settings = {"stream_images": COUNT, "held_out": HELD_OUT, "max_steps": 9, **changes}
        return tiny(data=data, num_workers=1, checkpoint_minutes=0, **settings)

    return make


@pytest.fixture
def deadly(monkeypatch):
    """Let the decoder be ended by images of these numbers."""

    def make(*numbers):
        contents = {png(number) for number in numbers}
        for module in (encoded, stream_loading):
            decode = module.decode

            def decode_or_die(content, *rest, decode=decode):
                if content in contents:
                    os._exit(3)
                return decode(content, *rest)

            monkeypatch.setattr(module, "decode", decode_or_die)

    return make


def broken_in(folder):
    return load_checkpoint(folder.last_checkpoint)["state"]["broken"]


def test_it_goes_on_and_resumes_to_the_same_bits(stream, quiet, monkeypatch, tmp_path, deadly):
    monkeypatch.setattr(trainer, "LOG_EVERY", 1)
    deadly(0, 30, 33, 77)  # the first is held out
    whole = pretrain(stream(out=tmp_path / "whole", max_broken_share=0.5), console=quiet)
    log = whole.log.read_text()
    for shard, number in ((0, 0), (1, 30), (1, 33), (3, 77)):
        place = f"{tmp_path}/{shard}.tar.gz member {number:02}.png: ends the process"
        assert log.count(f"skipped: {place}") == 1, log
    settings = stream(out=tmp_path / "broken", max_broken_share=0.5)
    with monkeypatch.context() as patch:
        stop_at(patch, 5)
        with pytest.raises(StopError):
            pretrain(settings, console=quiet)
    folder = pretrain(settings, resume=True, console=quiet)
    assert_same_run(whole, folder)
    assert_equal(broken_in(whole), broken_in(folder))
    assert len(broken_in(whole)) == 4


def test_what_was_broken_before_a_resumption_counts(stream, quiet, tmp_path, deadly):
    deadly(30, 33, 77)
    settings = stream(out=tmp_path / "run", max_broken_share=2 / (COUNT - HELD_OUT))
    with pytest.raises(UserError, match="3 images can't be read, 2 are allowed"):
        pretrain(settings, console=quiet)
    folder = RunFolder(settings.out)
    assert len(broken_in(folder)) == 2
    # None of the two comes once more in this epoch.
    with pytest.raises(UserError, match="3 images can't be read, 2 are allowed"):
        pretrain(settings, resume=True, console=quiet)
    assert len(broken_in(folder)) == 2


def test_a_killed_worker_is_replaced(stream, quiet, monkeypatch, tmp_path):
    whole = pretrain(stream(out=tmp_path / "whole", max_steps=4), console=quiet)
    decode, marker = stream_loading.decode, tmp_path / "killed"

    def kill_once(content, *rest):
        if content == png(30) and not marker.exists():
            marker.touch()
            os.kill(os.getppid(), signal.SIGKILL)  # the worker, beside which this decodes
        return decode(content, *rest)

    monkeypatch.setattr(stream_loading, "decode", kill_once)
    killed = pretrain(stream(out=tmp_path / "run", max_steps=4), console=quiet)
    assert marker.exists()
    assert_same_run(whole, killed)
    assert broken_in(killed) == []
