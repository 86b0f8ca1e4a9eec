"""Whole runs, started from Python, and what they leave."""

import csv
import dataclasses
import json
import math
import time

import pytest
import timm
import torch
import yaml
from PIL import Image
from safetensors.torch import load_file

from backfold.batch_norm import batch_norms
from backfold.cli.main import main
from backfold.data.loading import evaluation_loader
from backfold.data.parquet import ParquetSource
from backfold.data.source import open_source
from backfold.errors import UserError
from backfold.training import meter, recorder, setup, trainer
from backfold.training.config import PretrainConfig
from backfold.training.config_file import config_from_dict, config_to_dict
from backfold.training.health import watch_task
from backfold.training.optimizer import OptimizerSettings
from backfold.training.pretrained import load_pretrained
from backfold.training.run_folder import load_checkpoint
from backfold.training.stepper import Stepper
from backfold.training.trainer import pretrain

RESNET = {
    "backbone": "resnet10t",
    "backbone_options": {"channels": [8, 16, 24, 32]},
    "image_size": 32,
    "max_steps": 6,
}


def rows(folder):
    with folder.metrics.open(newline="") as file:
        return list(csv.DictReader(file))


def normalised(run, data):
    """All images of a parquet file, as the run saw them."""
    loader = evaluation_loader(open_source(data, "train"), run.image_size, run.channels, 64)
    return run.statistics.normalize(torch.cat([batch.images for batch in loader]))


@pytest.mark.parametrize("changes", [{}, RESNET], ids=["vit", "batch norm"])
def test_the_exported_backbone_is_timm_s_own_and_gives_the_same_features(tiny, quiet, changes):
    config = tiny(**changes)
    folder = pretrain(config, console=quiet)
    options = dict(config.backbone_options)
    if config.backbone.startswith("vit"):
        options["img_size"] = 28
    model = timm.create_model(config.backbone, num_classes=0, in_chans=1, **options)
    model.load_state_dict(load_file(folder.backbone), strict=True)
    run = load_pretrained(folder.root)
    images = normalised(run, config.data)[:16]
    with torch.no_grad():
        expected = run.energy.backbone.forward_features(images)
        features = model.eval().forward_features(images)
    scale = float(expected.abs().max())
    torch.testing.assert_close(features / scale, expected / scale, rtol=0, atol=1e-5)
    if batch_norms(model):
        torch.testing.assert_close(model(images) / scale, run.energy.backbone(images) / scale,
                                   rtol=0, atol=1e-5)  # fmt: skip


def test_restoration_with_exported_batch_norms_is_that_of_training(tiny, quiet):
    config = tiny(**RESNET)
    folder = pretrain(config, console=quiet)
    watched = json.loads(folder.health.read_text())["history"][-1]["tasks"]["masking"]
    run = load_pretrained(folder.root)
    before = {name: value.clone() for name, value in run.energy.backbone.state_dict().items()}
    exported = load_file(folder.backbone)
    assert any(not torch.allclose(exported[name], before[name]) for name in before)
    run.energy.backbone.load_state_dict(exported)
    held_out = setup.open_images(config).held_out
    loader = evaluation_loader(held_out, (32, 32), 1, 64)
    images = run.statistics.normalize(torch.cat([batch.images for batch in loader]))
    task = config.tasks.masking
    health = watch_task(
        run.energy, task, images, run.statistics, num_steps=1, step_size=1.0, batch_size=8
    )
    for name in ("psnr_restored_db", "psnr_corrupted_db", "psnr_mean_fill_db"):
        assert health.measures[name] == pytest.approx(watched[name], abs=0.01)


@pytest.fixture
def first_state(monkeypatch):
    """The energy's tensors before the first step, once it is taken."""
    state = {}
    original = Stepper.__call__

    def step(self, images, number):
        if not state:
            energy = self.training.module.energy
            state.update({name: value.clone() for name, value in energy.state_dict().items()})
        return original(self, images, number)

    monkeypatch.setattr(Stepper, "__call__", step)
    return state


