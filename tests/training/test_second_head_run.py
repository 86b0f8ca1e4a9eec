"""A run with a second head, from its start to the weights that are used."""

import pytest
import torch
from test_resume import StopError, assert_same_run, stop_at

from backfold import Backfold
from backfold.pretext import Masking
from backfold.training.config import TaskSettings
from backfold.training.run_folder import load_checkpoint
from backfold.training.trainer import pretrain

TASKS = TaskSettings(masking=Masking(mask_patch_size=7, normalised_share=0.5))


def test_it_is_trained_kept_and_resumed_to_the_same_bits(tiny, quiet, tmp_path, monkeypatch):
    whole = pretrain(tiny(tasks=TASKS, max_steps=6, out=tmp_path / "whole"), console=quiet)
    settings = tiny(tasks=TASKS, max_steps=6, checkpoint_minutes=0, out=tmp_path / "stopped")
    with monkeypatch.context() as patch:
        stop_at(patch, 3)
        with pytest.raises(StopError):
            pretrain(settings, console=quiet)
    middle = load_checkpoint(tmp_path / "stopped/checkpoints/last.ckpt")["model"]
    resumed = pretrain(settings, resume=True, console=quiet)
    assert_same_run(whole, resumed)
    last = load_checkpoint(resumed.last_checkpoint)["model"]
    assert not torch.equal(middle["second_head.weight"], last["second_head.weight"])
    log = whole.log.read_text()
    assert "get no gradient from restoration and stay as they are: backbone.norm.bias\n" in log


def test_pixels_are_restored_by_the_first_head(tiny, quiet):
    folder = pretrain(tiny(tasks=TASKS), console=quiet)
    model = Backfold.load(folder.root)
    images = torch.rand(2, 1, 28, 28)
    energies = model.energy(images)
    energy = model.run.energy
    assert energy.second_head is not None
    with torch.no_grad():
        energy.second_head.weight.zero_()
    assert torch.equal(torch.as_tensor(model.energy(images)), torch.as_tensor(energies))
