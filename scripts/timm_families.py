"""Check the smallest member of every timm family as an energy function, and write the page.

    python scripts/timm_families.py                    # continue the sweep, then write the page
    python scripts/timm_families.py --families vgg,eva # check these again

A family is a timm module, split by the class that its models are built from where there are more.
Rows are written as they are done; delete docs/timm-families.json to start anew.
"""

import argparse
import contextlib
import datetime
import json
import math
import platform
import statistics
import sys
import time
import warnings
from collections import defaultdict
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import timm
import torch

from backfold.backbone import create_backbone, default_image_size, feature_map
from backfold.data.isolation import Expendable
from backfold.energy import EnergyModel
from backfold.errors import BrokenImage, UserError
from backfold.files import write_json
from backfold.restoration import energy_gradient
from compatibility import check_compatibility

sys.path.append(str(Path(__file__).resolve().parents[1] / "benchmarks"))
from step_cost.page import fill

DOCS = Path(__file__).resolve().parents[1] / "docs"
SIZES = (28, 32, 48, 56, 64, 96, 112, 128, 160, 192, 224, 240, 256, 288, 320, 384, 448, 512)
# Attention over one position has no gradient with respect to its queries and keys.
ENOUGH_POSITIONS = 4
LONGEST_SEARCH = 1200.0  # seconds, to build every model without memory
CHECKS = {
    "finite_energies": "energy",
    "finite_gradient": "gradient",
    "second_order": "second order",
    "independent": "independent",
}
Row = dict[str, Any]


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--families", default="", help="check only these, again; comma-separated")
    parser.add_argument("--time-limit", type=float, default=300.0, help="seconds for a family")
    parser.add_argument("--docs", type=Path, default=DOCS, help="folder to write to")
    options = parser.parse_args()
    rows_file, page_file = options.docs / "timm-families.json", options.docs / "timm-families.md"
    report = _load(rows_file)
    if not report["families"]:
        report["families"] = _isolated(find_families, None, LONGEST_SEARCH)
        write_json(rows_file, report)
    chosen = options.families.split(",") if options.families else []
    unknown = [family for family in chosen if family not in report["families"]]
    if unknown:
        known = ", ".join(report["families"])
        raise SystemExit(f"unknown family {unknown[0]!r}; choose from {known}")
    for family, member in report["families"].items():
        if family in chosen or (not chosen and family not in report["rows"]):
            start = time.perf_counter()
            found = _isolated(check_family, member["model"], options.time_limit)
            row = {"family": family, **member, **dict.fromkeys(CHECKS, False), **found}
            row["seconds"] = round(time.perf_counter() - start, 1)
            print(f"{family:36} {row['seconds']:6.1f} s  {row['reason'] or 'ok'}", flush=True)
            report["rows"][family] = row
            report["date"] = datetime.date.today().isoformat()
            write_json(rows_file, report)
    text = (page_file if page_file.exists() else DOCS / page_file.name).read_text(encoding="utf-8")
    page_file.write_text(fill(text, {"families": table(report)}), encoding="utf-8")


def _load(path: Path) -> Row:
    """The report so far; a new one if there is none or it was made with other versions."""
    versions = {
        "timm": timm.__version__,
        "torch": torch.__version__,
        "python": platform.python_version(),
    }
    if path.exists():
        report: Row = json.loads(path.read_text(encoding="utf-8"))
        if report["versions"] == versions:
            return report
    return {"versions": versions, "date": "", "families": {}, "rows": {}}


def _isolated(function: Callable[[Any], Row], argument: Any, limit_s: float) -> Row:
    """The function's result from a process of its own; a "reason" alone, if it fails or ends that.

    Forking spares each family the imports; this process must not compute, as threads don't survive.
    """
    threads = torch.get_num_threads()

    def call(argument: Any) -> Row:
        warnings.simplefilter("ignore")
        torch.set_num_threads(threads)
        try:
            return function(argument)
        except Exception as error:
            return {"reason": f"{type(error).__name__}: {' '.join(str(error).split())[:200]}"}

    with Expendable(call, limit_s) as expendable:
        try:
            return expendable(argument)
        except BrokenImage as error:
            return {"reason": str(error).replace("its decoder ", "")}


def find_families(_: None) -> dict[str, Row]:
    """Each family's smallest member, its number of parameters, and how many members there are."""
    members: dict[tuple[str, str], list[tuple[int, str]]] = defaultdict(list)
    for module in timm.list_modules():
        for name in timm.list_models(module=module):
            with torch.device("meta"):
                model = timm.create_model(name, num_classes=0)
            size = sum(parameter.numel() for parameter in model.parameters())
            members[module, type(model).__name__].append((size, name))
    modules = [module for module, _ in members]
    families = {}
    for (module, kind), sized in members.items():
        family = module if modules.count(module) == 1 else f"{module}:{kind}"
        parameters, name = min(sized)
        families[family] = {"model": name, "parameters": parameters, "members": len(sized)}
    return families


