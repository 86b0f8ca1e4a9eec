"""The report of a run: one HTML page that needs nothing but itself."""

import base64
import csv
import io
import json
import math
import re
import shlex
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from itertools import chain
from pathlib import Path
from typing import Any, TypeVar

import numpy as np
import yaml
from jinja2 import Environment, PackageLoader, StrictUndefined
from PIL import Image

from backfold.errors import UserError
from backfold.evaluation.evaluate import PROTOCOLS
from backfold.evaluation.results import Row, Table, read_rows, tables_of
from backfold.reporting.plots import HELD_OUT_CURVES, plot_curves, plot_energies, plot_rows
from backfold.reporting.verdicts import (
    ABSENT,
    Look,
    Series,
    health_verdict,
    measure_health,
    payoff,
    show,
)
from backfold.training.run_folder import RunFolder, write_atomically

Content = TypeVar("Content")
PREVIEW_NAME = re.compile(r"step-(\d{1,18})-(.+)\.png")
SIGNS = {"good": "✓ good", "watch": "! watch", "bad": "✕ bad", "unknown": f"? {ABSENT}"}
WHOSE = 3  # a note on more rows than these does not say on which


@dataclass(frozen=True)
class Picture:
    """A picture with its content in words; width and height in pixels."""

    title: str
    alt: str
    width: int
    height: int
    data_uri: str


@dataclass(frozen=True)
class Facts:
    """What ``run.json`` says: all of it in words, and what is used besides."""

    described: Mapping[str, str] = field(default_factory=dict)
    command: str = "training"
    held_out_images: float = math.inf
    steps_left: float = 0.0
    tasks: Sequence[str] = ()


@dataclass(frozen=True)
class Health:
    """Looks in the order of their steps, and the held-out images' energies by task and kind."""

    looks: Sequence[Look]
    energies: Mapping[str, Mapping[str, Series]]


@dataclass(frozen=True)
class Run:
    """All that a report is made from; empty wherever the folder holds nothing.

    Args:
        folder: where everything lies.
        settings: the text of ``config.yaml``.
        facts: of ``run.json``.
        metrics: columns of ``metrics.csv``.
        health: of ``health.json``.
        rows: of the evaluation.
        previews: by file name, the latest of each task; None where it can't be read.
        segmentation: predictions beside the truth.
    """

    folder: RunFolder
    settings: str
    facts: Facts
    metrics: Mapping[str, Series]
    health: Health
    rows: Sequence[Row]
    previews: Mapping[str, Picture | None]
    segmentation: Picture | None


def write_report(run_folder: Path, out: Path | None = None) -> Path:
    """Write the report of a run, whole or not at all.

    Args:
        run_folder: what training left; parts of it may be missing, and the report says which.
        out: the HTML file; by default ``report.html`` in the run's folder.

    Returns:
        The path written.

    Raises:
        UserError: no run's folder, a broken file in it, or a place that can't be written.
    """
    page = render_report(read_run(run_folder))
    path = out or run_folder / "report.html"
    write_atomically(path, page.encode())
    return path


def read_run(path: Path) -> Run:
    """Read a run's folder; only ``config.yaml`` and ``run.json`` must be there.

    Raises:
        UserError: no run's folder, or a file in it that is broken.
    """
    folder = RunFolder(path)
    for needed in (folder.config, folder.facts):
        if not needed.is_file():
            raise UserError(
                f"{path} is no run's folder: it has no {needed.name}; "
                "give the folder that training wrote"
            )
    health = _read(folder.health, _health, Health((), {}))
    facts = _read(folder.facts, _facts, Facts())
    picture = folder.pictures / "segmentation.png"
    alt = "Test images, their true classes, and the classes predicted with each backbone."
    return Run(
        folder,
        _read(folder.config, _settings, ""),
        facts,
        _read(folder.metrics, _columns, {}),
        health,
        _read(folder.evaluation, lambda _: read_rows(folder.evaluation), []),
        _previews(folder.previews, facts.tasks),
        _picture(picture, "segmentation", alt) if picture.is_file() else None,
    )


def _read(path: Path, build: Callable[[str], Content], missing: Content) -> Content:
    """What a file's text builds; whatever is wrong with it becomes one line."""
    if not path.exists():
        return missing
    try:
        return build(path.read_text(encoding="utf-8"))
    except UserError as error:
        raise UserError(" ".join(str(error).split())) from error
    except (
        OSError, ValueError, KeyError, TypeError, AttributeError, OverflowError, RecursionError,
        csv.Error, yaml.YAMLError,
    ) as error:  # fmt: skip
        reason = " ".join(str(error).split())[:200]
        raise UserError(
            f"{path} is not as backfold writes it ({type(error).__name__}: {reason}); restore the "
            "file or train again"
        ) from error


