import errno
from unittest.mock import Mock

import pytest

from backfold.errors import UserError
from backfold.files import write_atomically
from backfold.training.run import RunFolder, claim


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


def test_a_new_folder_is_made_with_its_parents_and_an_empty_one_is_taken(tmp_path):
    for _ in range(2):
        with claim(tmp_path / "a" / "b", resume=False, overwrite=False) as folder:
            assert folder.root.is_dir()


def test_resuming_keeps_all_files_but_those_half_written(old_run, snapshot):
    half = [".run.json.tmp", "checkpoints/.step-000000006.ckpt.tmp"]
    (old_run / half[1]).write_bytes(b"half")
    before = snapshot(old_run)
    with claim(old_run, resume=True, overwrite=False):
        pass
    kept = {name: content for name, content in before.items() if name not in half}
    assert snapshot(old_run) == kept | {".lock": b""}


def test_overwriting_empties_the_folder(old_run, snapshot):
    with claim(old_run, resume=False, overwrite=True):
        assert set(snapshot(old_run)) == {".lock"}


def test_a_full_disk_or_a_kill_while_writing_leaves_the_old_file(tmp_path, monkeypatch, snapshot):
    path = tmp_path / "a.json"
    write_atomically(path, b"old")
    full = OSError(errno.ENOSPC, "No space left on device")
    for error, raised in ((full, UserError), (KeyboardInterrupt(), KeyboardInterrupt)):
        with monkeypatch.context() as patch:
            patch.setattr("os.fsync", Mock(side_effect=error))
            with pytest.raises(raised):
                write_atomically(path, b"new")
        assert path.read_bytes() == b"old"
    write_atomically(path, b"newest")
    assert snapshot(tmp_path) == {"a.json": b"newest"}
