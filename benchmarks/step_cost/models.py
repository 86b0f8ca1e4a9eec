"""The backbones that are measured, at their sizes."""

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, Literal

Family = Literal["vit", "swin", "convolutional"]


@dataclass(frozen=True)
class Model:
    """A backbone at one image size.

    Args:
        name: for the command line and the results.
        title: for tables and plots.
        backbone: timm's name.
        family: "vit" has sparse steps and rivals, "swin" a rival.
        image_size: side in pixels.
        mask_size: side of the hidden squares in pixels; a ViT's patches.
        cpu_batch: images in a step on a CPU.
        gpu_batch: images in a step on a GPU.
        options: further keyword arguments for timm.
    """

    name: str
    title: str
    backbone: str
    family: Family
    image_size: int
    mask_size: int
    cpu_batch: int
    gpu_batch: int
    options: Mapping[str, Any] = field(default_factory=dict)


def vision_transformer(size: str, image_size: int, cpu_batch: int, gpu_batch: int) -> Model:
    patch = 4 if image_size == 32 else 16
    short = {"tiny": "Ti", "small": "S", "base": "B"}[size]
    return Model(
        f"vit_{size}_{image_size}",
        f"ViT-{short}/{patch}, {image_size} px",
        f"vit_{size}_patch16_224",
        "vit",
        image_size,
        patch,
        cpu_batch,
        gpu_batch,
        {"patch_size": patch},
    )


MODELS = (
    vision_transformer("tiny", 32, 16, 512),
    vision_transformer("small", 32, 8, 512),
    vision_transformer("base", 32, 4, 256),
    vision_transformer("tiny", 224, 8, 256),
    vision_transformer("small", 224, 4, 256),
    vision_transformer("base", 224, 2, 128),
    Model(
        "swin_tiny_224", "Swin-T, 224 px", "swin_tiny_patch4_window7_224", "swin", 224, 32, 4, 128,
        {"drop_path_rate": 0.0},
    ),
    Model("convnext_tiny_224", "ConvNeXt-T, 224 px", "convnext_tiny", "convolutional",
          224, 32, 4, 128),
    Model("resnet50_224", "ResNet-50, 224 px", "resnet50", "convolutional", 224, 32, 4, 128),
)  # fmt: skip


def find(name: str) -> Model:
    return next(model for model in MODELS if model.name == name)
