"""Backfold beside MAE, SimMIM, SimCLR and VICReg: the same start, images, steps and rates for all.

"refined" alone has a last phase, of the recipe `refine`, within as many epochs; its seconds are of
that phase alone where the first one was there.

    python benchmarks/race/race.py --data ../shared/data/cifar10 --epochs 6

Every method is trained with each learning rate from the first seed, and judged by linear probes on
validation images ("layers"). With its best rate it is then trained from every seed and judged on
the test images, once; with --finetune also after fine-tuning, on three draws of labels. Each cell
leaves a file of JSON lines; what is there is not done again, and a training that was cut goes on.
Small models wait for the host of a GPU (37 ms a step of any batch on one H200, whatever ran beside
it): start many races beside each other, each with other --methods or --seeds, best under
`nvidia-cuda-mps-control -d`, with `--crops-on-device --compile false` and large batches (15 at once
compiled nothing in 90 s on 16 cores).

Writes race.md and race.svg of all test rows in `--out`, of shorter schedules, too. Needs `pip
install backfold[benchmarks]`.
"""

import argparse
import importlib
import json
import sys
import time
from collections.abc import Iterable, Sequence
from dataclasses import asdict, replace
from itertools import chain, product
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
import yaml
from matplotlib.figure import Figure
from torch import nn
from torch.utils.data import TensorDataset

import backfold
from backfold.cli.main import recipe_path
from backfold.data import loading
from backfold.data.augmentation import Augmentation
from backfold.data.open import open_source
from backfold.data.source import ImageSource
from backfold.errors import UserError
from backfold.evaluation.results import ACCURACY, OVER, PRETRAINED
from backfold.files import write_atomically
from backfold.pretext import Masking
from backfold.training.config import (
    OptimizerSettings,
    PretrainConfig,
    TaskSettings,
    config_from_dict,
    config_to_dict,
)
from backfold.training.devices import choose_device
from backfold.training.images import open_images
from backfold.training.run import RunFolder

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
from race.contest import start
from race.crops import DeviceCrops
from step_cost.page import svg
from step_cost.tables import grouped, markdown_table

# Ours, by the settings that tell them apart.
OURS: dict[str, dict[str, Any]] = {
    "conditional": {},
    "alike": {"invariance": 0.1},
    "dense": {"energy": "dense"},
    "refined": {},
}
# The last epochs of "refined", after a conditional run of all the others.
REFINING = yaml.safe_load(recipe_path("refine").read_text())
TITLES = {
    "untrained": "untrained",
    "conditional": "Backfold",
    "alike": "Backfold, two crops alike",
    "dense": "Backfold, dense energy",
    "refined": f"Backfold, crops alike in the last {REFINING['epochs']} epochs",
    "mae": "MAE (transformers)",
    "simmim": "SimMIM (transformers)",
    "simclr": "SimCLR (lightly)",
    "vicreg": "VICReg (lightly)",
}
VALIDATION, TEST, FINETUNED = "validation", "test", "finetuned"
PROTOCOLS = {VALIDATION: ["layers"], TEST: ["knn", "linear"], FINETUNED: ["finetune"]}
TESTS = [TEST, FINETUNED]
DRAWS = 3  # of the labels to fine-tune with


class Cell(NamedTuple):
    """A trained backbone and what it is judged on: ``part`` is a key of PROTOCOLS."""

    method: str
    seed: int
    rate: float
    epochs: float  # of the schedule
    part: str
    crop: float = Augmentation().crop_scale[0]  # smallest area of a crop, as a share
    batch: int = 64

    @property
    def run(self) -> str:
        """The name of its training, which all parts share."""
        other = "" if self.crop == Augmentation().crop_scale[0] else f"-crop{self.crop:g}"
        other += "" if self.batch == Cell._field_defaults["batch"] else f"-batch{self.batch}"
        return f"{self.method}-rate{self.rate:g}-seed{self.seed}-epochs{self.epochs:g}{other}"

    @property
    def file(self) -> str:
        """The name of its rows."""
        return f"{self.run}-{self.part}.jsonl"


def decoded(source: ImageSource) -> TensorDataset:
    """All images in memory, as a race would read them a hundred times; they are of one size."""
    return TensorDataset(torch.stack([source.read(place) for place in range(len(source))]))


def train(cell: Cell, common: PretrainConfig, data: TensorDataset, runs: Path) -> nn.Module:
    """The cell's timm backbone, in a folder of ``runs``; a finished training is read."""
    out = runs / cell.run
    values = config_to_dict(common) | {"out": str(out), "seed": cell.seed, "epochs": cell.epochs}
    values |= OURS.get(cell.method, {})
    values["optimizer"]["base_lr"] = cell.rate
    values["augmentation"]["crop_scale"] = [cell.crop, 1.0]
    if cell.method == "refined":
        if cell.epochs <= REFINING["epochs"]:
            raise UserError(f"epochs is {cell.epochs:g}; refined needs over {REFINING['epochs']}")
        before = cell._replace(method="conditional", epochs=cell.epochs - REFINING["epochs"])
        train(before, common, data, runs)
        values["init"] = str(runs / before.run)
        values = merged(values, REFINING)
    settings = config_from_dict(values)
    images = open_images(settings, source=open_source(data, "train"))
    given = (settings.backbone, settings.backbone_options, images, settings)
    if cell.method in OURS:
        resume = RunFolder(out).last_checkpoint.exists()
        run = backfold.pretrain(**values | {"data": data}, resume=resume, overwrite=not resume)
        return run.run.energy.backbone
    if cell.method == "untrained":
        return start(*given)
    return importlib.import_module(f"race.{cell.method}").train(*given)


