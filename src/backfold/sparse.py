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

OWN_BLOCKS = (vision_transformer.__name__, eva.__name__)


def check_sparse(backbone: nn.Module) -> VisionTransformer | Eva:
    """Give the backbone back, or raise UserError unless `sparse_feature_map` is exact for it.

    It is for timm's vision transformers whose blocks treat tokens as a set, with one token for each
    patch and positions that are added to tokens or rotate them.
    """
    forward = getattr(type(backbone), "forward_features", None)
    if not isinstance(backbone, (VisionTransformer, Eva)):  # older compilers stumble over a union
        reason = "it is neither timm's VisionTransformer nor its Eva"
    elif forward is not VisionTransformer.forward_features and forward is not Eva.forward_features:
        reason = "it changes timm's forward pass"
    elif not _embeds_alone(backbone.patch_embed):
        reason = "its tokens do not come from one patch each"
    # Others may look at a token's neighbours, or have biases by place.
    elif any(type(block).__module__ not in OWN_BLOCKS for block in backbone.blocks):
        reason = "its blocks are not timm's own"
    elif not isinstance(backbone.patch_drop, (nn.Identity, type(None))) or backbone.pos_drop.p:
        reason = "its patch_drop_rate or pos_drop_rate is not 0"
    else:
        return backbone
    raise UserError(
        "running on some patches alone (the conditional energy, hidden_share or excerpt.share "
        f"below 1) does not work with {type(backbone).__name__}: {reason}; take the dense "
        "energy and shares of 1, or a backbone of timm's ViT or EVA family as it comes"
    )


def _embeds_alone(embed: nn.Module) -> bool:
    """Whether a patch's embedding is a matrix product with its own pixels."""
    if type(embed).forward is not PatchEmbed.forward or type(embed.proj) is not nn.Conv2d:
        return False
    return embed.proj.stride == embed.proj.kernel_size == embed.patch_size


def token_size(backbone: nn.Module) -> ImageSize:
    """(height, width) in pixels of the patch behind each token; errors as `check_sparse`."""
    height, width = check_sparse(backbone).patch_embed.patch_size
    return int(height), int(width)


class RunningTokens(NamedTuple):
    """The patch tokens that run, int64, (batch, count); see `RunningSquares` for the others."""

    tokens: Tensor | None = None  # None runs all
    visible: Tensor | None = None
    normalised: Tensor | None = None  # bool, as tokens


def running_tokens(
    running: RunningSquares | None, backbone: nn.Module, image_size: ImageSize
) -> RunningTokens:
    """The patch tokens inside the squares; those of one square follow each other.

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
    down, across = image_size[0] // size, image_size[1] // size
    rows, columns = size // patch[0], size // patch[1]
    grid = torch.arange(down * rows * across * columns, device=running.indices.device)
    grid = grid.view(down, rows, across, columns).transpose(1, 2)
    of_square = grid.reshape(down * across, rows * columns)
    visible, normalised = running.visible, running.normalised
    return RunningTokens(
        of_square[running.indices].flatten(1),
        None if visible is None else of_square[visible].flatten(1),
        None if normalised is None else normalised.repeat_interleave(rows * columns, dim=1),
    )


def sparse_feature_map(backbone: nn.Module, images: Tensor, tokens: Tensor) -> Tensor:
    """The last features of the chosen patch tokens, normed, (batch, tokens, features).

    Class and register tokens run too and are left out of the result. The arithmetic is that of the
    backbone's own forward pass on fewer tokens. Arguments and errors are those of `run_tokens`.
    """
    backbone = check_sparse(backbone)
    features, _ = run_tokens(backbone, images, tokens)
    normed: Tensor = backbone.norm(features)
    return normed[:, backbone.num_prefix_tokens :]


def run_tokens(
    backbone: nn.Module, images: Tensor, tokens: Tensor
) -> tuple[Tensor, list[Tensor | None]]:
    """The last block's output, (batch, prefix and tokens, features), and `embed_tokens`' rotations.

    Shapes depend on shapes alone, so this compiles.

    Args:
        backbone: one that `check_sparse` accepts, or UserError is raised.
        images: (batch, channels, height, width).
        tokens: int64, (batch, tokens); each image's patches, row by row, each at most once.
    """
    features, rotations = embed_tokens(backbone, images, tokens)
    for block, rotation in zip(check_sparse(backbone).blocks, rotations, strict=True):
        features = block(features) if rotation is None else block(features, rope=rotation)
    return features, rotations


def embed_tokens(
    backbone: nn.Module, images: Tensor, tokens: Tensor
) -> tuple[Tensor, list[Tensor | None]]:
    """What the blocks get: the prefix and the chosen patch tokens, and the rotation for each block.

    It is None where positions are added alone, or (batch, 1 or heads, tokens, width): each token is
    rotated by its own place. Arguments and errors are those of `run_tokens`.
    """
    backbone = check_sparse(backbone)
    embed, prefix = backbone.patch_embed, backbone.num_prefix_tokens
    # Patches that do not run cost nothing; positions are those of patches that are zero.
    rows, columns = (n // side for n, side in zip(images.shape[2:], embed.patch_size, strict=True))
    grid = (rows, columns) if backbone.dynamic_img_size else (rows * columns,)
    found: Any = backbone._pos_embed(images.new_zeros(1, *grid, backbone.embed_dim))
    positions, rotation = found if isinstance(backbone, Eva) else (found, None)
    pixels = _pixels(images, embed.patch_size)
    pixels = pixels.gather(1, tokens[:, :, None].expand(-1, -1, pixels.shape[2]))
    chosen = embed.norm(F.linear(pixels, embed.proj.weight.flatten(1), embed.proj.bias))
    own = positions[0, prefix:][tokens]
    first = positions[:, :prefix].expand(len(images), -1, -1)
    kept = torch.cat([first.to(own.dtype), chosen + own], dim=1)
    sequence: Tensor = backbone.norm_pre(kept)
    if rotation is None:
        return sequence, [None] * len(backbone.blocks)
    if getattr(backbone, "rope_mixed", False):  # (heads, all tokens, width) for each block
        return sequence, [apply_keep_indices_nlc(sequence, one, tokens) for one in rotation]
    turned = apply_keep_indices_nlc(sequence, rotation, tokens)[:, None]
    return sequence, [turned] * len(backbone.blocks)


def _pixels(images: Tensor, patch_size: ImageSize) -> Tensor:
    """Each patch's pixels, (batch, patches, channels * height * width)."""
    rows, columns = patch_size
    grid = images.unflatten(3, (-1, columns)).unflatten(2, (-1, rows))
    patches: Tensor = grid.permute(0, 2, 4, 1, 3, 5).flatten(3).flatten(1, 2)
    return patches
