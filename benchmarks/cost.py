"""Time, peak memory and counted operations of a training step, beside other steps.

    python benchmarks/cost.py --quick                     # under 5 minutes on 2 CPU cores
    python benchmarks/cost.py --max-minutes 20            # all backbones, as far as time allows
    python benchmarks/cost.py --sweep --max-minutes 5     # growth with batch, tokens, depth and K
    python benchmarks/cost.py --write-page                # the tables of docs/cost.md

One process measures one backbone after another. All its variants are warmed up and then run in
turn, round after round; medians and quartiles are over the rounds. A step is the forward and the
backward pass with all parameter gradients, which are None before it. The optimizer's update is the
same for all and left out, and so is drawing masks (it has a row of its own), but for MAE, which
draws them within its model. The ordinary step is cross-entropy of random labels on mean features.

Writes cost-DEVICE.json, .md and .svg, with --sweep cost-growth-DEVICE.*. `docs/cost.md` reads them.
Needs `pip install backfold[benchmarks]`.
"""

import argparse
import os
import time
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

os.environ.setdefault("KINETO_LOG_LEVEL", "99")  # the profiler is chatty

import torch

from backfold.memory import keep_freed_memory
from step_cost.comparing import Results, compare_models
from step_cost.environment import facts
from step_cost.models import MODELS, Model
from step_cost.page import write_cost, write_growth, write_page
from step_cost.sweeps import run_sweeps
from step_cost.variants import TITLES, Variant, possible

RESULTS = Path(__file__).parent / "results"
PAGE = Path(__file__).parents[1] / "docs" / "cost.md"
QUICK = {
    "models": ["vit_tiny_32"],
    "variants": ["ordinary", "exact", "sparse", "simmim"],
    "precisions": ["float32"],
    "num_steps": [1],
    "repeats": 5,
    "max_minutes": 4.5,
}
MODES = {"eager": False, "compiled": True}


def parse(arguments: Sequence[str] | None = None) -> argparse.Namespace:
    """The options; ``--quick`` changes the defaults, and options given beside it count."""
    names = [model.name for model in MODELS]
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--quick", action="store_true", help="one backbone, few variants")
    parser.add_argument("--sweep", action="store_true", help="how cost grows, and nothing else")
    parser.add_argument("--write-page", action="store_true", help="renew docs/cost.md, and end")
    parser.add_argument("--models", nargs="+", choices=names, default=names)
    parser.add_argument("--variants", nargs="+", choices=list(TITLES), default=list(TITLES))
    parser.add_argument(
        "--precisions", nargs="+", choices=["float32", "bf16"], default=["float32", "bf16"]
    )
    parser.add_argument("--modes", nargs="+", choices=list(MODES), default=list(MODES))
    parser.add_argument(
        "--compiled-models",
        nargs="+",
        choices=names,
        default=names,
        help="backbones whose compiled variants run too",
    )
    parser.add_argument(
        "--num-steps", nargs="+", type=int, default=[1, 2, 4], help="K of the dense step"
    )
    parser.add_argument("--batch", type=int, help="images in a step; none takes each model's own")
    parser.add_argument("--repeats", type=int, default=7, help="rounds of timing")
    parser.add_argument(
        "--max-minutes",
        type=float,
        default=float("inf"),
        help="no new work after this; what is left out is listed",
    )
    parser.add_argument("--device", default="auto", help="auto, cpu or cuda")
    parser.add_argument("--out", type=Path, default=RESULTS)
    if parser.parse_known_args(arguments)[0].quick:
        parser.set_defaults(**QUICK)
    return parser.parse_args(arguments)  # fmt: skip


def variants_of(model: Model, options: argparse.Namespace) -> list[Variant]:
    """What to measure of a model, in the order that a lack of time cuts short: compiled last."""
    modes = [
        MODES[name]
        for name in options.modes
        if name == "eager" or model.name in options.compiled_models
    ]
    every = (
        Variant(method, compiled, precision, num_steps)
        for compiled in modes
        for precision in options.precisions
        for method in options.variants
        for num_steps in (options.num_steps if method == "exact" else [1])
    )
    return [variant for variant in every if possible(model, variant)]


def collect(parts: Iterator[Results], environment: dict[str, Any]) -> Iterator[dict[str, Any]]:
    """All results so far, after each part."""
    rows: list[dict[str, Any]] = []
    left_out: list[str] = []
    for part in parts:
        rows += part.rows
        left_out += part.left_out
        yield {"facts": environment, "rows": rows, "left_out": left_out}


def main() -> None:
    options = parse()
    if options.write_page:
        write_page(PAGE, RESULTS)
        return
    automatic = "cuda" if torch.cuda.is_available() else "cpu"
    device = torch.device(automatic if options.device == "auto" else options.device)
    deadline = time.perf_counter() + 60 * options.max_minutes
    if device.type == "cpu":
        keep_freed_memory()  # as pretraining does; for all steps alike
    environment = facts(device)
    if options.sweep:
        modes = [MODES[name] for name in options.modes]
        parts = run_sweeps(modes, options.repeats, device, deadline)
        write = write_growth
    else:
        models = [model for model in MODELS if model.name in options.models]
        parts = compare_models(
            models, lambda model: variants_of(model, options), options.batch, options.repeats,
            device, deadline,
        )  # fmt: skip
        write = write_cost
    for content in collect(parts, environment):
        print(write(options.out, content), f"{len(content['rows'])} rows", flush=True)


if __name__ == "__main__":
    main()
