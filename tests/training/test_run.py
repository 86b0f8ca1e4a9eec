"""Whole runs, started from Python, and what they leave."""

import json
import math
from unittest.mock import Mock

import pytest
import timm
import torch
from PIL import Image
from safetensors.torch import load_file

from backfold.batch_norm import batch_norms
from backfold.data.loading import evaluation_batches
from backfold.data.open import open_source
from backfold.errors import UserError
from backfold.training import pretrain as trainer
from backfold.training.config import OptimizerSettings
from backfold.training.images import open_images
from backfold.training.pretrain import pretrain
from backfold.training.run import load_checkpoint, load_pretrained
from backfold.training.step import Stepper
from backfold.training.watch import watch_task
from tiny_run import RESNET, rows_of, write_images

TASKS = ("masking", "sorting", "superresolution", "denoising")


def normalised(run, source):
    """All images of a source, as the run saw them."""
    batches = evaluation_batches(source, run.image_size, run.channels, 64)
    return run.statistics.normalize(torch.cat([batch.images for batch in batches]))


def still(folder):
    """The backbone's tensors that training left as they were, and the names of all."""
    first, last = load_file(folder.initial), load_checkpoint(folder.last_checkpoint)["model"]
    return {n for n, t in first.items() if torch.equal(t, last[f"backbone.{n}"])}, set(first)


def check_export(config, folder, **options):
    """The exported backbone is timm's own, and gives the run's features."""
    options = {**config.backbone_options, **options}
    model = timm.create_model(config.backbone, num_classes=0, in_chans=1, **options).eval()
    model.load_state_dict(load_file(folder.backbone), strict=True)
    run = load_pretrained(folder.root)
    images = normalised(run, open_source(config.data, "train"))[:16]
    ours = run.energy.backbone
    with torch.no_grad():
        expected, features = (part.forward_features(images) for part in (ours, model))
        scale = float(expected.abs().max())
        torch.testing.assert_close(features / scale, expected / scale, rtol=0, atol=1e-5)
        if batch_norms(model):
            torch.testing.assert_close(model(images) / scale, ours(images) / scale,
                                       rtol=0, atol=1e-5)  # fmt: skip


def test_a_backbone_with_batch_norms(tiny, quiet):
    config = tiny(**RESNET, max_steps=6)
    folder = pretrain(config, console=quiet)
    check_export(config, folder)
    same, names = still(folder)
    statistics = {name for name in names if name.endswith(("running_mean", "running_var"))}
    assert statistics
    assert statistics <= same
    assert not {name for name in same if "conv" in name and name.endswith("weight")}
    # Restoration with what is exported is that of training.
    watched = json.loads(folder.health.read_text())["history"][-1]["tasks"]["masking"]
    run = load_pretrained(folder.root)
    run.energy.backbone.load_state_dict(load_file(folder.backbone))
    images = normalised(run, open_images(config).held_out)
    measures, _ = watch_task(run.energy, config.tasks.masking, images, run.statistics, config, 8)
    for name in ("psnr_restored_db", "psnr_corrupted_db", "psnr_mean_fill_db"):
        assert measures[name] == pytest.approx(watched[name], abs=0.01)


def test_what_a_run_leaves(tiny, quiet, tmp_path):
    data = write_images(tmp_path / "images.parquet", 200)
    config = tiny(
        data=data, pretext="mixture", max_steps=45, epochs=4, held_out=20, watch_labels=True,
        watch_every=0.5,
    )  # fmt: skip
    folder = pretrain(config, command="backfold pretrain of a test", console=quiet)
    assert {path.name for path in folder.root.iterdir()} == {
        ".lock", "backbone.safetensors", "checkpoints", "config.yaml", "health.json",
        "initial.safetensors", "metrics.csv", "previews", "run.json", "tensorboard", "train.log",
    }  # fmt: skip
    per_epoch = 180 // 8  # 20 are held out
    watched = [0, 11, 22, 33, 44, 45]
    check_facts(json.loads(folder.facts.read_text()), data, per_epoch)
    health = json.loads(folder.health.read_text())
    check_health(health, watched, per_epoch)
    best = load_checkpoint(folder.best_checkpoint)
    assert (config.energy, best["config"]["energy"]) == ("auto", "conditional")
    gain = max(entry["psnr_gain_db"] for entry in health["history"])
    assert best["history"][-1]["psnr_gain_db"] == best["state"]["best_gain_db"] == gain
    check_metrics(rows_of(folder), per_epoch)
    names = {path.name for path in folder.previews.iterdir()}
    assert names == {f"step-{step:07d}-{task}.png" for step in watched for task in TASKS}
    with Image.open(folder.previews / "step-0000045-sorting.png") as picture:
        assert picture.size == (3 * 112 + 4 * 4, 6 * 112 + 7 * 4)  # corrupted, restored, clean
    check_export(config, folder, img_size=28)
    assert still(folder)[0] == {"norm.bias"}
    log = folder.log.read_text()
    assert "get no gradient" not in log  # that the last norm's bias gets none is by design
    assert "180 images to train, 20 held out" in log
    assert "labels of 10 classes" in log
    assert f"backbone written to {folder.backbone}" in log


