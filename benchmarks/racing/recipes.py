"""The recipes that the energy races with: what differs from the product's defaults.

Learning rate, batch size, schedule and backbone are the race's own.
"""

from collections.abc import Mapping
from typing import Any

# Of the trials in results/recipe-log.md. Patches of 32-pixel images move and hide in eighths.
MIXED: Mapping[str, Any] = {
    "pretext": "mixture",
    "tasks": {
        "mixture": {"masking": 1.0, "sorting": 1.0, "colorization": 1.0},
        "sorting": {"sorting_patch_size": 8},
    },
}
DENSE: Mapping[str, Any] = MIXED
# Every other masked image is restored to MAE's target, by a second head.
TWO_HEADS: Mapping[str, Any] = {
    **MIXED,
    "tasks": {**MIXED["tasks"], "masking": {"normalised_share": 0.5}},
}
# Started as MAE starts: timm's weights of 0.02 are several times too small for so narrow a ViT.
XAVIER: Mapping[str, Any] = {**MIXED, "backbone_options": {"weight_init": "jax"}}
# Three of four images are masked, three of four of those for MAE's target; the others are sorted.
MASKED: Mapping[str, Any] = {
    **XAVIER,
    "tasks": {"mixture": {"masking": 3.0, "sorting": 1.0}, "masking": {"normalised_share": 0.75}},
}
# On a random half of each image's squares.
EXCERPT: Mapping[str, Any] = {**XAVIER, "tasks": {**MIXED["tasks"], "excerpt": {"share": 0.5}}}
# As MAE: three quarters are hidden; and a third of those run beside the visible quarter.
SPARSE: Mapping[str, Any] = {"tasks": {"masking": {"mask_ratio": 0.75, "hidden_share": 1 / 3}}}
CONVOLUTIONAL: Mapping[str, Any] = MIXED
# Noise in hidden squares, as a norm over an empty one has a huge gradient; blocks that start at a
# tenth of their output instead of a millionth; and an energy that also tells clean images.
CONVOLUTIONAL_JUDGING: Mapping[str, Any] = {
    "backbone_options": {"ls_init_value": 0.1},
    "pretext": "mixture",
    "plausibility_weight": 1.0,
    "tasks": {
        "mixture": {"masking": 1.0, "sorting": 1.0, "colorization": 1.0, "identity": 1.0},
        "masking": {"fill": "noise"},
    },
}
