"""`backfold evaluate`: the rows as tables, and what they say."""

from collections.abc import Iterable, Sequence
from itertools import groupby
from pathlib import Path

from rich.console import Console
from rich.table import Table

from backfold.evaluation.evaluate import PROTOCOLS, EvaluateSettings, evaluate_each
from backfold.evaluation.results import Row, tables_of
from backfold.reporting.verdicts import payoff
from backfold.training.log import log_to, terminal
from backfold.training.run import RunFolder

SHOWN_SEVERITY = 3  # the report has them all


def run_evaluate(settings: EvaluateSettings) -> None:
    """`backfold evaluate`: prints tables and verdict, writes ``evaluation.json`` and pictures."""
    console = Console()
    rows: list[Row] = []
    with log_to(None, terminal()):
        for found in evaluate_each(settings):
            rows += found
            print_tables(console, found)
    print_verdict(console, rows)
    folder = settings.out or RunFolder.of(settings.checkpoint)
    if folder is not None:
        print(f"rows: {RunFolder(Path(folder)).evaluation}")


def print_verdict(console: Console, rows: Sequence[Row]) -> None:
    """Did pretraining pay? Nothing where no row says so."""
    verdict = payoff(rows)
    if verdict.state != "unknown":
        console.print(f"Did pretraining pay? {verdict.headline}", soft_wrap=True)


def print_tables(console: Console, rows: Iterable[Row]) -> None:
    """A table for each protocol and metric, and under it what was chosen."""
    ordered = sorted(rows, key=lambda row: list(PROTOCOLS).index(row.protocol))
    for protocol, members in groupby(ordered, lambda row: row.protocol):
        found = list(members)
        for content in tables_of(found, SHOWN_SEVERITY):
            title = f"{PROTOCOLS[protocol].title}: {content.caption}"
            table = Table(content.headings[0], title=title)
            for heading in content.headings[1:]:
                table.add_column(heading, justify="right")
            for cells in content.rows:
                table.add_row(*cells)
            console.print(table)
        for row in found:
            if row.note:
                line = f"  {row.contender}, {row.case}: {row.note}"
                console.print(line, style="dim", soft_wrap=True)