def test_batch_norm_statistics_stay_while_a_run_trains(tiny, quiet, first_state):
    folder = pretrain(tiny(**RESNET), console=quiet)
    end = load_checkpoint(folder.last_checkpoint)["model"]
    statistics = {name for name in end if name.endswith(("running_mean", "running_var"))}
    assert statistics
    assert all(torch.equal(end[name], first_state[name]) for name in statistics)
    weights = {name for name in end if "conv" in name and name.endswith("weight")}
    assert not any(torch.equal(end[name], first_state[name]) for name in weights)


def test_config_yaml_repeats_the_run_bit_for_bit(tiny, quiet, tmp_path):
    first = pretrain(tiny(pretext="mixture"), console=quiet)
    again = config_from_dict(yaml.safe_load(first.config.read_text()))
    second = pretrain(dataclasses.replace(again, out=tmp_path / "second"), console=quiet)
    left, right = load_file(first.backbone), load_file(second.backbone)
    assert left.keys() == right.keys()
    assert all(torch.equal(left[name], right[name]) for name in left)
    other = pretrain(dataclasses.replace(again, out=tmp_path / "third", seed=1), console=quiet)
    assert any(not torch.equal(left[n], value) for n, value in load_file(other.backbone).items())


def test_sub_folders_are_classes_only_on_request(tmp_path):
    for number in range(12):
        path = tmp_path / f"day {number % 2}" / f"{number}.png"
        path.parent.mkdir(exist_ok=True)
        Image.new("L", (8, 8), 20 * number).save(path)
    assert setup.open_images(PretrainConfig(data=tmp_path)).training.labels is None
    asked = setup.open_images(PretrainConfig(data=tmp_path, watch_labels=True)).training
    assert asked.class_names == ("day 0", "day 1")
    assert len(asked.labels) == len(asked)


def test_what_a_run_leaves(tiny, quiet, make_parquet):
    data = make_parquet(200)
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
    check_health(json.loads(folder.health.read_text()), watched, per_epoch)
    check_metrics(rows(folder), per_epoch)
    names = {path.name for path in folder.previews.iterdir()}
    tasks = ("masking", "sorting", "superresolution", "denoising")
    assert names == {f"step-{step:07d}-{task}.png" for step in watched for task in tasks}
    with Image.open(folder.previews / "step-0000045-sorting.png") as picture:
        assert picture.size == (3 * 112 + 4 * 4, 6 * 112 + 7 * 4)  # corrupted, restored, clean
    log = folder.log.read_text()
    assert "180 images to train, 20 held out" in log
    assert "labels of 10 classes" in log
    assert f"backbone written to {folder.backbone}" in log


def check_facts(facts, data, per_epoch):
    assert facts["command"] == "backfold pretrain of a test"
    assert set(facts["versions"]) == {"python", "backfold", "torch", "timm", "lightning"}
    expected = {
        "backbone": "vit_tiny_patch16_224", "device": "cpu", "precision": "32-true",
        "image_size": [28, 28], "channels": 1, "data": str(data), "training_images": 180,
        "held_out_images": 20, "steps": 45, "total_steps": 45, "epochs": 45 / per_epoch,
        "tasks": ["masking", "sorting", "superresolution", "denoising"],
    }  # fmt: skip
    assert {name: facts[name] for name in expected} == expected
    assert len(facts["mean"]) == len(facts["std"]) == 1
    model = timm.create_model(
        "vit_tiny_patch16_224", num_classes=0, in_chans=1, img_size=28, patch_size=7,
        embed_dim=16, depth=1, num_heads=2,
    )  # fmt: skip
    assert facts["parameters"] == sum(p.numel() for p in model.parameters())
    assert facts["seconds"] > 0
    assert {"started", "hardware"} <= facts.keys()


