"""The recipe's trials: each a hypothesis and what it changes."""

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from functools import partial
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

from backfold.pretext import Corruption, Masking, Mixture
from racing.contenders import Contender, Kind

Loss = Callable[[Tensor, Tensor, Tensor], Tensor]


def _nothing(_: Any) -> None:
    pass


@dataclass(frozen=True)
class Trial:
    """One line of the log.

    Args:
        name: of it.
        hypothesis: why it might be better.
        recipe: what differs from the product's defaults.
        lr: highest of the schedule.
        kind: as a contender's.
        loss: in place of the product's.
        prepare: changes the method before its first step.
        backbone: "vit" or "convnext".
    """

    name: str
    hypothesis: str
    recipe: Mapping[str, Any] = field(default_factory=dict, hash=False)
    lr: float = 2e-3
    kind: Kind = "energy"
    loss: Loss | None = None
    prepare: Callable[[Any], None] = _nothing
    backbone: str = "vit"

    @property
    def contender(self) -> Contender:
        """As the race builds it."""
        return Contender(self.name, self.name, self.backbone, self.kind, self.recipe)


def patches(images: Tensor, size: int = 8) -> Tensor:
    """(batch, patches, pixels x channels)."""
    return F.unfold(images.float(), size, stride=size).transpose(1, 2)


def patch_hidden(loss_mask: Tensor, size: int = 8) -> Tensor:
    """1 where a patch counts, (batch, patches)."""
    return F.max_pool2d(loss_mask.float(), size).flatten(1)


def _per_patch(distance: Tensor, loss_mask: Tensor) -> Tensor:
    counts = patch_hidden(loss_mask)
    per_image = (distance.mean(-1) * counts).sum(1) / counts.sum(1).clamp(min=1)
    return per_image.mean()


def normalised_target(restored: Tensor, clean: Tensor, loss_mask: Tensor) -> Tensor:
    """MAE's target: restores normalised values, not pixels."""
    target = patches(clean)
    target = (target - target.mean(-1, keepdim=True)) / (target.var(-1, keepdim=True) + 1e-4).sqrt()
    return _per_patch(F.smooth_l1_loss(patches(restored), target, reduction="none"), loss_mask)


def detail(
    restored: Tensor, clean: Tensor, loss_mask: Tensor, weight: float, floor: float = 0.1
) -> Tensor:
    """Pixels as they are, and what differs from each patch's mean in units of its deviation."""
    ours, target = patches(restored), patches(clean)
    plain = F.smooth_l1_loss(ours, target, reduction="none")
    ours, target = (part - part.mean(-1, keepdim=True) for part in (ours, target))
    deviation = (target.square().mean(-1, keepdim=True) + floor**2).sqrt()
    scaled = F.smooth_l1_loss(ours / deviation, target / deviation, reduction="none")
    return _per_patch(plain + weight * scaled, loss_mask)


def structure(
    restored: Tensor, clean: Tensor, loss_mask: Tensor, weight: float, floor: float = 0.1
) -> Tensor:
    """Pixels as they are, and each patch normalised by its own mean and deviation, both sides."""
    ours, target = patches(restored), patches(clean)
    plain = F.smooth_l1_loss(ours, target, reduction="none")

    def normalised(part: Tensor) -> Tensor:
        part = part - part.mean(-1, keepdim=True)
        return part / (part.square().mean(-1, keepdim=True) + floor**2).sqrt()

    scaled = F.smooth_l1_loss(normalised(ours), normalised(target), reduction="none")
    return _per_patch(plain + weight * scaled, loss_mask)


def everywhere(restored: Tensor, clean: Tensor, _: Tensor) -> Tensor:
    """The loss counts on visible pixels too."""
    return F.smooth_l1_loss(restored.float(), clean.float())


def louder_head(factor: float, method: Any) -> None:
    """Start from a larger first gradient."""
    with torch.no_grad():
        method.module.head.weight.mul_(factor)


class Foreign:
    """Hidden squares show another image of the batch; nothing tells which squares these are.

    Args:
        ratio: of the squares.
        size: side of the squares in pixels.
        everywhere: whether the loss counts on the image's own squares too.
    """

    def __init__(self, ratio: float, size: int = 8, everywhere: bool = True) -> None:
        self.masking, self.everywhere = Masking(mask_ratio=ratio, mask_patch_size=size), everywhere

    def __call__(self, clean: Tensor, generator: torch.Generator) -> Corruption:
        """Corrupt a batch."""
        mask = self.masking(clean, generator).loss_mask
        corrupted = torch.where(mask, clean.roll(1, 0), clean)
        return Corruption(corrupted, torch.ones_like(mask) if self.everywhere else mask)