def check_family(name: str) -> Row:
    """All results for one model at its smallest size."""
    torch.manual_seed(0)
    model, side, positions = smallest(name)
    rms, rms_doubled = first_gradient_rms(model, side), None
    with contextlib.suppress(Exception):
        rms_doubled = _rounded(first_gradient_rms(model, 2 * side))
    result = check_compatibility(model, (side, side))
    sizes_of = {key: p.numel() for key, p in model.backbone.named_parameters()}
    untouched = sum(sizes_of[key] for key in result.without_gradient)
    return {
        "image_size": side,
        "positions": positions,
        **{check: getattr(result, check) for check in CHECKS},
        "tensors_without_gradient": len(result.without_gradient),
        "share_without_gradient": untouched / sum(sizes_of.values()),
        "derivative_error": _rounded(result.derivative_error),
        "gradient_rms": _rounded(rms),
        "gradient_rms_doubled": rms_doubled,
        "reason": result.reason,
    }


def smallest(name: str) -> tuple[EnergyModel, int, int]:
    """The model, built for its smallest size, with this size and the positions it then has.

    Raises:
        UserError: no size is legal.
    """
    # Sizes are found quickly without memory and arithmetic. But on the meta device some models stop
    # at a number that they need, and others overlook an index that is out of range.
    for device in ("meta", "cpu"):
        sizes = [*legal_sizes(name, device)]
        if sizes:
            enough = [size for size in sizes if size[1] >= ENOUGH_POSITIONS]
            side, positions = (enough or sizes)[0]
            with contextlib.suppress(UserError):
                return EnergyModel(name, image_size=side), side, positions
    raise UserError(f"no image size of {SIZES[0]} to {SIZES[-1]} pixels is legal")


def _rounded(value: float) -> float | None:
    return float(f"{value:.3g}") if math.isfinite(value) else None


def legal_sizes(name: str, device: str) -> Iterator[tuple[int, int]]:
    """(pixels a side, positions of the feature map), rising, up to the first with enough."""
    default = default_image_size(timm.get_pretrained_cfg(name))[0]
    for side in sorted({*SIZES, default}):
        try:
            with torch.device(device), torch.no_grad():
                backbone = create_backbone(name, (side, side)).eval()
                positions = feature_map(backbone, torch.zeros(2, 3, side, side)).shape[1]
        except UserError:
            continue
        yield side, positions
        if positions >= ENOUGH_POSITIONS:
            return


def first_gradient_rms(model: EnergyModel, side: int) -> float:
    """Root mean square of the energy's gradient on random images that it was not scaled with."""
    generator = torch.Generator().manual_seed(1)
    images = torch.randn(4, 3, side, side, generator=generator)
    _, gradient = energy_gradient(model.eval(), images)
    return float(gradient.square().mean().sqrt())


def table(report: Row) -> str:
    """The rows in Markdown, and in words how many pass."""
    rows = [report["rows"][family] for family in report["families"] if family in report["rows"]]
    passed = [row for row in rows if not row["reason"]]
    made_with = ", ".join(f"{name} {version}" for name, version in report["versions"].items())
    doubled = [row["gradient_rms_doubled"] for row in passed if row["gradient_rms_doubled"]]
    lines = [
        f"**{len(passed)} of {len(rows)} families pass ({len(passed) / len(rows):.1%}).** The first"
        f" gradient's scale is {_within([row['gradient_rms'] for row in passed])}; at twice the "
        f"image size, for the {len(doubled)} that take it, {_within(doubled)}. Made on "
        f"{report['date']} with {made_with}, on the CPU, "
        f"in {sum(row['seconds'] for row in rows) / 60:.0f} minutes.",
        "",
        "| family | smallest model | parameters | pixels | "
        + " | ".join(CHECKS.values())
        + " | no gradient | error | scale | scale, 2x | s | why not |",
        "|---|---|--:|--:|" + ":-:|" * len(CHECKS) + "--:|--:|--:|--:|--:|---|",
        *(_line(row) for row in rows),
    ]
    return "\n".join(lines)


def _within(values: list[float]) -> str:
    deciles = statistics.quantiles(values, n=10)
    return (
        f"{min(values):.2g} to {max(values):.2g}, in eight families of ten "
        f"{deciles[0]:.2g} to {deciles[-1]:.2g}"
    )


def _line(row: Row) -> str:
    forms = {
        "share_without_gradient": ".1%",
        "derivative_error": ".0e",
        "gradient_rms": ".3g",
        "gradient_rms_doubled": ".3g",
    }
    values = ((row.get(name), form) for name, form in forms.items())
    cells = [
        row["family"],
        row["model"],
        f"{row['parameters'] / 1e6:.1f} M",
        str(row.get("image_size", "")),
        *("yes" if row[check] else "**no**" for check in CHECKS),
        *("" if value is None else format(value, form) for value, form in values),
        f"{row['seconds']:.0f}",
        row["reason"].replace("|", "/"),
    ]
    return f"| {' | '.join(cells)} |"


if __name__ == "__main__":
    main()
