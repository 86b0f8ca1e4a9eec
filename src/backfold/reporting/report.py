"""The report of a run: one HTML page that needs nothing but itself."""

import shlex
from dataclasses import dataclass
from pathlib import Path

from jinja2 import Environment, PackageLoader, StrictUndefined

from backfold.reporting import wording
from backfold.reporting.figures import plot_curves, plot_energies
from backfold.reporting.health import measure_health
from backfold.reporting.measure_tables import measure_sections
from backfold.reporting.reading import read_run
from backfold.reporting.records import Run
from backfold.reporting.tables import describe_facts, evaluation_table, task_table
from backfold.reporting.verdicts import health_verdict, payoff_verdict
from backfold.training.run_folder import RunFolder, write_atomically

STATE_WORDS = {"good": "good", "watch": "watch", "bad": "bad", "unknown": "not measured"}
STATE_SIGNS = {"good": "✓", "watch": "!", "bad": "✕", "unknown": "?"}


@dataclass(frozen=True)
class Gap:
    """A part that the run's folder lacks: what, and how it comes to be there."""

    what: str
    remedy: str
    command: str


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
    run = read_run(run_folder)
    path = out or run_folder / "report.html"
    write_atomically(path, render_report(run).encode())
    return path


def render_report(run: Run) -> str:
    """The HTML page of a run; the same run always gives the same page."""
    evaluate = f"backfold evaluate --checkpoint {shlex.quote(str(run.path))}"
    measures = measure_health(run)
    plots = [plot_energies(task, energies) for task, energies in run.energies.items()]
    environment = Environment(
        loader=PackageLoader("backfold", "reporting"),
        autoescape=True,
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    return environment.get_template("report.html.jinja").render(
        run=run,
        questions=[
            ("Is the run healthy?", health_verdict(run, measures)),
            ("Did pretraining pay?", payoff_verdict(run, evaluate)),
        ],
        measures=measures,
        gaps=find_gaps(run, evaluate),
        tasks=task_table(run.latest),
        evaluation=evaluation_table(run.evaluation),
        measured=measure_sections(run.measures),
        histograms=[plot for plot in plots if plot is not None],
        curves=plot_curves(run),
        facts=describe_facts(run.facts),
        state_words=STATE_WORDS,
        state_signs=STATE_SIGNS,
        wording=wording,
    )


def find_gaps(run: Run, evaluate: str) -> list[Gap]:
    """What the run's folder lacks, with the command that makes it."""
    folder = RunFolder(run.path)
    missing_in_training = {
        folder.metrics.name: not run.metrics,
        folder.health.name: not run.history,
        f"energies in {folder.health.name}": bool(run.history) and not run.energies,
        folder.previews.name: not run.previews and not run.broken_previews,
        folder.backbone.name: folder.backbone.name not in run.other_files,
    }
    training = run.facts.command or ""
    gaps = [
        Gap(what, "training writes it", training)
        for what, is_missing in missing_in_training.items()
        if is_missing
    ]
    gaps += [
        Gap(f"{folder.previews.name}/{name}, which can't be read", "training writes it", training)
        for name in run.broken_previews
    ]
    if not run.evaluation:
        gaps.append(Gap(folder.evaluation.name, "evaluation writes it", evaluate))
    return gaps
