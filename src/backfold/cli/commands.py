"""What most commands do, as functions of their settings."""

import logging
import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from itertools import groupby
from pathlib import Path
from typing import Literal

from rich.console import Console
from rich.markup import escape
from rich.table import Table
from torchvision.transforms.v2.functional import to_pil_image
from torchvision.utils import make_grid

from backfold.data.loading import default_workers
from backfold.data.open import open_source
from backfold.data.survey import StatsSettings, survey
from backfold.errors import UserError, check_ranges, not_negative, positive
from backfold.evaluation.evaluate import EvaluateSettings, evaluate_each
from backfold.evaluation.results import ABOUT, Row, tables_of
from backfold.exporting.export import Format, export_run
from backfold.files import write_atomically, write_json
from backfold.inference import restored
from backfold.pictures import png_bytes, to_display
from backfold.reporting.report import write_report
from backfold.reporting.verdicts import payoff
from backfold.training.config import (
    PretrainConfig,
    config_from_dict,
    config_to_dict,
    task_names,
    used_tasks,
)
from backfold.training.devices import choose_device
from backfold.training.log import is_first_process, log_to, progress_bar, terminal
from backfold.training.pretrain import pretrain
from backfold.training.run import DEMO_RUN, RunFolder, load_checkpoint, load_pretrained
from backfold.training.signals import was_requeued

LOGGER = logging.getLogger("backfold")
SAMPLED_IMAGES = 4
PIPED_WIDTH = 300  # characters: where nobody looks, tables are as wide as they are
SHOWN = 5  # broken files and groups of duplicates on the terminal
SHOWN_SEVERITY = 3  # the report has them all
# What may differ between a run and its continuation without changing its result.
FREE_ON_RESUME = {
    "out", "num_workers", "prefetch", "accelerator", "devices", "checkpoint_minutes",
    "keep_checkpoints", "micro_batch", "compile", "num_nodes", "shard_optimizer", "loggers",
}  # fmt: skip


