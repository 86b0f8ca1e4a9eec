"""A run that was stopped and goes on ends in the same bits as one that was not."""

import json

import pytest
import torch
from rich.console import Console
from safetensors.torch import load_file

from backfold.cli.main import main
from backfold.errors import UserError
from backfold.pretext import ExcerptSettings, Masking, Sorting
from backfold.training import images
from backfold.training import pretrain as trainer
from backfold.training.config import TaskSettings
from backfold.training.pretrain import pretrain
from backfold.training.run import RunFolder, load_checkpoint
from backfold.training.step import Stepper
from tiny_run import RESNET, TINY_VIT, rows_of

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
    return [{k: v for k, v in row.items() if k not in TIMES} for row in rows_of(folder)]


def assert_equal(left, right, place=""):
    """Equality of nested mappings, lists, tensors and plain values."""
    assert type(left) is type(right), place
    if isinstance(left, (dict, list)):
        keys = left if isinstance(left, dict) else range(len(left))
        assert len(left) == len(right), place
        for key in keys:
            assert_equal(left[key], right[key], f"{place}/{key}")
    elif isinstance(left, torch.Tensor):
        assert torch.equal(left, right), place
    else:
        assert left == right or (left != left and right != right), place


def content(folder):
    """All that a run leaves but times and paths."""
    last = load_checkpoint(folder.last_checkpoint)
    kept = ("model", "optimizer", "history", "energies", "mean", "std")
    return {name: last[name] for name in kept} | {
        "state": {name: last["state"][name] for name in ("step", "best_gain_db")},
        "best": load_checkpoint(folder.best_checkpoint)["model"],
        "backbone": load_file(folder.backbone),
        "rows": rows(folder),
        "health": json.loads(folder.health.read_text()),
    }


def assert_same_run(left, right):
    assert_equal(content(left), content(right))


def break_off(monkeypatch, config, stop, **how):
    """A run that dies in the middle of this step; its folder."""
    with monkeypatch.context() as patch:
        stop_at(patch, stop)
        with pytest.raises(StopError):
            pretrain(config, console=Console(quiet=True), **how)
    return RunFolder(config.out)


DROPPED = {
    "backbone_options": {**TINY_VIT, "depth": 2, "drop_path_rate": 0.5, "proj_drop_rate": 0.2},
    "micro_batch": 4,
    "num_steps": 2,
}
MASKING = Masking(mask_patch_size=7)
HALF = {
    "pretext": "mixture",
    "tasks": TaskSettings(
        masking=MASKING, sorting=Sorting(7), mixture={"masking": 1.0, "sorting": 1.0},
        excerpt=ExcerptSettings(0.5, 7),
    ),
    "max_steps": 5,
}  # fmt: skip
DENSE = {"energy": "dense", "pretext": "mixture", "max_steps": 5}
VIEWS = {"invariance": 0.1, "max_steps": 5, "micro_batch": 4}


@pytest.mark.parametrize(
    ("stop", "changes"),
    [
        pytest.param(10, {"pretext": "mixture", "num_workers": 2}, id="mixture, workers"),
        pytest.param(10, DROPPED, id="dropout, parts, two steps"),
        pytest.param(1, RESNET | {"max_steps": 3}, id="batch norm"),
        pytest.param(10, {"checkpoint_minutes": 10.0}, id="checkpoints at looks only"),
        pytest.param(3, HALF, id="half of the squares"),
        pytest.param(3, DENSE, id="dense energy"),
        pytest.param(3, VIEWS, id="two views"),
    ],
)
def test_a_resumed_run_has_the_bits_of_an_unbroken_one(
    tiny, quiet, monkeypatch, tmp_path, capsys, stop, changes
):
    monkeypatch.setattr(trainer, "LOG_EVERY", 1)
    settings = {"max_steps": 12, "checkpoint_minutes": 0, **changes}
    whole = pretrain(tiny(out=tmp_path / "whole", **settings), console=quiet)
    broken = break_off(monkeypatch, tiny(out=tmp_path / "broken", **settings), stop)
    middle = load_checkpoint(broken.last_checkpoint)
    saved = middle["state"]["step"]
    assert saved == (stop if settings["checkpoint_minutes"] == 0 else 9)
    assert not broken.backbone.exists()
    assert main(["pretrain", "--resume", "--out", str(broken.root)]) == 0
    assert f"resuming at step {saved} of" in capsys.readouterr().err
    assert_same_run(whole, broken)
    assert [int(row["step"]) for row in rows(broken)] == list(range(1, settings["max_steps"] + 1))
    if changes is VIEWS:
        last = load_checkpoint(broken.last_checkpoint)["model"]
        for name in ("second_head.weight", "projector.0.weight"):
            assert not torch.equal(middle["model"][name], last[name])


def test_resuming_twice_and_when_done_measures_nothing_again(tiny, quiet, monkeypatch, tmp_path):
    monkeypatch.setattr(trainer, "LOG_EVERY", 1)
    settings = {"max_steps": 12, "checkpoint_minutes": 0}
    whole = pretrain(tiny(out=tmp_path / "whole", **settings), console=quiet)
    config = tiny(out=tmp_path / "broken", **settings)
    break_off(monkeypatch, config, 0)
    monkeypatch.setattr(images, "survey", lambda *_, **__: pytest.fail("normalisation measured"))
    folder = break_off(monkeypatch, config, 9, resume=True)  # an epoch has 9 steps
    for _ in range(2):
        assert main(["pretrain", "--resume", "--out", str(config.out)]) == 0
        assert_same_run(whole, folder)


def test_a_run_that_another_process_went_on_with_is_not_taken_back(tiny, quiet, monkeypatch):
    config, claim = tiny(max_steps=12, checkpoint_minutes=0), trainer.run.claim
    folder = break_off(monkeypatch, config, 3)

    def late(root, **how):
        monkeypatch.setattr(trainer.run, "claim", claim)
        pretrain(config, console=quiet, resume=True)  # as the other process
        return claim(root, **how)

    monkeypatch.setattr(trainer.run, "claim", late)
    with pytest.raises(UserError, match="another process went on with"):
        pretrain(config, console=quiet, resume=True)
    assert load_checkpoint(folder.last_checkpoint)["state"]["step"] == 12
