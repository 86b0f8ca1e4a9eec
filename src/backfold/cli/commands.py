"""What each command does, as functions of its typed settings."""

from dataclasses import dataclass, field
from pathlib import Path

from rich.console import Console
from rich.table import Table

from backfold.cli.evaluation import print_tables, print_verdict
from backfold.errors import UserError
from backfold.evaluation.evaluate import EvaluateSettings, evaluate_each
from backfold.inference.restored import (
    RestoredImage,
    distinct_names,
    read_images,
    restore_images,
    sample_images,
)
from backfold.reporting.report import write_report
from backfold.training.config import PretrainConfig, build_tasks
from backfold.training.pretrained import load_pretrained
from backfold.training.progress import is_first_process, log_to, terminal
from backfold.training.run_folder import DEMO_RUN, RunFolder
from backfold.training.trainer import pretrain

SAMPLED_IMAGES = 4


@dataclass
class RestoreSettings:
    """How `backfold restore` corrupts and restores image files.

    Args:
        images: files; none takes a few of the run's own data.
        checkpoint: a run's folder or a .ckpt file.
        pretext: masking, sorting, superresolution, denoising or colorization; none takes the run's
            first.
        num_steps: restoration steps; 0 shows the corruption alone.
        step_size: factor of the energy gradient; none takes the run's.
        out: folder for NAME.png (corrupted, restored, clean) and NAME.gif (the trajectory).
        seed: of the corruption.
    """

    images: list[Path] = field(default_factory=list)
    checkpoint: Path = DEMO_RUN
    pretext: str | None = None
    num_steps: int = 1
    step_size: float | None = None
    out: Path = Path("restored")
    seed: int = 0


@dataclass
class ReportSettings:
    """What `backfold report` reads and writes.

    Args:
        run: a run's folder.
        out: the file; none takes RUN/report.html.
    """

    run: Path = DEMO_RUN
    out: Path | None = None


def run_pretrain(config: PretrainConfig, resume: bool, overwrite: bool, command: str) -> None:
    """`backfold pretrain`."""
    pretrain(config, resume=resume, overwrite=overwrite, command=command)
    if is_first_process():
        print(f"run: {config.out}")


def run_restore(settings: RestoreSettings) -> None:
    """`backfold restore`: writes the pictures, prints the numbers."""
    if settings.num_steps < 0:
        raise UserError(f"num_steps is {settings.num_steps}; give 0 or more")
    run = load_pretrained(settings.checkpoint)
    config = run.config
    if settings.pretext is not None:
        config.pretext = settings.pretext
    tasks = build_tasks(config, run.channels)
    if settings.images:
        names, clean = distinct_names(settings.images), read_images(settings.images, run)
    else:
        names, clean = sample_images(run, SAMPLED_IMAGES)
    restored = restore_images(
        run,
        names,
        clean,
        next(iter(tasks.values())),
        settings.out,
        num_steps=settings.num_steps,
        step_size=config.step_size if settings.step_size is None else settings.step_size,
        seed=settings.seed,
    )
    Console().print(_restored_table(restored, next(iter(tasks))))
    print(f"pictures: {settings.out}")


def _restored_table(rows: list[RestoredImage], task: str) -> Table:
    table = Table(title=f"{task}: corrupted -> restored")
    troubled = any(row.message != "ok" for row in rows)
    table.add_column("image")
    for heading in ("PSNR (dB)", "SSIM", "energy", "if clean"):
        table.add_column(heading, justify="right", no_wrap=True)
    if troubled:
        table.add_column("status")
    for row in rows:
        table.add_row(
            row.name,
            f"{row.psnr_db[0]:.2f} -> {row.psnr_db[1]:.2f}",
            f"{row.ssim[0]:.3f} -> {row.ssim[1]:.3f}",
            f"{row.energies[0]:.4g} -> {row.energies[1]:.4g}",
            f"{row.clean_energy:.4g}",
            *([row.message] if troubled else []),
        )
    return table


def run_report(settings: ReportSettings) -> None:
    """`backfold report`: writes one HTML file."""
    print(f"report: {write_report(settings.run, settings.out)}")


def run_demo(config: PretrainConfig, command: str) -> None:
    """`backfold demo`: pretrain, evaluate, report; the table and the report's path come last."""
    console = terminal()
    pretrain(config, overwrite=True, command=command, console=console)
    if not is_first_process():
        return
    with log_to(RunFolder(config.out).log, console):
        settings = EvaluateSettings(checkpoint=config.out, protocols="knn,linear,layers")
        found = list(evaluate_each(settings))
    report = write_report(config.out)
    rows = [row for part in found for row in part if row.protocol != "layers"]
    print_tables(Console(), rows)
    print_verdict(Console(), rows)
    print(f"report: {report}")
