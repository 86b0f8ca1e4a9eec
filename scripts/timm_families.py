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
import multiprocessing
import platform
import statistics
import time
import warnings
from collections import defaultdict
from collections.abc import Callable, Iterator
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any

import timm
import torch

from backfold.backbone import create_backbone, default_image_size, feature_map
from backfold.energy import EnergyModel
from backfold.errors import UserError
from backfold.restoration import energy_gradient
from compatibility import check_compatibility

DOCS = Path(__file__).resolve().parent.parent / "docs"
SIZES = (28, 32, 48, 56, 64, 96, 112, 128, 160, 192, 224, 240, 256, 288, 320, 384, 448, 512)
# Attention over one position has no gradient with respect to its queries and keys.
ENOUGH_POSITIONS = 4
CHECKS = {
    "finite_energies": "energy",
    "finite_gradient": "gradient",
    "second_order": "second order",
    "independent": "independent",
}

INTRODUCTION = """
# timm families as energy functions

<!-- Written by scripts/timm_families.py; do not edit. -->

Regenerate with `python scripts/timm_families.py` (the rows are also in `timm-families.json`; delete
it to start anew).

A *family* is a timm module, split by the class its models are built from where there are several
(`deit:VisionTransformerDistilled`). Its *smallest model* has the fewest parameters, at random
weights. *Pixels* is the smallest of a list of sizes at which the model runs and its last feature
map has at least four positions; for models that always give fewer, the smallest at which they run.

The checks are those of `scripts/compatibility.py`, in float64 (also where a model would cast to
float32), on random images, after all parameters have been perturbed by a tenth of their size, so
that no residual branch is switched off by a zero:

- *energy*: finite, one for each image.
- *gradient* with respect to the images: finite, not zero, and equal to a finite difference of the
  energy along a direction that is partly random.
- *second order*: after a training step's backward pass each parameter of the backbone has a finite
  gradient that is not zero, or a change of the parameter is shown to leave the energy's gradient as
  it is; *no gradient* is the share of such parameters (biases before a linear head or a ReLU, class
  attention, parts that are used by the classifier only). Along a random direction in the space of
  all parameters the gradient equals a finite difference of the loss, within *error*, relative.
- *independent*: energy and gradient of an image are the same alone and in a batch of three.

*Scale* is the root mean square of the first energy gradient on fresh random images (float32, before
the perturbation), at the size the model was built for and at twice that size (empty if the model
does not take it). Near 1, a step size of 1 is right from the start.
"""

Row = dict[str, Any]


def main() -> None:
    options = _parse_options()
    rows_file, page_file = options.docs / "timm-families.json", options.docs / "timm-families.md"
    report = _load(rows_file)
    if not report["families"]:
        result = _isolated(find_families, (), limit_s=1200)
        assert isinstance(result, dict), result
        report["families"] = result
        _save(report, rows_file)
    chosen = options.families.split(",") if options.families else []
    _refuse_unknown(chosen, report["families"])
    for family, member in report["families"].items():
        if family in chosen or (not chosen and family not in report["rows"]):
            row = _check_isolated(family, member, options.time_limit)
            print(f"{family:36} {row['seconds']:6.1f} s  {row['reason'] or 'ok'}", flush=True)
            report["rows"][family] = row
            report["date"] = datetime.date.today().isoformat()
            _save(report, rows_file)
    page_file.write_text(page(report), encoding="utf-8")


def _parse_options() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--families", default="", help="check only these, again; comma-separated")
    parser.add_argument("--time-limit", type=float, default=300.0, help="seconds for a family")
    parser.add_argument("--docs", type=Path, default=DOCS, help="folder to write to")
    return parser.parse_args()


def _refuse_unknown(chosen: list[str], families: dict[str, Row]) -> None:
    unknown = [family for family in chosen if family not in families]
    if unknown:
        raise SystemExit(f"unknown family {unknown[0]!r}; choose from {', '.join(families)}")


def versions() -> dict[str, str]:
    return {
        "timm": timm.__version__,
        "torch": torch.__version__,
        "python": platform.python_version(),
    }


def _load(path: Path) -> Row:
    """The report so far; a new one if there is none or it was made with other versions."""
    if path.exists():
        report: Row = json.loads(path.read_text(encoding="utf-8"))
        if report["versions"] == versions():
            return report
    return {"versions": versions(), "date": "", "families": {}, "rows": {}}


def _save(report: Row, path: Path) -> None:
    partial = path.with_suffix(".partial")
    partial.write_text(json.dumps(report, indent=1) + "\n", encoding="utf-8")
    partial.replace(path)


def find_families() -> dict[str, Row]:
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


