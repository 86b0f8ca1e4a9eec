"""Reading the folder that a training run leaves."""

import base64
import io
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from PIL import Image

from backfold.errors import UserError
from backfold.evaluation.protocol import EvaluationRow, read_rows
from backfold.reporting import fields
from backfold.reporting.records import (
    HealthEntry,
    Preview,
    RunFacts,
    RunFolder,
    TaskEnergies,
    TaskHealth,
)

SETTINGS_FILE, FACTS_FILE = "config.yaml", "run.json"
METRICS_FILE, HEALTH_FILE = "metrics.csv", "health.json"
PREVIEWS_FOLDER, EVALUATION_FILE = "previews", "evaluation.json"
OTHER_FILES = ("backbone.safetensors", "checkpoints", "tensorboard", "train.log")

PREVIEW_NAME = re.compile(r"step-(\d+)-(.+)\.png")


def read_run_folder(path: Path) -> RunFolder:
    """Read a run folder; only ``config.yaml`` and ``run.json`` must be there.

    Raises:
        UserError: no run folder, or a file in it that is broken.
    """
    for name in (SETTINGS_FILE, FACTS_FILE):
        if not (path / name).is_file():
            raise UserError(
                f"{path} is no run folder: it has no {name}; give the folder that training wrote"
            )
    facts = path / FACTS_FILE
    metrics, evaluation = path / METRICS_FILE, path / EVALUATION_FILE
    history, energies = _read_health(path / HEALTH_FILE)
    previews, broken_previews = _read_previews(path / PREVIEWS_FOLDER)
    return RunFolder(
        path=path,
        settings=fields.check_yaml(path / SETTINGS_FILE),
        facts=fields.read_record(RunFacts, fields.read_json(facts), str(facts)),
        metrics=fields.read_columns(metrics) if metrics.exists() else {},
        history=history,
        energies=energies,
        previews=previews,
        broken_previews=broken_previews,
        evaluation=_read_evaluation(evaluation) if evaluation.exists() else (),
        other_files=tuple(name for name in OTHER_FILES if (path / name).exists()),
    )


def _read_health(
    path: Path,
) -> tuple[tuple[HealthEntry, ...], dict[str, TaskEnergies]]:
    if not path.exists():
        return (), {}
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
    for row in rows:
        for key in ("accuracy_mean", "accuracy_std"):
            # read_rows checks the names of the fields, not their types.
            fields.number(row.to_dict(), key, str(path))
    return rows


def _read_previews(folder: Path) -> tuple[tuple[Preview, ...], tuple[str, ...]]:
    """The latest picture of each task, by task, and the names of those that can't be read."""
    latest: dict[str, tuple[int, Path]] = {}
    for path in sorted(folder.glob("*.png")):
        match = PREVIEW_NAME.fullmatch(path.name)
        if match and int(match[1]) >= latest.get(match[2], (0, path))[0]:
            latest[match[2]] = (int(match[1]), path)
    previews, broken = [], []
    for task, (step, path) in sorted(latest.items()):
        try:
            data = path.read_bytes()
            with Image.open(io.BytesIO(data), formats=["PNG"]) as picture:
                picture.load()
                width, height = picture.size
        except (OSError, SyntaxError, ValueError, Image.DecompressionBombError):
            broken.append(path.name)
            continue
        uri = "data:image/png;base64," + base64.b64encode(data).decode()
        previews.append(Preview(task, step, width, height, uri))
    return tuple(previews), tuple(broken)