def _checked(value: Any, *kinds: type) -> Any:
    if not isinstance(value, kinds) or (isinstance(value, bool) and bool not in kinds):
        raise TypeError(f"{value!r} is no {kinds[0].__name__}")
    return value


def _number(value: Any) -> float:
    return float(_checked(value, float, int))


def _settings(text: str) -> str:
    _checked(yaml.safe_load(text), dict)
    return text


def _facts(text: str) -> Facts:
    values = {key: value for key, value in json.loads(text).items() if value is not None}
    return Facts(
        {key.replace("_", " "): _word(value) for key, value in values.items()},
        _checked(values.get("command", "training"), str),
        _number(values.get("held_out_images", math.inf)),
        _number(values.get("total_steps", 0)) - _number(values.get("steps", 0)),
        [_checked(task, str) for task in _checked(values.get("tasks", []), list)],
    )


def _word(value: Any) -> str:
    if isinstance(value, list):
        return ", ".join(map(_word, value))
    if isinstance(value, dict):
        return ", ".join(f"{name} {_word(part)}" for name, part in value.items())
    if isinstance(value, str | bool):
        return str(value)
    return show(_number(value), ",.4g" if abs(value) < 1000 else ",.0f")


def _columns(text: str) -> dict[str, Series]:
    """Of rows with the same step, as a resumed run leaves them, the last one counts."""
    lines = text.splitlines(keepends=True)
    if lines and not lines[-1].endswith("\n"):
        lines.pop()  # it is still being written
    reader = csv.DictReader(lines)
    rows = {float(row["step"]): row for row in reader}
    if not all(map(math.isfinite, rows)):
        raise ValueError(f"steps {list(rows)} are not all finite")
    return {
        name: np.array([float(rows[step][name] or "nan") for step in sorted(rows)])
        for name in (reader.fieldnames or [] if rows else [])
    }


def _health(text: str) -> Health:
    """Of looks at the same step, as a resumed run leaves them, the last one counts."""
    values = json.loads(text)
    looks = {}
    for entry in values.get("history") or []:
        measures = {name: entry.get(name) for name in (*HELD_OUT_CURVES, "embedding_size")}
        tasks = {task: _numbers(row) for task, row in (entry.get("tasks") or {}).items()}
        step = _number(entry["step"])
        looks[step] = Look(step, _numbers(measures), tasks)
    energies = {
        task: {
            name: np.array([math.nan if x is None else _number(x) for x in found[name] or []])
            for name in ("clean", "corrupted", "restored")
        }
        for task, found in (values.get("energies") or {}).items()
    }
    return Health([looks[step] for step in sorted(looks)], energies)


def _numbers(values: Mapping[str, Any]) -> dict[str, float]:
    return {name: _number(value) for name, value in values.items() if value is not None}


def _previews(folder: Path, tasks: Sequence[str]) -> dict[str, Picture | None]:
    """The latest picture of each task, in the tasks' order."""
    latest: dict[str, tuple[int, Path]] = {}
    for path in sorted(folder.glob("*.png")):
        match = PREVIEW_NAME.fullmatch(path.name)
        if match and int(match[1]) >= latest.get(match[2], (0, path))[0]:
            latest[match[2]] = (int(match[1]), path)
    previews = {}
    for task in sorted(latest, key=lambda task: (*tasks, task).index(task)):
        step, path = latest[task]
        alt = (
            f"Held-out images under {task} at step {step:,}: each row is one image, from left to "
            "right corrupted, the steps of its restoration, restored, clean."
        )
        previews[path.name] = _picture(path, f"{task}, step {step:,}", alt)
    return previews


def _picture(path: Path, title: str, alt: str) -> Picture | None:
    try:
        data = path.read_bytes()
        with Image.open(io.BytesIO(data), formats=["PNG"]) as picture:
            picture.load()
            width, height = picture.size
    except (OSError, SyntaxError, ValueError, Image.DecompressionBombError):
        return None
    data_uri = "data:image/png;base64," + base64.b64encode(data).decode()
    return Picture(title, alt, width, height, data_uri)


