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
from collections.abc import Callable
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
from step_cost.tables import markdown_table

DOCS = Path(__file__).resolve().parents[1] / "docs"
SIZES = (28, 32, 48, 56, 64, 96, 112, 128, 160, 192, 224, 240, 256, 288, 320, 384, 448, 512)
# Attention over one position has no gradient with respect to its queries and keys.
ENOUGH_POSITIONS = 4
LONGEST_SEARCH = 1200.0  # seconds, to build every model without memory
LONGEST_CHECK = 300.0  # seconds, of a family
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
    chosen = parser.parse_args().families
    rows_file, page_file = DOCS / "timm-families.json", DOCS / "timm-families.md"
    versions = {"timm": timm.__version__, "torch": torch.__version__}
    versions["python"] = platform.python_version()
    report = json.loads(rows_file.read_text()) if rows_file.exists() else {}
    if report.get("versions") != versions:
        report = {"versions": versions, "date": "", "rows": {}}
        report["families"] = _isolated(find_families, None, LONGEST_SEARCH)
        write_json(rows_file, report)
    families, rows = report["families"], report["rows"]
    wanted = chosen.split(",") if chosen else [each for each in families if each not in rows]
    if unknown := [family for family in wanted if family not in families]:
        raise SystemExit(f"unknown family {unknown[0]!r}; choose from {', '.join(families)}")
    for family in wanted:
        start = time.perf_counter()
        found = _isolated(check_family, families[family]["model"], LONGEST_CHECK)
        row = {"family": family, **families[family], **dict.fromkeys(CHECKS, False), **found}
        row["seconds"] = round(time.perf_counter() - start, 1)
        print(f"{family:36} {row['seconds']:6.1f} s  {row['reason'] or 'ok'}", flush=True)
        rows[family] = row
        report["date"] = datetime.date.today().isoformat()
        write_json(rows_file, report)
    page_file.write_text(fill(page_file.read_text(), {"families": table(report)}))


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
    default = default_image_size(timm.get_pretrained_cfg(name))[0]
    # Sizes are found quickly without memory and arithmetic. But on the meta device some models stop
    # at a number that they need, and others overlook an index that is out of range.
    for device in ("meta", "cpu"):
        legal: dict[int, int] = {}
        for side in sorted({*SIZES, default}):
            with contextlib.suppress(UserError), torch.device(device), torch.no_grad():
                backbone = create_backbone(name, (side, side)).eval()
                legal[side] = feature_map(backbone, torch.zeros(2, 3, side, side)).shape[1]
                if legal[side] >= ENOUGH_POSITIONS:
                    break
        enough = [side for side, positions in legal.items() if positions >= ENOUGH_POSITIONS]
        for side in [*enough, *legal][:1]:
            with contextlib.suppress(UserError):
                return EnergyModel(name, image_size=side), side, legal[side]
    raise UserError(f"no image size of {SIZES[0]} to {SIZES[-1]} pixels is legal")


def _rounded(value: float) -> float | None:
    return float(f"{value:.3g}") if math.isfinite(value) else None


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
    header = [
        "family", "smallest model", "parameters", "pixels", *CHECKS.values(), "no gradient",
        "error", "scale", "scale, 2x", "s", "why not",
    ]  # fmt: skip
    return (
        f"**{len(passed)} of {len(rows)} families pass ({len(passed) / len(rows):.1%}).** The first"
        f" gradient's scale is {_within([row['gradient_rms'] for row in passed])}; at twice the "
        f"image size, for the {len(doubled)} that take it, {_within(doubled)}. Made on "
        f"{report['date']} with {made_with}, on the CPU, "
        f"in {sum(row['seconds'] for row in rows) / 60:.0f} minutes.\n\n"
        + markdown_table(header, map(_cells, rows))
    )


def _within(values: list[float]) -> str:
    deciles = statistics.quantiles(values, n=10)
    return (
        f"{min(values):.2g} to {max(values):.2g}, in eight families of ten "
        f"{deciles[0]:.2g} to {deciles[-1]:.2g}"
    )


def _cells(row: Row) -> list[str]:
    forms = {
        "share_without_gradient": ".1%", "derivative_error": ".0e", "gradient_rms": ".3g",
        "gradient_rms_doubled": ".3g",
    }  # fmt: skip
    values = ((row.get(name), form) for name, form in forms.items())
    return [
        row["family"],
        row["model"],
        f"{row['parameters'] / 1e6:.1f} M",
        str(row.get("image_size", "")),
        *("yes" if row[check] else "**no**" for check in CHECKS),
        *("" if value is None else format(value, form) for value, form in values),
        f"{row['seconds']:.0f}",
        row["reason"].replace("|", "/"),
    ]


if __name__ == "__main__":
    main()
