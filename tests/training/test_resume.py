"""A run that was stopped and goes on ends in the same bits as one that was not."""

import csv
import json
import os
import signal
import subprocess
import sys
import time

import pytest
import torch
import yaml
from safetensors.torch import load_file

from backfold.cli.main import main
from backfold.training import setup, trainer
from backfold.training.config_file import config_to_dict
from backfold.training.run_folder import RunFolder, load_checkpoint
from backfold.training.stepper import Stepper
from backfold.training.trainer import pretrain

# From Python 3.12 on, forking a process with threads warns; torch has threads and forks workers.
pytestmark = pytest.mark.filterwarnings(
    "ignore:This process .* is multi-threaded:DeprecationWarning"
)
TIMES = ("seconds", "images_per_second", "data_wait")


class StopError(Exception):
    """What stops a run in these tests."""


def stop_at(monkeypatch, stop):
    """Let the run die in the middle of this step, counted from 0."""
    original = Stepper.__call__

    def step(self, images, number):
        found = original(self, images, number)
        if number == stop:
            raise StopError
        return found

    monkeypatch.setattr(Stepper, "__call__", step)


def rows(folder):
    with folder.metrics.open(newline="") as file:
        table = list(csv.DictReader(file))
    return [{k: v for k, v in row.items() if k not in TIMES} for row in table]


def assert_equal(left, right, place=""):
    """Equality of nested mappings, lists, tensors and plain values."""
    assert type(left) is type(right), place
    if isinstance(left, dict):
        assert left.keys() == right.keys(), place
        for key in left:
            assert_equal(left[key], right[key], f"{place}/{key}")
    elif isinstance(left, list):
        assert len(left) == len(right), place
        for index, pair in enumerate(zip(left, right, strict=True)):
            assert_equal(*pair, f"{place}/{index}")
    elif isinstance(left, torch.Tensor):
        assert torch.equal(left, right), place
    else:
        assert left == right or (left != left and right != right), place


def assert_same_run(left, right):
    assert_equal(load_file(left.backbone), load_file(right.backbone))
    contents = [load_checkpoint(folder.last_checkpoint) for folder in (left, right)]
    for name in ("model", "optimizer", "history", "energies", "mean", "std"):
        assert_equal(contents[0][name], contents[1][name], name)
    states = [content["state"] for content in contents]
    assert states[0]["step"] == states[1]["step"]
    assert states[0]["best_gain_db"] == states[1]["best_gain_db"]
    best = [load_checkpoint(folder.best_checkpoint)["model"] for folder in (left, right)]
    assert_equal(*best)
    assert rows(left) == rows(right)
    health = [json.loads(folder.health.read_text()) for folder in (left, right)]
    assert_equal(*health)


MIXED = {"pretext": "mixture"}
DROPPED = {"backbone_options": {"patch_size": 7, "embed_dim": 16, "depth": 2, "num_heads": 2,
                                "drop_path_rate": 0.5, "proj_drop_rate": 0.2}}  # fmt: skip
STEPS = {"micro_batch": 4, "num_steps": 2}
RESNET = {
    "backbone": "resnet10t",
    "backbone_options": {"channels": [8, 16, 24, 32]},
    "image_size": 32,
    "max_steps": 3,
}


@pytest.mark.parametrize(
    ("stop", "changes"),
    [
        pytest.param(5, {}, id="mid-epoch"),
        pytest.param(9, {}, id="at an epoch's end"),
        pytest.param(0, {}, id="first step"),
        pytest.param(10, MIXED, id="mixture"),
        pytest.param(10, MIXED | {"num_workers": 2}, id="workers"),
        pytest.param(10, DROPPED | STEPS, id="dropout, parts, two steps"),
        pytest.param(1, RESNET, id="batch norm"),
        pytest.param(10, {"checkpoint_minutes": 10.0}, id="checkpoints at looks only"),
    ],
)
def test_a_resumed_run_has_the_bits_of_an_unbroken_one(
    tiny, quiet, monkeypatch, tmp_path, capsys, stop, changes
):
    monkeypatch.setattr(trainer, "LOG_EVERY", 1)
    settings = {"max_steps": 12, "checkpoint_minutes": 0, **changes}
    whole = pretrain(tiny(out=tmp_path / "whole", **settings), console=quiet)
    broken = RunFolder(tmp_path / "broken")
    with monkeypatch.context() as patch:
        stop_at(patch, stop)
        with pytest.raises(StopError):
            pretrain(tiny(out=broken.root, **settings), console=quiet)
    saved = load_checkpoint(broken.last_checkpoint)["state"]["step"]
    assert saved == (stop if settings["checkpoint_minutes"] == 0 else 9)
    assert not broken.backbone.exists()
    assert main(["pretrain", "--resume", "--out", str(broken.root)]) == 0
    assert f"resuming at step {saved} of" in capsys.readouterr().err
    assert_same_run(whole, broken)
    steps = [int(row["step"]) for row in rows(broken)]
    assert steps == list(range(1, settings["max_steps"] + 1))