def check_health(health, watched, per_epoch):
    history = health["history"]
    assert [entry["step"] for entry in history] == watched
    assert [entry["epoch"] for entry in history] == [step / per_epoch for step in watched]
    for entry in history:
        assert 1 <= entry["rank_me"] <= entry["embedding_size"] == 16
        assert 0 <= entry["knn"] <= 100
        tasks = entry["tasks"]
        gains = [row["psnr_restored_db"] - row["psnr_corrupted_db"] for row in tasks.values()]
        assert entry["psnr_gain_db"] == pytest.approx(sum(gains) / 4)
        for name in ("auroc", "energy_gap"):
            mean = sum(row[name] for row in tasks.values()) / 4
            assert entry[name] == pytest.approx(mean)
        assert "patches_placed_right_restored" in tasks["sorting"]
    # The images and their corruption are the same at every look.
    for name in ("masking", "sorting", "superresolution", "denoising"):
        assert len({entry["tasks"][name]["psnr_corrupted_db"] for entry in history}) == 1
        energies = health["energies"][name]
        assert {kind: len(values) for kind, values in energies.items()} == dict.fromkeys(
            ("clean", "corrupted", "restored"), 20
        )
        mean = {kind: sum(values) / 20 for kind, values in energies.items()}
        gap = history[-1]["tasks"][name]["energy_gap"]
        assert mean["corrupted"] - mean["clean"] == pytest.approx(gap, rel=1e-3, abs=1e-4)


def check_metrics(table, per_epoch):
    assert [int(row["step"]) for row in table] == [1, 11, 20, 22, 33, 40, 44, 45]
    for row in table:
        assert float(row["epoch"]) == pytest.approx(int(row["step"]) / per_epoch, rel=1e-4)
        assert 0 <= float(row["data_wait"]) <= 1
        assert float(row["images_per_second"]) > 0
        assert all(math.isfinite(float(value)) for value in row.values())
    seconds = [float(row["seconds"]) for row in table]
    assert seconds == sorted(seconds)
    peak = 0.05 * 8 / 256
    step = 45 - 1
    warmup = round(0.1 * per_epoch)
    expected = peak * (1 + math.cos(math.pi * (step - warmup) / (45 - warmup))) / 2
    assert float(table[-1]["lr"]) == pytest.approx(expected, rel=1e-4)


def test_training_beats_the_beginning_on_held_out_images(tiny, quiet, make_parquet):
    config = tiny(
        data=make_parquet(300), max_steps=70, epochs=100, batch_size=16, held_out=30,
        optimizer=OptimizerSettings(base_lr=0.08, warmup_epochs=0.5), watch_every=3,
    )  # fmt: skip
    folder = pretrain(config, console=quiet)
    gains = [e["psnr_gain_db"] for e in json.loads(folder.health.read_text())["history"]]
    assert gains[-1] > gains[0] + 1
    best = load_checkpoint(folder.best_checkpoint)
    assert best["history"][-1]["psnr_gain_db"] == max(gains)
    assert best["state"]["best_gain_db"] == max(gains)


def non_finite(monkeypatch, at_step, loss, norm):
    """Let the given step end in this loss and norm, with weights to match."""
    original = Stepper.__call__

    def step(self, images, number):
        found = original(self, images, number)
        if number != at_step:
            return found
        with torch.no_grad():
            for parameter in self.training.parameters():
                parameter.fill_(float("nan"))
        return torch.tensor(loss), torch.tensor(norm), found[2]

    monkeypatch.setattr(Stepper, "__call__", step)


