"""Embeddings: one vector an image, pooled from one layer of a backbone."""

import inspect
import math
from collections.abc import Iterable
from contextlib import suppress
from dataclasses import dataclass
from typing import Any, Literal, cast, get_args

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from backfold.backbone import ImageSize, as_positions, feature_map
from backfold.errors import UserError
from backfold.restoration import eval_mode

Pooling = Literal["average", "max", "class_token", "grid"]
MOST_LAYERS = 4
GRID, FINE_GRID, LONGEST_FINE = 2, 4, 2048
Layer = tuple[Tensor, Tensor | None]  # (batch, positions, features); the class token, if any


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
    """

    layer: int = -1
    pooling: Pooling = "average"

    def __post_init__(self) -> None:
        if self.layer >= 0:
            raise UserError(f"embedding layer {self.layer} is not negative; give -1 for the last")
        if self.pooling not in get_args(Pooling):
            known = ", ".join(get_args(Pooling))
            raise UserError(f"unknown pooling {self.pooling!r}; choose from {known}")

    def __str__(self) -> str:
        return f"layer {self.layer}, {self.pooling.replace('_', ' ')}"


def embed(backbone: nn.Module, images: Tensor, choice: EmbeddingChoice | None = None) -> Tensor:
    """Embeddings ``(batch, features)`` of normalised images, in float32.

    Layers below the last norm can have features of very uneven scales; nothing is rescaled here.

    Args:
        backbone: a timm model, or for layer -1 any module that `feature_map` takes.
        images: (batch, channels, height, width).
        choice: the layer and the pooling; None takes the last layer's average. What the backbone
            does not have raises a UserError.
    """
    choice, name = choice or EmbeddingChoice(), type(backbone).__name__
    if choice.layer < -1:
        try:
            _, found = _intermediates(backbone, images, -choice.layer)
        except (AssertionError, AttributeError, IndexError) as error:
            raise UserError(
                f"backbone {name} can't give layer {choice.layer}: {error}; choose one nearer to -1"
            ) from error
        positions, token = found[0]
    elif choice.pooling == "class_token" and _has_class_token(backbone):
        positions = token = cast(Any, backbone).forward_features(images)[:, 0]
    else:
        positions, token = feature_map(backbone, images), None
    if choice.pooling != "class_token":
        return _pooled(positions.float(), choice.pooling, (images.shape[2], images.shape[3]))
    if token is None:
        raise UserError(
            f"backbone {name} has no class token in layer {choice.layer}; choose average or max"
        )
    return token.float()


def _has_class_token(backbone: nn.Module) -> bool:
    prefix = getattr(backbone, "num_prefix_tokens", 0)
    return prefix > 0 and getattr(backbone, "cls_token", None) is not None


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
    """Rows and columns of a feature map that has the image's shape, or a UserError."""
    height, width = image_size
    rows = max(1, round(math.sqrt(positions * height / width)))
    columns = positions // rows
    if rows * columns != positions:
        raise UserError(
            f"the backbone's {positions} positions are no grid over {height} x {width} pixels; "
            "give an image size whose sides are multiples of its stride"
        )
    return rows, columns


def _intermediates(backbone: nn.Module, images: Tensor, layers: int) -> tuple[Tensor, list[Layer]]:
    """What timm gives as the last features, and so many last layers, without the last norm."""
    forward = cast(Any, backbone).forward_intermediates
    options: dict[str, Any] = {"indices": layers, "norm": False, "output_fmt": "NCHW"}
    known = inspect.signature(forward).parameters
    with_token = _has_class_token(backbone) and "return_prefix_tokens" in known
    if with_token:
        options["return_prefix_tokens"] = True
    last, found = forward(images, **options)
    pairs = ((each[0], each[1][:, 0]) if with_token else (each, None) for each in found)
    return last, [(features.float().flatten(2).transpose(1, 2), token) for features, token in pairs]


class Embedder:
    """Vectors of all layers and poolings that a backbone has, from one pass over the images.

    ``choices`` has the last `MOST_LAYERS` layers, as far as there are so many, with each pooling.
    What there is is found out on the ``probe``, a few normalised images; the backbone is in eval
    mode.
    """

    @torch.no_grad()
    def __init__(self, backbone: nn.Module, probe: Tensor) -> None:
        self._backbone, self._layers, self._last_is_own = backbone, 0, False
        for layers in range(MOST_LAYERS, 0, -1):
            try:
                last, found = _intermediates(backbone, probe, layers)
            # Each family has its own conditions, and checks them by whatever fails.
            except Exception:
                continue
            if len(found) == layers:
                expected, given = feature_map(backbone, probe), as_positions(backbone, last)
                same = expected.shape == given.shape and torch.allclose(expected, given, atol=1e-4)
                self._layers, self._last_is_own = layers, same
                break
        self.choices = tuple(self(probe))

    @torch.no_grad()
    def __call__(self, images: Tensor) -> dict[EmbeddingChoice, Tensor]:
        """(batch, features) in float32 for each choice."""
        below: list[Layer] = []
        token = positions = None
        if self._layers:
            last, below = _intermediates(self._backbone, images, self._layers)
            token = last[:, 0] if below[-1][1] is not None and last.ndim == 3 else None
            positions = as_positions(self._backbone, last) if self._last_is_own else None
        if positions is None:
            positions = feature_map(self._backbone, images)
        layers = [(positions.float(), token), *below[-2::-1]]
        found, size = {}, (images.shape[2], images.shape[3])
        for depth, (features, class_token) in enumerate(layers, start=1):
            found[EmbeddingChoice(-depth, "average")] = _pooled(features, "average", size)
            found[EmbeddingChoice(-depth, "max")] = _pooled(features, "max", size)
            if class_token is not None:
                found[EmbeddingChoice(-depth, "class_token")] = class_token.float()
            with suppress(UserError):  # they form no grid
                if min(grid_shape(features.shape[1], size)) >= GRID:
                    found[EmbeddingChoice(-depth, "grid")] = _pooled(features, "grid", size)
        return found


def embed_batches(
    backbone: nn.Module,
    batches: Iterable[Tensor],
    choice: EmbeddingChoice | None = None,
    device: torch.device | str = "cpu",
) -> Tensor:
    """Embeddings ``(images, features)`` of all batches, float32 on the CPU; see `embed`.

    The backbone runs on its ``device`` in eval mode, without gradients, and gets the mode of each
    of its modules back. No images raise a UserError.
    """
    with eval_mode(backbone), torch.inference_mode():
        parts = [
            embed(backbone, batch.to(device, non_blocking=True), choice).float().cpu()
            for batch in batches
        ]
    if not parts:
        raise UserError("there are no images to embed: 0 batches; give a data set with images")
    return torch.cat(parts)
