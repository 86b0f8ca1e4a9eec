"""What each command does, as functions of its typed settings."""

from dataclasses import dataclass, field
from pathlib import Path
from typing import cast

import torch
from rich.console import Console
from rich.table import Table

from backfold.data.loading import default_workers
from backfold.embedding import EmbeddingChoice
from backfold.errors import UserError
from backfold.evaluation.protocol import EvaluationRow, ProtocolName, write_rows
from backfold.evaluation.restored_images import (
    RestoredImage,
    distinct_names,
    read_images,
    restore_images,
    sample_images,
)
from backfold.evaluation.run import evaluate_run, open_labelled
from backfold.evaluation.table import render_table
from backfold.reporting.report import write_report
from backfold.training.config import PretrainConfig, build_tasks
from backfold.training.pretrained import load_pretrained
from backfold.training.progress import is_first_process, log_to, terminal
from backfold.training.run_folder import RunFolder
from backfold.training.trainer import pretrain

PROTOCOLS = ("knn", "linear")
DEMO_RUN = Path("runs/demo")
SAMPLED_IMAGES = 4


@dataclass
class EvaluateSettings:
    """How `backfold evaluate` measures a frozen backbone, beside the same backbone untrained.

    Args:
        checkpoint: a run's folder or a .ckpt file.
        data: labelled images: a folder with a sub-folder a class, or parquet files with a label
            column; none takes the run's own data.
        protocol: comma-separated: knn (k = 20, cosine) and linear (logistic regression).
        embedding: which layer and pooling give the embedding.
        labels_per_class: labelled training images a class in the low-label rows.
        draws: how often these are drawn; the table shows mean and deviation.
        seed: of the draws and splits.
        out: folder for evaluation.json; none takes the run's.
        accelerator: cpu, cuda, mps, or auto.
    """

    checkpoint: Path = DEMO_RUN
    data: str | Path | None = None
    protocol: str = "knn,linear"
    embedding: EmbeddingChoice = field(default_factory=EmbeddingChoice)
    labels_per_class: int = 10
    draws: int = 5
    seed: int = 0
    out: Path | None = None
    accelerator: str = "auto"


@dataclass
class RestoreSettings:
    """How `backfold restore` corrupts and restores image files.

    Args:
        checkpoint: a run's folder or a .ckpt file.
        pretext: masking, sorting, superresolution, denoising or colorization; none takes the run's
            first.
        num_steps: restoration steps; 0 shows the corruption alone.
        step_size: factor of the energy gradient; none takes the run's.
        out: folder for NAME.png (corrupted, restored, clean) and NAME.gif (the trajectory).
        seed: of the corruption.
    """

    checkpoint: Path = DEMO_RUN
    pretext: str | None = None
    num_steps: int = 1
    step_size: float | None = None
    out: Path = Path("restored")
    seed: int = 0


def run_pretrain(config: PretrainConfig, resume: bool, overwrite: bool, command: str) -> None:
    """`backfold pretrain`."""
    pretrain(config, resume=resume, overwrite=overwrite, command=command)
    if is_first_process():
        print(f"run: {config.out}")


def run_evaluate(settings: EvaluateSettings) -> None:
    """`backfold evaluate`: prints the table, writes ``evaluation.json``."""
    console = terminal()
    with log_to(None, console):
        rows = evaluate(settings)
    Console().print(render_table(rows))
    print(f"rows: {evaluation_path(settings)}")


def evaluate(settings: EvaluateSettings) -> list[EvaluationRow]:
    """The rows, also written to `evaluation_path`."""
    protocols = parse_protocols(settings.protocol)
    run = load_pretrained(settings.checkpoint)
    images = open_labelled(settings.data or run.config.data, settings.seed)
    rows = evaluate_run(
        run,
        images,
        protocols,
        settings.embedding,
        labels_per_class=(None, settings.labels_per_class),
        draws=settings.draws,
        seed=settings.seed,
        num_workers=default_workers(),
        device=choose_device(settings.accelerator),
    )
    write_rows(evaluation_path(settings), rows)
    return rows


def evaluation_path(settings: EvaluateSettings) -> Path:
    """Where ``evaluation.json`` goes: the given folder, or the run's."""
    if settings.out is not None:
        return RunFolder(settings.out).evaluation
    given = settings.checkpoint
    return RunFolder(given if given.is_dir() else given.parent.parent).evaluation


def parse_protocols(text: str) -> list[ProtocolName]:
    """The protocols of a comma-separated list.

    Raises:
        UserError: an unknown one, or none.
    """
    names = [name.strip() for name in text.split(",") if name.strip()]
    unknown = [name for name in names if name not in PROTOCOLS]
    if unknown or not names:
        raise UserError(
            f"unknown protocol {', '.join(unknown) or text!r}; choose from {', '.join(PROTOCOLS)}"
        )
    return cast("list[ProtocolName]", names)


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


def run_restore(settings: RestoreSettings, images: list[Path]) -> None:
    """`backfold restore`: writes the pictures, prints the numbers."""
    if settings.num_steps < 0:
        raise UserError(f"num_steps is {settings.num_steps}; give 0 or more")
    run = load_pretrained(settings.checkpoint)
    config = run.config
    if settings.pretext is not None:
        config.pretext = settings.pretext
    tasks = build_tasks(config, run.channels)
    if images:
        names, clean = distinct_names(images), read_images(images, run)
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


def run_report(run: Path, out: Path | None) -> None:
    """`backfold report`: writes one HTML file."""
    print(f"report: {write_report(run, out)}")


def run_demo(config: PretrainConfig, command: str) -> None:
    """`backfold demo`: pretrain, evaluate, report; the table and the report's path come last."""
    console = terminal()
    pretrain(config, overwrite=True, command=command, console=console)
    if not is_first_process():
        return
    with log_to(RunFolder(config.out).log, console):
        rows = evaluate(EvaluateSettings(checkpoint=config.out))
    report = write_report(config.out)
    Console().print(render_table(rows))
    print(f"report: {report}")
