"""How large a race is: data, backbones, schedule and evaluation, by the name of the size."""

from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from typing import Any

import timm
import torch
from torch import nn


@dataclass(frozen=True)
class Decoder:
    """Of the masked autoencoder: narrower and shallower than its encoder, as published."""

    width: int
    layers: int
    heads: int


@dataclass(frozen=True)
class BackboneSpec:
    """A timm model, and what goes with it.

    Args:
        name: timm's.
        options: further keyword arguments of the model.
        mask_size: side in pixels of the squares that are hidden by energy and SimMIM.
        decoder: of the masked autoencoder; None where it has no form.
    """

    name: str
    options: Mapping[str, Any]
    mask_size: int
    decoder: Decoder | None = None

    def build(self, image_size: int, seed: int, drop_path: float = 0.0) -> nn.Module:
        """A new backbone as timm makes it, without classifier, its weights decided by the seed."""
        # Convolutional ones take images of any size, and no such argument.
        sized = {} if self.decoder is None else {"img_size": image_size}
        with torch.random.fork_rng(devices=[]):
            torch.default_generator.manual_seed(seed)
            model: nn.Module = timm.create_model(
                self.name, num_classes=0, drop_path_rate=drop_path, **sized, **self.options
            )
        return model


@dataclass(frozen=True)
class FineTuningBudget:
    """Fine-tuning of every backbone, and training from scratch.

    Args:
        labels_per_class: one fine-tuning for each of these numbers.
        steps: optimizer steps of each of them, whatever the labels are.
        batch: images in a step.
        learning_rates: the grid of highest ones; the best on the validation images is taken.
    """

    labels_per_class: tuple[int, ...] = (10, 100)
    steps: int = 200
    batch: int = 64
    learning_rates: tuple[float, ...] = (5e-4, 2e-3)


@dataclass(frozen=True)
class Size:
    """A race's extent.

    Args:
        name: "cpu", "gpu", "gpu-imagenette" or "smoke".
        data: how the data are called beside a number.
        image_size: side in pixels.
        backbones: by "vit" and "convnext".
        images: unlabelled images that are pretrained on; None takes all but the validation images.
        validation: images of the training file for every choice, and for nothing else.
        labelled: of the unlabelled images, how many the probes know the labels of.
        test: images of the test file that numbers are reported on.
        batch: images in an optimizer step.
        epochs: of a whole run.
        warmup_share: of a run's epochs.
        trial_share: a learning-rate trial's epochs as a share of the run's.
        learning_rates: highest ones of the schedule, tried for every contender.
        points: shares of a run at which the backbone is kept and probed.
        draws: of 10 labelled images a class.
        fine_tuning: see there.
        timed_steps: of each contender in each round of timing.
        rounds: of timing.
        workers: processes that make contrastive views; 0 makes them in this one.
        compiled: all steps run under torch.compile.
    """

    name: str
    data: str
    image_size: int
    backbones: Mapping[str, BackboneSpec]
    images: int | None
    validation: int
    labelled: int
    test: int
    batch: int = 128
    epochs: float = 8.0
    warmup_share: float = 0.1
    trial_share: float = 0.25
    learning_rates: tuple[float, ...] = (5e-4, 1e-3, 2e-3, 4e-3)
    points: tuple[float, ...] = (0.25, 0.5, 1.0)
    draws: int = 5
    fine_tuning: FineTuningBudget = field(default_factory=FineTuningBudget)
    timed_steps: int = 4
    rounds: int = 5
    workers: int = 0
    compiled: bool = False


def _vit(patch: int, width: int, depth: int, heads: int, mask: int, decoder: Decoder) -> Any:
    options = {"patch_size": patch, "embed_dim": width, "depth": depth, "num_heads": heads}
    return BackboneSpec("vit_tiny_patch16_224", options, mask, decoder)


# Of 32 pixels, the usual stem and strides would leave a single position, and kernels of 7 pixels
# are wider than most of the maps.
CONVNEXT = {"patch_size": 2, "output_stride": 16, "kernel_sizes": 3}
CPU = Size(
    name="cpu",
    data="CIFAR-10 (JPEG q92)",
    image_size=32,
    backbones={
        "vit": _vit(8, 128, 4, 4, 8, Decoder(96, 2, 4)),
        "convnext": BackboneSpec(
            "convnext_atto",
            {**CONVNEXT, "depths": (1, 1, 3, 1), "dims": (32, 64, 128, 256)},
            mask_size=8,
        ),
    },
    images=10_000,
    validation=2_000,
    labelled=4_000,
    test=5_000,
    batch=64,
    learning_rates=(2.5e-4, 5e-4, 1e-3, 2e-3),
)
GPU = Size(
    name="gpu",
    data="CIFAR-10 (JPEG q92)",
    image_size=32,
    backbones={"vit": _vit(4, 384, 12, 6, 8, Decoder(256, 4, 8))},
    images=None,
    validation=5_000,
    labelled=45_000,
    test=10_000,
    batch=512,
    epochs=100.0,
    trial_share=0.1,
    fine_tuning=FineTuningBudget((10, 100, 450), 2_000, 256),
    workers=14,
)
IMAGENETTE = replace(
    GPU,
    name="gpu-imagenette",
    data="Imagenette (160 px, squashed)",
    image_size=160,
    backbones={"vit": _vit(16, 384, 12, 6, 32, Decoder(256, 4, 8))},
    validation=900,
    labelled=8_000,
    test=3_925,
    epochs=200.0,
    fine_tuning=FineTuningBudget((10, 80), 2_000, 256),
)
SMOKE = Size(
    name="smoke",
    data="anything",
    image_size=16,
    backbones={
        "vit": _vit(4, 16, 3, 2, 8, Decoder(8, 1, 2)),
        "convnext": BackboneSpec(
            "convnext_atto",
            {**CONVNEXT, "depths": (1, 1, 1, 1), "dims": (8, 8, 8, 8)},
            mask_size=4,
        ),
    },
    images=32,
    validation=16,
    labelled=24,
    test=16,
    batch=16,
    epochs=1.0,
    trial_share=0.5,
    learning_rates=(1e-3, 2e-3),
    points=(0.5, 1.0),
    draws=2,
    fine_tuning=FineTuningBudget((2,), 2, 8, (1e-3,)),
    timed_steps=1,
    rounds=1,
)
SIZES = {size.name: size for size in (CPU, GPU, IMAGENETTE, SMOKE)}
