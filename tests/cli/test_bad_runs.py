"""Checkpoints, folders and disks that a run can't use give one line, and lose nothing."""

import errno
import fcntl
import os

import pytest
import torch

from backfold.cli.main import main
from backfold.training import run_folder as run_folder_module
from backfold.training.metrics_log import MetricsLog
from backfold.training.pretrained import load_pretrained
from backfold.training.run_folder import RunFolder

# From Python 3.12 on, forking a process with threads warns; the evaluation's loaders fork workers.
pytestmark = pytest.mark.filterwarnings(
    "ignore:This process .* is multi-threaded:DeprecationWarning"
)


def damage(run, kind):
    """Damage the run's last checkpoint; returns what the message says of it."""
    path = RunFolder(run).last_checkpoint
    if kind == "truncated":
        path.write_bytes(path.read_bytes()[:-100])
        return "truncated or not written by backfold; take another, such as checkpoints/best.ckpt"
    if kind == "missing":
        path.unlink()
        return "there is no checkpoint at"
    if kind == "foreign":
        torch.save({"state_dict": {"w": torch.zeros(2)}}, path)
        return "was not written by backfold; give a run's folder or a .ckpt of one"
    if kind == "code":
        torch.save({"format": "backfold-checkpoint", "model": Malice(run / "owned")}, path)
        return "not written by backfold"
    content = torch.load(path, weights_only=True)
    if kind == "version":
        torch.save(content | {"format_version": 99, "backfold": "9.9"}, path)
        return "has format version 99, this backfold reads 1; use backfold 9.9"
    if kind == "head":
        content["config"]["head"] = "quadratic"
        torch.save(content, path)
        return "the run has a quadratic head, and this backfold knows the linear one alone"
    content["model"].pop("backbone.patch_embed.proj.weight")
    torch.save(content, path)
    return "does not fit this version of backfold or timm"


class Malice:
    def __init__(self, target):
        self.target = target

    def __reduce__(self):
        return os.mkdir, (str(self.target),)


@pytest.mark.parametrize(
    "kind", ["truncated", "missing", "foreign", "code", "version", "head", "incomplete"]
)
def test_bad_checkpoints(kind, run_folder, refused, tmp_path, snapshot):
    message = damage(run_folder, kind)
    picture = tmp_path / "a.png"
    picture.write_bytes(b"")
    before = snapshot(tmp_path)
    refused(["evaluate", f"--checkpoint={run_folder}"], message)
    out = tmp_path / "restored"
    refused(["restore", f"--checkpoint={run_folder}", f"--out={out}", picture], message)
    if kind not in ("missing", "head", "incomplete"):
        refused(["pretrain", "--resume", f"--out={run_folder}"], message)
    assert snapshot(tmp_path) == before


def test_an_older_run_s_linear_head_and_unused_task_are_no_obstacle(run_folder):
    path, before = RunFolder(run_folder).last_checkpoint, load_pretrained(run_folder)
    content = torch.load(path, weights_only=True)
    content["config"]["head"] = "linear"
    content["config"]["tasks"]["exchange"] = {"exchange_ratio": 0.4, "exchange_patch_size": 16}
    torch.save(content, path)
    assert load_pretrained(run_folder).config == before.config


def test_an_existing_run_stays(run_folder, refused, tiny, snapshot, make_parquet):
    before = snapshot(run_folder)
    data = f"--data={make_parquet()}"
    arguments = ["pretrain", *tiny, data, f"--out={run_folder}"]
    refused(arguments, "exists; give --resume to go on, --overwrite to replace it")
    # What is refused for another reason must not have emptied the folder first.
    refused([*arguments, "--overwrite", "--backbone=no_such"], "unknown backbone")
    refused([*arguments, "--overwrite", "--data=nowhere"], "nowhere does not exist")
    refused([*arguments, "--overwrite", "--micro-batch=0"], "micro_batch is 0")
    (run_folder / "notes.txt").write_text("mine")
    refused([*arguments, "--overwrite"], "notes.txt", "choose another --out")
    (run_folder / "notes.txt").unlink()
    assert snapshot(run_folder) == before


def test_a_run_in_use(run_folder, refused, tiny, snapshot, make_parquet, tmp_path):
    data = f"--data={make_parquet()}"
    before = snapshot(run_folder)
    with (run_folder / ".lock").open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        for flag in ("--resume", "--overwrite"):
            arguments = [] if flag == "--resume" else [*tiny, data]
            refused(
                ["pretrain", flag, f"--out={run_folder}", *arguments],
                "is in use by another process; wait for it or choose another --out",
            )
    assert snapshot(run_folder) == before
    fresh = tmp_path / "fresh"
    fresh.mkdir()
    with (fresh / ".lock").open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        refused(["pretrain", *tiny, data, f"--out={fresh}"], "in use")
    assert set(snapshot(fresh)) == {".lock"}


@pytest.mark.parametrize("place", ["file/run", "/proc/run"])
def test_a_folder_that_cannot_be_written(place, tiny, refused, make_parquet, tmp_path):
    (tmp_path / "file").write_text("precious")
    arguments = ["pretrain", *tiny, f"--data={make_parquet()}", f"--out={tmp_path / place}"]
    refused(arguments, "can't write to", "choose another --out")
    assert (tmp_path / "file").read_text() == "precious"


def fill_disk_after(monkeypatch, writes):
    """Let the disk be full after so many atomic writes."""
    done = []
    original = os.fsync

    def sync(descriptor):
        done.append(descriptor)
        if len(done) > writes:
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        original(descriptor)

    monkeypatch.setattr(run_folder_module.os, "fsync", sync)


@pytest.mark.parametrize("writes", [6, 10, 12, 15, 18])
def test_a_full_disk_keeps_the_last_checkpoint(
    writes, monkeypatch, refused, tiny, make_parquet, tmp_path, capsys
):
    folder = RunFolder(tmp_path / "out")
    arguments = [f"--data={make_parquet()}", f"--out={folder.root}", "--checkpoint-minutes=0"]
    with monkeypatch.context() as patch:
        fill_disk_after(patch, writes)
        refused(
            ["pretrain", *tiny, *arguments, "--max-steps=9"],
            "No space left on device; free space or choose another --out",
        )
    assert load_pretrained(folder.root).step < 9
    assert not list(folder.root.rglob(".*.tmp"))
    assert main(["pretrain", "--resume", f"--out={folder.root}"]) == 0
    assert load_pretrained(folder.root).step == 9
    capsys.readouterr()


def test_a_disk_that_fills_up_between_checkpoints(
    monkeypatch, refused, tiny, make_parquet, tmp_path
):
    def full(*_):
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setattr(MetricsLog, "add", full)
    arguments = ["pretrain", *tiny, f"--data={make_parquet()}", f"--out={tmp_path / 'out'}"]
    refused(arguments, "No space left on device; free space or choose another --out")
    assert load_pretrained(tmp_path / "out").step == 0


def test_nothing_to_resume(refused, tmp_path, snapshot):
    (tmp_path / "empty").mkdir()
    for name in ("missing", "empty"):
        out = tmp_path / name
        refused(["pretrain", "--resume", f"--out={out}"], "holds no run to resume; check --out")
    assert snapshot(tmp_path) == {"empty": None}


def test_changed_settings_of_a_resumed_run_are_named(run_folder, refused, snapshot):
    before = snapshot(run_folder)
    line = refused(
        ["pretrain", "--resume", f"--out={run_folder}", "--seed=3", "--optimizer.base-lr=1"],
        "seed", "optimizer", "leave them out",
    )  # fmt: skip
    assert "epochs" not in line
    assert snapshot(run_folder) == before
