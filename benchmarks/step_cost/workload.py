"""What is measured: a backbone on a device with a batch of images, and the steps run on it."""

import copy
from collections.abc import Callable, Mapping
from contextlib import AbstractContextManager
from dataclasses import dataclass, field
from functools import cached_property, partial
from typing import Any, Literal

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from backfold.backbone import feature_map, use_plain_attention
from backfold.energy import EnergyModel
from backfold.finite_difference import finite_difference_losses
from backfold.pretext.masking import Masking
from backfold.restoration import restoration_losses
from backfold.sparse import running_tokens, token_size
from backfold.training.step import RestorationTraining
from step_cost.measuring import Step

MASK_RATIO = 0.75
HIDDEN_SHARE = 1 / 3
NUM_CLASSES = 1000
TITLES = {  # in the order of the tables, and in which they are warmed up while there is time
    "forward": "forward pass",
    "ordinary": "ordinary step",
    "ordinary-plain": "ordinary step, unfused attention",
    "exact": "Backfold, dense",
    "sparse": "Backfold, sparse",
    "finite-difference": "Backfold, finite difference",
    "simmim": "SimMIM (transformers)",
    "mae": "MAE (transformers)",
    "masking": "drawing masks",
}


@dataclass(frozen=True)
class Model:
    """A timm backbone at one image size (pixels a side).

    Hidden squares have ``mask_size`` pixels a side, a ViT's patches; a step has ``cpu_batch`` or
    ``gpu_batch`` images. A "vit" has sparse steps and both rivals, "swin" one of them.
    """

    title: str
    backbone: str
    family: Literal["vit", "swin", "convolutional"]
    image_size: int
    mask_size: int
    cpu_batch: int
    gpu_batch: int
    options: Mapping[str, Any] = field(default_factory=dict)


def vision_transformer(size: str, image_size: int, cpu_batch: int, gpu_batch: int) -> Model:
    patch = 4 if image_size == 32 else 16
    short = {"tiny": "Ti", "small": "S", "base": "B"}[size]
    return Model(
        f"ViT-{short}/{patch}, {image_size} px", f"vit_{size}_patch16_224", "vit",
        image_size, patch, cpu_batch, gpu_batch, {"patch_size": patch},
    )  # fmt: skip


MODELS = {
    "vit_tiny_32": vision_transformer("tiny", 32, 16, 512),
    "vit_small_32": vision_transformer("small", 32, 8, 512),
    "vit_base_32": vision_transformer("base", 32, 4, 256),
    "vit_tiny_224": vision_transformer("tiny", 224, 8, 256),
    "vit_small_224": vision_transformer("small", 224, 4, 256),
    "vit_base_224": vision_transformer("base", 224, 2, 128),
    "swin_tiny_224": Model(
        "Swin-T, 224 px", "swin_tiny_patch4_window7_224", "swin", 224, 32, 4, 128,
        {"drop_path_rate": 0.0},
    ),
    "convnext_tiny_224": Model(
        "ConvNeXt-T, 224 px", "convnext_tiny", "convolutional", 224, 32, 4, 128
    ),
    "resnet50_224": Model("ResNet-50, 224 px", "resnet50", "convolutional", 224, 32, 4, 128),
}  # fmt: skip


@dataclass(frozen=True)
class Variant:
    """One way to run one method, a name of `TITLES`; ``precision`` is float32 or bf16."""

    method: str
    compiled: bool = False
    precision: str = "float32"
    num_steps: int = 1

    @property
    def title(self) -> str:
        """For tables and plots."""
        return TITLES[self.method] + (f", K = {self.num_steps}" if self.num_steps > 1 else "")

    @property
    def name(self) -> str:
        """Unlike every other variant's of the model."""
        return f"{self.title}, {self.precision}, {'compiled' if self.compiled else 'eager'}"

    def exists_for(self, model: Model) -> bool:
        """Whether the model has the method, and this is not the same as another variant."""
        if model.family == "convolutional" and self.method in ("simmim", "ordinary-plain"):
            return False
        if model.family != "vit" and self.method in ("mae", "sparse"):
            return False
        if self.precision != "float32" and self.method in ("masking", "finite-difference"):
            return False
        if self.compiled and self.method == "masking":
            return False
        return self.num_steps == 1 or self.method == "exact"


class Classifier(nn.Module):
    """The ordinary step: mean over positions, one linear layer, cross-entropy of random labels."""

    def __init__(self, backbone: nn.Module, num_features: int) -> None:
        super().__init__()
        self.backbone = backbone
        self.head = nn.Linear(num_features, NUM_CLASSES)

    def forward(self, images: Tensor, labels: Tensor) -> Tensor:
        """The mean loss of images with labels (batch,)."""
        return F.cross_entropy(self.head(feature_map(self.backbone, images).mean(dim=1)), labels)