@dataclass
class RestoreSettings:
    """How `backfold restore` corrupts and restores image files.

    Args:
        images: files; none takes a few of the run's own data.
        checkpoint: a run's folder or a .ckpt file.
        pretext: masking, sorting, superresolution, denoising, colorization, bands or frames; none
            takes the run's first.
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

    def __post_init__(self) -> None:
        check_ranges(self, [not_negative("num_steps seed"), positive("step_size")])


@dataclass
class SampleSettings:
    """How `backfold sample` draws new images from a run that was trained to remove noise.

    Args:
        checkpoint: a run's folder or a .ckpt file.
        count: how many images.
        levels: of falling noise, each one step of descent; more are better, and slower.
        fresh_noise: share of the noise, 0 to 1, that each level draws anew.
        out: a .png file for all of them.
        seed: of the noise.
        accelerator: cpu, cuda, mps, or auto.
    """

    checkpoint: Path = DEMO_RUN
    count: int = 64
    levels: int = 50
    fresh_noise: float = 0.5
    out: Path = Path("samples.png")
    seed: int = 0
    accelerator: str = "auto"


@dataclass
class ReportSettings:
    """What `backfold report` reads and writes.

    Args:
        run: a run's folder.
        out: the file; none takes RUN/report.html.
    """

    run: Path = DEMO_RUN
    out: Path | None = None


@dataclass
class ExportSettings:
    """How `backfold export` takes a pretrained backbone elsewhere, with a model card.

    Args:
        checkpoint: a run's folder or a .ckpt file.
        format: timm (weights and config that timm.create_model loads), huggingface (the same, for
            transformers too), onnx or pt2 (images in [0, 1] to embeddings and energies; pt2 is
            torch.export's).
        out: the folder.
        overwrite: replace an earlier export.
    """

    checkpoint: Path = DEMO_RUN
    format: Format = "timm"
    out: Path = Path("exported")
    overwrite: bool = False


def run_pretrain(config: PretrainConfig, resume: bool, overwrite: bool, command: str) -> None:
    """`backfold pretrain`; a job that its cluster starts anew goes on by itself."""
    requeued = was_requeued(config.out)
    checkpoint = RunFolder(config.out).last_checkpoint
    if resume and checkpoint.exists():
        kept, now = load_checkpoint(checkpoint)["config"], config_to_dict(config)
        # Settings that the run did not know yet have no value of its own, or the usual one.
        told = [key for key in now if key in kept and key not in FREE_ON_RESUME]
        try:
            before = config_to_dict(config_from_dict({key: kept[key] for key in told}))
        except UserError as error:
            raise UserError(f"{checkpoint} can't go on here: {error}; start a new run") from error
        changed = [key for key in told if before[key] != now[key]]
        if changed:
            raise UserError(
                f"--resume goes on with the run's own settings, and {', '.join(changed)} "
                "differ(s); leave them out, or start a new run with another --out"
            )
    resume, overwrite = resume or requeued, overwrite and not requeued
    pretrain(config, resume=resume, overwrite=overwrite, command=command)
    if is_first_process():
        print(f"run: {config.out}")


def run_restore(settings: RestoreSettings) -> None:
    """`backfold restore`: writes the pictures, prints the numbers."""
    run = load_pretrained(settings.checkpoint)
    trained = task_names(run.config)
    if settings.pretext is not None:
        run.config.pretext = settings.pretext
        if untrained := set(task_names(run.config)) - set(trained):
            with log_to(None, terminal()):
                LOGGER.warning(
                    f"the run learned {', '.join(trained)}, and not {', '.join(untrained)}: expect "
                    "little of it"
                )
    name, task = next(iter(used_tasks(run.config, run.channels).items()))
    if settings.images:
        stems = [path.stem for path in settings.images]
        names = [f"{s}-{at}" if stems.count(s) > 1 else s for at, s in enumerate(stems)]
        clean = restored.read_images(settings.images, run)
    else:
        names, clean = restored.sample_images(run, SAMPLED_IMAGES)
    step_size = run.config.step_size if settings.step_size is None else settings.step_size
    images = restored.restore_images(
        run, names, clean, task, settings.out, num_steps=settings.num_steps, step_size=step_size,
        seed=settings.seed,
    )  # fmt: skip
    cells = [
        (
            image.name + (" (diverged: lower --step-size)" if image.diverged else ""),
            "{:.2f} -> {:.2f}".format(*image.psnr_db),
            "{:.3f} -> {:.3f}".format(*image.ssim),
            "{:.4g} -> {:.4g}".format(*image.energies),
            f"{image.clean_energy:.4g}",
        )
        for image in images
    ]
    headings = ("image", "PSNR (dB)", "SSIM", "energy", "if clean")
    print_table(f"{name}: corrupted -> restored", headings, cells)
    print(f"pictures: {settings.out}")


def run_sample(settings: SampleSettings) -> None:
    """`backfold sample`: writes one picture, prints its path."""
    if settings.out.suffix != ".png":
        raise UserError(f"out is {settings.out}; give a name that ends in .png")
    run = load_pretrained(settings.checkpoint)
    run.energy.to(choose_device(settings.accelerator))
    made = restored.new_images(
        run, settings.count, settings.levels, settings.fresh_noise, settings.seed
    )
    tiles = make_grid(to_display(made, run.statistics), nrow=math.ceil(settings.count**0.5))
    write_atomically(settings.out, png_bytes(to_pil_image(tiles)))
    print(f"samples: {settings.out}")


def run_report(settings: ReportSettings) -> None:
    """`backfold report`: writes one HTML file."""
    print(f"report: {write_report(settings.run, settings.out)}")


def run_export(settings: ExportSettings) -> None:
    """`backfold export`: writes the folder, prints its path."""
    with log_to(None, terminal()):
        export_run(settings.checkpoint, settings.format, settings.out, settings.overwrite)
    print(f"{settings.format}: {settings.out}")


def run_evaluate(settings: EvaluateSettings) -> None:
    """`backfold evaluate`: prints tables and verdict, writes ``evaluation.json`` and pictures."""
    rows: list[Row] = []
    with log_to(None, terminal()):
        for found in evaluate_each(settings):
            rows += found
            print_tables(found)
    print_verdict(rows)
    folder = settings.out or RunFolder.of(settings.checkpoint)
    if folder is not None:
        print(f"rows: {RunFolder(Path(folder)).evaluation}")


def run_demo(config: PretrainConfig, command: str) -> None:
    """`backfold demo`: pretrain, evaluate, report; the table and the report's path come last."""
    console = terminal()
    pretrain(config, overwrite=True, command=command, console=console)
    if not is_first_process():
        return
    with log_to(RunFolder(config.out).log, console):
        settings = EvaluateSettings(checkpoint=config.out, protocols="knn,linear,layers")
        rows = [row for part in evaluate_each(settings) for row in part]
    report = write_report(config.out)
    shown = [row for row in rows if row.protocol != "layers"]
    print_tables(shown)
    print_verdict(shown)
    print(f"report: {report}")


def results_console() -> Console:
    """Standard output."""
    console = Console()
    if not console.is_terminal:
        console.width = PIPED_WIDTH
    return console


def print_verdict(rows: Sequence[Row]) -> None:
    """Did pretraining pay? Nothing where no row says so."""
    verdict = payoff(rows)
    if verdict.state != "unknown":
        results_console().print(f"Did pretraining pay? {verdict.headline}", soft_wrap=True)


def print_tables(rows: Sequence[Row]) -> None:
    """A table for each protocol and metric, and under it what was chosen."""
    ordered = sorted(rows, key=lambda row: list(ABOUT).index(row.protocol))
    for protocol, members in groupby(ordered, lambda row: row.protocol):
        found = list(members)
        for content in tables_of(found, SHOWN_SEVERITY):
            title = f"{ABOUT[protocol].title}: {content.caption}"
            print_table(title, content.headings, content.rows)
        for row in found:
            if row.note:
                line = f"  {row.contender}, {row.case}: {row.note}"
                results_console().print(line, style="dim", soft_wrap=True)


def print_table(title: str, headings: Sequence[str], rows: Iterable[Sequence[str]]) -> None:
    """Numbers stand on the right, names on the left."""
    table = Table(title=title)
    for heading in headings:
        side: Literal["left", "right"] = "right" if table.columns else "left"
        table.add_column(heading, justify=side, overflow="fold")
    for cells in rows:
        table.add_row(*cells)
    results_console().print(table)


def run_stats(settings: StatsSettings) -> None:
    """`backfold stats`: prints a table, and writes JSON where a file is named."""
    console, limit = terminal(), settings.max_images
    source = open_source(settings.data, "train", max_pixels=settings.max_pixels)
    workers = default_workers() if settings.num_workers is None else settings.num_workers
    total = min(len(source), limit or len(source))
    with log_to(None, console), progress_bar(console, "images", 0, total) as bar:
        found = survey(
            source, settings.channels, limit, settings.seed, workers,
            lambda done: bar.update(bar.task_ids[0], completed=done),
        )  # fmt: skip
    if settings.out is not None:
        write_json(settings.out, asdict(found))
    table = Table(title=escape(found.name), show_header=False)
    table.add_column(no_wrap=True)
    table.add_column()
    part = f"{found.looked_at} of " if found.looked_at < found.images else ""
    duplicates = [" = ".join(group) for group in found.duplicates]
    rows = {
        "images": f"{part}{found.images}",
        "broken": _listed(found.broken_count, found.broken),
        "formats": _counts(found.formats),
        "values": f"{_counts(found.kinds)}, from {found.lowest:.6g} to {found.highest:.6g}",
        "channels": _counts(found.channel_counts),
        "can't be given these channels": str(found.unfit_count or ""),
        "height": "{0} to {2}, median {1} pixels".format(*found.height),
        "width": "{0} to {2}, median {1} pixels".format(*found.width),
        "in reading": _counts(found.conversions),
        "duplicates": _listed(found.duplicate_count, duplicates),
        f"mean of {found.channels} channel(s)": "  ".join(f"{each:.5g}" for each in found.mean),
        "deviation": "  ".join(f"{each:.5g}" for each in found.std),
    }
    for name, value in rows.items():
        if value:
            table.add_row(name, escape(value))
    results_console().print(table)
    if settings.out is not None:
        print(f"stats: {settings.out}")


def _counts(counts: Mapping[str, int]) -> str:
    return ", ".join(f"{name} ({count})" for name, count in counts.items())


def _listed(count: int, names: list[str]) -> str:
    more = [f"and {len(names) - SHOWN} more"] if len(names) > SHOWN else []
    return "\n".join([str(count), *names[:SHOWN], *more])
