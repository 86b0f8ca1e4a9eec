"""Encoders of Hugging Face transformers as timm backbones: the same function, other names.

timm keeps queries, keys and values in one matrix, adds positions to the class token too (which is
how transformers stores them), and calls the rest otherwise.
"""

from collections.abc import Mapping

import torch
from torch import Tensor

TOP = {
    "cls_token": "embeddings.cls_token",
    "pos_embed": "embeddings.position_embeddings",
    "patch_embed.proj.weight": "embeddings.patch_embeddings.projection.weight",
    "patch_embed.proj.bias": "embeddings.patch_embeddings.projection.bias",
    "norm.weight": "layernorm.weight",
    "norm.bias": "layernorm.bias",
}
BLOCK = {
    "norm1": "layernorm_before",
    "attn.proj": "attention.o_proj",
    "norm2": "layernorm_after",
    "mlp.fc1": "mlp.fc1",
    "mlp.fc2": "mlp.fc2",
}
PROJECTIONS = ("attention.q_proj", "attention.k_proj", "attention.v_proj")
TIMM_NORM_EPS = 1e-6  # of timm's vision transformers; transformers' default is another


def timm_weights(encoder: Mapping[str, Tensor], depth: int) -> dict[str, Tensor]:
    """The state of a ``ViTMAEModel`` or ``ViTModel`` under the names of timm's VisionTransformer.

    Args:
        encoder: the state's names and tensors; a mask token is left out, it hides nothing now.
        depth: how many blocks.
    """
    weights = {name: encoder[source] for name, source in TOP.items()}
    for index in range(depth):
        for part in ("weight", "bias"):
            at = f"layers.{index}"
            weights[f"blocks.{index}.attn.qkv.{part}"] = torch.cat(
                [encoder[f"{at}.{name}.{part}"] for name in PROJECTIONS]
            )
            for name, source in BLOCK.items():
                weights[f"blocks.{index}.{name}.{part}"] = encoder[f"{at}.{source}.{part}"]
    return {name: tensor.detach().clone() for name, tensor in weights.items()}
