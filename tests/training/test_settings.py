import dataclasses
from pathlib import Path

import pytest
import torch
import yaml

from backfold.data.augmentation import Augmentation
from backfold.embedding import EmbeddingChoice
from backfold.errors import UserError
from backfold.pretext import (
    Colorization,
    Denoising,
    ExcerptSettings,
    Masking,
    Mixture,
    Sorting,
    SuperResolution,
)
from backfold.training.config import (
    PretrainConfig,
    TaskSettings,
    build_tasks,
    combine_tasks,
    parse_image_size,
    task_names,
)
from backfold.training.config_file import config_from_dict, config_to_dict
from backfold.training.optimizer import OptimizerSettings

UNUSUAL = PretrainConfig(
    data="some/images",
    out=Path("there"),
    backbone="resnet18",
    backbone_options={"act_layer": "gelu", "deep": {"list": [1, 2]}},
    image_size="96x128",
    channels=3,
    pretext="mixture",
    tasks=TaskSettings(
        masking=Masking(0.3, 8, "noise", True),
        sorting=Sorting(8, 0.25),
        superresolution=SuperResolution(1.5, 6.0),
        denoising=Denoising(0.2, 0.3, 3),
        colorization=Colorization(0.2, 0.3),
        excerpt=ExcerptSettings(0.5, 32),
        mixture={"masking": 2.0, "sorting": 0.5, "identity": 1.0},
    ),
    num_steps=3,
    step_size=0.5,
    epochs=2.5,
    batch_size=48,
    micro_batch=16,
    compile=True,
    derivative="finite-difference",
    prefetch=3,
    optimizer=OptimizerSettings(1e-4, 0.1, (0.5, 0.6), 1.5, 0.2, 0.0),
    augmentation=Augmentation(False, (0.4, 0.9), False),
    precision="bf16-mixed",
    accelerator="cpu",
    devices=2,
    num_workers=1,
    seed=9,
    held_out=3,
    watch_every=0.25,
    watch_labels=True,
    loggers=["mlflow"],
    checkpoint_minutes=0.0,
    max_steps=17,
    keep_checkpoints=5,
    max_pixels=1000,
    stream_images=12,
    num_nodes=2,
    shard_optimizer=True,
    init="weights.safetensors",
    max_broken_share=0.5,
    embedding=EmbeddingChoice(-2, "max"),
)
# Neither finite differences nor several steps train plausibility.
JUDGED = dataclasses.replace(UNUSUAL, derivative="exact", num_steps=1, plausibility_weight=0.5)


def test_the_unusual_settings_leave_no_default():
    usual = PretrainConfig()
    for field in dataclasses.fields(usual):
        given = {repr(getattr(config, field.name)) for config in (UNUSUAL, JUDGED)}
        assert given - {repr(getattr(usual, field.name))}, field.name


@pytest.mark.parametrize(
    "config", [PretrainConfig(), UNUSUAL, JUDGED], ids=["defaults", "unusual", "judged"]
)
def test_settings_survive_yaml_and_checkpoints(config, tmp_path):
    plain = config_to_dict(config)
    assert config_from_dict(yaml.safe_load(yaml.safe_dump(plain))) == config
    torch.save(plain, tmp_path / "a.pt")
    assert config_from_dict(torch.load(tmp_path / "a.pt", weights_only=True)) == config