def check_facts(facts, data, per_epoch):
    assert set(facts["versions"]) == {"python", "backfold", "torch", "timm", "lightning"}
    expected = {
        "command": "backfold pretrain of a test", "data": str(data), "training_images": 180,
        "held_out_images": 20, "steps": 45, "epochs": 45 / per_epoch, "tasks": list(TASKS),
    }  # fmt: skip
    assert {name: facts[name] for name in expected} == expected
    assert {"started", "hardware", "seconds", "parameters", "mean", "image_size"} <= facts.keys()


def check_health(health, watched, per_epoch):
    history = health["history"]
    assert [entry["step"] for entry in history] == watched
    for entry in history:
        assert entry["epoch"] == entry["step"] / per_epoch
        assert 1 <= entry["rank_me"] <= entry["embedding_size"] == 16
        assert 0 <= entry["knn"] <= 100
        tasks = entry["tasks"].values()
        gains = [row["psnr_restored_db"] - row["psnr_corrupted_db"] for row in tasks]
        assert entry["psnr_gain_db"] == pytest.approx(sum(gains) / 4)
    for name in TASKS:
        # The images and their corruption are the same at every look.
        assert len({entry["tasks"][name]["psnr_corrupted_db"] for entry in history}) == 1
        assert health["energies"][name].keys() == {"clean", "corrupted", "restored"}


def check_metrics(table, per_epoch):
    assert [int(row["step"]) for row in table] == [1, 11, 20, 22, 33, 40, 44, 45]
    for row in table:
        assert float(row["epoch"]) == pytest.approx(int(row["step"]) / per_epoch, rel=1e-4)
        assert 0 <= float(row["data_wait"]) <= 1
        assert all(math.isfinite(float(value)) for value in row.values())


@pytest.mark.parametrize("minutes", [0, 10])
def test_a_loss_that_is_not_finite_keeps_the_last_good_checkpoint(tiny, quiet, minutes):
    rate = OptimizerSettings(base_lr=1e30, warmup_epochs=0)
    config = tiny(optimizer=rate, max_steps=30, checkpoint_minutes=minutes)
    message = r"^the loss is .*last\.ckpt.*lower optimizer\.base_lr \(now 1e\+30\).*$"
    with pytest.raises(UserError, match=message):
        pretrain(config, console=quiet)
    run = load_pretrained(config.out)
    assert (run.step > 0) == (minutes == 0)
    assert all(torch.isfinite(value).all() for value in run.energy.state_dict().values())


@pytest.mark.parametrize(
    ("place", "name", "advice"),
    [
        (trainer, "freeze_unreachable", "choose a smaller image size"),
        (Stepper, "__call__", "8 images at once; set --micro-batch 4"),
        (trainer, "watch", "8 images at once; set --micro-batch 4"),
    ],
)
def test_running_out_of_memory_anywhere_is_one_line_of_advice(
    tiny, quiet, monkeypatch, place, name, advice
):
    error = torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB.\nMore lines")
    monkeypatch.setattr(place, name, Mock(side_effect=error))
    with pytest.raises(UserError, match=f"out of memory.*{advice}") as caught:
        pretrain(tiny(), console=quiet)
    assert "\n" not in str(caught.value)


def test_warm_up_sees_the_run_s_own_images(tiny, quiet, monkeypatch):
    warm_up = Mock(wraps=trainer.warm_up)
    monkeypatch.setattr(trainer, "warm_up", warm_up)
    config = tiny(max_steps=1)
    pretrain(config, console=quiet)
    (batch,) = evaluation_batches(open_images(config).held_out, (28, 28), 1, 8)
    torch.testing.assert_close(warm_up.call_args.args[1], batch.images / 255)
