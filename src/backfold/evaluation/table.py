"""Evaluation rows as a table for the terminal."""

from collections.abc import Sequence

from rich.table import Table

from backfold.evaluation.protocol import EvaluationRow

ABSENT = "-"


def render_table(rows: Sequence[EvaluationRow]) -> Table:
    """One line for each protocol and number of labels, untrained beside pretrained, in percent."""
    table = Table(title="Test accuracy (%), mean ± deviation over draws")
    table.add_column("protocol")
    for heading in ("labels a class", "untrained", "pretrained", "difference"):
        table.add_column(heading, justify="right")
    cells = {(row.protocol, row.labels, row.backbone): row for row in rows}
    for protocol, labels in dict.fromkeys((row.protocol, row.labels) for row in rows):
        untrained = cells.get((protocol, labels, "untrained"))
        pretrained = cells.get((protocol, labels, "pretrained"))
        table.add_row(
            protocol,
            str(labels),
            _accuracy(untrained),
            _accuracy(pretrained),
            _difference(untrained, pretrained),
        )
    return table


def _accuracy(row: EvaluationRow | None) -> str:
    if row is None:
        return ABSENT
    deviation = "" if row.labels == "all" else f" ± {row.accuracy_std:.1f}"
    return f"{row.accuracy_mean:.1f}{deviation}"


def _difference(untrained: EvaluationRow | None, pretrained: EvaluationRow | None) -> str:
    if untrained is None or pretrained is None:
        return ABSENT
    return f"{pretrained.accuracy_mean - untrained.accuracy_mean:+.1f}"
