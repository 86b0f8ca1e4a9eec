"""Masked autoencoders: transformers' decoder, target and loss around a timm ViT.

As in the paper: a quarter of the patches is encoded; normalised pixels are the target; the decoder
is two thirds as deep and wide as a ViT-B, for which the paper has 8 layers of width 512, and so for
any other encoder.
"""

from typing import Any

import torch
from torch import Tensor, nn
from transformers import ViTMAEConfig, ViTMAEForPreTraining
from transformers.models.vit_mae.modeling_vit_mae import ViTMAEModelOutput

from backfold.training.config import PretrainConfig
from backfold.training.images import Images
from race.contest import fit, start_vit

MASK_RATIO = 0.75


class VisibleTokens(nn.Module):
    """In the place of transformers' encoder: a timm ViT, on the patches that are not hidden."""

    def __init__(self, vit: Any) -> None:
        super().__init__()
        self.vit = vit

    def forward(self, pixels: Tensor, **_: Any) -> ViTMAEModelOutput:
        """Features of the class token and the visible patches, in random order."""
        tokens = self.vit._pos_embed(self.vit.patch_embed(pixels))
        patches = tokens[:, 1:]
        restore = torch.rand(patches.shape[:2], device=pixels.device).argsort(1).argsort(1)
        count = int(patches.shape[1] * (1 - MASK_RATIO))
        visible = restore.argsort(1)[:, :count, None].expand(-1, -1, patches.shape[2])
        tokens = torch.cat([tokens[:, :1], patches.gather(1, visible)], dim=1)
        return ViTMAEModelOutput(
            last_hidden_state=self.vit.norm(self.vit.blocks(self.vit.norm_pre(tokens))),
            mask=(restore >= count).to(pixels.dtype),
            ids_restore=restore,
        )


class MaskedAutoencoder(nn.Module):
    """The loss of normalised images."""

    def __init__(self, vit: Any, sizes: dict[str, int], settings: PretrainConfig) -> None:
        super().__init__()
        self.backbone, self.augmentation = vit, settings.augmentation
        depth, heads = len(vit.blocks), vit.blocks[0].attn.num_heads
        self.rival = ViTMAEForPreTraining(
            ViTMAEConfig(
                **sizes,
                norm_pix_loss=True,
                decoder_num_hidden_layers=round(2 / 3 * depth),
                decoder_hidden_size=round(2 / 3 * vit.embed_dim / (4 * heads)) * 4 * heads,
                decoder_intermediate_size=round(8 / 3 * vit.embed_dim / 32) * 32,
                decoder_num_attention_heads=heads,
            )
        )
        # transformers 5 leaves a new decoder with a mask token and fixed positions of zeros.
        self.rival.decoder.initialize_weights(vit.patch_embed.num_patches)
        self.rival.vit = VisibleTokens(vit)

    def forward(self, pixels: Tensor) -> Tensor:
        """Squared error of the hidden patches' normalised pixels."""
        return self.rival(pixels).loss


def train(
    backbone_name: str, options: dict[str, Any], images: Images, settings: PretrainConfig
) -> nn.Module:
    """A timm ViT after MAE; goes on with a cut run in the settings' ``out``."""
    vit, sizes = start_vit(backbone_name, options, images, settings)
    return fit("mae", MaskedAutoencoder(vit, sizes, settings), images, settings)