def _isolated(
    function: Callable[..., Row], arguments: tuple[Any, ...], limit_s: float
) -> Row | str:
    """The function's result from a process of its own, or what ended that process.

    Forking spares each family the imports; this process must not compute, as threads don't survive.
    """
    context = multiprocessing.get_context("fork")
    receiver, sender = context.Pipe(duplex=False)
    process = context.Process(target=_call_and_send, args=(sender, function, arguments))
    process.start()
    sender.close()
    try:
        if not receiver.poll(limit_s):
            return f"not done after {limit_s:g} s"
        result: Row | str = receiver.recv()
        return result
    except EOFError:
        process.join()
        return f"the process ended with exit code {process.exitcode}"
    finally:
        process.kill()
        process.join()


def _call_and_send(
    sender: Connection, function: Callable[..., Row], arguments: tuple[Any, ...]
) -> None:
    warnings.simplefilter("ignore")
    try:
        sender.send(function(*arguments))
    except Exception as error:
        sender.send(f"{type(error).__name__}: {' '.join(str(error).split())[:200]}")


def _check_isolated(family: str, member: Row, limit_s: float) -> Row:
    start = time.perf_counter()
    result = _isolated(check_family, (member["model"],), limit_s)
    seconds = round(time.perf_counter() - start, 1)
    failed = {**dict.fromkeys(CHECKS, False), "reason": result}
    return {
        "family": family,
        **member,
        **(failed if isinstance(result, str) else result),
        "seconds": seconds,
    }


def check_family(name: str) -> Row:
    """All results for one model at its smallest size."""
    torch.manual_seed(0)
    model, side, positions = smallest(name)
    rms = first_gradient_rms(model, side)
    try:
        rms_doubled = first_gradient_rms(model, 2 * side)
    except Exception:
        rms_doubled = None
    result = check_compatibility(model, (side, side))
    sizes_of = {key: p.numel() for key, p in model.backbone.named_parameters()}
    untouched = sum(sizes_of[key] for key in result.without_gradient)
    return {
        "image_size": side,
        "positions": positions,
        **{check: getattr(result, check) for check in CHECKS},
        "tensors_without_gradient": len(result.without_gradient),
        "share_without_gradient": untouched / sum(sizes_of.values()),
        "derivative_error": _number(result.derivative_error),
        "gradient_rms": _number(rms),
        "gradient_rms_doubled": None if rms_doubled is None else _number(rms_doubled),
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


def _number(value: float) -> float | None:
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


def page(report: Row) -> str:
    """The rows as a page of Markdown."""
    rows = [report["rows"][family] for family in report["families"] if family in report["rows"]]
    passed = [row for row in rows if not row["reason"]]
    made_with = ", ".join(f"{name} {version}" for name, version in report["versions"].items())
    lines = [
        *INTRODUCTION.strip().splitlines(),
        "",
        f"**{len(passed)} of {len(rows)} families pass ({len(passed) / len(rows):.1%}).** "
        f"{_scales(passed)} Made on {report['date']} with {made_with}, on the CPU, "
        f"in {sum(row['seconds'] for row in rows) / 60:.0f} minutes.",
        "",
        "| family | smallest model | parameters | pixels | "
        + " | ".join(CHECKS.values())
        + " | no gradient | error | scale | scale, 2x | s | why not |",
        "|---|---|--:|--:|" + ":-:|" * len(CHECKS) + "--:|--:|--:|--:|--:|---|",
        *(_line(row) for row in rows),
    ]
    return "\n".join(lines) + "\n"


def _scales(rows: list[Row]) -> str:
    built = [row["gradient_rms"] for row in rows]
    doubled = [row["gradient_rms_doubled"] for row in rows if row["gradient_rms_doubled"]]
    return (
        f"The first gradient's scale is {_within(built)}; at twice the image size, for the "
        f"{len(doubled)} that take it, {_within(doubled)}."
    )


def _within(values: list[float]) -> str:
    deciles = statistics.quantiles(values, n=10)
    return (
        f"{min(values):.2g} to {max(values):.2g}, in eight families of ten "
        f"{deciles[0]:.2g} to {deciles[-1]:.2g}"
    )


def _line(row: Row) -> str:
    marks = ["yes" if row[check] else "**no**" for check in CHECKS]
    cells = [
        row["family"],
        row["model"],
        f"{row['parameters'] / 1e6:.1f} M",
        _cell(row.get("image_size"), "d"),
        *marks,
        _cell(row.get("share_without_gradient"), ".1%"),
        _cell(row.get("derivative_error"), ".0e"),
        _cell(row.get("gradient_rms"), ".3g"),
        _cell(row.get("gradient_rms_doubled"), ".3g"),
        f"{row['seconds']:.0f}",
        row["reason"].replace("|", "/"),
    ]
    return f"| {' | '.join(cells)} |"


def _cell(value: float | None, form: str) -> str:
    return "" if value is None else format(value, form)


if __name__ == "__main__":
    main()
