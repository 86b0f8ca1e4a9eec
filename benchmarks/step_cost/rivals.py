"""Masked autoencoders and SimMIM of Hugging Face transformers, with a timm backbone's dimensions.

As they come: random weights from their configuration, attention by PyTorch's fused kernels ("sdpa",
the best they have), MAE's decoder of 8 layers of width 512 whatever the encoder is.
"""

import torch
from torch import Tensor, nn
from transformers import (
    AutoModelForMaskedImageModeling,
    AutoModelForPreTraining,
    PretrainedConfig,
    SwinConfig,
    ViTConfig,
    ViTMAEConfig,
)

from step_cost.models import Model


def masked_autoencoder(model: Model, backbone: nn.Module, mask_ratio: float) -> nn.Module:
    """MAE with this ViT as its encoder; draws its own masks."""
    config = ViTMAEConfig(**_dimensions(model, backbone), mask_ratio=mask_ratio)
    return AutoModelForPreTraining.from_config(config, attn_implementation="sdpa").train()


def simmim(model: Model, backbone: nn.Module) -> nn.Module:
    """SimMIM with this ViT, or with Swin-T."""
    config: PretrainedConfig
    if model.family == "vit":
        config = ViTConfig(**_dimensions(model, backbone), encoder_stride=model.mask_size)
    else:
        config = SwinConfig(image_size=model.image_size, drop_path_rate=0.0)
    made = AutoModelForMaskedImageModeling.from_config(config, attn_implementation="sdpa")
    return made.train()


def simmim_mask(rival: nn.Module, loss_mask: Tensor) -> Tensor:
    """Hidden pixels (batch, 1, height, width) as SimMIM takes them: bool, (batch, patches)."""
    patch = rival.config.patch_size
    return loss_mask[:, 0, ::patch, ::patch].flatten(1).to(torch.bool)


def _dimensions(model: Model, backbone: nn.Module) -> dict[str, int]:
    width = backbone.embed_dim
    return {
        "hidden_size": width,
        "num_hidden_layers": len(backbone.blocks),
        "num_attention_heads": backbone.blocks[0].attn.num_heads,
        "intermediate_size": backbone.blocks[0].mlp.fc1.out_features,
        "image_size": model.image_size,
        "patch_size": model.mask_size,
    }
