"""Runs on a part of each image's squares, from the settings to the weights."""

import pytest
import torch
from test_resume import StopError, assert_same_run, stop_at

from backfold.errors import UserError
from backfold.pretext import Denoising, ExcerptSettings, Masking, Sorting
from backfold.training.config import PretrainConfig, TaskSettings, doubtful_settings
from backfold.training.run_folder import load_checkpoint
from backfold.training.trainer import pretrain

HALF = ExcerptSettings(0.5, 7)
TASKS = TaskSettings(
    masking=Masking(mask_patch_size=7),
    sorting=Sorting(7),
    mixture={"masking": 1.0, "sorting": 1.0},
    excerpt=HALF,
)


def test_a_mixture_on_half_of_the_squares_resumes_to_the_same_bits(
    tiny, quiet, tmp_path, monkeypatch
):
    given = {"pretext": "mixture", "tasks": TASKS, "max_steps": 6}
    whole = pretrain(tiny(**given, out=tmp_path / "whole"), console=quiet)
    settings = tiny(**given, checkpoint_minutes=0, out=tmp_path / "stopped")
    with monkeypatch.context() as patch:
        stop_at(patch, 3)
        with pytest.raises(StopError):
            pretrain(settings, console=quiet)
    resumed = pretrain(settings, resume=True, console=quiet)
    assert_same_run(whole, resumed)


def test_the_share_changes_what_is_learned(tiny, quiet, tmp_path):
    def weights(name, **changes):
        tasks = TaskSettings(masking=Masking(mask_patch_size=7), **changes)
        run = pretrain(tiny(tasks=tasks, max_steps=2, out=tmp_path / name), console=quiet)
        return load_checkpoint(run.last_checkpoint)["model"]["head.weight"]

    plain = weights("plain")
    assert torch.equal(plain, weights("all", excerpt=ExcerptSettings(1.0, 7)))
    assert not torch.equal(plain, weights("half", excerpt=HALF))


def test_refuses_a_backbone_that_needs_the_whole_grid_and_writes_nothing(tiny, quiet, tmp_path):
    config = tiny(tasks=TASKS, backbone="resnet10t", backbone_options={}, out=tmp_path / "run")
    with pytest.raises(UserError, match=r"^hidden_share or tasks.excerpt.share .* with ResNet: "):
        pretrain(config, console=quiet)
    assert not (tmp_path / "run").exists()


def test_refuses_tasks_that_do_not_fit_and_writes_nothing(tiny, quiet, tmp_path):
    tasks = TaskSettings(masking=Masking(mask_patch_size=14), excerpt=HALF)
    with pytest.raises(UserError, match=r"excerpt_patch_size is 7 and tasks.masking.mask_patch"):
        pretrain(tiny(tasks=tasks, out=tmp_path / "run"), console=quiet)
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        ({"pretext": "denoising"}, "worse than untrained ones"),
        ({"pretext": "denoising", "tasks": TaskSettings(denoising=Denoising(octaves=4))}, None),
        ({"pretext": "mixture"}, None),
        (
            {"tasks": TaskSettings(excerpt=ExcerptSettings(1.0, 8))},
            "tasks.excerpt.excerpt_patch_size has no effect with a share of 1",
        ),
        ({"tasks": TaskSettings(excerpt=ExcerptSettings(0.5, 8))}, None),
    ],
)
def test_what_is_said_of_doubtful_settings(changes, said):
    lines = doubtful_settings(PretrainConfig(**changes))
    assert len(lines) == (said is not None)
    assert all(said in line for line in lines)