def render_report(run: Run) -> str:
    """The HTML page of a run; the same run always gives the same page."""
    evaluate = f"backfold evaluate --checkpoint {shlex.quote(str(run.folder.root))}"
    latest = run.health.looks[-1] if run.health.looks else None
    measures = measure_health(run.health.looks, run.metrics, run.facts.held_out_images)
    paid = payoff(run.rows)
    if paid.state == "unknown":
        paid = replace(paid, sentences=(f"Evaluate it: {evaluate}",))
    histograms = [plot_energies(task, energies) for task, energies in run.health.energies.items()]
    environment = Environment(
        loader=PackageLoader("backfold", "reporting"),
        autoescape=True,
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    return environment.get_template("report.html.jinja").render(
        settings=run.settings,
        facts=run.facts.described,
        name=run.folder.root.resolve().name,
        questions=[
            ("Is the run healthy?", health_verdict(measures, latest)),
            ("Did pretraining pay?", paid),
        ],
        measures=measures,
        gaps=_gaps(run, evaluate),
        tasks=_task_table(latest),
        previews=[picture for picture in run.previews.values() if picture],
        histograms=[plot for plot in histograms if plot],
        curves=plot_curves(run.health.looks, run.metrics),
        sections=_sections(run),
        signs=SIGNS,
    )


def _gaps(run: Run, evaluate: str) -> list[tuple[str, str]]:
    """What the run's folder lacks, and the command that makes it."""
    folder, training = run.folder, run.facts.command
    left = run.facts.steps_left
    gaps = {
        f"{left:,.0f} steps of training": left > 0,
        folder.metrics.name: not run.metrics,
        folder.health.name: not run.health.looks,
        f"energies in {folder.health.name}": bool(run.health.looks) and not run.health.energies,
        folder.previews.name: not run.previews,
        folder.backbone.name: not folder.backbone.exists(),
        **{f"{name}, which can't be read": found is None for name, found in run.previews.items()},
    }
    made = [(what, training) for what, is_missing in gaps.items() if is_missing]
    return made if run.rows else [*made, (folder.evaluation.name, evaluate)]


def _task_table(latest: Look | None) -> Table | None:
    """The tasks' measures at the last look; columns that no task has are left out."""
    if latest is None or not latest.tasks:
        return None
    gains, names = latest.gains(), dict.fromkeys(chain.from_iterable(latest.tasks.values()))
    rows = tuple(
        (task, show(gains.get(task), "+z.2f"), *(show(row.get(name), "#.4g") for name in names))
        for task, row in latest.tasks.items()
    )
    headings = [
        name.replace("_", " ")
        .replace("psnr", "PSNR")
        .replace(" db", " (dB)")
        .replace("auroc", "AUROC")
        for name in names
    ]
    caption = (
        f"Pretext tasks on held-out images, step {latest.step:,.0f}. "
        "PSNR counts the pixels where the task's loss counts."
    )
    return Table(caption, ("task", "gain (dB)", *headings), rows)


def _sections(run: Run) -> list[dict[str, Any]]:
    """What the template shows of each protocol that was run, in the order of `PROTOCOLS`."""
    names = dict.fromkeys([*PROTOCOLS, *(row.protocol for row in run.rows)])
    by_protocol = {name: [row for row in run.rows if row.protocol == name] for name in names}
    return [
        {
            "title": PROTOCOLS[name].title if name in PROTOCOLS else name,
            "sentence": PROTOCOLS[name].sentence if name in PROTOCOLS else "",
            "origins": list(dict.fromkeys(filter(None, map(_origin, rows)))),
            "plots": plot_rows(rows),
            "picture": run.segmentation if name == "segmentation" else None,
            "tables": tables_of(rows),
            "notes": _notes(rows),
        }
        for name, rows in by_protocol.items()
        if rows
    ]


def _origin(row: Row) -> str:
    step = "" if row.step is None else f"step {row.step:,}"
    return ", ".join(part for part in (row.data, step) if part)


def _notes(rows: Sequence[Row]) -> list[str]:
    """Each note once, with the rows that it is on; what is on all of them comes first."""
    noted = [(row, row.note.split("; ")) for row in rows if row.note]
    every = dict.fromkeys(chain.from_iterable(notes for _, notes in noted))
    shared = [note for note in every if all(note in notes for _, notes in noted)]
    whose: dict[str, list[str]] = {}
    for row, notes in noted:
        own = "; ".join(note for note in notes if note not in shared)
        whose.setdefault(own, []).append(f"{row.case}, {row.contender}")
    whose.pop("", None)
    return shared + [
        f"{'; '.join(who) if len(who) <= WHOSE else 'several'}: {note}"
        for note, who in whose.items()
    ]
