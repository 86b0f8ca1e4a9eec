"""`backfold embed` and `backfold score`."""

import logging
from collections.abc import Callable, Iterable
from dataclasses import dataclass, field, replace
from functools import partial
from pathlib import Path
from typing import Literal

import numpy as np
import pyarrow as pa
import torch
from numpy.typing import NDArray
from rich.console import Console
from sklearn.metrics import roc_auc_score

from backfold.data.loading import default_workers
from backfold.data.source import Split
from backfold.defects import DefectFinder
from backfold.embedding import EmbeddingChoice
from backfold.errors import UserError, at_least, check_ranges, not_negative, positive
from backfold.files import write_atomically
from backfold.inference.contact_sheet import render_contact_sheet
from backfold.inference.jobs import (
    INDEX,
    MAP,
    USUAL_IMAGES,
    EmbeddingJob,
    Job,
    ScoringJob,
    open_data,
    usual_finder,
)
from backfold.inference.parts import (
    Engine,
    Parts,
    check_out,
    compute,
    local_parts,
    ray_parts,
)
from backfold.training.config import NOT_DENSE, used_tasks
from backfold.training.devices import choose_device
from backfold.training.log import log_to, terminal
from backfold.training.run import DEMO_RUN, Pretrained, load_pretrained

LOGGER = logging.getLogger("backfold")


@dataclass
class InferenceSettings:
    """What `backfold embed` and `backfold score` have in common.

    Args:
        checkpoint: a run's folder or a .ckpt file.
        data: as pretrain takes it, but no stream; none takes the run's own.
        split: train or test, of data that have both.
        batch_size: images that are computed at once.
        part_size: images that are kept at a time; what stops the command costs at most a part.
        num_workers: processes that load images, or with ray the actors; none takes up to 8, one
            core left free, with ray 2.
        engine: local, or ray: on the cluster that RAY_ADDRESS names, or on this machine.
        accelerator: cpu, cuda, mps, or auto; with ray, auto takes the CPU.
        overwrite: replace the file, and start anew where parts of another job lie.
    """

    checkpoint: Path = DEMO_RUN
    data: str | Path | None = None
    split: Split = "train"
    batch_size: int = 64
    part_size: int = 1024
    num_workers: int | None = None
    engine: Literal["local", "ray"] = "local"
    accelerator: str = "auto"
    overwrite: bool = False

    def __post_init__(self) -> None:
        check_ranges(self, [not_negative("num_workers"), at_least(1, "batch_size part_size")])


@dataclass
class EmbedSettings(InferenceSettings):
    """How `backfold embed` writes a vector for every image.

    Args:
        out: .parquet (path, vector) or .npz (arrays of the same names, joined in memory).
        embedding: layer and pooling.
    """

    out: Path = Path("vectors.parquet")
    embedding: EmbeddingChoice = field(default_factory=EmbeddingChoice)


@dataclass
class ScoreSettings(InferenceSettings):
    """How `backfold score` writes energy, restoration errors and defects of every image.

    Args:
        out: .parquet or .csv (path, energy, error_TASK, and scores of defects); beside it an .html
            file shows the strangest images by each score, and where they are strange.
        usual: images without defects, to compare with; none takes the run's own data.
        usual_images: how many of them; 0 leaves the scores of defects out. These are the run's own
            whatever pretext, num_steps and step_size are.
        good: the class, of labelled data, that is without defects: how often each score is higher
            for an image of another class is printed, so that you see which to trust.
        maps: a folder for the maps of defects, NUMBER.tiff and NUMBER.png, where NUMBER is in the
            column map; none writes none.
        pretext: the corruption to restore from; none takes the run's, each task of a mixture in its
            own column.
        num_steps: restoration steps; none takes the run's.
        step_size: factor of the energy gradient; none takes the run's.
        seed: of the corruptions: the seed and an image's number alone decide its own.
    """

    out: Path = Path("scores.parquet")
    usual: str | Path | None = None
    usual_images: int = USUAL_IMAGES
    good: str | None = None
    maps: Path | None = None
    pretext: str | None = None
    num_steps: int | None = None
    step_size: float | None = None
    seed: int = 0

    def __post_init__(self) -> None:
        super().__post_init__()
        self.out = Path(self.out)  # from Python, text may be given
        check_ranges(self, [not_negative("usual_images num_steps seed"), positive("step_size")])
        self.maps = None if self.maps is None else Path(self.maps)


def run_embed(settings: EmbedSettings) -> None:
    """Writes the vectors, prints where."""
    check_out(settings.out, (".parquet", ".npz"), (), settings.overwrite)
    console = terminal()
    with log_to(None, console):
        run = load_pretrained(settings.checkpoint)
        job = EmbeddingJob(run, settings.embedding, _device(settings))
        count = _compute(settings, job, console)
    print(f"{count} vectors: {settings.out}")