def merged(values: dict[str, Any], others: dict[str, Any]) -> dict[str, Any]:
    """Settings, with others in their place, group by group."""
    both = {
        name: merged(values[name], other) if isinstance(other, dict) else other
        for name, other in others.items()
    }
    return values | both


def judge(
    cell: Cell,
    common: PretrainConfig,
    data: TensorDataset,
    out: Path,
    labelled: int | None,
    finetune: str | None = None,
) -> list[dict[str, Any]]:
    """The cell's rows: read if they are there, else found and written."""
    path = out / cell.file
    if path.exists():
        return [json.loads(line) for line in path.read_text().splitlines()]
    begun = time.monotonic()
    backbone = train(cell, common, data, out / "runs")
    seconds = time.monotonic() - begun  # of a run that was cut, those since it went on
    few = {"labels": finetune, "draws": DRAWS} if cell.part == FINETUNED else {}
    found = backfold.evaluate(
        backbone, data=common.data, protocols=PROTOCOLS[cell.part], channels=common.channels,
        image_size=common.image_size, accelerator=common.accelerator,
        num_workers=common.num_workers, train_images=labelled, **few,
    )  # fmt: skip
    rows = [{**cell._asdict(), "seconds": seconds, **asdict(row)} for row in found]
    write_atomically(path, "".join(json.dumps(row) + "\n" for row in rows).encode())
    print(f"{cell.file}: {len(rows)} rows", flush=True)
    return rows


def best_rate(rows: Sequence[dict[str, Any]]) -> float:
    """The rate whose best layer does best on validation images.

    Raises:
        UserError: test images are among the rows.
    """
    if any(row["part"] != VALIDATION for row in rows):
        raise UserError("a choice must not see test images")
    return float(max(rows, key=lambda row: row["mean"])["rate"])


def race(
    methods: Iterable[str],
    seeds: Sequence[int],
    rates: Sequence[float],
    common: PretrainConfig,
    out: Path,
    labelled: int | None = None,
    finetune: str | None = None,
) -> list[dict[str, Any]]:
    """All test rows; each cell is done once, whatever was cut before.

    So many labelled images are judged with; None takes all. ``finetune`` is `evaluate`'s
    ``labels`` to fine-tune with; None leaves it out.
    """
    data = decoded(open_source(common.data, "train"))
    common = replace(common, channels=len(data[0][0]))
    rows, epochs = [], common.epochs
    own = (common.augmentation.crop_scale[0], common.batch_size)
    for method in methods:
        rate = rates[0]
        if method != "untrained" and len(rates) > 1:
            cells = [Cell(method, seeds[0], rate, epochs, VALIDATION, *own) for rate in rates]
            judged = [judge(cell, common, data, out, labelled) for cell in cells]
            rate = best_rate(list(chain.from_iterable(judged)))
        for seed, part in product(seeds, TESTS if finetune else [TEST]):
            cell = Cell(method, seed, rate, epochs, part, *own)
            rows += judge(cell, common, data, out, labelled, finetune)
    return rows


def title(row: dict[str, Any]) -> str:
    """Of its line: the method and its schedule, or what was judged beside it."""
    if row["contender"] != PRETRAINED:
        return str(row["contender"])
    if row["method"] == "untrained":
        return TITLES["untrained"]
    defaults = Cell._field_defaults  # of what older rows do not say
    crop, batch = (row.get(name, defaults[name]) for name in ("crop", "batch"))
    other = "" if crop == defaults["crop"] else f", crops from {crop:g}"
    other += "" if batch == defaults["batch"] else f", batches of {batch}"
    return f"{TITLES[row['method']]}, {row['epochs']:g} epochs{other}"


def summary(rows: Iterable[dict[str, Any]]) -> dict[str, dict[str, tuple[float, float, int]]]:
    """By title and case: mean and deviation over seeds in percent, and the number of seeds.

    What is judged without a backbone, such as pixels, has a line of its own.
    """
    found: dict[str, dict[str, tuple[float, float, int]]] = {}
    kept = [row for row in rows if row["metric"] == ACCURACY and OVER not in row["contender"]]
    named = [row | {"line": title(row)} for row in kept]
    for (*_, protocol, case), group in grouped(named, "line", "method", "protocol", "case").items():
        means = [row["mean"] for row in group]
        deviation = float(np.std(means, ddof=1)) if len(means) > 1 else 0.0
        cell = (float(np.mean(means)), deviation, len(means))
        found.setdefault(title(group[0]), {})[f"{protocol}, {case}"] = cell
    return found


