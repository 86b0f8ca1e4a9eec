"""What is judged: the contenders' weights are those they are said to be, however they are given."""

import shutil

import pytest
import timm
import torch
from rich.console import Console
from safetensors.torch import load_file, save_file
from torch import nn

from backfold.backbone import feature_map
from backfold.errors import UserError
from backfold.evaluation.results import BEFORE, PRETRAINED, RANDOM
from backfold.evaluation.subject import open_subject
from backfold.exporting.export import export_run
from backfold.training.pretrain import pretrain
from backfold.training.run import RunFolder, build_energy, load_pretrained
from tiny_run import TINY_VIT, tiny_config, write_images

NAME = "vit_tiny_patch16_224"
OPTIONS = TINY_VIT | {"depth": 2}
IMAGES = torch.randn(3, 1, 28, 28, generator=torch.Generator().manual_seed(0))


def same(first, second):
    return first.keys() == second.keys() and all(torch.equal(first[k], second[k]) for k in first)


def run(folder, **changes):
    """A run of two steps on 40 grey images."""
    settings = {"data": write_images(folder / "images.parquet", 40), "out": folder / "run"}
    settings |= {"backbone_options": OPTIONS, "max_steps": 2, "held_out": 4, **changes}
    pretrain(tiny_config(**settings), console=Console(quiet=True))
    return folder / "run"


@pytest.fixture(scope="module")
def fresh(tmp_path_factory):
    """A run that started at random."""
    return run(tmp_path_factory.mktemp("fresh"))


@pytest.fixture
def init(tmp_path):
    """Weights of the same backbone, from elsewhere."""
    torch.manual_seed(77)
    backbone = timm.create_model(NAME, num_classes=0, in_chans=1, img_size=28, **OPTIONS)
    save_file(backbone.state_dict(), tmp_path / "weights.safetensors")
    return tmp_path / "weights.safetensors"


def test_before_is_what_training_wrote_and_the_seed_made(fresh, tmp_path):
    subject = open_subject(fresh)
    assert list(subject.weights) == [PRETRAINED, BEFORE]
    assert subject.scratch == BEFORE
    before = subject.weights[BEFORE]
    assert same(before, load_file(fresh / "initial.safetensors"))
    alone = shutil.copy(RunFolder(fresh).last_checkpoint, tmp_path)  # the seed makes the same
    assert same(before, open_subject(alone).weights[BEFORE])
    for contender, weights in subject.weights.items():
        subject.backbone(contender).requires_grad_(False).pos_embed.zero_()  # a copy
        assert same(subject.backbone(contender).state_dict(), weights)
    assert same(subject.weights[PRETRAINED], load_file(fresh / "backbone.safetensors"))
    moved = [not torch.equal(before[k], v) for k, v in subject.weights[PRETRAINED].items()]
    assert sum(moved) > len(moved) / 2


@torch.no_grad()
def test_runs_and_their_exports_have_the_same_features(fresh, tmp_path):
    own, out = load_pretrained(fresh), tmp_path / "out"
    export_run(fresh, "timm", out)
    for path in (fresh, RunFolder(fresh).last_checkpoint, out):
        subject = open_subject(path)
        assert (subject.channels, subject.image_size) == (1, (28, 28))
        assert subject.statistics == own.statistics
        backbone = subject.backbone(PRETRAINED)
        assert not backbone.training
        torch.testing.assert_close(
            feature_map(backbone, IMAGES), feature_map(own.energy.backbone, IMAGES)
        )
        assert (subject.run is None) == (subject.folder is None) == (path == out)
    assert list(subject.weights) == [PRETRAINED, RANDOM]
    larger = open_subject(out, image_size=(42, 28))
    assert feature_map(larger.backbone(PRETRAINED), torch.zeros(2, 1, 42, 28)).shape == (2, 24, 16)
    kept = [each.weights[PRETRAINED]["blocks.0.attn.qkv.weight"] for each in (subject, larger)]
    assert torch.equal(*kept)


