"""Evaluation of frozen backbones: probes on embeddings, their protocol and the table of results."""

from backfold.evaluation.probes import linear_probe_accuracy
from backfold.evaluation.protocol import (
    EvaluationRow,
    evaluate_embeddings,
    read_rows,
    write_rows,
)
from backfold.evaluation.table import render_table

__all__ = [
    "EvaluationRow",
    "evaluate_embeddings",
    "linear_probe_accuracy",
    "read_rows",
    "render_table",
    "write_rows",
]
