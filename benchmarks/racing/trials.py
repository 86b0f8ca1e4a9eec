"""The recipe's trials: each a hypothesis and what it changes."""

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from functools import partial
from typing import Any

from torch import Tensor

from backfold.pretext import Colorization, Masking, Sorting
from racing.changes import (
    averaged,
    banded,
    compound,
    detail,
    everywhere,
    inpaint,
    judge_patches,
    local_scale,
    louder_head,
    noisy,
    normalised_target,
    normalised_where_masked,
    structure,
    two_heads,
)
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
        precision: of the training.
    """

    name: str
    hypothesis: str
    recipe: Mapping[str, Any] = field(default_factory=dict, hash=False)
    lr: float = 2e-3
    kind: Kind = "energy"
    loss: Loss | None = None
    prepare: Callable[[Any], None] = _nothing
    backbone: str = "vit"
    precision: str = "bf16-mixed"

    @property
    def contender(self) -> Contender:
        """As the race builds it."""
        return Contender(self.name, self.name, self.backbone, self.kind, self.recipe)


def mixture(**weights: float) -> dict[str, Any]:
    """A recipe with these tasks; what moves is as large as what hides."""
    return {
        "pretext": "mixture",
        "tasks": {
            "mixture": weights,
            "sorting": {"sorting_patch_size": 8},
            "exchange": {"exchange_patch_size": 8},
        },
    }


def masking(**settings: Any) -> dict[str, Any]:
    """A recipe with masking of this kind."""
    return {"tasks": {"masking": settings}}


def with_masking(mix: Mapping[str, Any], **settings: Any) -> dict[str, Any]:
    """A mixture with masking of this kind."""
    return {**mix, "tasks": {**mix["tasks"], "masking": settings}}


def mixed_masking(**settings: Any) -> dict[str, Any]:
    """The mixture of three with masking of this kind."""
    return with_masking(MIX, **settings)


def excerpt(recipe: Mapping[str, Any], squares: int) -> dict[str, Any]:
    """A recipe that runs on so many of an image's sixteen squares."""
    part = {"share": squares / 16, "excerpt_patch_size": 8}
    return {**recipe, "tasks": {**recipe.get("tasks", {}), "excerpt": part}}