def run_score(settings: ScoreSettings) -> None:
    """Writes the scores and the contact sheet, prints where."""
    sheet = settings.out.with_suffix(".html")
    check_out(settings.out, (".parquet", ".csv"), (sheet,), settings.overwrite)
    maps = None if settings.maps is None else _checked_maps(settings.maps, settings)

    trusted: dict[str, float] = {}

    def draw(parts: Parts) -> None:
        if is_good is not None:
            trusted.update(trust(parts.tables(), is_good))
        title = f"{parts.source.name}, scored by {settings.checkpoint}"
        page = render_contact_sheet(parts.tables(), parts.source, run, title, finder=job.finder)
        write_atomically(sheet, page.encode())

    console = terminal()
    with log_to(None, console):
        run = load_pretrained(settings.checkpoint)
        config = run.config
        if settings.pretext is not None:
            config = replace(config, pretext=settings.pretext)
        is_good = None if settings.good is None else _good(settings, run)
        if config.energy == "conditional":
            LOGGER.warning(NOT_DENSE)
        tasks = used_tasks(config, run.channels)
        num_steps = config.num_steps if settings.num_steps is None else settings.num_steps
        step_size = config.step_size if settings.step_size is None else settings.step_size
        finder = _finder(settings, run) if settings.usual_images else None
        device, seed = _device(settings), settings.seed
        job = ScoringJob(run, tasks, num_steps, step_size, seed, device, finder, maps)
        count = _compute(settings, job, console, draw)
    print(f"{count} scores: {settings.out}")
    print(f"contact sheet: {sheet}")
    for name, auroc in trusted.items():
        print(f"AUROC {auroc:.3f}: {name}")


def _checked_maps(maps: Path, settings: ScoreSettings) -> Path:
    """Where maps are written: nowhere that they would replace or join somebody's images."""
    if not settings.usual_images:
        raise UserError("maps need usual images; give usual_images of 8 or more, or no maps")
    goes_on = settings.out.with_name(settings.out.name + ".parts").exists()
    is_used = maps.is_dir() and any(maps.iterdir()) and not (goes_on or settings.overwrite)
    if maps.is_file() or is_used:
        raise UserError(f"{maps} exists; choose another folder, or --overwrite its maps")
    where = maps.resolve()
    if settings.data is not None and Path(settings.data).resolve() in (where, *where.parents):
        raise UserError(f"maps would lie among the images, in {maps}; choose other --maps")
    return where


def _finder(settings: ScoreSettings, run: Pretrained) -> DefectFinder | None:
    """Fitted here, on whatever there is: a Ray job's machines may have other hardware.

    None, with a warning, where there are no usual images: the run's own may be gone.
    """
    try:
        source = open_data(run, settings.usual)
    except UserError as error:
        if settings.usual is not None:
            raise
        if settings.maps is not None:
            raise UserError(f"maps need usual images: {error}; or give --usual") from error
        LOGGER.warning("no defects are scored, for want of --usual images: %s", error)
        return None
    is_local = settings.engine == "local"
    run.energy.to(choose_device(settings.accelerator if is_local else "auto"))
    return usual_finder(run, source, settings.usual_images, settings.batch_size)


def _good(settings: ScoreSettings, run: Pretrained) -> NDArray[np.bool_]:
    """By image, whether it is of the class that is without defects."""
    source = open_data(run, settings.data, settings.split, labelled=True)
    names = source.class_names
    if settings.good not in names:
        raise UserError(
            f"good is {settings.good!r}; {source.name} has "
            + (f"the classes {', '.join(names)}" if names else "no labels")
        )
    good: NDArray[np.bool_] = np.asarray(source.labels) == names.index(settings.good)
    if good.all() or not good.any():
        raise UserError(
            f"all images of {source.name} or none of its {settings.split} split are "
            f"{settings.good!r}; give data with both, or another --split"
        )
    return good


def trust(tables: Iterable[pa.Table], is_good: NDArray[np.bool_]) -> dict[str, float]:
    """The AUROC of every score, best first: how often it is higher for an image that isn't good."""
    table = pa.concat_tables(tables)
    good = is_good[table[INDEX].to_numpy()]
    highest = float(np.finfo(np.float32).max)  # for infinite errors
    found = {
        name: float(roc_auc_score(~good, np.nan_to_num(table[name].to_numpy(), posinf=highest)))
        for name in table.column_names
        if name not in (INDEX, "path", MAP)
    }
    return dict(sorted(found.items(), key=lambda item: -item[1]))


def _device(settings: InferenceSettings) -> torch.device:
    if settings.engine == "local":
        return choose_device(settings.accelerator)
    # The machine that starts a Ray job may have other hardware than the cluster.
    return torch.device("cuda" if settings.accelerator in ("cuda", "gpu") else "cpu")


def _compute(
    settings: EmbedSettings | ScoreSettings,
    job: Job,
    console: Console,
    finish: Callable[[Parts], None] | None = None,
) -> int:
    source, workers = open_data(job.run, settings.data, settings.split), settings.num_workers
    LOGGER.info("%s: %d images", source.name, len(source))
    parts = Parts(job, source, settings.out, settings.batch_size, settings.part_size)
    if settings.engine == "ray":
        actors = 2 if workers is None else max(1, workers)
        gpus = int(job.device.type == "cuda")
        engine: Engine = partial(ray_parts, parts, actors=actors, gpus=gpus)
    else:
        workers = default_workers() if workers is None else workers
        engine = partial(local_parts, parts, num_workers=workers)
    return compute(parts, engine, console, overwrite=settings.overwrite, finish=finish)
