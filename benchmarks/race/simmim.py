"""SimMIM: transformers' decoder and loss around a timm ViT, with 60 % of the patches hidden."""

from typing import Any

import torch
from torch import Tensor, nn
from transformers import ViTConfig, ViTForMaskedImageModeling
from transformers.modeling_outputs import BaseModelOutput

from backfold.training.config import PretrainConfig
from backfold.training.images import Images
from race.contest import fit, start_vit

MASK_RATIO = 0.6


class MaskedTokens(nn.Module):
    """In the place of transformers' encoder: a timm ViT, one learned token for hidden patches."""

    def __init__(self, vit: Any) -> None:
        super().__init__()
        self.vit = vit
        self.mask_token = nn.Parameter(torch.empty(vit.embed_dim).normal_(std=0.02))

    def forward(self, pixels: Tensor, bool_masked_pos: Tensor, **_: Any) -> BaseModelOutput:
        """Features of the class token and all patches."""
        patches = self.vit.patch_embed(pixels)
        patches = torch.where(
            bool_masked_pos[..., None], self.mask_token.to(patches.dtype), patches
        )
        tokens = self.vit.norm_pre(self.vit._pos_embed(patches))
        return BaseModelOutput(last_hidden_state=self.vit.norm(self.vit.blocks(tokens)))


class MaskedImages(nn.Module):
    """The loss of normalised images."""

    def __init__(self, vit: Any, sizes: dict[str, int], settings: PretrainConfig) -> None:
        super().__init__()
        self.backbone, self.augmentation = vit, settings.augmentation
        config = ViTConfig(**sizes, encoder_stride=sizes["patch_size"])
        self.rival = ViTForMaskedImageModeling(config)
        self.rival.vit = MaskedTokens(vit)

    def forward(self, pixels: Tensor) -> Tensor:
        """Absolute error of the hidden pixels."""
        shape = (len(pixels), self.backbone.patch_embed.num_patches)
        order = torch.rand(shape, device=pixels.device).argsort(1).argsort(1)
        return self.rival(pixels, order < MASK_RATIO * shape[1]).loss


def train(
    backbone_name: str, options: dict[str, Any], images: Images, settings: PretrainConfig
) -> nn.Module:
    """A timm ViT after SimMIM; goes on with a cut run in the settings' ``out``."""
    vit, sizes = start_vit(backbone_name, options, images, settings)
    return fit("simmim", MaskedImages(vit, sizes, settings), images, settings)
