"""The report of a run: one HTML page that needs nothing but itself."""

import base64
import csv
import io
import json
import math
import re
import shlex
from collections.abc import Callable, Mapping, Sequence
from itertools import chain, product
from pathlib import Path
from typing import Any, TypeVar

import numpy as np
from jinja2 import Environment, PackageLoader, StrictUndefined
from PIL import Image

from backfold.errors import UserError
from backfold.evaluation.results import ABOUT, About, Row, Table, read_rows, tables_of
from backfold.files import write_atomically
from backfold.reporting import verdicts
from backfold.reporting.plots import plot_curves, plot_energies, plot_rows
from backfold.reporting.verdicts import Look, Series, psnr_gains, show
from backfold.training.run import RunFolder

Content = TypeVar("Content")
PREVIEW_NAME = re.compile(r"step-(\d{1,18})-(.+)\.png")
SIGNS = {"good": "✓ good", "watch": "! watch", "bad": "✕ bad", "unknown": f"? {verdicts.ABSENT}"}
BROKEN = (OSError, ValueError, LookupError, TypeError, AttributeError, OverflowError,
          RecursionError, csv.Error)  # fmt: skip
WHOSE = 3  # a note on more rows than these does not say on which
TEMPLATES = Environment(
    loader=PackageLoader("backfold", "reporting"), autoescape=True, undefined=StrictUndefined
)


def write_report(run_folder: Path, out: Path | None = None) -> Path:
    """Write the report of a run, whole or not at all, and return its path.

    The same run always gives the same page, which says what is missing. ``out`` is ``report.html``
    in the folder by default. No run's folder, or a broken file in it, raises a `UserError`.
    """
    folder = RunFolder(run_folder)
    for needed in (folder.config, folder.facts):
        if not needed.is_file():
            raise UserError(
                f"{folder.root} is no run's folder: it has no {needed.name}; "
                "give the folder that training wrote"
            )
    facts, held_out, left = _read(folder.facts, "{}", _facts)
    metrics = _read(folder.metrics, "", _columns)
    looks, energies = _read(folder.health, "{}", _health)
    path = folder.evaluation
    rows = _read(path, "", lambda _: read_rows(path) if path.exists() else [])
    previews = _previews(folder.previews)
    look = looks[-1] if looks else {"tasks": {}}
    measures = verdicts.measure_health(looks, metrics, held_out)
    paid, health = verdicts.payoff(rows), verdicts.health_verdict(measures, psnr_gains(look))
    evaluate = f"backfold evaluate --checkpoint {shlex.quote(str(folder.root))}"
    missing = {
        f"{left:,.0f} steps of training": left > 0,
        folder.metrics.name: not metrics,
        folder.health.name: not looks,
        folder.previews.name: not previews,
        folder.backbone.name: not folder.backbone.exists(),
        **{f"{name}, which can't be read": found is None for name, found in previews.items()},
    }
    gaps = [(what, facts.get("command") or "training") for what, lacks in missing.items() if lacks]
    page = TEMPLATES.get_template("report.html.jinja").render(
        settings=_read(folder.config, "", str),
        facts=facts,
        name=folder.root.resolve().name,
        questions=[("Is the run healthy?", health), ("Did pretraining pay?", paid)],
        measures=measures,
        gaps=gaps if rows else [*gaps, (path.name, evaluate)],
        tasks=_task_table(look),
        previews=[picture for picture in previews.values() if picture],
        histograms=list(filter(None, (plot_energies(*item) for item in energies.items()))),
        curves=plot_curves(looks, metrics),
        sections=_sections(folder, rows),
        signs=SIGNS,
    )
    out = out or run_folder / "report.html"
    write_atomically(out, page.encode())
    return out


def _read(path: Path, missing: str, build: Callable[[str], Content]) -> Content:
    """What a file's text builds, or that of a missing one; an error becomes one line."""
    try:
        return build(path.read_text(encoding="utf-8") if path.exists() else missing)
    except BROKEN as error:
        reason = " ".join(str(error).split())[:300]
        raise UserError(
            f"{path} is not as backfold writes it ({type(error).__name__}: {reason}); restore or "
            "remove the file, or make it again"
        ) from error


def _facts(text: str) -> tuple[dict[str, str], float, float]:
    """In words, the number of held-out images, and of steps that are left."""
    values = {key: value for key, value in json.loads(text).items() if value is not None}
    left = float(values.get("total_steps", 0)) - float(values.get("steps", 0))
    words = {key.replace("_", " "): _word(value) for key, value in values.items()}
    return words, float(values.get("held_out_images", math.inf)), left


def _word(value: Any) -> str:
    if isinstance(value, list):
        return ", ".join(map(_word, value))
    if isinstance(value, dict):
        return ", ".join(f"{name} {_word(part)}" for name, part in value.items())
    if isinstance(value, str | bool):
        return str(value)
    return show(value, ",.4g" if abs(value) < 1000 else ",.0f")