def write_table(rows: Sequence[dict[str, Any]], out: Path) -> None:
    """race.md, one line a contender, and race.svg."""
    found = summary(rows)
    cases = list(dict.fromkeys(case for cells in found.values() for case in cells))
    lines = []
    for line, cells in found.items():
        trained = [row for row in rows if row["contender"] == PRETRAINED]
        rates = {f"{row['rate']:g}" for row in trained if title(row) == line}
        shown = [cells.get(case) for case in cases]
        texts = [
            f"{cell[0]:.1f}" + (f" ± {cell[1]:.1f}" if cell[2] > 1 else "") if cell else ""
            for cell in shown
        ]
        count = max(cell[2] for cell in cells.values())
        lines.append([line, ", ".join(sorted(rates)), str(count), *texts])
    header = ["accuracy (%)", "learning rate", "seeds", *cases]
    write_atomically(out / "race.md", (markdown_table(header, lines) + "\n").encode())
    figure = Figure(figsize=(2.6 * len(cases) + 3, 0.4 * len(found) + 1.2), layout="constrained")
    axes = figure.subplots(1, len(cases), squeeze=False, sharey=True)[0]
    for case, axis in zip(cases, axes, strict=True):
        bars = {line: cells[case] for line, cells in found.items() if case in cells}
        means, deviations, _ = zip(*bars.values(), strict=True)
        axis.barh(list(bars), means, xerr=deviations)
        axis.set_title(case, fontsize=9)
        axis.set_xlabel(ACCURACY)
    axes[0].invert_yaxis()
    write_atomically(out / "race.svg", svg(figure))


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--data", help="labelled images; none takes the embedded ones")
    parser.add_argument("--methods", nargs="+", choices=list(TITLES), default=list(TITLES))
    parser.add_argument("--seeds", nargs="+", type=int, default=[0, 1, 2])
    parser.add_argument("--rates", nargs="+", type=float, default=[5e-4, 1.5e-3, 5e-3])
    parser.add_argument("--backbone", default="vit_tiny_patch16_224")
    parser.add_argument("--patch", type=int, default=4, help="pixels, also of hidden squares")
    parser.add_argument("--depth", type=int, help="blocks; none takes the backbone's own")
    parser.add_argument("--width", type=int, help="features, a multiple of 32, the heads' width")
    parser.add_argument("--image-size", type=int, default=32)
    parser.add_argument("--epochs", type=float, default=100.0)
    parser.add_argument("--batch", type=int, default=256)
    parser.add_argument(
        "--crop", type=float, default=Augmentation().crop_scale[0],
        help="smallest area of a crop, as a share of the image",
    )  # fmt: skip
    parser.add_argument("--crops-on-device", action="store_true", help="of uint8 square images")
    parser.add_argument("--compile", choices=["auto", "false"], default="auto")
    parser.add_argument("--labelled", type=int, help="training images to judge with; none: all")
    parser.add_argument("--finetune", help="labels a class to fine-tune with, such as 100")
    parser.add_argument("--device", default="auto", help="auto, cpu or cuda")
    parser.add_argument("--out", type=Path, default=Path(__file__).parents[1] / "results" / "race")
    options = parser.parse_args()
    device = choose_device(options.device).type
    if options.crops_on_device:
        if "refined" in options.methods:
            parser.error("crops on the device keep their colours; leave refined out")
        loading.BatchDataset = DeviceCrops  # type: ignore[misc]
    # Of all contenders: timm's usual start is too quiet for short runs.
    shape: dict[str, Any] = {"patch_size": options.patch, "weight_init": "jax"}
    shape |= {"depth": options.depth} if options.depth else {}
    if options.width:
        shape |= {"embed_dim": options.width, "num_heads": options.width // 32}
    common = PretrainConfig(
        data=options.data, backbone=options.backbone, image_size=options.image_size,
        backbone_options=shape, epochs=options.epochs, watch_every=options.epochs / 10,
        batch_size=options.batch, accelerator=device, devices=1,
        # No core is left for one, or nothing is loaded.
        num_workers=None if device == "cuda" and not options.crops_on_device else 0,
        compile="auto" if options.compile == "auto" else False,
        precision="bf16-mixed" if device == "cuda" else "32-true",
        tasks=TaskSettings(masking=Masking(mask_patch_size=options.patch)),
        optimizer=OptimizerSettings(), augmentation=Augmentation(crop_scale=(options.crop, 1.0)),
    )  # fmt: skip
    labels = (options.labelled, options.finetune)
    race(options.methods, options.seeds, options.rates, common, options.out, *labels)
    tested = sorted(chain.from_iterable(options.out.glob(f"*-{part}.jsonl") for part in TESTS))
    lines = chain.from_iterable(path.read_text().splitlines() for path in tested)
    write_table([json.loads(line) for line in lines], options.out)


if __name__ == "__main__":
    main()
