"""Weights with a config that timm and transformers build the model from."""

import logging
from dataclasses import dataclass
from itertools import product
from pathlib import Path
from typing import Any

import timm
import torch
from safetensors.torch import save
from timm.models import split_model_name_tag
from torch import Tensor, nn

from backfold.backbone import feature_map
from backfold.embedding import embed
from backfold.errors import UserError
from backfold.files import write_atomically, write_json
from backfold.training.run import Pretrained

LOGGER = logging.getLogger("backfold")
WEIGHTS = "model.safetensors"
CONFIG = "config.json"
TOLERANCE = 1e-5
# How models are told to give the mean over positions, the embedding, as their output. Vision
# transformers with a mean move their last norm behind it unless they are told not to.
POOLINGS: tuple[dict[str, Any], ...] = (
    {"global_pool": "avg"},
    {"global_pool": "avg", "fc_norm": False},
    {},
)
CONFIG_KEYS = ("first_conv", "classifier", "fixed_input_size", "pool_size")


def architecture(run: Pretrained) -> str:
    """The model's name in timm, without the name of somebody's weights."""
    return str(split_model_name_tag(run.config.backbone)[0])


@dataclass(frozen=True)
class Rebuilt:
    """A backbone as timm alone builds it.

    Args:
        model: timm's own layers with the backbone's weights, in eval mode.
        arguments: of `timm.create_model`, besides the name and ``num_classes=0``.
        pooled: whether the model's output is the embedding, the last layer's average.
    """

    model: nn.Module
    arguments: dict[str, Any]
    pooled: bool


@torch.no_grad()
def rebuild(run: Pretrained, backbone: nn.Module) -> Rebuilt:
    """Build the backbone anew with arguments that anybody can give timm, and compare.

    Raises:
        UserError: timm can't build it; only with another timm than the run's.
    """
    # Two images of noise: what differs anywhere differs on them.
    generator = torch.Generator().manual_seed(0)
    images = torch.randn(2, run.channels, *run.image_size, generator=generator)
    expected, features = embed(backbone, images), feature_map(backbone, images)
    sizes: tuple[dict[str, Any], ...] = ({"img_size": list(run.image_size)}, {})
    fallback = None
    for pooling, size in product(POOLINGS, sizes):
        options = run.config.backbone_options
        arguments = {"in_chans": run.channels, **options, **size, **pooling}
        try:
            model: nn.Module = timm.create_model(architecture(run), num_classes=0, **arguments)
            model.load_state_dict(backbone.state_dict())
        except (TypeError, RuntimeError, AssertionError, ValueError):
            continue
        model.eval()
        if not _close(feature_map(model, images), features):
            continue
        if _close(model(images), expected):
            return Rebuilt(model, arguments, pooled=True)
        if not pooling:
            fallback = fallback or Rebuilt(model, arguments, pooled=False)
    if fallback is None:
        raise UserError(
            f"timm {timm.__version__} can't build {run.config.backbone!r} with these weights; use "
            "the versions in the run's run.json"
        )
    return fallback


def _close(given: object, expected: Tensor) -> bool:
    return (
        isinstance(given, Tensor)
        and given.shape == expected.shape
        and torch.allclose(given, expected, rtol=TOLERANCE, atol=TOLERANCE)
    )


def write_timm_folder(folder: Path, run: Pretrained, rebuilt: Rebuilt, wrapped: bool) -> None:
    """Write weights and config; ``wrapped`` names transformers' wrapper as the model's type."""
    model, arguments = rebuilt.model, rebuilt.arguments
    tensors = {name: t.detach().contiguous().clone() for name, t in model.state_dict().items()}
    write_atomically(folder / WEIGHTS, save(tensors, metadata={"format": "pt"}))
    known = dict(getattr(model, "pretrained_cfg", None) or {})
    config = {
        "architecture": architecture(run),
        "num_classes": 0,
        "num_features": int(getattr(model, "num_features", 0)),
        "model_args": arguments,
        "pretrained_cfg": {
            **{key: known[key] for key in CONFIG_KEYS if key in known},
            "input_size": [run.channels, *run.image_size],
            "mean": list(run.statistics.mean),
            "std": list(run.statistics.std),
            "interpolation": "bilinear",
            "crop_pct": 1.0,
            "crop_mode": "center",
            "num_classes": 0,
            "tag": "backfold",
            "custom_load": False,
        },
    }
    if "global_pool" in arguments:
        config["global_pool"] = arguments["global_pool"]
    write_json(folder / CONFIG, {"model_type": "timm_wrapper", **config} if wrapped else config)