def with_foreign(ratio: float, weight: float, everywhere: bool, method: Any) -> None:
    """Mix foreign squares into the recipe's task, or take them alone."""
    foreign, task = Foreign(ratio, everywhere=everywhere), method.stepper.task
    if weight == 0:
        method.stepper.task = foreign
    elif isinstance(task, Mixture):
        method.stepper.task = Mixture((*task.tasks, foreign), (*task.weights, weight))
    else:
        method.stepper.task = Mixture((task, foreign), (1.0, weight))


def mixture(**weights: float) -> dict[str, Any]:
    """A recipe with these tasks; sorted patches as large as the hidden ones."""
    return {
        "pretext": "mixture",
        "tasks": {"mixture": weights, "sorting": {"sorting_patch_size": 8}},
    }


def masking(**settings: Any) -> dict[str, Any]:
    """A recipe with masking of this kind."""
    return {"tasks": {"masking": settings}}


XAVIER = {"backbone_options": {"weight_init": "jax"}}
_ALL = [
    Trial("untrained", "the floor", kind="untrained"),
    Trial("mae", "the mark to beat", kind="mae"),
    Trial("simmim", "the mark to beat", kind="simmim"),
    Trial("dense", "the product's defaults"),
    Trial("dense-lr1e-3", "a lower learning rate", lr=1e-3),
    Trial("dense-lr4e-3", "a higher learning rate", lr=4e-3),
    Trial("normalised", "MAE's target, which restores no pixels", loss=normalised_target),
    Trial("detail-1", "detail in units of the patch's contrast, beside pixels",
          loss=partial(detail, weight=1.0)),
    Trial("structure-1", "both sides normalised by their own contrast, beside pixels",
          loss=partial(structure, weight=1.0)),
    Trial("structure-mix", "the same with the mixture",
          mixture(masking=1, sorting=1, colorization=1), loss=partial(structure, weight=1.0)),
    Trial("quadratic", "the top layer's output reaches the gradient", {"head": "quadratic"}),
    Trial("everywhere", "visible pixels count too", loss=everywhere),
    Trial("louder-8", "a larger first gradient", prepare=partial(louder_head, 8.0)),
    Trial("mask75", "more hidden", masking(mask_ratio=0.75)),
    Trial("sorting", "only the content of patches tells where they belong",
          {"pretext": "sorting", "tasks": {"sorting": {"sorting_patch_size": 8}}}),
    Trial("superresolution", "fine from coarse", {"pretext": "superresolution"}),
    Trial("colorization", "colours need names of things", {"pretext": "colorization"}),
    Trial("mask-sort", "two tasks share what is semantic", mixture(masking=1, sorting=1)),
    Trial("mask-sort-color", "three tasks", mixture(masking=1, sorting=1, colorization=1)),
    Trial("mask-color", "two tasks", mixture(masking=1, colorization=1)),
    Trial("mask4", "smaller squares", masking(mask_patch_size=4)),
    Trial("mask16", "larger squares", masking(mask_patch_size=16)),
    Trial("k2", "two restoration steps", {"num_steps": 2}),
    Trial("xavier", "weights of 0.02 leave the Jacobian of a narrow ViT near one: nothing to learn "
          "from; timm's 'jax' initialisation follows the width", XAVIER),
    Trial("xavier-quadratic", "both", {**XAVIER, "head": "quadratic"}),
    Trial("xavier-mask-sort-color", "both",
          {**XAVIER, **mixture(masking=1, sorting=1, colorization=1)}),
    Trial("xavier-mask-color", "both", {**XAVIER, **mixture(masking=1, colorization=1)}),
    Trial("xavier-lr4e-3", "and faster", XAVIER, lr=4e-3),
    Trial("xavier-sparse75", "and half of the tokens",
          {**XAVIER, **masking(mask_ratio=0.75, hidden_share=1 / 3)}),
    Trial("xavier-detail", "and detail in units of contrast", XAVIER,
          loss=partial(detail, weight=1.0)),
    Trial("foreign", "squares of other images must be found before they can be restored",
          prepare=partial(with_foreign, 0.4, 0, True)),
    Trial("foreign-hidden", "the same, the loss on them alone",
          prepare=partial(with_foreign, 0.4, 0, False)),
    Trial("four", "masking, sorting, colours and foreign squares",
          mixture(masking=1, sorting=1, colorization=1),
          prepare=partial(with_foreign, 0.4, 1.0, True)),
    Trial("sparse75", "half of the tokens run", masking(mask_ratio=0.75, hidden_share=1 / 3)),
]  # fmt: skip
TRIALS = {trial.name: trial for trial in _ALL}
