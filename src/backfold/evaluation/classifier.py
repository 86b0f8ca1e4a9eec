"""A backbone with a linear head, as it is fine-tuned."""

import logging
from collections.abc import Callable, Mapping
from types import SimpleNamespace
from typing import Any, cast

import timm
import torch
from timm.models import group_parameters, split_model_name_tag
from timm.optim import param_groups_layer_decay, param_groups_weight_decay
from torch import Tensor, nn

from backfold.backbone import feature_map
from backfold.data.statistics import ChannelStatistics
from backfold.errors import UserError
from backfold.restoration import eval_mode
from backfold.training.pretrained import Pretrained

LOGGER = logging.getLogger("backfold")
HEAD_STD = 0.01
BACKBONE = "backbone."
# What not every timm model takes.
OPTIONAL_ARGUMENTS = ("img_size", "drop_path_rate")

MakeBackbone = Callable[[float], nn.Module]
"""From a drop path rate to a new backbone, in train mode on the CPU."""


class Classifier(nn.Module):
    """Averages the backbone's feature map over the positions, norms it and classifies it.

    Args:
        backbone: any module that `backfold.backbone.feature_map` takes.
        classes: (classes,) whole numbers, rising: the labels that the logits stand for.
        image_shape: (channels, height, width).

    Attributes:
        classes: as given.
    """

    classes: Tensor

    def __init__(
        self, backbone: nn.Module, classes: Tensor, image_shape: tuple[int, int, int]
    ) -> None:
        super().__init__()
        self.backbone = backbone
        with eval_mode(backbone), torch.no_grad():
            num_features = feature_map(backbone, torch.zeros(2, *image_shape)).shape[-1]
        self.norm = nn.LayerNorm(num_features)
        self.head = nn.Linear(num_features, len(classes))
        nn.init.trunc_normal_(self.head.weight, std=HEAD_STD)
        nn.init.zeros_(self.head.bias)
        self.register_buffer("classes", classes)

    def forward(self, images: Tensor) -> Tensor:
        """Logits (batch, classes) of normalised images (batch, channels, height, width)."""
        logits: Tensor = self.head(self.norm(feature_map(self.backbone, images).mean(dim=1)))
        return logits

    def group_matcher(self, coarse: bool = False) -> Callable[[str], int]:
        """From a parameter's name to its layer, counted from the images; see timm's models.

        The head is where timm's own classifier would be.
        """
        matcher = getattr(self.backbone, "group_matcher", None)
        layers = {"head": 0}
        if matcher is not None:
            named = {
                **dict(self.backbone.named_parameters()),
                _classifier_name(self.backbone): None,
            }
            listed: Any = SimpleNamespace(named_parameters=lambda: iter(named.items()))
            layers = group_parameters(listed, matcher(coarse=coarse), reverse=True)
        top = max(layers.values())
        of = {BACKBONE + name: layer for name, layer in layers.items()}
        return lambda name: of.get(name, top)

    def no_weight_decay(self) -> set[str]:
        """Names of the parameters that the backbone wants without decay."""
        names: set[str] = getattr(self.backbone, "no_weight_decay", set)()
        return {BACKBONE + name for name in names}


def _classifier_name(backbone: nn.Module) -> str:
    """The name that timm's own classifier's weight would have."""
    known: Mapping[str, Any] = getattr(backbone, "pretrained_cfg", None) or {}
    name = known.get("classifier") or "head"
    return f"{name if isinstance(name, str) else name[0]}.weight"


def parameter_groups(
    classifier: Classifier, weight_decay: float, layer_decay: float
) -> list[dict[str, Any]]:
    """The optimizer's groups, with ``lr_scale``, a factor of the learning rate, where it decays.

    It is 1 for the head and one factor ``layer_decay`` less for each layer below. What counts as a
    layer is what timm's ``group_matcher`` says; a backbone without one has no layers. Norms, biases
    and what the backbone exempts have no weight decay.

    Args:
        classifier: its trainable parameters are grouped.
        weight_decay: 0 or more.
        layer_decay: above 0, at most 1, which switches it off.
    """
    exempt = classifier.no_weight_decay()
    if layer_decay < 1.0 and not hasattr(classifier.backbone, "group_matcher"):
        LOGGER.warning(
            f"layer_decay {layer_decay:g} has no effect: {type(classifier.backbone).__name__} does "
            "not say what its layers are"
        )
        layer_decay = 1.0
    groups = (
        param_groups_weight_decay(classifier, weight_decay, no_weight_decay_list=exempt)
        if layer_decay == 1.0
        else param_groups_layer_decay(
            classifier, weight_decay, no_weight_decay_list=exempt, layer_decay=layer_decay
        )
    )
    return cast("list[dict[str, Any]]", groups)


def classify(
    classifier: Classifier,
    images: Tensor,
    statistics: ChannelStatistics,
    device: torch.device,
    batch_size: int = 512,
) -> Tensor:
    """Logits (images, classes) in float32 on the CPU, the classifier in eval mode.

    Args:
        classifier: on the device.
        images: uint8 or float in [0, 1], (images, channels, height, width).
        statistics: normalise them.
        device: where to compute.
        batch_size: images at once.
    """
    with eval_mode(classifier), torch.inference_mode():
        parts = [
            classifier(statistics.normalize(batch.to(device))).float().cpu()
            for batch in images.split(batch_size)
        ]
    return torch.cat(parts)


def backbone_maker(run: Pretrained, weights: Mapping[str, Tensor] | None) -> MakeBackbone:
    """How a run's backbone is built anew, as timm has it: fused attention, its own layers.

    Args:
        run: architecture, channels and image size.
        weights: under timm's names, as `backfold.exporting.weights.exported_backbone` has them;
            None leaves timm's random ones, which then depend on PyTorch's generator.
    """

    def make(drop_path: float) -> nn.Module:
        backbone = _build(run, drop_path)
        if weights is not None:
            try:
                backbone.load_state_dict(weights)
            except RuntimeError as error:
                reason = " ".join(str(error).split())[:200]
                raise UserError(
                    f"the weights do not fit timm's {run.config.backbone!r}: {reason}; use the "
                    "versions in the run's run.json"
                ) from error
        return backbone.train()

    return make


def _build(run: Pretrained, drop_path: float) -> nn.Module:
    config = run.config
    arguments: dict[str, Any] = {
        "in_chans": run.channels,
        "img_size": run.image_size,
        **config.backbone_options,
        "drop_path_rate": drop_path,
    }
    while True:
        try:
            backbone: nn.Module = timm.create_model(
                split_model_name_tag(config.backbone)[0], num_classes=0, **arguments
            )
            return backbone
        except TypeError as error:
            named = (name for name in OPTIONAL_ARGUMENTS if name in str(error))
            unknown = next((name for name in named if name in arguments), None)
            if unknown is None:
                raise
            del arguments[unknown]
            if unknown == "drop_path_rate" and drop_path:
                LOGGER.warning(f"drop_path {drop_path:g} has no effect on {config.backbone!r}")