MIX = mixture(masking=1, sorting=1, colorization=1)
BLOCKS_AWAKE = {"backbone_options": {"ls_init_value": 0.1}}
XAVIER = {"backbone_options": {"weight_init": "jax"}}
HEADS_3 = {
    **XAVIER,
    **with_masking(mixture(masking=3, sorting=1), normalised_share=0.75),
}
# In the order in which they were thought of; those without a line in the log have not been run.
_ALL = [
    Trial("untrained", "the floor", kind="untrained"),
    Trial("mae", "the mark to beat", kind="mae"),
    Trial("mae-lr5e-4", "the mark to beat", kind="mae", lr=5e-4),
    Trial("simmim", "the mark to beat", kind="simmim"),
    Trial("dense", "the product's defaults"),
    Trial("normalised", "MAE's target, which restores no pixels", loss=normalised_target),
    Trial("detail-1", "detail in units of the patch's contrast, beside pixels",
          loss=partial(detail, weight=1.0)),
    Trial("structure-1", "both sides normalised by their own contrast, beside pixels",
          loss=partial(structure, weight=1.0)),
    Trial("structure-mix", "the same with the mixture", MIX, loss=partial(structure, weight=1.0)),
    Trial("sorting", "only the content of patches tells where they belong",
          {"pretext": "sorting", "tasks": {"sorting": {"sorting_patch_size": 8}}}),
    Trial("superresolution", "fine from coarse", {"pretext": "superresolution"}),
    Trial("denoising", "the issue's first trials made features worse by it",
          {"pretext": "denoising"}),
    Trial("denoising-loud", "the weights that write corrections read the image, too: noise "
          "must drown the content before they read content", {
              "pretext": "denoising",
              "tasks": {"denoising": {"min_noise_std": 0.5, "max_noise_std": 3.0}}}),
    Trial("denoising-coarse", "or noise that is as coarse as content", {
        "pretext": "denoising", "tasks": {"denoising": {"octaves": 5}}}),
    Trial("denoising-coarse-loud", "both", {"pretext": "denoising", "tasks": {"denoising": {
              "octaves": 5, "min_noise_std": 0.5, "max_noise_std": 2.0}}}),
    Trial("colorization", "colours need names of things", {"pretext": "colorization"}),
    Trial("mask-sort", "two tasks share what is semantic", mixture(masking=1, sorting=1)),
    Trial("mask-sort-color", "three tasks", MIX),
    Trial("xavier", "weights of 0.02 leave the Jacobian of a narrow ViT near one: nothing to learn "
          "from; timm's 'jax' initialisation follows the width", XAVIER),
    Trial("foreign", "squares of other images must be found before they can be restored",
          {"pretext": "exchange", "tasks": {"exchange": {"exchange_patch_size": 8}}}),
    Trial("four", "masking, sorting, colours and foreign squares",
          mixture(masking=1, sorting=1, colorization=1, exchange=1)),
    Trial("normalised-mix", "MAE's target for masked images, pixels for the other tasks", MIX,
          loss=normalised_where_masked),
    Trial("normalised-all", "MAE's target for every task, so that no image is restored to another "
          "space than the next", MIX, loss=normalised_target),
    Trial("two-heads", "a head that restores pixels and one to MAE's target, in turn",
          MIX, prepare=two_heads),
    Trial("two-heads-masking", "the same with masking alone", prepare=two_heads),
    Trial("normalised-k2", "MAE's target, in two steps", {"num_steps": 2}, loss=normalised_target),
    Trial("second-head", "the same with masking alone, as the product has it",
          masking(normalised_share=0.5)),
    Trial("second-head-75", "and more hidden, as MAE",
          masking(normalised_share=0.5, mask_ratio=0.75)),
    Trial("second-head-8", "seven of eight images for what makes features",
          masking(normalised_share=0.875)),
    Trial("second-head-mix", "and sorting and colours, to pixels",
          mixed_masking(normalised_share=0.5)),
    Trial("mix-lr4e-3", "the race's best rate was the grid's highest", MIX, lr=4e-3),
    Trial("inpainted", "hidden squares start from the mean around them: what is left to restore is "
          "structure, and pixels are restored", prepare=inpaint),
    Trial("local", "the same, and in units of the contrast around: MAE's target, but known without "
          "the clean image, so that pixels are restored", prepare=inpaint, loss=local_scale),
    Trial("local-mix", "the same in the mixture", MIX, prepare=inpaint, loss=local_scale),
    Trial("plausible", "the energy itself tells corrupted images from clean ones, so the top layer "
          "learns too", {**mixture(masking=1, sorting=1, colorization=1, identity=1),
                         "plausibility_weight": 0.1}),
    Trial("plausible-patches", "the same for each patch: what was changed, in its surroundings?",
          mixture(masking=1, sorting=1, colorization=1, exchange=1),
          prepare=partial(judge_patches, 0.1)),
    Trial("xavier-mix", "a larger start for the mixture", {**XAVIER, **MIX}),
    Trial("mix-mask75", "more hidden", mixed_masking(mask_ratio=0.75)),
    Trial("mix-mask4", "smaller squares", mixed_masking(mask_patch_size=4)),
    Trial("mix-mask16", "larger squares", mixed_masking(mask_patch_size=16)),
    Trial("mix-ema", "an average of the weights, decay 0.99", MIX, prepare=partial(averaged, 0.99)),
    Trial("mix-betas", "AdamW's usual second beta, 0.999",
          {**MIX, "optimizer": {"betas": [0.9, 0.999]}}),
    Trial("mix-k2", "two restoration steps", {**MIX, "num_steps": 2}),
    Trial("mix-k4", "four", {**MIX, "num_steps": 4}),
    Trial("mix-noise", "noise before the step smooths the energy", MIX,
          prepare=partial(noisy, 0.1)),
    Trial("mix-k2-noise", "noise before each of two steps: Langevin dynamics",
          {**MIX, "num_steps": 2}, prepare=partial(noisy, 0.1)),
    Trial("mix-k2-mask75", "two, and more hidden", {**mixed_masking(mask_ratio=0.75),
                                                     "num_steps": 2}),
    Trial("mix-quadratic", "the top layer's output reaches the gradient",
          {**MIX, "head": "quadratic"}),
    Trial("mix-pooled", "what is sent back comes from the whole image",
          {**MIX, "head": "pooled"}),
    Trial("mix-louder-8", "a larger first gradient", MIX, prepare=partial(louder_head, 8.0)),
    Trial("mix-quieter-8", "a smaller one: images that need little restoring start unharmed", MIX,
          prepare=partial(louder_head, 1 / 8)),
    Trial("mix-everywhere", "visible pixels count too", MIX, loss=everywhere),
    Trial("mix-sort2", "sorting twice as often", mixture(masking=1, sorting=2, colorization=1)),
    Trial("mix-color2", "colours twice as often", mixture(masking=1, sorting=1, colorization=2)),
    Trial("convnext-untrained", "its floor", kind="untrained", backbone="convnext"),
    Trial("convnext-mix", "its mark", MIX, lr=5e-4, backbone="convnext"),
    Trial("convnext-noise", "a norm over an empty patch has a huge gradient, which sets the scale "
          "for all; noise in hidden squares has none", mixed_masking(fill="noise"), lr=1e-3,
          backbone="convnext"),
    Trial("convnext-twoheads", "and masking alone, with a second head",
          masking(fill="noise", normalised_share=0.5), lr=1e-3, backbone="convnext"),
    Trial("convnext-plausible", "and the energy itself tells clean images",
          {**with_masking(mixture(masking=1, sorting=1, colorization=1, identity=1), fill="noise"),
           "plausibility_weight": 1.0}, lr=1e-3, backbone="convnext"),
    Trial("mix-float32", "second derivatives lose too much in bf16", MIX, precision="32-true"),
    Trial("mix-half", "eight of sixteen squares run, whatever the task: half of the time",
          excerpt(MIX, 8)),
    Trial("mix-6", "six of sixteen squares", excerpt(MIX, 6)),
    Trial("xavier-mix-half", "both", excerpt({**XAVIER, **MIX}, 8)),
    Trial("xavier-mix-6", "both, and faster", excerpt({**XAVIER, **MIX}, 6)),
    Trial("xavier-heads-half", "and a second head",
          excerpt({**XAVIER, **mixed_masking(normalised_share=0.5)}, 8)),
    Trial("xavier-mask2-half", "and more of what makes neighbours",
          excerpt({**XAVIER, **mixture(masking=2, sorting=1, colorization=1)}, 8)),
    Trial("xavier-quadratic-half", "and a head that the top layer's output matters to",
          excerpt({**XAVIER, **MIX, "head": "quadratic"}, 8)),
    Trial("heads3", "three of four images are masked, three of four of those for what makes "
          "features; sorting for fine-tuning", HEADS_3),
    Trial("heads3-half", "the same on half of the squares", excerpt(HEADS_3, 8)),
    Trial("heads3-float32", "the same in float32", HEADS_3, precision="32-true"),
    Trial("mix-half-banded", "coarse errors drown fine ones; all in units of the data, so that "
          "pixels are restored", excerpt(MIX, 8), loss=partial(banded, power=1.0)),
    Trial("mix-half-banded2", "half of the way", excerpt(MIX, 8), loss=partial(banded, power=0.5)),
    Trial("mix-half-coarse", "if fine errors make features worse, coarse ones may make them better",
          excerpt(MIX, 8), loss=partial(banded, power=-0.5)),
    Trial("mix-4", "as many as MAE's encoder sees", excerpt(MIX, 4)),
    Trial("mix-sort2-half", "sorting twice as often",
          excerpt(mixture(masking=1, sorting=2, colorization=1), 8)),
    Trial("mask2-sort-half", "no colours, masking twice as often",
          excerpt(mixture(masking=2, sorting=1), 8)),
    Trial("sorting-all", "all patches move",
          {"pretext": "sorting", "tasks": {"sorting": {"sorting_patch_size": 8, "share": 1.0}}}),
    Trial("sorting-half", "eight of sixteen squares run, all of them move", excerpt(
        {"pretext": "sorting", "tasks": {"sorting": {"sorting_patch_size": 8, "share": 1.0}}}, 8)),
    Trial("grey-sorting", "grey patches are sorted and coloured",
          prepare=partial(compound, (Sorting(8, 0.5), Colorization()))),
    Trial("masked-sorting", "a third is hidden, and what is seen is out of order",
          prepare=partial(compound, (Sorting(8, 0.75), Masking(0.4, 8)))),
    Trial("xavier-sorting", "a larger start for sorting",
          {**XAVIER, "pretext": "sorting", "tasks": {"sorting": {"sorting_patch_size": 8}}}),
    Trial("mask-sort2", "sorting wins in fine-tuning, masking in neighbours",
          mixture(masking=1, sorting=2)),
    Trial("convnext-scaled", "timm starts each block at a millionth of its output, so that an "
          "energy starts with next to no blocks: at a tenth", {
              **with_masking(MIX, fill="noise"), **BLOCKS_AWAKE}, lr=1e-3, backbone="convnext"),
    Trial("convnext-scaled-plausible", "and the energy itself tells clean images", {
        **with_masking(mixture(masking=1, sorting=1, colorization=1, identity=1), fill="noise"),
        **BLOCKS_AWAKE, "plausibility_weight": 1.0}, lr=1e-3, backbone="convnext"),
    Trial("convnext-sorting", "what fine-tunes best on a ViT", {
        "pretext": "sorting", "tasks": {"sorting": {"sorting_patch_size": 8}}, **BLOCKS_AWAKE},
          lr=1e-3, backbone="convnext"),
    Trial("sparse75", "half of the tokens run", masking(mask_ratio=0.75, hidden_share=1 / 3)),
]  # fmt: skip
TRIALS = {trial.name: trial for trial in _ALL}