@pytest.mark.parametrize(
    ("loss", "norm"), [(math.nan, math.nan), (math.inf, 1.0), (0.5, math.inf), (0.5, math.nan)]
)
@pytest.mark.parametrize("minutes", [0, 10])
def test_a_loss_that_is_not_finite_keeps_the_last_good_checkpoint(
    tiny, quiet, monkeypatch, loss, norm, minutes
):
    non_finite(monkeypatch, at_step=4, loss=loss, norm=norm)
    config = tiny(max_steps=5, checkpoint_minutes=minutes)
    with pytest.raises(UserError) as caught:
        pretrain(config, console=quiet)
    message = str(caught.value)
    assert "\n" not in message
    assert f"the loss is {loss:g} and its gradient's norm {norm:g}" in message
    assert "step 5" in message
    assert "last.ckpt" in message
    assert "base_lr" in message
    run = load_pretrained(config.out)
    assert run.step == (4 if minutes == 0 else 0)
    assert all(torch.isfinite(value).all() for value in run.energy.state_dict().values())


def test_a_learning_rate_far_too_high_stops_in_one_line(tiny, quiet):
    config = tiny(
        optimizer=OptimizerSettings(base_lr=1e30, warmup_epochs=0), max_steps=30, watch_every=0.2
    )
    with pytest.raises(UserError, match=r"the loss is .* lower optimizer\.base_lr \(now 1e\+30\)"):
        pretrain(config, console=quiet)
    run = load_pretrained(config.out)
    assert all(torch.isfinite(value).all() for value in run.energy.state_dict().values())


def test_unreadable_files_are_named_in_the_log(tiny, quiet, tmp_path):
    folder = tmp_path / "images"
    folder.mkdir()
    for number in range(40):
        path = folder / f"{number:02}.png"
        Image.effect_noise((28, 28), 50 + number).save(path)
    broken = [folder / "03.png", folder / "17.png", folder / "31.png"]
    for path in broken:
        path.write_bytes(b"no image")
    run = pretrain(tiny(data=folder, max_steps=10, max_broken_share=0.2), console=quiet)
    skipped = [line for line in run.log.read_text().splitlines() if "skipped: " in line]
    assert len(skipped) == len(broken)
    for path in broken:
        assert sum(str(path) in line and "not an image" in line for line in skipped) == 1


def test_frozen_parameters_do_not_move(tiny, quiet, first_state):
    folder = pretrain(tiny(max_steps=5), console=quiet)
    end = load_checkpoint(folder.last_checkpoint)["model"]
    still = {name for name in end if torch.equal(end[name], first_state[name])}
    assert still == {"backbone.norm.bias"}
    assert "1 parameter(s) get no gradient" in folder.log.read_text()


def test_waiting_for_slow_images_is_warned_of_once(tiny, quiet, monkeypatch):
    original = ParquetSource.read

    def slow(*arguments):
        time.sleep(0.002)
        return original(*arguments)

    monkeypatch.setattr(ParquetSource, "read", slow)
    monkeypatch.setattr(trainer, "LOG_EVERY", 1)
    monkeypatch.setattr(meter, "LONG_WAIT", 0.05)  # the machine may be busy otherwise
    folder = pretrain(tiny(max_steps=45, epochs=100), console=quiet)
    warnings = [line for line in folder.log.read_text().splitlines() if "WARNING" in line]
    (line,) = warnings
    assert "waiting for images takes" in line
    assert "--num-workers (now 0)" in line


@pytest.mark.parametrize(
    ("place", "name", "advice"),
    [
        (setup, "calibrate", "choose a smaller image size"),
        (Stepper, "restore_part", "8 images at once; set --micro-batch 4"),  # in the warm-up
        (Stepper, "__call__", "8 images at once; set --micro-batch 4"),
        (recorder, "watch", "8 images at once; set --micro-batch 4"),
    ],
)
def test_running_out_of_memory_anywhere_is_one_line_of_advice(
    tiny, monkeypatch, tmp_path, capsys, place, name, advice
):
    def exhausted(*_, **__):
        raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB.\nMore lines")

    monkeypatch.setattr(place, name, exhausted)
    settings = tmp_path / "settings.yaml"
    settings.write_text(yaml.safe_dump(config_to_dict(tiny())))
    assert main(["pretrain", f"--config={settings}"]) == 2
    last = capsys.readouterr().err.splitlines()[-1]
    assert "out of memory" in last
    assert advice in last