@pytest.mark.parametrize(
    ("values", "named"),
    [
        ({"batch_sise": 3}, "batch_sise"),
        ({"optimizer": {"base_lrr": 3}}, "base_lrr"),
        ({"batch_size": "many"}, "batch_size"),
        ({"tasks": {"masking": {"mask_ratio": "most"}}}, "mask_ratio"),
        ({"tasks": {"masking": {"mask_ratio": 1.5}}}, "mask_ratio is 1.5"),
        ({"augmentation": {"crop_scale": [0.5]}}, "crop_scale"),
    ],
)
def test_bad_values_are_named_in_one_line(values, named):
    with pytest.raises(UserError) as caught:
        config_from_dict(values)
    assert named in str(caught.value)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"num_steps": 0}, "num_steps is 0"),
        ({"step_size": 0.0}, "step_size is 0"),
        ({"batch_size": -8}, "batch_size is -8"),
        ({"micro_batch": 0}, "micro_batch is 0"),
        ({"epochs": 0}, "epochs is 0"),
        ({"epochs": float("inf")}, "epochs is inf"),
        ({"epochs": float("nan")}, "epochs is nan"),
        ({"watch_every": 0.0}, "watch_every is 0"),
        ({"held_out": 0}, "held_out is 0"),
        ({"max_steps": 0}, "max_steps is 0"),
        ({"seed": -1}, "seed is -1"),
        ({"pretext": "maskin"}, "unknown pretext task 'maskin'; nearest: masking"),
        ({"tasks": TaskSettings(mixture={"sortin": 1})}, "'sortin'; nearest: sorting"),
        ({"tasks": TaskSettings(mixture={"sorting": 0.0})}, "not all 0"),
        ({"tasks": TaskSettings(mixture={"sorting": 1, "masking": -1})}, "0 or more"),
        ({"image_size": "8x8x8"}, "neither N nor HxW"),
    ],
)
def test_settings_out_of_range_are_refused(changes, message):
    with pytest.raises(UserError, match=message):
        PretrainConfig(**changes)


@pytest.mark.parametrize(
    "changes", [{"base_lr": 0.0}, {"weight_decay": -1.0}, {"warmup_epochs": -1.0}]
)
def test_optimizer_settings_out_of_range_are_refused(changes):
    with pytest.raises(UserError, match=next(iter(changes))):
        OptimizerSettings(**changes)


@pytest.mark.parametrize(
    ("given", "size"),
    [(None, None), (224, (224, 224)), ("96", (96, 96)), ("96x128", (96, 128)), ("8X9", (8, 9))],
)
def test_image_sizes(given, size):
    assert parse_image_size(given) == size


@pytest.mark.parametrize("given", ["", "x", "8x", "x8", "0", "0x8", "-8", "8.5", "8x8x8", "big"])
def test_malformed_image_sizes(given):
    with pytest.raises(UserError, match="neither N nor HxW"):
        parse_image_size(given)


def mixture(**weights):
    return PretrainConfig(pretext="mixture", tasks=TaskSettings(mixture=weights))


def test_which_tasks_a_pretext_names():
    every = ("masking", "sorting", "superresolution", "denoising", "colorization")
    assert task_names(PretrainConfig(pretext="denoising")) == ("denoising",)
    assert task_names(mixture()) == every
    assert task_names(mixture(denoising=1, masking=3, sorting=0)) == ("masking", "denoising")


def test_grey_images_have_no_colorization():
    assert "colorization" in build_tasks(mixture(), channels=3)
    assert list(build_tasks(mixture(), channels=1)) == [
        "masking", "sorting", "superresolution", "denoising",
    ]  # fmt: skip
    for config in (PretrainConfig(pretext="colorization"), mixture(colorization=1, masking=1)):
        with pytest.raises(UserError, match="colorization needs more than 1 channel"):
            build_tasks(config, channels=1)


def test_the_mixture_has_the_weights_asked_for():
    config = mixture(denoising=1, masking=3)
    combined = combine_tasks(config, build_tasks(config, 3))
    assert combined == Mixture((config.tasks.masking, config.tasks.denoising), (3, 1))
    config = mixture()
    combined = combine_tasks(config, build_tasks(config, 1))
    assert isinstance(combined, Mixture)
    assert combined.weights == (1.0,) * 4
    only = PretrainConfig(pretext="sorting")
    assert combine_tasks(only, build_tasks(only, 1)) is only.tasks.sorting