class Workload:
    """A model on a device with a batch; makes its variants, which share weights where they can.

    Masks and corrupted images are drawn here once. MAE draws its masks in its own forward pass.
    """

    def __init__(self, model: Model, batch: int, device: torch.device, seed: int = 0) -> None:
        torch.manual_seed(seed)
        self.model, self.batch, self.device = model, batch, device
        self.energy = EnergyModel(
            model.backbone, image_size=model.image_size, backbone_options=model.options, seed=seed
        ).to(device)
        # A restoration's attention becomes plain for good; the forward pass keeps its fused one.
        self.fused = copy.deepcopy(self.energy)
        self.generator = torch.Generator(device).manual_seed(seed)
        shape = (batch, 3, model.image_size, model.image_size)
        self.images = torch.randn(shape, generator=self.generator, device=device)
        self.labels = torch.randint(NUM_CLASSES, (batch,), generator=self.generator, device=device)
        self.task = Masking(MASK_RATIO, model.mask_size)
        self.dense = self.task(self.images, self.generator)

    @cached_property
    def classifier(self) -> nn.Module:
        """The ordinary step's model."""
        # A copy: the energy's batch norms stay on fixed statistics, an ordinary step's do not.
        backbone = copy.deepcopy(self.fused.backbone)
        made = Classifier(backbone, self.energy.head.weight.shape[-1])
        return made.to(self.device).train()

    @cached_property
    def plain_classifier(self) -> nn.Module:
        """The same without fused attention."""
        made = copy.deepcopy(self.classifier)
        use_plain_attention(made)
        return made

    @cached_property
    def mae(self) -> nn.Module:
        """The masked autoencoder of transformers as it comes: a decoder of 8 layers, width 512."""
        import transformers

        config = transformers.ViTMAEConfig(**self._dimensions(), mask_ratio=MASK_RATIO)
        return self._rival(transformers.AutoModelForPreTraining, config)

    @cached_property
    def simmim(self) -> nn.Module:
        """SimMIM of transformers as it comes, with this ViT or with Swin-T."""
        import transformers

        if self.model.family == "vit":
            patch = self.model.mask_size
            config = transformers.ViTConfig(**self._dimensions(), encoder_stride=patch)
        else:
            config = transformers.SwinConfig(image_size=self.model.image_size, drop_path_rate=0.0)
        return self._rival(transformers.AutoModelForMaskedImageModeling, config)

    def _dimensions(self) -> dict[str, int]:
        blocks = self.energy.backbone.blocks
        return {
            "hidden_size": self.energy.backbone.embed_dim,
            "num_hidden_layers": len(blocks),
            "num_attention_heads": blocks[0].attn.num_heads,
            "intermediate_size": blocks[0].mlp.fc1.out_features,
            "image_size": self.model.image_size,
            "patch_size": self.model.mask_size,
        }

    def _rival(self, factory: Any, config: Any) -> nn.Module:
        # "sdpa" takes PyTorch's fused kernels, the best attention they have.
        return factory.from_config(config, attn_implementation="sdpa").train().to(self.device)

    def step(self, variant: Variant) -> Step:
        """Forward and backward to all parameters; for "masking" and "forward" only that."""
        method = variant.method
        if method == "masking":
            return lambda: self.task(self.images, self.generator)
        if method == "forward":
            return self._forward(variant)
        if method in ("exact", "sparse"):
            return self._restoration(variant)
        if method == "finite-difference":
            energy = self._compiled(self.fused) if variant.compiled else self.fused
            given = (self.dense.corrupted, self.images, self.dense.loss_mask, 1.0)
            return lambda: _backward_each(finite_difference_losses(energy, *given))
        if method == "mae":
            mae = self.mae
            return self._loss_step(variant, lambda images: mae(images).loss, self.images)
        if method == "simmim":
            simmim, patch = self.simmim, self.simmim.config.patch_size
            hidden = self.dense.loss_mask[:, 0, ::patch, ::patch].flatten(1).to(torch.bool)
            return self._loss_step(
                variant, lambda *inputs: simmim(*inputs).loss, self.images, hidden
            )
        model = self.classifier if method == "ordinary" else self.plain_classifier
        return self._loss_step(variant, model, self.images, self.labels)

    def _autocast(self, variant: Variant) -> AbstractContextManager[object]:
        enabled = variant.precision == "bf16"
        return torch.autocast(self.device.type, dtype=torch.bfloat16, enabled=enabled)

    @staticmethod
    def _compiled(function: Callable[..., Tensor], whole: bool = True) -> Callable[..., Tensor]:
        return torch.compile(function, fullgraph=whole, dynamic=False)

    def _forward(self, variant: Variant) -> Step:
        energy = self._compiled(self.fused) if variant.compiled else self.fused

        def step() -> None:
            with torch.no_grad(), self._autocast(variant):
                energy(self.images)

        return step

    def _loss_step(self, variant: Variant, loss: Callable[..., Tensor], *inputs: Tensor) -> Step:
        """Forward and backward of a loss; our own models are compiled in one graph."""
        if variant.compiled:
            loss = self._compiled(loss, whole=isinstance(loss, nn.Module))

        def step() -> None:
            with self._autocast(variant):
                value = loss(*inputs)
            value.backward()

        return step

    def _restoration(self, variant: Variant) -> Step:
        corruption, tokens = self.dense, None
        if variant.method == "sparse":
            sparse = Masking(MASK_RATIO, self.model.mask_size, hidden_share=HIDDEN_SHARE)
            corruption = sparse(self.images, self.generator)
            assert corruption.running is not None
            size = (self.model.image_size, self.model.image_size)
            tokens = running_tokens(corruption.running, token_size(self.energy.backbone), size)
        training = RestorationTraining(self.energy, 1.0, compiled=variant.compiled)

        def restore(points: Tensor) -> tuple[Tensor, Tensor, Tensor]:
            with self._autocast(variant):
                return training(points, self.images, corruption.loss_mask, tokens)

        losses = partial(restoration_losses, restore, corruption.corrupted, variant.num_steps)
        return lambda: _backward_each(losses())

    def clear_gradients(self) -> None:
        """Set all gradients to None, as before every step."""
        for module in vars(self).values():
            if isinstance(module, nn.Module):
                module.zero_grad(set_to_none=True)


def _backward_each(losses: Any) -> None:
    for loss, _, _ in losses:
        loss.backward()
