"""What is measured on a backbone: which step, and how it runs."""

from dataclasses import dataclass
from typing import Literal

from step_cost.models import Model

Method = Literal[
    "masking", "forward", "ordinary", "ordinary-plain", "mae", "simmim",
    "exact", "sparse", "finite-difference",
]  # fmt: skip
Precision = Literal["float32", "bf16"]

# In the order of the tables, and in which they are warmed up while there is time.
TITLES: dict[Method, str] = {
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
WITH_ATTENTION = ("vit", "swin")


@dataclass(frozen=True)
class Variant:
    """One way to run one method."""

    method: Method
    compiled: bool = False
    precision: Precision = "float32"
    num_steps: int = 1

    @property
    def title(self) -> str:
        """For tables and plots."""
        steps = f", K = {self.num_steps}" if self.num_steps > 1 else ""
        return TITLES[self.method] + steps

    @property
    def name(self) -> str:
        """Unlike every other variant's of the model."""
        mode = "compiled" if self.compiled else "eager"
        return f"{self.title}, {self.precision}, {mode}"


def possible(model: Model, variant: Variant) -> bool:
    """Whether the method exists for the model, and is not the same as another variant."""
    method = variant.method
    if method in ("mae", "sparse") and model.family != "vit":
        return False
    if method == "simmim" and model.family == "convolutional":
        return False
    if method == "ordinary-plain" and model.family not in WITH_ATTENTION:
        return False
    if method == "masking" and (variant.compiled or variant.precision != "float32"):
        return False
    if method == "finite-difference" and variant.precision != "float32":
        return False
    return variant.num_steps == 1 or method == "exact"
