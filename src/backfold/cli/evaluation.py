"""`backfold evaluate`: what is measured, printed and written."""

import logging
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import cast

import torch
from rich.console import Console
from rich.table import Table
from torch import Tensor

from backfold.data.loading import default_workers
from backfold.errors import UserError
from backfold.evaluation.measure_suite import (
    Measured,
    MeasureData,
    measure,
    open_measure_data,
)
from backfold.evaluation.measures import MeasureRow, write_measures
from backfold.evaluation.origin import with_origin
from backfold.evaluation.protocol import EvaluationRow, ProtocolName, read_rows, write_rows
from backfold.evaluation.run import open_labelled
from backfold.evaluation.settings import (
    CLASSIFIER_PROTOCOLS,
    MEASURE_PROTOCOLS,
    TUNING_PROTOCOLS,
    EvaluateSettings,
    parse_protocols,
)
from backfold.evaluation.severities import parse_case
from backfold.evaluation.suite import ClassifierSuite, Subject, merge_rows
from backfold.evaluation.table import render_table
from backfold.exporting.weights import exported_backbone
from backfold.reporting.measure_tables import case_tables
from backfold.training.pretrained import Pretrained, load_pretrained
from backfold.training.progress import log_to, terminal
from backfold.training.run_folder import RunFolder, write_atomically

LOGGER = logging.getLogger("backfold")
FROZEN = ("knn", "linear")
SHOWN_SEVERITY = 3


def run_evaluate(settings: EvaluateSettings) -> None:
    """`backfold evaluate`: prints the tables, writes ``evaluation.json`` and ``measures``."""
    console, printed = terminal(), Console()
    written = []
    rows: list[EvaluationRow] = []
    with log_to(None, console):
        for found in evaluate(settings):
            if isinstance(found, Measured):
                paths = measure_paths(settings, found)
                written += [f"measures: {paths[0]}", f"picture: {paths[1]}"]
                for table in _measure_tables(found.rows):
                    printed.print(table)
            else:
                rows += found
    if rows:
        printed.print(render_table(rows))
        written.append(f"rows: {evaluation_path(settings)}")
    print("\n".join(written))


def evaluate(settings: EvaluateSettings) -> Iterator[list[EvaluationRow] | Measured]:
    """What each protocol found, as it is found and written.

    Raises:
        UserError: an unknown protocol, data that one of them can't use, or what it raises.
    """
    protocols = parse_protocols(settings.protocol)
    run = load_pretrained(settings.checkpoint)
    subject = _subject(settings, run, protocols)
    asked = [protocol for protocol in protocols if protocol in MEASURE_PROTOCOLS]
    classifiers = [protocol for protocol in protocols if protocol in CLASSIFIER_PROTOCOLS]
    data = open_measure_data(asked, run, settings)
    suite = (
        ClassifierSuite(
            subject,
            open_labelled(settings.data or run.config.data, settings.seed, run.config.max_pixels),
        )
        if classifiers
        else None
    )
    for name in settings.without_effect(protocols):
        LOGGER.warning(f"{name} has no effect on {', '.join(protocols)}")
    if suite is not None:
        for rows in _classifier_rows(suite, classifiers):
            path = evaluation_path(settings)
            found = with_origin(rows, settings.data or run.config.data, run.step)
            write_rows(path, merge_rows(_rows_before(path), found))
            yield found
    for protocol in asked:
        measured = _measured(protocol, subject, data)
        rows_path, picture_path = measure_paths(settings, measured)
        write_measures(rows_path, measured.rows)
        write_atomically(picture_path, measured.picture)
        yield measured


def _measured(protocol: str, subject: Subject, data: MeasureData) -> Measured:
    given, run = subject.settings, subject.run
    found = measure(protocol, subject, data)
    own = given.segmentation.data if protocol == "segmentation" else None
    rows = with_origin(found.rows, own or given.data or run.config.data, run.step)
    return replace(found, rows=rows)


def _subject(settings: EvaluateSettings, run: Pretrained, protocols: list[str]) -> Subject:
    # Before anything takes time: an unknown accelerator is refused.
    device = choose_device(settings.accelerator)
    weights: dict[str, Tensor] = {}
    if set(protocols) & set(TUNING_PROTOCOLS):
        weights = exported_backbone(run, _folder_of(settings.checkpoint)).state_dict()
    return Subject(run, weights, settings, device, default_workers())


def _classifier_rows(suite: ClassifierSuite, protocols: list[str]) -> Iterator[list[EvaluationRow]]:
    frozen = [protocol for protocol in protocols if protocol in FROZEN]
    if frozen:
        yield suite.frozen_rows(cast("list[ProtocolName]", frozen))
    for protocol in protocols:
        if protocol not in FROZEN:
            yield suite.rows(protocol)


def _rows_before(path: Path) -> list[EvaluationRow]:
    if not path.exists():
        return []
    try:
        return read_rows(path)
    except UserError as error:
        LOGGER.warning(f"{error}: it is replaced")
        return []


def _measure_tables(rows: list[MeasureRow]) -> list[Table]:
    """Those of the middle severity, where there are severities: the report has them all."""
    cases = [(row, parse_case(row.case)) for row in rows]
    shown = [row for row, case in cases if case is None or case[1] == SHOWN_SEVERITY]
    tables = []
    for content in case_tables(shown):
        table = Table(title=content.caption)
        table.add_column(content.headings[0])
        for heading in content.headings[1:]:
            table.add_column(heading, justify="right")
        for row in content.rows:
            table.add_row(*row)
        tables.append(table)
    return tables


def evaluation_path(settings: EvaluateSettings) -> Path:
    """Where ``evaluation.json`` goes: the given folder, or the run's."""
    return RunFolder(settings.out or _folder_of(settings.checkpoint)).evaluation


def measure_paths(settings: EvaluateSettings, measured: Measured) -> tuple[Path, Path]:
    """Where a protocol's rows and its picture go."""
    folder = RunFolder(settings.out or _folder_of(settings.checkpoint)).measures
    name = measured.rows[0].protocol
    return folder / f"{name}.json", folder / f"{name}.{measured.suffix}"


def _folder_of(checkpoint: Path) -> Path:
    return checkpoint if checkpoint.is_dir() else checkpoint.parent.parent


def choose_device(accelerator: str) -> torch.device:
    """The device that Lightning would take.

    Raises:
        UserError: an accelerator that is not there.
    """
    from lightning.fabric import Fabric

    try:
        return Fabric(accelerator=accelerator, devices=1).device
    except Exception as error:
        reason = str(error).splitlines()[0]
        raise UserError(f"can't use accelerator {accelerator!r}: {reason}; try auto") from error
