"""Sparse runs of token backbones: only some patches of each image go through the blocks.

The others are removed, not hidden: no token attends to them, and no energy is summed over them.
Patch embedding and positions come first, so a patch keeps its place in the image.
"""

from typing import Any, NamedTuple

import torch
from timm.layers import PatchEmbed, apply_keep_indices_nlc
from timm.models import eva, vision_transformer
from timm.models.eva import Eva
from timm.models.vision_transformer import VisionTransformer
from torch import Tensor, nn
from torch.nn import functional as F

from backfold.backbone import ImageSize
from backfold.errors import UserError
from backfold.pretext.corruption import RunningSquares

FAMILIES = (VisionTransformer, Eva)  # a tuple: older compilers stumble over a union


def check_sparse(backbone: nn.Module) -> None:
    """Raise UserError unless `sparse_feature_map` is exact for this backbone.

    It is for timm's vision transformers whose blocks treat tokens as a set, with one token for each
    patch and positions that are added to tokens or rotate them.
    """
    reason = _obstacle(backbone)
    if reason:
        raise UserError(
            "running on some patches alone (the conditional energy, hidden_share or excerpt.share "
            f"below 1) does not work with {type(backbone).__name__}: {reason}; take the dense "
            "energy and shares of 1, or a backbone of timm's ViT or EVA family as it comes"
        )


def token_size(backbone: nn.Module) -> ImageSize:
    """(height, width) in pixels of the patch behind each token.

    Raises:
        UserError: as `check_sparse`.
    """
    check_sparse(backbone)
    assert isinstance(backbone, FAMILIES)
    height, width = backbone.patch_embed.patch_size
    return int(height), int(width)


def _obstacle(backbone: nn.Module) -> str | None:
    if not isinstance(backbone, FAMILIES):
        return "it is neither timm's VisionTransformer nor its Eva"
    own = Eva if isinstance(backbone, Eva) else VisionTransformer
    if type(backbone).forward_features is not own.forward_features:
        return "it changes timm's forward pass"
    if type(backbone.patch_embed).forward is not PatchEmbed.forward:
        return "its tokens do not come from one patch each"
    # Others may look at a token's neighbours, or have biases by place.
    known = (vision_transformer.__name__, eva.__name__)
    if any(type(block).__module__ not in known for block in backbone.blocks):
        return "its blocks are not timm's own"
    if not isinstance(backbone.patch_drop, (nn.Identity, type(None))):
        return "its patch_drop_rate drops tokens too"
    return None


class RunningTokens(NamedTuple):
    """The patch tokens that run, int64, (batch, count); see `RunningSquares` for the others."""

    tokens: Tensor | None = None  # None runs all
    visible: Tensor | None = None
    normalised: Tensor | None = None  # bool, as tokens


def running_tokens(
    running: RunningSquares | None, backbone: nn.Module, image_size: ImageSize
) -> RunningTokens:
    """The patch tokens inside the squares; those of one square follow each other.

    Args:
        running: the squares; None runs all tokens.
        backbone: one that `check_sparse` accepts.
        image_size: (height, width) of the images in pixels, multiples of the square's side.

    Raises:
        UserError: as `check_sparse`, or a square that is not made of whole patches.
    """
    if running is None:
        return RunningTokens()
    size, patch = running.square_size, token_size(backbone)
    if size % patch[0] or size % patch[1]:
        raise UserError(
            f"mask_patch_size or excerpt_patch_size is {size} and the backbone's patches are "
            f"{patch[0]}x{patch[1]} pixels; to run on a part of them, give a multiple"
        )
    assert image_size[0] % size == 0
    assert image_size[1] % size == 0
    rows, columns = size // patch[0], size // patch[1]
    squares_across, tokens_across = image_size[1] // size, image_size[1] // patch[1]
    row = torch.arange(rows, device=running.indices.device)[:, None] * tokens_across
    within = (row + torch.arange(columns, device=row.device)).flatten()

    def tokens(squares: Tensor) -> Tensor:
        square_row, square_column = squares // squares_across, squares % squares_across
        corner = square_row * rows * tokens_across + square_column * columns
        return (corner[:, :, None] + within).flatten(1)

    visible, normalised = running.visible, running.normalised
    return RunningTokens(
        tokens(running.indices),
        None if visible is None else tokens(visible),
        None if normalised is None else normalised.repeat_interleave(rows * columns, dim=1),
    )


