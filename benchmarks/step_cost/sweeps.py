"""How cost grows with the batch, the tokens, the depth and the steps K."""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace

import torch

from step_cost.comparing import Case, Results, measure
from step_cost.models import Model
from step_cost.variants import Method, Variant
from step_cost.workload import Workload

METHODS: tuple[Method, ...] = ("ordinary", "ordinary-plain", "exact")
PATCH = 4


@dataclass(frozen=True)
class Point:
    """ViT-Ti's width with this depth, on 4-pixel patches."""

    batch: int = 8
    image_size: int = 32
    depth: int = 4
    num_steps: int = 1

    @property
    def tokens(self) -> int:
        """Patches in an image."""
        return (self.image_size // PATCH) ** 2


BASE = Point()
SWEEPS: dict[str, tuple[Point, ...]] = {
    "batch": tuple(replace(BASE, batch=batch) for batch in (4, 8, 16, 32, 64)),
    "tokens": tuple(
        replace(BASE, batch=2, image_size=size) for size in (32, 48, 64, 96, 128)
    ),
    "depth": tuple(replace(BASE, depth=depth) for depth in (2, 4, 8, 12)),
    "num_steps": tuple(replace(BASE, num_steps=steps) for steps in (1, 2, 4)),
}  # fmt: skip


def run_sweeps(
    modes: Sequence[bool], repeats: int, device: torch.device, deadline: float
) -> Iterator[Results]:
    """All sweeps, each in rounds over its points; ``modes`` says whether to compile."""
    for factor, points in SWEEPS.items():
        cases = dict(_cases(factor, points, modes, device))
        yield measure(cases, repeats, device, deadline)
        torch._dynamo.reset()


def _cases(
    factor: str, points: Sequence[Point], modes: Sequence[bool], device: torch.device
) -> Iterator[tuple[str, Case]]:
    for point in points:
        workload = Workload(_model(point), point.batch, device)
        value = point.tokens if factor == "tokens" else getattr(point, factor)
        facts = {"factor": factor, "value": value, "tokens": point.tokens, "depth": point.depth}
        for method in METHODS:
            if method != "exact" and point.num_steps > 1:
                continue  # an ordinary step knows no K
            for compiled in modes:
                variant = Variant(method, compiled, num_steps=point.num_steps)
                yield f"{factor} {value}, {variant.name}", Case(workload, variant, facts)


def _model(point: Point) -> Model:
    return Model(
        name=f"vit_{point.image_size}_{point.depth}",
        title="ViT-Ti's width",
        backbone="vit_tiny_patch16_224",
        family="vit",
        image_size=point.image_size,
        mask_size=PATCH,
        cpu_batch=point.batch,
        gpu_batch=point.batch,
        options={"patch_size": PATCH, "depth": point.depth},
    )
