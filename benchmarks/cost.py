"""Time, peak memory and counted operations of a training step, beside other steps.

    python benchmarks/cost.py --quick                     # under 5 minutes on 2 CPU cores
    python benchmarks/cost.py --max-minutes 20            # all backbones, as far as time allows
    python benchmarks/cost.py --write-page                # the bars of docs/cost.md

One process measures one backbone after another. All its variants are run once and then timed in
turn, round after round; medians and quartiles are over the rounds. A step is the forward and the
backward pass with all parameter gradients, which are None before it. The optimizer's update is the
same for all and left out, and so is drawing masks (it has a row of its own), but for MAE, which
draws them within its model. The ordinary step is cross-entropy of random labels on mean features.

Writes cost-DEVICE.json, of which `docs/cost.md` shows the bars, and prints all tables. Needs `pip
install backfold[benchmarks]`.
"""

import argparse
import os
import time
from collections.abc import Sequence
from functools import partial
from pathlib import Path
from typing import Any

os.environ.setdefault("KINETO_LOG_LEVEL", "99")  # the profiler is chatty

import torch

from backfold.files import write_json
from backfold.memory import keep_freed_memory
from step_cost.comparing import cases_of, measure_each
from step_cost.measuring import facts
from step_cost.page import write_page
from step_cost.tables import bars_table, cost_tables
from step_cost.workload import MODELS, TITLES, Variant

RESULTS = Path(__file__).parent / "results"
PAGE = Path(__file__).parents[1] / "docs" / "cost.md"
QUICK: dict[str, Any] = {
    "models": ["vit_tiny_32"],
    "variants": ["ordinary", "exact", "sparse", "simmim"],
    "precisions": ["float32"],
    "num_steps": [1],
    "repeats": 5,
    "max_minutes": 4.5,
}


def parse(arguments: Sequence[str] | None = None) -> argparse.Namespace:
    """The options; ``--quick`` changes the defaults, and options given beside it count."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--quick", action="store_true", help="one backbone, few variants")
    parser.add_argument("--write-page", action="store_true", help="renew docs/cost.md, and end")
    choices: dict[str, Any] = {
        "models": MODELS,
        "variants": TITLES,
        "precisions": ["float32", "bf16"],
        "modes": ["eager", "compiled"],
        "compiled-models": MODELS,  # whose compiled variants run too
    }
    for name, known in choices.items():
        parser.add_argument(f"--{name}", nargs="+", choices=list(known), default=list(known))
    parser.add_argument("--num-steps", nargs="+", type=int, default=[1, 2, 4], help="K, if dense")
    parser.add_argument("--repeats", type=int, default=7, help="rounds of timing")
    parser.add_argument("--max-minutes", type=float, default=float("inf"),
                        help="no new work after this; what is left out is listed")  # fmt: skip
    parser.add_argument("--out", type=Path, default=RESULTS)
    if parser.parse_known_args(arguments)[0].quick:
        parser.set_defaults(**QUICK)
    return parser.parse_args(arguments)


def variants_of(name: str, options: argparse.Namespace) -> list[Variant]:
    """What to measure of a model, in the order that a lack of time cuts short: compiled last."""
    every = (
        Variant(method, mode == "compiled", precision, num_steps)
        for mode in options.modes
        if mode == "eager" or name in options.compiled_models
        for precision in options.precisions
        for method in options.variants
        for num_steps in (options.num_steps if method == "exact" else [1])
    )
    return [variant for variant in every if variant.exists_for(MODELS[name])]


def main() -> None:
    options = parse()
    if options.write_page:
        write_page(PAGE, RESULTS)
        return
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    deadline = time.perf_counter() + 60 * options.max_minutes
    if device.type == "cpu":
        keep_freed_memory()  # as pretraining does; for all steps alike
    wanted = {name: variants_of(name, options) for name in MODELS if name in options.models}
    groups = {MODELS[name].title: partial(cases_of, name, variants, device)
              for name, variants in wanted.items() if variants}  # fmt: skip
    content: dict[str, Any] = {"facts": facts(device), "rows": [], "left_out": []}
    path = options.out / f"cost-{device.type}.json"
    for part in measure_each(groups, options.repeats, device, deadline):
        content["rows"] += part.rows
        content["left_out"] += part.left_out
        write_json(path, content)
        print(path, f"{len(content['rows'])} rows", flush=True)
    for table in (bars_table, cost_tables):
        print(table(content))


if __name__ == "__main__":
    main()