def sparse_feature_map(backbone: nn.Module, images: Tensor, tokens: Tensor) -> Tensor:
    """The last features of the chosen patch tokens, (batch, tokens, features).

    Class and register tokens run too and are left out of the result. The arithmetic is that of the
    backbone's own forward pass on fewer tokens. Shapes depend on shapes alone, so this compiles.

    Args:
        backbone: one that `check_sparse` accepts.
        images: (batch, channels, height, width).
        tokens: int64, (batch, tokens); each image's patches, row by row, each at most once.

    Raises:
        UserError: as `check_sparse`.
    """
    features, rotations = embed_tokens(backbone, images, tokens)
    assert isinstance(backbone, FAMILIES)
    for block, rotation in zip(backbone.blocks, rotations, strict=True):
        features = block(features) if rotation is None else block(features, rope=rotation)
    normed: Tensor = backbone.norm(features)
    return normed[:, backbone.num_prefix_tokens :]


def embed_tokens(
    backbone: nn.Module, images: Tensor, tokens: Tensor
) -> tuple[Tensor, list[Tensor | None]]:
    """What the blocks get: the prefix and the chosen patch tokens, and the rotation for each block.

    Args:
        backbone: one that `check_sparse` accepts.
        images: (batch, channels, height, width).
        tokens: int64, (batch, tokens).

    Returns:
        (batch, prefix and tokens, features), and for each block None where positions are added
        alone, or (batch, 1 or heads, tokens, width): each token is rotated by its own place.

    Raises:
        UserError: as `check_sparse`.
    """
    check_sparse(backbone)
    assert isinstance(backbone, FAMILIES)
    embed, prefix = backbone.patch_embed, backbone.num_prefix_tokens
    if _embeds_alone(backbone, images):
        # Patches that do not run cost nothing; positions are those of patches that are zero.
        height, width = (
            n // side for n, side in zip(images.shape[2:], embed.patch_size, strict=True)
        )
        grid = (height, width) if backbone.dynamic_img_size else (height * width,)
        positions, rotation = _positioned(backbone, images.new_zeros(1, *grid, backbone.embed_dim))
        weight = embed.proj.weight.flatten(1)
        chosen = embed.norm(
            F.linear(_pixels(images, tokens, embed.patch_size), weight, embed.proj.bias)
        )
        own = positions[0, prefix:][tokens]
        first = positions[:, :prefix].expand(len(images), -1, -1)
        kept = torch.cat([first.to(own.dtype), chosen + own], dim=1)
    else:
        positions, rotation = _positioned(backbone, embed(images))
        kept = _keep(positions, tokens, prefix)
    sequence: Tensor = backbone.norm_pre(kept)
    if rotation is None:
        return sequence, [None] * len(backbone.blocks)
    if getattr(backbone, "rope_mixed", False):  # (heads, all tokens, width) for each block
        return sequence, [apply_keep_indices_nlc(sequence, one, tokens) for one in rotation]
    kept = apply_keep_indices_nlc(sequence, rotation, tokens)[:, None]
    return sequence, [kept] * len(backbone.blocks)


def _embeds_alone(backbone: VisionTransformer | Eva, images: Tensor) -> bool:
    """Whether a patch's embedding is a matrix product with its own pixels, plus its position."""
    embed, (height, width) = backbone.patch_embed, images.shape[2:]
    proj, dropped = embed.proj, backbone.pos_drop
    rows, columns = embed.patch_size
    return (
        type(proj) is nn.Conv2d
        and proj.stride == proj.kernel_size == (rows, columns)
        and height % rows == width % columns == 0
        and not (isinstance(dropped, nn.Dropout) and dropped.training and dropped.p)
    )


def _positioned(backbone: Any, embedded: Tensor) -> tuple[Tensor, Any]:
    """All tokens with their positions, and what rotates them or None."""
    found = backbone._pos_embed(embedded)
    return (found[0], found[1]) if isinstance(backbone, Eva) else (found, None)


def _pixels(images: Tensor, tokens: Tensor, patch_size: ImageSize) -> Tensor:
    """The chosen patches' pixels, (batch, tokens, channels * height * width)."""
    rows, columns = patch_size
    grid = images.unflatten(3, (-1, columns)).unflatten(2, (-1, rows))
    patches: Tensor = grid.permute(0, 2, 4, 1, 3, 5).flatten(3).flatten(1, 2)
    return patches.gather(1, tokens[:, :, None].expand(-1, -1, patches.shape[2]))


def _keep(sequence: Tensor, tokens: Tensor, num_prefix: int) -> Tensor:
    """The prefix and the chosen ones of the tokens behind it, (batch, tokens, features)."""
    prefix, patches = sequence[:, :num_prefix], sequence[:, num_prefix:]
    chosen = patches.gather(1, tokens[:, :, None].expand(-1, -1, patches.shape[2]))
    return torch.cat([prefix, chosen], dim=1)
