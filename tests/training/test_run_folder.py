import errno
import fcntl
import json
import os
import subprocess
import sys

import pytest
import torch
import yaml
from safetensors.torch import load_file

from backfold.errors import UserError
from backfold.training import run_folder
from backfold.training.run_folder import (
    RunFolder,
    check_available,
    claim,
    load_checkpoint,
    save_checkpoint,
    write_atomically,
    write_json,
    write_tensors,
    write_yaml,
)

FRESH = {"resume": False, "overwrite": False}
RESUME = {"resume": True, "overwrite": False}
OVERWRITE = {"resume": False, "overwrite": True}


def snapshot(folder):
    return {
        str(path.relative_to(folder)): path.read_bytes() if path.is_file() else None
        for path in folder.rglob("*")
    }


@pytest.fixture
def old_run(tmp_path):
    """A folder with one of each file that a run leaves."""
    root = tmp_path / "run"
    folder = RunFolder(root)
    files = [
        folder.config, folder.facts, folder.last_checkpoint, folder.best_checkpoint,
        folder.initial, folder.backbone, folder.metrics, folder.health, folder.evaluation,
        folder.pictures / "segmentation.png", folder.log, folder.previews / "a.png",
        folder.tensorboard / "events", root / "report.html", root / "measures" / "energy.json",
        root / ".run.json.tmp",
    ]  # fmt: skip
    for number, path in enumerate(files):
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(str(number))
    return root


def test_a_new_folder_is_made_with_its_parents(tmp_path):
    with claim(tmp_path / "a" / "b", **FRESH) as folder:
        assert folder.root.is_dir()


def test_an_empty_folder_can_be_claimed(tmp_path):
    with claim(tmp_path, **FRESH) as folder:
        assert folder.root == tmp_path


@pytest.mark.parametrize(
    ("flags", "message"), [(FRESH, "--resume to go on, --overwrite to replace")]
)
def test_an_existing_run_needs_a_flag_and_stays(old_run, flags, message):
    before = snapshot(old_run)
    with pytest.raises(UserError, match=message), claim(old_run, **flags):
        pytest.fail("entered")
    assert snapshot(old_run) == before


def test_resuming_keeps_all_files_but_those_half_written(old_run):
    half = [".run.json.tmp", "checkpoints/.step-000000006.ckpt.tmp"]
    (old_run / half[1]).write_bytes(b"half")
    before = snapshot(old_run)
    with claim(old_run, **RESUME):
        pass
    kept = {name: content for name, content in before.items() if name not in half}
    assert snapshot(old_run) == kept | {".lock": b""}


def test_overwriting_empties_the_folder(old_run):
    with claim(old_run, **OVERWRITE):
        assert set(snapshot(old_run)) == {".lock"}


@pytest.mark.parametrize("flags", [FRESH, OVERWRITE])
def test_files_of_others_are_never_removed(old_run, flags):
    (old_run / "thesis.tex").write_text("years of work")
    before = snapshot(old_run)
    message = r"thesis\.tex" if flags is OVERWRITE else "exists"
    with pytest.raises(UserError, match=message), claim(old_run, **flags):
        pytest.fail("entered")
    assert snapshot(old_run) == before


def test_nothing_to_resume(tmp_path):
    with pytest.raises(UserError, match="holds no run to resume"):
        check_available(tmp_path, **RESUME)
    with pytest.raises(UserError, match="holds no run to resume"):
        check_available(tmp_path / "missing", **RESUME)
    assert snapshot(tmp_path) == {}


@pytest.mark.parametrize("below", ["file", "file/run"])
def test_a_file_in_the_way(tmp_path, below):
    (tmp_path / "file").write_text("precious")
    with pytest.raises(UserError, match="choose another --out"), claim(tmp_path / below, **FRESH):
        pytest.fail("entered")
    assert snapshot(tmp_path) == {"file": b"precious"}


HOLD = """
import fcntl, sys
with open(sys.argv[1], "w") as lock:
    fcntl.flock(lock, fcntl.LOCK_EX)
    print("held", flush=True)
    sys.stdin.read()
"""


def test_another_process_holds_the_folder_until_it_dies(tmp_path):
    (tmp_path / "run").mkdir()
    with subprocess.Popen(
        [sys.executable, "-c", HOLD, str(tmp_path / "run" / ".lock")],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
    ) as holder:
        try:
            assert holder.stdout.readline() == b"held\n"
            with pytest.raises(UserError, match="in use by another process"):
                claim(tmp_path / "run", **OVERWRITE).__enter__()
        finally:
            holder.kill()
        holder.wait()
    with claim(tmp_path / "run", **FRESH):
        pass


