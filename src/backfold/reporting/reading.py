"""Reading a run's folder, whatever of it is there."""

import base64
import io
import re
from collections.abc import Mapping, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

from PIL import Image

from backfold.errors import UserError
from backfold.evaluation.measures import MeasureRow, read_measures
from backfold.evaluation.protocol import EvaluationRow, read_rows
from backfold.evaluation.settings import MEASURE_PROTOCOLS
from backfold.reporting import fields
from backfold.reporting.records import (
    HealthEntry,
    Measures,
    Preview,
    Run,
    RunFacts,
    TaskEnergies,
    TaskHealth,
)
from backfold.training.run_folder import RunFolder

PICTURE_KINDS = {"png": "image/png", "svg": "image/svg+xml"}
PREVIEW_NAME = re.compile(r"step-(\d+)-(.+)\.png")


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
    history, energies = _read_health(folder.health) if folder.health.exists() else ((), {})
    facts = fields.read_record(RunFacts, fields.read_json(folder.facts), str(folder.facts))
    previews, broken_previews = _read_previews(folder.previews, facts.tasks)
    others = (folder.backbone, folder.last_checkpoint.parent, folder.tensorboard, folder.log)
    return Run(
        path=path,
        settings=fields.check_yaml(folder.config),
        facts=facts,
        metrics=fields.read_columns(folder.metrics) if folder.metrics.exists() else {},
        history=history,
        energies=energies,
        previews=previews,
        broken_previews=broken_previews,
        evaluation=_read_evaluation(folder.evaluation) if folder.evaluation.exists() else (),
        measures=_read_measures(folder.measures),
        other_files=tuple(other.name for other in others if other.exists()),
    )


def _read_health(
    path: Path,
) -> tuple[tuple[HealthEntry, ...], dict[str, TaskEnergies]]:
    values, where = fields.read_json(path), str(path)
    entries = [
        _health_entry(item, f"entry {position} of the history in {where}")
        for position, item in enumerate(fields.mappings(values, "history", where))
    ]
    # A resumed run may repeat steps: the later look counts.
    by_step = {entry.step or 0.0: entry for entry in entries}
    energies = fields.mapping(values, "energies", where)
    return tuple(by_step[step] for step in sorted(by_step)), {
        task: fields.read_record(TaskEnergies, fields.mapping(energies, task, where), where)
        for task in energies
    }


def _health_entry(values: Mapping[str, Any], where: str) -> HealthEntry:
    tasks = fields.mapping(values, "tasks", where)
    return fields.read_record(
        HealthEntry,
        values,
        where,
        tasks={
            task: fields.read_record(TaskHealth, fields.mapping(tasks, task, where), where)
            for task in tasks
        },
    )


def _read_evaluation(path: Path) -> tuple[EvaluationRow, ...]:
    rows = tuple(read_rows(path))
    # read_rows checks the names of the fields, not their types.
    for values in (row.to_dict() for row in rows):
        for key in ("protocol", "backbone", "data"):
            fields.text(values, key, str(path))
        for key in ("accuracy_mean", "accuracy_std", "step"):
            fields.number(values, key, str(path))
        if not isinstance(values["labels"], str):
            fields.number(values, "labels", str(path))
    return rows


def _read_measures(folder: Path) -> tuple[Measures, ...]:
    return tuple(
        Measures(
            protocol,
            _read_measure_rows(folder / f"{protocol}.json"),
            _read_picture(folder, protocol),
        )
        for protocol in MEASURE_PROTOCOLS
        if (folder / f"{protocol}.json").exists()
    )


def _read_measure_rows(path: Path) -> tuple[MeasureRow, ...]:
    rows = tuple(read_measures(path))
    # read_measures checks the names of the fields, not their types.
    for values in map(asdict, rows):
        for key in ("protocol", "case", "contender", "metric", "data"):
            fields.text(values, key, str(path))
        for key in ("mean", "std", "count", "step"):
            fields.number(values, key, str(path))
    return rows


def _read_picture(folder: Path, protocol: str) -> str | None:
    for suffix, kind in PICTURE_KINDS.items():
        path = folder / f"{protocol}.{suffix}"
        if path.is_file():
            return f"data:{kind};base64," + base64.b64encode(path.read_bytes()).decode()
    return None


def _read_previews(
    folder: Path, tasks: Sequence[str]
) -> tuple[tuple[Preview, ...], tuple[str, ...]]:
    """The latest picture of each task, in the tasks' order, and the names of the broken ones."""
    latest: dict[str, tuple[int, Path]] = {}
    for path in sorted(folder.glob("*.png")):
        match = PREVIEW_NAME.fullmatch(path.name)
        if match and int(match[1]) >= latest.get(match[2], (0, path))[0]:
            latest[match[2]] = (int(match[1]), path)
    previews, broken = [], []
    for task in sorted(latest, key=lambda task: (*tasks, task).index(task)):
        step, path = latest[task]
        preview = _read_preview(path, task, step)
        broken.append(path.name) if preview is None else previews.append(preview)
    return tuple(previews), tuple(broken)


def _read_preview(path: Path, task: str, step: int) -> Preview | None:
    try:
        data = path.read_bytes()
        with Image.open(io.BytesIO(data), formats=["PNG"]) as picture:
            picture.load()
            width, height = picture.size
    except (OSError, SyntaxError, ValueError, Image.DecompressionBombError):
        return None
    data_uri = "data:image/png;base64," + base64.b64encode(data).decode()
    return Preview(task, step, width, height, data_uri)
