"""Checkpoints, folders and disks that a run can't use give one line, and lose nothing."""

import fcntl
import os

import pytest
import torch

from backfold.training.run import RunFolder, load_pretrained


class Malice:
    def __reduce__(self):
        return os.mkdir, ("owned",)


def without_a_weight(content):
    name = "backbone.patch_embed.proj.weight"
    return content | {"model": {k: v for k, v in content["model"].items() if k != name}}


@pytest.mark.parametrize(
    ("damage", "message", "resumes"),
    [
        (lambda _: {"state_dict": {"w": torch.zeros(2)}},
         "was not written by backfold; give a run's folder or a .ckpt of one", False),
        (lambda _: {"format": "backfold-checkpoint", "model": Malice()},
         "not written by backfold", False),
        (lambda content: content | {"format_version": 99, "backfold": "9.9"},
         "has format version 99, this backfold reads 1; use backfold 9.9", False),
        (lambda content: content | {"config": content["config"] | {"head": "quadratic"}},
         "does not fit this version of backfold or timm: bad settings: ", True),
        (without_a_weight, "does not fit this version of backfold or timm", True),
        (lambda content: content, "truncated or not written by backfold; take another, such as "
         "checkpoints/best.ckpt", False),
        (None, "there is no checkpoint at", True),
    ],
    ids=["foreign", "code", "version", "head", "incomplete", "truncated", "missing"],
)  # fmt: skip
def test_bad_checkpoints(
    damage, message, resumes, run_folder, refused, tmp_path, snapshot, monkeypatch
):
    monkeypatch.chdir(tmp_path)
    path = RunFolder(run_folder).last_checkpoint
    content = torch.load(path, weights_only=True)
    path.unlink()
    if damage is not None:
        torch.save(damage(content), path)
    if message.startswith("truncated"):
        path.write_bytes(path.read_bytes()[:-100])
    picture = tmp_path / "a.png"
    picture.write_bytes(b"")
    before = snapshot(tmp_path)
    refused(["evaluate", f"--checkpoint={run_folder}"], message)
    refused(["restore", f"--checkpoint={run_folder}", "--out=restored", picture], message)
    if not resumes:
        refused(["pretrain", "--resume", f"--out={run_folder}"], message)
    assert snapshot(tmp_path) == before


def test_an_older_run_s_linear_head_and_unused_task_are_no_obstacle(run_folder):
    path, before = RunFolder(run_folder).last_checkpoint, load_pretrained(run_folder)
    content = torch.load(path, weights_only=True)
    content["config"] |= {"head": "linear", "derivative": "exact"}
    content["config"]["tasks"]["exchange"] = {"exchange_ratio": 0.4, "exchange_patch_size": 16}
    torch.save(content, path)
    assert load_pretrained(run_folder).config == before.config


def test_an_existing_run_stays(run_folder, refused, tiny, snapshot, make_parquet):
    before = snapshot(run_folder)
    anew = ["pretrain", *tiny, f"--data={make_parquet()}", f"--out={run_folder}"]
    resume = ["pretrain", "--resume", f"--out={run_folder}"]
    refused(anew, "exists; give --resume to go on, --overwrite to replace it")
    # What is refused for another reason must not have emptied the folder first.
    refused([*anew, "--overwrite", "--backbone=no_such"], "unknown backbone")
    changed = [*resume, "--seed=3", "--optimizer.base-lr=1"]
    assert "epochs" not in refused(changed, "seed", "optimizer", "leave them out")
    with (run_folder / ".lock").open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        for arguments in (resume, [*anew, "--overwrite"]):
            refused(arguments, "is in use by another process; wait for it or choose another --out")
    (run_folder / "notes.txt").write_text("mine")
    refused([*anew, "--overwrite"], "notes.txt", "choose another --out")
    (run_folder / "notes.txt").unlink()
    assert snapshot(run_folder) == before


@pytest.mark.parametrize("place", ["file/run", "/proc/run"])
def test_a_folder_that_cannot_be_written(place, tiny, refused, make_parquet, tmp_path, finished):
    (tmp_path / "file").write_text("precious")
    out = f"--out={tmp_path / place}"
    refused(["pretrain", *tiny, f"--data={make_parquet()}", out], "can't write to", "another --out")
    evaluate = ["evaluate", f"--checkpoint={finished}", "--accelerator=cpu", "--protocols=knn"]
    refused([*evaluate, "--labels=1", "--draws=1", out], "choose another --out")
    assert (tmp_path / "file").read_text() == "precious"


def test_nothing_to_resume(refused, tmp_path, snapshot):
    (tmp_path / "empty").mkdir()
    for name in ("missing", "empty"):
        out = tmp_path / name
        refused(["pretrain", "--resume", f"--out={out}"], "holds no run to resume; check --out")
    assert snapshot(tmp_path) == {"empty": None}


def test_the_demo_leaves_folders_of_others_alone(make_parquet, tiny, refused, tmp_path, snapshot):
    (tmp_path / "letters").mkdir()
    (tmp_path / "letters" / "love.txt").write_text("dear")
    arguments = ["demo", f"--data={make_parquet()}", f"--out={tmp_path / 'letters'}", *tiny]
    before = snapshot(tmp_path / "letters")
    refused(arguments, "love.txt", "choose another --out")
    assert snapshot(tmp_path / "letters") == before