def test_a_refused_claim_empties_nothing(old_run):
    before = snapshot(old_run)
    with (old_run / ".lock").open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        with pytest.raises(UserError, match="in use"), claim(old_run, **OVERWRITE):
            pytest.fail("entered")
    assert snapshot(old_run) == before | {".lock": b""}


def test_what_is_written_can_be_read(tmp_path):
    write_json(tmp_path / "deep" / "a.json", {"a": [1, None]})
    assert json.loads((tmp_path / "deep" / "a.json").read_text()) == {"a": [1, None]}
    write_yaml(tmp_path / "a.yaml", {"b": 1, "a": {"c": [1.5, "x"]}})
    assert list(yaml.safe_load((tmp_path / "a.yaml").read_text()).items()) == [
        ("b", 1),
        ("a", {"c": [1.5, "x"]}),
    ]
    weight = torch.randn(3, 4).T.requires_grad_()
    write_tensors(tmp_path / "a.safetensors", {"weight": weight})
    assert torch.equal(load_file(tmp_path / "a.safetensors")["weight"], weight.detach())


def test_a_full_disk_leaves_the_old_file_and_no_other(tmp_path, monkeypatch):
    path = tmp_path / "a.json"
    write_atomically(path, b"old")

    def full(_):
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(run_folder.os, "fsync", full)
    with pytest.raises(UserError, match=r"No space left on device; free space or .* --out"):
        write_atomically(path, b"new")
    assert snapshot(tmp_path) == {"a.json": b"old"}


def test_a_kill_while_writing_leaves_the_old_file(tmp_path, monkeypatch):
    path = tmp_path / "a.json"
    write_atomically(path, b"old")

    def killed(_):
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(run_folder.os, "fsync", killed)
        with pytest.raises(KeyboardInterrupt):
            write_atomically(path, b"new")
    assert path.read_bytes() == b"old"
    write_atomically(path, b"newest")
    assert snapshot(tmp_path) == {"a.json": b"newest"}


CONTENT = {"step": 3, "model": {"w": torch.arange(4.0)}, "nested": [{"a": None, "b": 1.5}]}


def test_a_checkpoint_comes_back(tmp_path):
    path = RunFolder(tmp_path).last_checkpoint
    save_checkpoint(path, CONTENT)
    for given in (path, tmp_path):
        content = load_checkpoint(given)
        assert torch.equal(content["model"]["w"], torch.arange(4.0))
        assert (content["step"], content["nested"]) == (3, CONTENT["nested"])


def refused(path):
    with pytest.raises(UserError) as caught:
        load_checkpoint(path)
    message = str(caught.value)
    assert "\n" not in message
    assert str(path) in message
    return message


@pytest.mark.parametrize("share", [0.0, 0.3, 0.99])
def test_a_truncated_checkpoint_is_refused(tmp_path, share):
    path = tmp_path / "a.ckpt"
    save_checkpoint(path, CONTENT)
    path.write_bytes(path.read_bytes()[: int(share * path.stat().st_size)])
    assert "truncated or not written by backfold" in refused(path)


def test_foreign_checkpoints_are_refused(tmp_path):
    path = tmp_path / "a.ckpt"
    for content in ({"state_dict": {}}, [1, 2], torch.zeros(3)):
        torch.save(content, path)
        assert "not written by backfold" in refused(path)
    path.write_text("hello")
    assert "not written by backfold" in refused(path)
    torch.save({"format": "backfold-checkpoint", "format_version": 99, "backfold": "7.5"}, path)
    assert "format version 99" in refused(path)
    assert "use backfold 7.5" in refused(path)
    assert "there is no checkpoint" in refused(tmp_path / "missing.ckpt")


class Malice:
    def __init__(self, target):
        self.target = target

    def __reduce__(self):
        return os.mkdir, (str(self.target),)


def test_code_in_a_checkpoint_does_not_run(tmp_path):
    path = tmp_path / "a.ckpt"
    torch.save({"format": "backfold-checkpoint", "model": Malice(tmp_path / "owned")}, path)
    assert "not written by backfold" in refused(path)
    assert not (tmp_path / "owned").exists()