def test_resuming_twice_and_when_done(tiny, quiet, monkeypatch, tmp_path):
    monkeypatch.setattr(trainer, "LOG_EVERY", 1)
    settings = {"max_steps": 12, "checkpoint_minutes": 0}
    whole = pretrain(tiny(out=tmp_path / "whole", **settings), console=quiet)
    config = tiny(out=tmp_path / "broken", **settings)
    folder = RunFolder(config.out)
    for stop in (3, 8):
        with monkeypatch.context() as patch:
            stop_at(patch, stop)
            with pytest.raises(StopError):
                pretrain(config, resume=stop > 3, console=quiet)
    for _ in range(2):
        assert main(["pretrain", "--resume", "--out", str(config.out)]) == 0
        assert_same_run(whole, folder)


def test_a_resumed_run_keeps_its_normalisation_whatever_is_measured_in_between(
    tiny, quiet, monkeypatch, tmp_path
):
    monkeypatch.chdir(tmp_path)
    config = tiny(checkpoint_minutes=0, max_steps=6)
    with monkeypatch.context() as patch:
        stop_at(patch, 3)
        with pytest.raises(StopError):
            pretrain(config, console=quiet)
    folder = RunFolder(config.out)
    before = load_checkpoint(folder.last_checkpoint)
    assert main(["stats", f"--data={config.data}", "--max-images=20", "--num-workers=0"]) == 0
    monkeypatch.setattr(setup, "survey", lambda *_, **__: pytest.fail("measured again"))
    assert main(["pretrain", "--resume", "--out", str(config.out)]) == 0
    after = load_checkpoint(folder.last_checkpoint)
    facts = json.loads(folder.facts.read_text())
    for name in ("mean", "std"):
        assert before[name] == after[name] == facts[name]


def test_a_run_without_a_checkpoint_starts_over(tiny, quiet, tmp_path, capsys):
    whole = pretrain(tiny(out=tmp_path / "whole"), console=quiet)
    config = tiny(out=tmp_path / "broken")
    config.out.mkdir()
    RunFolder(config.out).config.write_text(yaml.safe_dump(config_to_dict(config)))
    assert main(["pretrain", "--resume", "--out", str(config.out)]) == 0
    assert "no checkpoint yet" in capsys.readouterr().err
    assert_same_run(whole, RunFolder(config.out))


def steps_saved(folder):
    return json.loads(folder.facts.read_text())["steps"] if folder.facts.exists() else 0


def wait_for(condition, process, seconds=120.0):
    start = time.monotonic()
    while not condition():
        assert process.poll() is None, process.stderr.read()
        assert time.monotonic() - start < seconds
        time.sleep(0.02)


@pytest.mark.slow
def test_a_killed_process_s_run_goes_on(tiny, quiet, tmp_path):
    settings = {"max_steps": 150, "epochs": 1000, "watch_every": 5.0}
    whole = pretrain(tiny(out=tmp_path / "whole", **settings), console=quiet)
    killed = RunFolder(tmp_path / "killed")
    config = tmp_path / "settings.yaml"
    config.write_text(
        yaml.safe_dump(config_to_dict(tiny(out=killed.root, checkpoint_minutes=0.001, **settings)))
    )
    threads = {"OMP_NUM_THREADS": str(torch.get_num_threads())}
    with subprocess.Popen(
        [sys.executable, "-m", "backfold.cli.main", "pretrain", f"--config={config}"],
        env={**os.environ, **threads},
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
    ) as process:
        wait_for(lambda: steps_saved(killed) > 0, process)
        process.send_signal(signal.SIGKILL)
        process.wait()
        process.stdout.read(), process.stderr.read()
    assert 0 < load_checkpoint(killed.last_checkpoint)["state"]["step"] < 150
    assert main(["pretrain", "--resume", "--out", str(killed.root)]) == 0
    assert_same_run(whole, killed)
