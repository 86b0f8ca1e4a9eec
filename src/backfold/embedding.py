"""Embeddings: one vector an image, pooled from one layer of a backbone."""

import inspect
import math
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Any, Literal, cast

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from backfold.backbone import ImageSize, as_positions, feature_map
from backfold.errors import UserError
from backfold.restoration import eval_mode

Pooling = Literal["average", "max", "class_token", "grid"]
POOLINGS: tuple[Pooling, ...] = ("average", "max", "class_token", "grid")
MOST_LAYERS = 4
GRID, FINE_GRID, LONGEST_FINE = 2, 4, 2048


@dataclass(frozen=True)
class EmbeddingChoice:
    """Which layer of the backbone gives the embedding, and how it is pooled.

    Args:
        layer: -1 for the last features, after the last norm; -2 for the output of the block below
            it, -3 for the next. What counts as a block (a stage, in convolutional and hierarchical
            backbones) is what timm's ``forward_intermediates`` lists.
        pooling: "average" or "max" over the positions, "grid" for the averages over each of the
            image's four quarters, or of its sixteen sixteenths where the vector stays within 2048
            numbers, or "class_token" in backbones that have one.

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
        if self.pooling not in POOLINGS:
            raise UserError(f"unknown pooling {self.pooling!r}; choose from {', '.join(POOLINGS)}")

    def __str__(self) -> str:
        return f"layer {self.layer}, {self.pooling.replace('_', ' ')}"


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
    return _pooled(positions, choice.pooling, (images.shape[2], images.shape[3]))


def _pooled(positions: Tensor, pooling: Pooling, image_size: ImageSize) -> Tensor:
    """(batch, positions, features) -> (batch, pooled features)."""
    if pooling == "average":
        return positions.mean(dim=1)
    if pooling == "max":
        return positions.amax(dim=1)
    rows, columns = grid_shape(positions.shape[1], image_size)
    grid = positions.transpose(1, 2).unflatten(2, (rows, columns))
    fine = FINE_GRID**2 * positions.shape[2] <= LONGEST_FINE and min(rows, columns) >= FINE_GRID
    return F.adaptive_avg_pool2d(grid, FINE_GRID if fine else GRID).flatten(1)


def grid_shape(positions: int, image_size: ImageSize) -> tuple[int, int]:
    """Rows and columns of a feature map that has the image's shape.

    Raises:
        UserError: no whole numbers of them make up the positions.
    """
    height, width = image_size
    rows = max(1, round(math.sqrt(positions * height / width)))
    columns = positions // rows
    if rows * columns != positions:
        raise UserError(
            f"the backbone's {positions} positions are no grid over {height} x {width} pixels; "
            "give an image size whose sides are multiples of its stride"
        )
    return rows, columns


class Embedder:
    """Vectors of all layers and poolings that a backbone has, from one pass over the images.

    Args:
        backbone: a timm model, or any module that `feature_map` takes, in eval mode.
        probe: a few normalised images, (batch, channels, height, width), on which it is found out
            what there is.

    Attributes:
        choices: the last `MOST_LAYERS` layers, as far as there are so many, with each pooling.
    """

    def __init__(self, backbone: nn.Module, probe: Tensor) -> None:
        self._backbone = backbone
        self._layers, self._last_is_own = self._look(probe)
        self.choices = tuple(self(probe))

    @torch.no_grad()
    def __call__(self, images: Tensor) -> dict[EmbeddingChoice, Tensor]:
        """(batch, features) in float32 for each choice."""
        if not self._layers:
            return self._pool({-1: (feature_map(self._backbone, images), None)}, images)
        last, below = self._forward(images, self._layers)
        token = last[:, 0] if self._has_token and last.ndim == 3 else None
        positions = (
            as_positions(self._backbone, last)
            if self._last_is_own
            else feature_map(self._backbone, images)
        )
        outputs: dict[int, tuple[Tensor, Tensor | None]] = {-1: (positions, token)}
        for depth, output in enumerate(reversed(below[:-1]), start=2):
            features, prefix = output if self._has_token else (output, None)
            token = None if prefix is None else prefix[:, 0]
            outputs[-depth] = (features.flatten(2).transpose(1, 2), token)
        return self._pool(outputs, images)

    @property
    def _has_token(self) -> bool:
        if getattr(self._backbone, "cls_token", None) is None:
            return False
        forward = getattr(self._backbone, "forward_intermediates", None)
        return "return_prefix_tokens" in inspect.signature(forward).parameters if forward else False

    def _forward(self, images: Tensor, layers: int) -> tuple[Tensor, list[Any]]:
        options = {"return_prefix_tokens": True} if self._has_token else {}
        last, below = cast(Any, self._backbone).forward_intermediates(
            images, indices=layers, norm=False, output_fmt="NCHW", **options
        )
        return last, list(below)

    @torch.no_grad()
    def _look(self, probe: Tensor) -> tuple[int, bool]:
        """How many layers there are, 0 if none can be had, and whether the last comes with them."""
        if not hasattr(self._backbone, "forward_intermediates"):
            return 0, True
        for layers in range(MOST_LAYERS, 0, -1):
            try:
                last, below = self._forward(probe, layers)
            # Each family has its own conditions, and checks them by whatever fails.
            except Exception:
                continue
            if len(below) == layers:
                expected, given = (
                    feature_map(self._backbone, probe),
                    as_positions(self._backbone, last),
                )
                same = expected.shape == given.shape and torch.allclose(expected, given, atol=1e-4)
                return layers, same
        return 0, True

    def _pool(
        self, outputs: Mapping[int, tuple[Tensor, Tensor | None]], images: Tensor
    ) -> dict[EmbeddingChoice, Tensor]:
        found, size = {}, (images.shape[2], images.shape[3])
        for layer, (features, token) in outputs.items():
            positions = features.float()
            found[EmbeddingChoice(layer, "average")] = _pooled(positions, "average", size)
            found[EmbeddingChoice(layer, "max")] = _pooled(positions, "max", size)
            if token is not None:
                found[EmbeddingChoice(layer, "class_token")] = token.float()
            if self._is_grid(positions.shape[1], size):
                found[EmbeddingChoice(layer, "grid")] = _pooled(positions, "grid", size)
        return found

    @staticmethod
    def _is_grid(positions: int, size: ImageSize) -> bool:
        try:
            return min(grid_shape(positions, size)) >= GRID
        except UserError:
            return False


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
