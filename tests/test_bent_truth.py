"""Deliberate faults, made in one place from outside: the checks that pass must then fail.

Swapped contenders, test images in training and a dropped initialisation are bent beside what they
belong to: tests/evaluation/test_frozen.py, test_finetune.py, test_subject.py, test_segmentation.py.
"""

import copy

import pytest
import torch
from lightning.fabric import Fabric

from backfold.data.open import open_source
from backfold.data.statistics import ChannelStatistics
from backfold.energy import EnergyModel
from backfold.pretext import Masking
from backfold.training import pretrain as trainer
from backfold.training import step
from backfold.training.config import OptimizerSettings, PretrainConfig, TaskSettings
from backfold.training.step import Part, Restored, Stepper

STATISTICS = ChannelStatistics((0.3,), (0.35,))
OPTIONS = {"patch_size": 7, "embed_dim": 16, "depth": 1, "num_heads": 2}
TASK = Masking(mask_patch_size=7)


@pytest.fixture(scope="module")
def pictures():
    """Eleven embedded images, normalised."""
    source = open_source(None, "train")
    return STATISTICS.normalize(torch.stack([source.read(index) for index in range(11)]))


@pytest.fixture(scope="module")
def energy():
    torch.manual_seed(0)
    return EnergyModel("vit_tiny_patch16_224", image_size=28, channels=1, backbone_options=OPTIONS)


def assert_notices(check, monkeypatch, place, name, fault):
    """The check passes, and fails once this one thing is bent."""
    check()
    with monkeypatch.context() as patch:
        patch.setattr(place, name, fault)
        with pytest.raises(AssertionError):
            check()


def test_unequal_micro_batches_weigh_by_their_images(energy, pictures, monkeypatch):
    def gradient(micro_batch):
        model = copy.deepcopy(energy)
        config = PretrainConfig(
            batch_size=11, micro_batch=micro_batch,
            optimizer=OptimizerSettings(max_gradient_norm=0.0),
        )  # fmt: skip
        fabric = Fabric(accelerator="cpu", devices=1, precision="32-true")
        taken = Stepper(config, model, TASK, STATISTICS, fabric, 100, 10)
        taken(STATISTICS.denormalize(pictures), 0)
        return torch.cat([p.grad.flatten() for p in model.parameters() if p.grad is not None])

    def check():
        whole, parts = gradient(None), gradient(6)  # 6 and 5 images
        assert (whole - parts).norm() < 1e-4 * whole.norm()

    def alike(clean, corruption, tokens, _):
        return Part(clean, corruption, tokens, 0.5)

    assert_notices(check, monkeypatch, step, "Part", alike)


def test_the_logged_energy_gap_is_corrupted_minus_clean(energy, pictures, monkeypatch):
    corruption = TASK(pictures, torch.Generator().manual_seed(0))
    with torch.no_grad():
        clean, corrupted = energy(pictures), energy(corruption.corrupted)

    def check():
        part = Restored(pictures, corruption, pictures)
        assert part.energy_gap(energy) == pytest.approx(float((corrupted - clean).mean()), rel=1e-4)

    half = lambda clean, corrupted: float((corrupted - clean).mean()) / 2  # noqa: E731
    assert_notices(check, monkeypatch, step, "energy_gap", half)


def test_warm_up_sees_the_run_s_own_images(tmp_path, monkeypatch):
    seen, real = [], trainer.warm_up

    def looks(taken, images, *rest):
        seen.append(images)
        return real(taken, images, *rest)

    config = PretrainConfig(
        out=tmp_path / "run", backbone="vit_tiny_patch16_224", backbone_options=OPTIONS,
        image_size=28, batch_size=8, max_steps=1, held_out=8, num_workers=0, accelerator="cpu",
        devices=1, precision="32-true", tasks=TaskSettings(masking=TASK),
    )  # fmt: skip

    def check():
        trainer.pretrain(config, overwrite=True)
        images = seen.pop()
        assert (images.flatten(1).std(dim=1) > 0.1).all()
        assert len(images.flatten(1).unique(dim=0)) == len(images) == 8

    monkeypatch.setattr(trainer, "warm_up", looks)
    blank = lambda taken, images, *rest: looks(taken, torch.zeros_like(images), *rest)  # noqa: E731
    assert_notices(check, monkeypatch, trainer, "warm_up", blank)