def _columns(text: str) -> dict[str, Series]:
    """Of rows with the same step, as a resumed run leaves them, the last one counts."""
    whole = text[: text.rfind("\n") + 1]  # the last line may still be being written
    reader = csv.DictReader(whole.splitlines())
    by_step = {int(row["step"]): row for row in reader}
    rows = [by_step[step] for step in sorted(by_step)]
    names = reader.fieldnames if rows and reader.fieldnames else ()
    return {name: np.array([row[name] or "nan" for row in rows], float) for name in names}


def _health(text: str) -> tuple[list[Look], dict[str, dict[str, Series]]]:
    """Of looks at the same step, as a resumed run leaves them, the last one counts."""

    def numbers(values: Mapping[str, Any]) -> dict[str, float]:
        return {name: float(value) for name, value in values.items() if value is not None}

    content, looks = json.loads(text), {}
    for entry in content.get("history", []):
        tasks = {task: numbers(row) for task, row in entry.pop("tasks", {}).items()}
        looks[entry["step"]] = numbers(entry) | {"tasks": tasks}
    energies = {
        task: {name: np.array(found[name], float) for name in ("clean", "corrupted", "restored")}
        for task, found in content.get("energies", {}).items()
    }
    return [looks[step] for step in sorted(looks)], energies


def _previews(folder: Path) -> dict[str, dict[str, Any] | None]:
    """By file name the latest picture of each task; None where it can't be read."""
    found = [match for path in folder.glob("*.png") if (match := PREVIEW_NAME.fullmatch(path.name))]
    found.sort(key=lambda match: (int(match[1]), match[2]))
    alt = "Held-out images under {}, one a row: corrupted, step by step restored, clean."
    return {
        match[0]: _picture(folder / match[0], f"{task}, step {int(match[1]):,}", alt.format(task))
        for task, match in {match[2]: match for match in found}.items()
    }


def _picture(path: Path, title: str, alt: str) -> dict[str, Any] | None:
    """None where there is no picture, or where it can't be read."""
    try:
        data = path.read_bytes()
        with Image.open(io.BytesIO(data), formats=["PNG"]) as picture:
            picture.load()
            width, height = picture.size
    except (OSError, SyntaxError, ValueError, Image.DecompressionBombError):
        return None
    data_uri = "data:image/png;base64," + base64.b64encode(data).decode()
    return {"title": title, "alt": alt, "width": width, "height": height, "data_uri": data_uri}


def _task_table(look: Look) -> Table | None:
    """The tasks' measures at the last look; columns that no task has are left out."""
    gains, names = psnr_gains(look), dict.fromkeys(chain.from_iterable(look["tasks"].values()))
    rows = tuple(
        (task, show(gains.get(task), "+z.2f"), *(show(row.get(name), "#.4g") for name in names))
        for task, row in look["tasks"].items()
    )
    headings = (
        name.replace("_", " ").replace("psnr", "PSNR").replace(" db", " (dB)") for name in names
    )
    caption = "Pretext tasks on held-out images. PSNR counts pixels where the task's loss counts."
    return Table(caption, ("task", "gain (dB)", *headings), rows) if rows else None


def _sections(folder: RunFolder, rows: Sequence[Row]) -> list[dict[str, Any]]:
    """What the template shows of each protocol, in the order of `ABOUT`, on each data set."""
    alt = "Test images, their true classes, and the classes predicted with each backbone."
    picture = _picture(folder.pictures / "segmentation.png", "segmentation", alt)
    sections = []
    names = dict.fromkeys([*ABOUT, *(row.protocol for row in rows)])
    for name, data in product(names, dict.fromkeys(row.data for row in rows)):
        if found := [row for row in rows if (row.protocol, row.data) == (name, data)]:
            origins = (f"{row.data}, step {row.step:,}" if row.step else row.data for row in found)
            section = {
                "about": ABOUT.get(name, About(name, "")),
                "origins": list(dict.fromkeys(filter(None, origins))),
                "plots": plot_rows(found),
                "picture": picture if name == "segmentation" else None,
                "tables": tables_of(found),
                "notes": _notes(found),
            }
            sections.append(section)
    return sections


def _notes(rows: Sequence[Row]) -> list[str]:
    """Each note once, with the rows that it is on; what is on all of them comes first."""
    noted = [(f"{row.case}, {row.contender}", row.note.split("; ")) for row in rows if row.note]
    shared = [note for note in noted[0][1] if all(note in n for _, n in noted)] if noted else []
    whose: dict[str, list[str]] = {}
    for who, notes in noted:
        own = "; ".join(note for note in notes if note not in shared)
        whose.setdefault(own, []).append(who)
    whose.pop("", None)
    return shared + [
        f"{'; '.join(who) if len(who) <= WHOSE else 'several'}: {note}"
        for note, who in whose.items()
    ]
