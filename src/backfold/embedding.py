"""Embeddings: one vector an image, pooled from one layer of a backbone."""

import inspect
from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any, Literal, cast

import torch
from torch import Tensor, nn

from backfold.backbone import feature_map
from backfold.errors import UserError
from backfold.restoration import eval_mode

Pooling = Literal["average", "max", "class_token"]


@dataclass(frozen=True)
class EmbeddingChoice:
    """Which layer of the backbone gives the embedding, and how it is pooled.

    Args:
        layer: -1 for the last features, after the last norm; -2 for the output of the block below
            it, -3 for the next. What counts as a block (a stage, in convolutional and hierarchical
            backbones) is what timm's ``forward_intermediates`` lists.
        pooling: "average" or "max" over the positions, or "class_token" in backbones that have one.

    Raises:
        UserError: a layer that is not negative, or an unknown pooling.
    """

    layer: int = -1
    pooling: Pooling = "average"

    def __post_init__(self) -> None:
        if self.layer >= 0:
            raise UserError(
                f"embedding layer {self.layer} is not negative; layers are counted from the end, "
                "give -1 for the last"
            )
        if self.pooling not in ("average", "max", "class_token"):
            raise UserError(
                f"unknown pooling {self.pooling!r}; choose from average, max, class_token"
            )


def embed(backbone: nn.Module, images: Tensor, choice: EmbeddingChoice | None = None) -> Tensor:
    """Embeddings ``(batch, features)`` of normalised images, in float32.

    Layers below the last norm can have features of very uneven scales; nothing is rescaled here.

    Args:
        backbone: a timm model, or for layer -1 any module that `feature_map` takes.
        images: (batch, channels, height, width).
        choice: the layer and the pooling; None takes the last layer's average.

    Raises:
        UserError: a layer or a class token that the backbone does not have.
    """
    choice = choice or EmbeddingChoice()
    if choice.pooling == "class_token":
        return _class_token(backbone, images, choice.layer)
    positions = _positions(backbone, images, choice.layer)
    return positions.mean(dim=1) if choice.pooling == "average" else positions.amax(dim=1)


def embed_batches(
    backbone: nn.Module,
    batches: Iterable[Tensor],
    choice: EmbeddingChoice | None = None,
    device: torch.device | str = "cpu",
) -> Tensor:
    """Embeddings ``(images, features)`` of all batches, float32 on the CPU.

    The backbone runs in eval mode without gradients and gets the mode of each of its modules back.

    Args:
        backbone: as for `embed`; it must be on ``device`` already.
        batches: normalised images, (batch, channels, height, width) each.
        choice: as for `embed`.
        device: where the batches are sent.

    Raises:
        UserError: no images, or as `embed`.
    """
    with eval_mode(backbone), torch.inference_mode():
        parts = [
            embed(backbone, batch.to(device, non_blocking=True), choice).float().cpu()
            for batch in batches
        ]
    if not parts:
        raise UserError("there are no images to embed: 0 batches; give a data set with images")
    return torch.cat(parts)


def _positions(backbone: nn.Module, images: Tensor, layer: int) -> Tensor:
    """Features of a layer as (batch, positions, features), in float32."""
    if layer == -1:
        return feature_map(backbone, images).float()
    features, _ = _intermediate(backbone, images, layer)
    return features.float().flatten(2).transpose(1, 2)


def _class_token(backbone: nn.Module, images: Tensor, layer: int) -> Tensor:
    """The class token of a layer as (batch, features), in float32."""
    num_prefix_tokens = getattr(backbone, "num_prefix_tokens", 0)
    if not num_prefix_tokens or getattr(backbone, "cls_token", None) is None:
        raise UserError(
            f"backbone {type(backbone).__name__} has no class token for pooling 'class_token'; "
            "choose average or max"
        )
    if layer == -1:
        tokens: Tensor = cast(Any, backbone).forward_features(images)
    else:
        _, tokens = _intermediate(backbone, images, layer, prefix_tokens=True)
    return tokens[:, 0].float()


def _intermediate(
    backbone: nn.Module, images: Tensor, layer: int, prefix_tokens: bool = False
) -> tuple[Tensor, Tensor]:
    """A layer's features, without the last norm, and its prefix tokens (none unless asked for).

    Shapes: (batch, features, height, width) and (batch, tokens, features).
    """
    name = type(backbone).__name__
    forward = getattr(backbone, "forward_intermediates", None)
    options = {"return_prefix_tokens": True} if prefix_tokens else {}
    if forward is None or not options.keys() <= inspect.signature(forward).parameters.keys():
        wanted = "class token" if prefix_tokens else "features"
        raise UserError(
            f"backbone {name} has no way to give the {wanted} of layer {layer}; use layer -1"
        )
    try:
        (layer_output,) = forward(
            images,
            indices=[layer],
            norm=False,
            intermediates_only=True,
            output_fmt="NCHW",
            **options,
        )
    except (AssertionError, IndexError) as error:
        raise UserError(
            f"backbone {name} can't give layer {layer}: {error}; choose a layer nearer to -1"
        ) from error
    return layer_output if prefix_tokens else (layer_output, images.new_empty(0))
