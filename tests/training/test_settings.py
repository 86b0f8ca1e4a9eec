from pathlib import Path

import pytest
import torch
import yaml

from backfold.data.augmentation import Augmentation
from backfold.embedding import EmbeddingChoice
from backfold.errors import UserError
from backfold.pretext import Denoising, ExcerptSettings, Identity, Masking, Mixture, Sorting
from backfold.training.config import (
    OptimizerSettings,
    PretrainConfig,
    TaskSettings,
    build_tasks,
    combine_tasks,
    config_from_dict,
    config_to_dict,
    doubtful_settings,
    parse_image_size,
)

UNUSUAL = PretrainConfig(
    out=Path("there"),
    backbone_options={"act_layer": "gelu", "deep": {"list": [1, 2]}},
    image_size="96x128",
    tasks=TaskSettings(
        masking=Masking(0.3, 8, "noise", True),
        excerpt=ExcerptSettings(0.5, 32),
        mixture={"masking": 2.0, "sorting": 0.5, "identity": 1.0},
    ),
    micro_batch=16,
    compile=True,
    optimizer=OptimizerSettings(1e-4, 0.1, (0.5, 0.6), 1.5, 0.2, 0.0),
    augmentation=Augmentation(False, (0.4, 0.9), False),
    devices=2,
    num_workers=1,
    watch_labels=True,
    loggers=["mlflow"],
    embedding=EmbeddingChoice(-2, "max"),
)

SORTING, SPARSE = Sorting(sorting_patch_size=8), Masking(hidden_share=0.5)
ABOVE_0 = (
    "num_steps", "hidden_blocks", "step_size", "batch_size", "epochs", "watch_every", "held_out",
    "max_steps", "micro_batch", "prefetch", "keep_checkpoints", "max_pixels", "stream_images",
    "num_nodes",
)  # fmt: skip


@pytest.mark.parametrize("config", [PretrainConfig(), UNUSUAL], ids=["defaults", "unusual"])
def test_settings_survive_yaml_and_checkpoints(config, tmp_path):
    plain = config_to_dict(config)
    assert config_from_dict(yaml.safe_load(yaml.safe_dump(plain))) == config
    torch.save(plain, tmp_path / "a.pt")
    assert config_from_dict(torch.load(tmp_path / "a.pt", weights_only=True)) == config


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"batch_sise": 3}, "batch_sise"),
        ({"batch_size": "many"}, "batch_size"),
        ({"tasks": {"masking": {"mask_ratio": 1.5}}}, "mask_ratio is 1.5"),
        ({"augmentation": {"crop_scale": [0.5]}}, "crop_scale"),
        ({"optimizer": {"base_lr": 0.0}}, "base_lr"),
        ({"optimizer": {"betas": [0.9, 1.0]}}, "betas is"),
        ({"optimizer": {"final_lr_share": -3.0}}, "final_lr_share is -3"),
        ({"optimizer": {"warmup_epochs": float("nan")}}, "warmup_epochs is nan"),
        ({"num_workers": -1}, "num_workers is -1"),
        ({"max_broken_share": -1.0}, "max_broken_share is -1"),
        *(({name: 0}, f"^{name} is 0; give ") for name in ABOVE_0),
        ({"epochs": float("inf")}, "epochs is inf"),
        ({"seed": -1}, "seed is -1"),
        ({"invariance": -1.0}, "invariance is -1; give 0 or more"),
        (
            {"frames": 2, "augmentation": {"color_jitter": 0.4}},
            "set augmentation.color_jitter to 0",
        ),
        ({"tasks": {"masking": {"normalised_share": float("nan")}}}, "normalised_share is nan"),
        ({"tasks": {"mixture": {"sorting": 0.0}}}, "not all 0"),
        ({"tasks": {"mixture": {"sorting": 1, "masking": -1}}}, "0 or more"),
    ],
)
def test_bad_values_are_named_in_one_line(values, message):
    with pytest.raises(UserError, match=message) as caught:
        config_from_dict(values)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        ({"pretext": "denoising"}, "worse than untrained ones"),
        ({"pretext": "denoising", "tasks": TaskSettings(denoising=Denoising(octaves=4))}, None),
        ({"energy": "dense", "hidden_blocks": 2}, "hidden_blocks has no effect on the dense"),
        (
            {"energy": "dense", "pretext": "sorting", "tasks": TaskSettings(SPARSE)},
            "hidden_share has",
        ),
        ({"pretext": "mixture"}, None),
        ({"tasks": TaskSettings(mixture={"sorting": 1.0})}, "tasks.mixture has no effect without"),
        ({"invariance": 0.1}, "set augmentation.color_jitter to 0.4"),
        ({"invariance": 0.1, "augmentation": Augmentation(color_jitter=0.4)}, None),
        (
            {"pretext": "bands", "augmentation": Augmentation(color_jitter=0.4)},
            "all colour from 20%",
        ),
        ({"contrast_epochs": 2.0}, "contrast_epochs has no effect"),
        ({"tasks": TaskSettings(excerpt=ExcerptSettings(1.0, 8))}, "excerpt_patch_size has no"),
        ({"num_workers": 0, "prefetch": 2}, "prefetch has no effect without worker"),
        (
            {"energy": "conditional", "pretext": "sorting", "tasks": TaskSettings(sorting=SORTING)},
            "tasks.sorting has no effect",
        ),
    ],
)
def test_what_is_said_of_doubtful_settings(changes, said):
    lines = doubtful_settings(PretrainConfig(**changes))
    assert len(lines) == (said is not None)
    assert all(said in line for line in lines)


def test_image_sizes():
    given = {None: None, 224: (224, 224), "96": (96, 96), "96x128": (96, 128), "8X9": (8, 9)}
    assert {text: parse_image_size(text) for text in given} == given
    for text in ("", "8x", "0", "-8", "8.5", "8x8x8"):
        with pytest.raises(UserError, match="neither N nor HxW"):
            parse_image_size(text)


def mixture(**weights):
    return PretrainConfig(pretext="mixture", tasks=TaskSettings(mixture=weights))


def test_a_mixture_for_grey_images_may_not_name_colorization():
    with pytest.raises(UserError, match="colorization needs more than 1 channel"):
        build_tasks(mixture(colorization=1, masking=1), channels=1)


def test_the_mixture_has_the_weights_asked_for():
    config = mixture(denoising=1, masking=3, identity=2)
    combined = combine_tasks(config, build_tasks(config, 3))
    tasks = config.tasks.masking, config.tasks.denoising, Identity()
    assert combined == Mixture(tasks, (3, 1, 2))
    only = PretrainConfig(pretext="sorting")
    assert combine_tasks(only, build_tasks(only, 1)) is only.tasks.sorting
