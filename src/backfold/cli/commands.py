"""What the other commands do, as functions of their settings; each imports what it uses."""

from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING

from rich.console import Console
from rich.table import Table

from backfold.errors import UserError
from backfold.training.run import DEMO_RUN, RunFolder

if TYPE_CHECKING:
    from backfold.training.config import PretrainConfig

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


def run_pretrain(config: "PretrainConfig", resume: bool, overwrite: bool, command: str) -> None:
    """`backfold pretrain`."""
    from backfold.training.log import is_first_process
    from backfold.training.pretrain import pretrain

    pretrain(config, resume=resume, overwrite=overwrite, command=command)
    if is_first_process():
        print(f"run: {config.out}")


def run_restore(settings: RestoreSettings) -> None:
    """`backfold restore`: writes the pictures, prints the numbers."""
    from backfold.inference import restored
    from backfold.training.config import build_tasks
    from backfold.training.run import load_pretrained

    if settings.num_steps < 0:
        raise UserError(f"num_steps is {settings.num_steps}; give 0 or more")
    run = load_pretrained(settings.checkpoint)
    if settings.pretext is not None:
        run.config.pretext = settings.pretext
    name, task = next(iter(build_tasks(run.config, run.channels).items()))
    if settings.images:
        names = restored.distinct_names(settings.images)
        clean = restored.read_images(settings.images, run)
    else:
        names, clean = restored.sample_images(run, SAMPLED_IMAGES)
    step_size = run.config.step_size if settings.step_size is None else settings.step_size
    images = restored.restore_images(
        run, names, clean, task, settings.out, num_steps=settings.num_steps, step_size=step_size,
        seed=settings.seed,
    )  # fmt: skip
    table = Table("image", title=f"{name}: corrupted -> restored")
    for heading in ("PSNR (dB)", "SSIM", "energy", "if clean"):
        table.add_column(heading, justify="right", no_wrap=True)
    troubled = any(image.diverged for image in images)
    if troubled:
        table.add_column("status")
    for image in images:
        status = "diverged: lower --step-size" if image.diverged else "ok"
        table.add_row(
            image.name,
            "{:.2f} -> {:.2f}".format(*image.psnr_db),
            "{:.3f} -> {:.3f}".format(*image.ssim),
            "{:.4g} -> {:.4g}".format(*image.energies),
            f"{image.clean_energy:.4g}",
            *([status] if troubled else []),
        )
    Console().print(table)
    print(f"pictures: {settings.out}")


def run_report(settings: ReportSettings) -> None:
    """`backfold report`: writes one HTML file."""
    from backfold.reporting.report import write_report

    print(f"report: {write_report(settings.run, settings.out)}")


def run_demo(config: "PretrainConfig", command: str) -> None:
    """`backfold demo`: pretrain, evaluate, report; the table and the report's path come last."""
    from backfold.cli.evaluation import print_tables, print_verdict
    from backfold.evaluation.evaluate import EvaluateSettings, evaluate_each
    from backfold.reporting.report import write_report
    from backfold.training.log import is_first_process, log_to, terminal
    from backfold.training.pretrain import pretrain

    console = terminal()
    pretrain(config, overwrite=True, command=command, console=console)
    if not is_first_process():
        return
    with log_to(RunFolder(config.out).log, console):
        settings = EvaluateSettings(checkpoint=config.out, protocols="knn,linear,layers")
        rows = [row for part in evaluate_each(settings) for row in part]
    report = write_report(config.out)
    shown = [row for row in rows if row.protocol != "layers"]
    print_tables(Console(), shown)
    print_verdict(Console(), shown)
    print(f"report: {report}")
