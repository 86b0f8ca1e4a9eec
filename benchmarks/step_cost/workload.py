"""What is measured: a backbone on a device with a batch of images, and the steps run on it."""

import copy
from collections.abc import Callable, Iterable, Mapping
from contextlib import AbstractContextManager
from dataclasses import dataclass, field
from functools import partial
from typing import Any, Literal

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from backfold.backbone import feature_map, use_plain_attention
from backfold.energy import EnergyModel
from backfold.pretext import HiddenPatches, Masking
from backfold.restoration import restoration_losses
from backfold.sparse import running_tokens
from backfold.training.step import CompiledStep, RestorationTraining
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
    "conditional": "Backfold, conditional",
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
        if model.family != "vit" and self.method in ("mae", "sparse", "conditional"):
            return False
        if self.method == "masking" and (self.compiled or self.precision != "float32"):
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
        self.modules: dict[str, nn.Module] = {"restored": self.energy, "fused": self.fused}
        self.generator = torch.Generator(device).manual_seed(seed)
        shape = (batch, 3, model.image_size, model.image_size)
        self.images = torch.randn(shape, generator=self.generator, device=device)
        self.labels = torch.randint(NUM_CLASSES, (batch,), generator=self.generator, device=device)
        self.task = Masking(MASK_RATIO, model.mask_size)
        self.dense = self.task(self.images, self.generator)

    def other(self, method: str) -> Any:
        """The model of an ordinary or a rival's step, in train mode; made once."""
        if method not in self.modules:
            ordinary = method.startswith("ordinary")
            made = self._ordinary(method) if ordinary else self._rival(method)
            self.modules[method] = made.train().to(self.device)
        return self.modules[method]

    def _ordinary(self, method: str) -> nn.Module:
        # A copy: the energy's batch norms stay on fixed statistics, an ordinary step's do not.
        backbone = copy.deepcopy(self.fused.backbone)
        if method == "ordinary-plain":
            use_plain_attention(backbone)
        return Classifier(backbone, self.energy.head.weight.shape[-1])

    def _rival(self, method: str) -> nn.Module:
        """That of transformers as it comes; MAE's decoder has 8 layers of width 512."""
        import transformers

        sizes = {"image_size": self.model.image_size}
        if self.model.family == "vit":
            blocks = self.energy.backbone.blocks
            sizes |= {
                "hidden_size": self.energy.backbone.embed_dim,
                "num_hidden_layers": len(blocks),
                "num_attention_heads": blocks[0].attn.num_heads,
                "intermediate_size": blocks[0].mlp.fc1.out_features,
                "patch_size": self.model.mask_size,
            }
        if method == "mae":
            kind: Any = transformers.ViTMAEForPreTraining
            config: Any = transformers.ViTMAEConfig(**sizes, mask_ratio=MASK_RATIO)
        elif self.model.family == "vit":
            kind = transformers.ViTForMaskedImageModeling
            config = transformers.ViTConfig(**sizes, encoder_stride=self.model.mask_size)
        else:
            kind = transformers.SwinForMaskedImageModeling
            config = transformers.SwinConfig(**sizes, drop_path_rate=0.0)
        # "sdpa" takes PyTorch's fused kernels, the best attention they have.
        made: nn.Module = kind._from_config(config, attn_implementation="sdpa")
        return made

    def step(self, variant: Variant) -> Step:
        """Forward and backward to all parameters; for "masking" and "forward" only that."""
        method = variant.method
        if method == "masking":
            return lambda: self.task(self.images, self.generator)
        if method in ("exact", "sparse", "conditional"):
            return self._restoration(variant)
        energy = self._compiled(self.fused) if variant.compiled else self.fused
        loss, inputs = (energy, [self.images]) if method == "forward" else self._loss(variant)

        def step() -> None:
            with self._autocast(variant), torch.set_grad_enabled(method != "forward"):
                value = loss(*inputs)
            if value.requires_grad:
                value.backward()

        return step

    def _loss(self, variant: Variant) -> tuple[Callable[..., Tensor], list[Tensor]]:
        """The loss of an ordinary or a rival's step, and what it is given."""
        model = self.other(variant.method)
        if variant.method.startswith("ordinary"):
            return self._compiled(model) if variant.compiled else model, [self.images, self.labels]
        inputs = [self.images]
        if variant.method == "simmim":
            patch = model.config.patch_size
            inputs.append(self.dense.loss_mask[:, 0, ::patch, ::patch].flatten(1))

        def loss(*inputs: Tensor) -> Tensor:
            return model(*inputs).loss

        return self._compiled(loss, whole=False) if variant.compiled else loss, inputs

    def _autocast(self, variant: Variant) -> AbstractContextManager[object]:
        enabled = variant.precision == "bf16"
        return torch.autocast(self.device.type, dtype=torch.bfloat16, enabled=enabled)

    @staticmethod
    def _compiled(function: Callable[..., Tensor], whole: bool = True) -> Callable[..., Tensor]:
        return torch.compile(function, fullgraph=whole, dynamic=False)

    def _restoration(self, variant: Variant) -> Step:
        corruption, energy = self.dense, self.energy
        conditional, size = variant.method == "conditional", self.model.mask_size
        if conditional:
            task, energy = Masking(MASK_RATIO, size, normalised_share=0.0), self.fused
            corruption = HiddenPatches((task,), (1.0,), task)(self.images, self.generator)
        elif variant.method == "sparse":
            sparse = Masking(MASK_RATIO, size, hidden_share=HIDDEN_SHARE)
            corruption = sparse(self.images, self.generator)
        sides = (self.model.image_size, self.model.image_size)
        tokens = running_tokens(corruption.running, energy.backbone, sides)
        training = RestorationTraining(energy, 1.0, conditional=conditional)
        if variant.compiled:
            training.compiled = CompiledStep(training.restore)

        def restore(points: Tensor) -> tuple[Tensor, Tensor, Tensor]:
            with self._autocast(variant):
                return training(points, self.images, corruption.loss_mask, *tokens)

        losses = partial(restoration_losses, restore, corruption.corrupted, variant.num_steps)
        return lambda: _backward_each(losses())

    def clear_gradients(self) -> None:
        """Set all gradients to None, as before every step."""
        for module in self.modules.values():
            module.zero_grad(set_to_none=True)


def _backward_each(losses: Iterable[tuple[Tensor, ...]]) -> None:
    for loss, *_ in losses:
        loss.backward()
