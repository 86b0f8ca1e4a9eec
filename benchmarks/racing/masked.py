"""MAE and SimMIM as Hugging Face transformers has them, on a timm ViT's dimensions."""

from collections.abc import Mapping
from typing import Any

import torch
from timm.models.vision_transformer import VisionTransformer
from torch import Tensor, nn
from transformers import ViTConfig, ViTForMaskedImageModeling, ViTMAEConfig, ViTMAEForPreTraining

from backfold.pretext import Masking
from racing.conversion import TIMM_NORM_EPS, timm_weights
from racing.methods import Attention, Rival, Setting
from racing.sizes import BackboneSpec

# Published recipes: 75 % hidden and normalised targets; 60 % hidden, and gradients clipped at 5.
MAE_RATIO, MAE_BETAS = 0.75, (0.9, 0.95)
SIMMIM_RATIO, SIMMIM_BETAS, SIMMIM_NORM = 0.6, (0.9, 0.999), 5.0
ATTENTION = {"fused": "sdpa", "plain": "eager"}  # as transformers calls them


def make_autoencoder(
    spec: BackboneSpec, image_size: int, seed: int, attention: Attention = "fused"
) -> ViTMAEForPreTraining:
    """MAE with random weights; its targets are each patch's normalised pixels."""
    assert spec.decoder is not None
    config = ViTMAEConfig(
        **_dimensions(spec, image_size),
        mask_ratio=MAE_RATIO,
        norm_pix_loss=True,
        decoder_hidden_size=spec.decoder.width,
        decoder_num_hidden_layers=spec.decoder.layers,
        decoder_num_attention_heads=spec.decoder.heads,
        decoder_intermediate_size=4 * spec.decoder.width,
    )
    with torch.random.fork_rng(devices=[]):
        torch.default_generator.manual_seed(seed)
        made = ViTMAEForPreTraining._from_config(config, attn_implementation=ATTENTION[attention])
        assert isinstance(made, ViTMAEForPreTraining)
        _restore_positions(made)
        _start_as_published(made)
    return made


def _restore_positions(model: ViTMAEForPreTraining) -> None:
    """Let transformers' own initialisation put the sines into encoder and decoder.

    Seen in transformers 5.23: a model that is trained from scratch is left with zeros there, which
    are frozen. The patches would have no places, and MAE would not be what was published.
    """
    embeddings = model.vit.embeddings
    embeddings.patch_embeddings.projection._is_hf_initialized = False
    embeddings.initialize_weights()
    model.decoder.initialize_weights(embeddings.patch_embeddings.num_patches)


def _start_as_published(model: ViTMAEForPreTraining) -> None:
    """Xavier's uniform weights in all linear layers, as MAE's own code has them.

    transformers starts them at a deviation of 0.02 whatever the width is: right for ViT-B, and
    several times too small for a narrow encoder.
    """
    for name, module in model.named_modules():
        if isinstance(module, nn.Linear):
            # There the three projections are one matrix of three times the outputs.
            is_part = name.endswith(("q_proj", "k_proj", "v_proj"))
            nn.init.xavier_uniform_(module.weight, gain=0.5**0.5 if is_part else 1.0)


class SimMIMModel(ViTForMaskedImageModeling):
    """Knows which of its weights do not decay, as SimMIM's own ViT does."""

    def no_weight_decay(self) -> set[str]:
        """For timm's parameter groups."""
        names = ("cls_token", "position_embeddings", "mask_token")
        return {f"vit.embeddings.{name}" for name in names}


def make_simmim(
    spec: BackboneSpec, image_size: int, seed: int, attention: Attention = "fused"
) -> SimMIMModel:
    """SimMIM with random weights."""
    dimensions = _dimensions(spec, image_size)
    config = ViTConfig(**dimensions, encoder_stride=dimensions["patch_size"])
    with torch.random.fork_rng(devices=[]):
        torch.default_generator.manual_seed(seed)
        made = SimMIMModel._from_config(config, attn_implementation=ATTENTION[attention])
    assert isinstance(made, SimMIMModel)
    return made


def _dimensions(spec: BackboneSpec, image_size: int) -> dict[str, Any]:
    model = spec.build(image_size, seed=0)
    assert isinstance(model, VisionTransformer)
    block = model.blocks[0]
    return {
        "hidden_size": model.embed_dim,
        "num_hidden_layers": len(model.blocks),
        "num_attention_heads": block.attn.num_heads,
        "intermediate_size": block.mlp.fc1.out_features,
        "layer_norm_eps": TIMM_NORM_EPS,
        "image_size": image_size,
        "patch_size": model.patch_embed.patch_size[0],
    }


class Loss(nn.Module):
    """A model of transformers that returns its loss and nothing else."""

    def __init__(self, backbone: nn.Module) -> None:
        super().__init__()
        self.backbone = backbone

    def forward(self, **inputs: Tensor) -> Tensor:
        """The loss of the model's own inputs."""
        loss: Tensor = self.backbone(**inputs).loss
        return loss


class MaskedAutoencoder(Rival):
    """MAE (He et al., CVPR 2022)."""

    def __init__(self, setting: Setting) -> None:
        self.model = make_autoencoder(
            setting.backbone, setting.image_size, setting.seed, setting.attention
        )
        self.patches = self.model.vit.embeddings.patch_embeddings.num_patches
        super().__init__(setting, Loss(self.model), MAE_BETAS, 0.0)

    def loss(self, batch: Tensor, seed: int) -> Tensor:
        """See `Rival`."""
        noise = torch.rand(
            len(batch), self.patches, generator=torch.Generator(batch.device).manual_seed(seed),
            device=batch.device,
        )  # fmt: skip
        images = self.setting.statistics.normalize(batch)
        loss: Tensor = self.module(pixel_values=images, noise=noise)
        return loss

    def backbone(self) -> Mapping[str, Tensor]:
        """See `Method`."""
        return timm_weights(self.model.vit.state_dict(), len(self.model.vit.layers))


class SimMIM(Rival):
    """SimMIM (Xie et al., CVPR 2022)."""

    def __init__(self, setting: Setting) -> None:
        self.model = make_simmim(
            setting.backbone, setting.image_size, setting.seed, setting.attention
        )
        self.masking = Masking(SIMMIM_RATIO, setting.backbone.mask_size)
        super().__init__(setting, Loss(self.model), SIMMIM_BETAS, SIMMIM_NORM)

    def loss(self, batch: Tensor, seed: int) -> Tensor:
        """See `Rival`."""
        generator = torch.Generator(batch.device).manual_seed(seed)
        hidden = self.masking.draw_mask(len(batch), *batch.shape[2:], generator)
        patch = self.model.config.patch_size
        tokens = hidden[:, 0, ::patch, ::patch].flatten(1)
        images = self.setting.statistics.normalize(batch)
        loss: Tensor = self.module(pixel_values=images, bool_masked_pos=tokens)
        return loss

    def backbone(self) -> Mapping[str, Tensor]:
        """See `Method`."""
        return timm_weights(self.model.vit.state_dict(), len(self.model.vit.layers))
