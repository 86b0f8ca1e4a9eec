"""The energy of hidden patches given the visible ones.

The visible patches alone run through the whole backbone, as in a masked autoencoder's encoder
(He et al., CVPR 2022). A hidden patch, whatever stands in it, enters by the same patch embedding
and its position, and runs through the last blocks only, where it reads the visible tokens' last
output and itself, never another hidden patch (as in the decoder of CrossMAE, Fu et al., 2024):

    E(x_h | x_v) = sum over hidden tokens of w . f,    x_h <- x_h - step_size * dE/dx_h.

There is one linear head, no decoder, no mask token. The second derivative exists for the hidden
stream alone: the visible one is an ordinary forward and backward pass. As hidden patches do not see
each other, any part of them is an unbiased sample of all.

    context = visible(backbone, clean, visible_tokens)
    energy = lambda images: head(hidden(backbone, images, hidden_tokens, context))
    loss, restored, _ = training_step(energy, corrupted, clean, loss_mask)
"""

from typing import Any, NamedTuple

import torch
from timm.layers import apply_rot_embed_cat
from timm.layers.attention import Attention, AttentionRope
from timm.models.eva import EvaAttention, EvaBlock
from timm.models.vision_transformer import Block
from torch import Tensor, nn
from torch.nn import functional as F

from backfold.errors import UserError
from backfold.sparse import check_sparse, embed_tokens, run_tokens


class Context(NamedTuple):
    """What hidden patches read of the visible ones."""

    tokens: Tensor  # the last block's output, prefix first, not normed: (batch, tokens, features)
    rotations: list[Tensor | None]  # of the patch tokens for each block; None where there is none


def check_conditional(backbone: nn.Module, num_blocks: int = 1) -> None:
    """Raise UserError unless hidden patches can enter the last blocks: timm's ViTs and EVAs."""
    blocks = check_sparse(backbone).blocks
    if not 1 <= num_blocks <= len(blocks):
        raise UserError(f"hidden_blocks is {num_blocks}; give 1 to {len(blocks)}")
    attentions = (Attention, AttentionRope, EvaAttention)
    for block in blocks:
        fits = type(block) in (Block, EvaBlock) and type(block.attn) in attentions
        if not fits or getattr(block.attn, "num_kv_groups", 1) != 1:
            raise UserError(
                f"the conditional energy does not work with {type(backbone).__name__}: its blocks "
                "are not timm's plain ones; take the dense energy"
            )


def visible(backbone: nn.Module, images: Tensor, tokens: Tensor) -> Context:
    """The visible patches' last output.

    Args:
        backbone: one that `check_conditional` accepts, or UserError is raised.
        images: clean and normalised, (batch, channels, height, width).
        tokens: int64, (batch, visible tokens); each image's patches, row by row.
    """
    check_conditional(backbone)
    return Context(*run_tokens(backbone, images, tokens))


def hidden(
    backbone: nn.Module, images: Tensor, tokens: Tensor, context: Context, num_blocks: int = 1
) -> Tensor:
    """The hidden patches' last features, (batch, hidden tokens, features), normed.

    A linear head of them, such as `LinearHead`, gives their energies.

    Args:
        backbone: as for `visible`.
        images: corrupted, (batch, channels, height, width); only the hidden patches are read.
        tokens: int64, (batch, hidden tokens).
        context: of the same images' visible patches.
        num_blocks: how many of the last blocks they run through; UserError unless 1 to all.
    """
    check_conditional(backbone, num_blocks)
    backbone = check_sparse(backbone)
    sequence, rotations = embed_tokens(backbone, images, tokens)
    features = sequence[:, backbone.num_prefix_tokens :]
    for index in range(-num_blocks, 0):
        block: Any = backbone.blocks[index]
        own, read = (block.norm1(each) for each in (features, context.tokens))
        attended = _attend(block.attn, own, read, rotations[index], context.rotations[index])
        features = features + block.drop_path1(_scaled(block, 1, attended))
        features = features + block.drop_path2(_scaled(block, 2, block.mlp(block.norm2(features))))
    normed: Tensor = backbone.norm(features)
    return normed


def _scaled(block: Any, number: int, values: Tensor) -> Tensor:
    """A branch of a block times its layer scale, which ViT's and EVA's blocks keep differently."""
    if isinstance(block, EvaBlock):
        gamma = getattr(block, f"gamma_{number}")
        return values if gamma is None else gamma * values
    scaled: Tensor = getattr(block, f"ls{number}")(values)
    return scaled


def _attend(
    attention: Any, own: Tensor, read: Tensor, own_rope: Tensor | None, rope: Tensor | None
) -> Tensor:
    """Attention of each token of ``own`` over ``read`` and itself; see timm's attention layers."""
    queries, own_keys, own_values = _heads(attention, own)
    _, keys, values = _heads(attention, read)
    if own_rope is not None and rope is not None:
        half = attention.rotate_half
        queries, own_keys = (
            apply_rot_embed_cat(each, own_rope, half=half).type_as(own_values)
            for each in (queries, own_keys)
        )
        prefix = attention.num_prefix_tokens
        turned = apply_rot_embed_cat(keys[:, :, prefix:], rope, half=half)
        keys = torch.cat([keys[:, :, :prefix], turned], dim=2).type_as(values)
    queries = queries * attention.scale
    scores = [queries @ keys.mT, (queries * own_keys).sum(dim=3, keepdim=True)]
    weights = attention.attn_drop(torch.cat(scores, dim=3).softmax(dim=3))
    mixed = weights[..., :-1] @ values + weights[..., -1:] * own_values
    joined = attention.norm(mixed.transpose(1, 2).flatten(2))
    if attention.gate is not None:
        joined = joined * attention.gate(own).sigmoid()
    projected: Tensor = attention.proj_drop(attention.proj(joined))
    return projected


def _heads(attention: Any, tokens: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Queries, keys and values, (batch, heads, tokens, width) each."""
    if attention.qkv is None:
        parts = [layer(tokens) for layer in (attention.q_proj, attention.k_proj, attention.v_proj)]
    elif getattr(attention, "q_bias", None) is not None:
        bias = torch.cat([attention.q_bias, attention.k_bias, attention.v_bias])
        parts = list(F.linear(tokens, attention.qkv.weight, bias).chunk(3, dim=2))
    else:
        parts = list(attention.qkv(tokens).chunk(3, dim=2))
    queries, keys, values = (
        part.unflatten(2, (attention.num_heads, -1)).transpose(1, 2) for part in parts
    )
    return attention.q_norm(queries), attention.k_norm(keys), values
