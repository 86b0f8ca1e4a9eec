"""Embeddings of several layers and poolings in one pass: as `backfold.embedding.embed`'s."""

from collections.abc import Sequence
from typing import Any, cast

import torch
from torch import Tensor, nn

from backfold.backbone import as_positions
from backfold.data.statistics import ChannelStatistics
from backfold.embedding import EmbeddingChoice
from backfold.restoration import eval_mode

LAYERS = (-1, -2, -3)
BATCH = 500


def embed_choices(backbone: nn.Module, images: Tensor) -> dict[EmbeddingChoice, Tensor]:
    """(batch, features) in float32 for every layer of `LAYERS` and every pooling that there is.

    Args:
        backbone: a timm model with ``forward_intermediates``, in eval mode.
        images: normalised, (batch, channels, height, width).
    """
    model = cast(Any, backbone)
    has_token = getattr(model, "cls_token", None) is not None
    options = {"return_prefix_tokens": True} if has_token else {}
    last, below = model.forward_intermediates(
        images, indices=list(LAYERS[:0:-1]), norm=False, output_fmt="NCHW", **options
    )
    found: dict[EmbeddingChoice, Tensor] = {}
    _pool(found, -1, as_positions(backbone, last), last[:, 0] if has_token else None)
    for layer, output in zip(LAYERS[1:], reversed(below), strict=True):
        features, prefix = output if has_token else (output, None)
        positions = features.flatten(2).transpose(1, 2)
        _pool(found, layer, positions, None if prefix is None else prefix[:, 0])
    return found


def _pool(
    found: dict[EmbeddingChoice, Tensor], layer: int, positions: Tensor, token: Tensor | None
) -> None:
    positions = positions.float()
    found[EmbeddingChoice(layer, "average")] = positions.mean(dim=1)
    found[EmbeddingChoice(layer, "max")] = positions.amax(dim=1)
    if token is not None:
        found[EmbeddingChoice(layer, "class_token")] = token.float()


def embed_all(
    backbone: nn.Module,
    images: Tensor,
    statistics: ChannelStatistics,
    device: torch.device,
    precision: str,
    only: Sequence[EmbeddingChoice] = (),
) -> dict[EmbeddingChoice, Tensor]:
    """`embed_choices` of all images, on the CPU.

    Args:
        backbone: on the device.
        images: uint8, (images, channels, height, width).
        statistics: normalise them.
        device: where to compute.
        precision: "32-true" or "bf16-mixed".
        only: keep these; none keeps all.
    """
    parts = []
    half = torch.autocast(device.type, torch.bfloat16, enabled=precision == "bf16-mixed")
    with eval_mode(backbone), torch.inference_mode(), half:
        for batch in images.split(BATCH):
            found = embed_choices(backbone, statistics.normalize(batch.to(device)))
            parts.append({choice: found[choice].cpu() for choice in only or found})
    return {choice: torch.cat([part[choice] for part in parts]) for choice in parts[0]}