def test_before_is_what_a_run_was_given_and_a_random_backbone_is_beside_it(init, tmp_path, caplog):
    folder = run(tmp_path, init=str(init))
    subject, given = open_subject(folder), load_file(init)
    assert list(subject.weights) == [PRETRAINED, BEFORE, RANDOM]
    assert same(subject.weights[BEFORE], given)
    random = build_energy(load_pretrained(folder).config, 1).backbone.state_dict()
    assert same(subject.weights[RANDOM], random)
    assert not same(random, given)
    assert subject.scratch == RANDOM
    RunFolder(folder).initial.unlink()
    assert list(open_subject(folder).weights) == [PRETRAINED]
    assert "initial.safetensors is not there: the run's start is not compared" in caplog.text


def test_timm_names_take_weights_from_a_file(tmp_path):
    torch.manual_seed(5)
    other = timm.create_model("test_vit", num_classes=0, in_chans=3)
    save_file(other.state_dict(), tmp_path / "weights.safetensors")
    subject = open_subject("test_vit", weights=tmp_path / "weights.safetensors", seed=3)
    assert same(subject.weights[PRETRAINED], other.state_dict())
    torch.manual_seed(3)
    random = timm.create_model("test_vit", num_classes=0, in_chans=3)
    assert same(subject.weights[RANDOM], random.state_dict())
    assert subject.scratch == RANDOM
    assert subject.image_size == (160, 160)
    assert subject.statistics.mean == timm.get_pretrained_cfg("test_vit").mean
    grey = open_subject("test_vit", channels=1, image_size=(32, 48))
    assert grey.statistics is None
    assert same(grey.weights[PRETRAINED], grey.weights[RANDOM])
    named = open_subject(f"{NAME}.augreg_in21k", image_size=(32, 32))
    assert named.backbone(PRETRAINED).pretrained_cfg["tag"] == "augreg_in21k"


def test_modules_are_copied():
    module = nn.Sequential(nn.Conv2d(1, 4, 3), nn.BatchNorm2d(4)).train()
    subject = open_subject(module, image_size=(28, 28), channels=1)
    assert list(subject.weights) == [PRETRAINED]
    assert subject.scratch is None
    backbone = subject.backbone(PRETRAINED)
    torch.testing.assert_close(backbone(IMAGES), module.eval()(IMAGES))
    assert backbone is not module
    assert backbone[0].weight is not module[0].weight


def test_drop_path_rises_to_the_last_block_and_changes_no_weight(fresh):
    subject = open_subject(fresh)
    backbone = subject.backbone(PRETRAINED, drop_path=0.3)
    rates = [getattr(block.drop_path1, "drop_prob", 0.0) for block in backbone.blocks]
    assert rates == pytest.approx([0.0, 0.3])
    assert same(backbone.state_dict(), subject.weights[PRETRAINED])
    without = open_subject("dla46x_c", image_size=(32, 32))  # it takes neither
    assert same(without.backbone(PRETRAINED, drop_path=0.2).state_dict(), without.weights[RANDOM])


def test_damaged_files_and_sizes_are_refused(fresh, tmp_path):
    for given in ("no_such_model", "no/such/folder", "resnet18.no_such_tag"):
        with pytest.raises(UserError, match="no run's folder, checkpoint, exported folder or timm"):
            open_subject(given)
    with pytest.raises(UserError, match="30x30 is no multiple"):
        open_subject("test_vit", image_size=(30, 30))
    with pytest.raises(UserError, match="can't take images of 3 x 28x28"):
        open_subject(nn.Conv2d(1, 4, 3), image_size=(28, 28))
    torn, exported = shutil.copytree(fresh, tmp_path / "run"), tmp_path / "out"
    export_run(fresh, "timm", exported)
    weights = load_file(exported / "model.safetensors")
    del weights["norm.bias"]
    for bias in ({}, {"norm.bias": torch.zeros(1)}):
        save_file(weights | bias, exported / "model.safetensors")
        with pytest.raises(UserError, match=r"weights of .*out do not fit vit_tiny.*: norm.bias"):
            open_subject(exported)
    for path, message in (
        (torn / "initial.safetensors", r"initial\.safetensors can't be read"),
        (exported / "model.safetensors", "is no exported folder"),
        (exported / "config.json", "is no exported folder"),
    ):
        path.write_bytes(path.read_bytes()[:99])
        with pytest.raises(UserError, match=message):
            open_subject(path.parent)
