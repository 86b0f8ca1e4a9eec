"""The verbs: what the commands do, as functions that return what was made.

import backfold

run = backfold.pretrain(data="photos", backbone="vit_small_patch16_224", out="runs/photos")
rows = backfold.evaluate(run, data="labelled")
run = backfold.load("runs/photos")
energies = run.energy(images)  # lower is more plausible
vectors = run.embed(images)
restored = run.restore(images).restored
maps = run.defect_map(images)  # higher where stranger
"""

import math
import warnings
from collections.abc import Sequence
from dataclasses import asdict, is_dataclass, replace
from pathlib import Path
from typing import Any, Self

import numpy as np
import pyarrow as pa
import torch
from numpy.typing import NDArray
from PIL import Image
from pyarrow import csv, parquet
from torch import Tensor

from backfold.backbone import check_image_size
from backfold.cli.inference import ScoreSettings, run_score
from backfold.data.decode import as_float
from backfold.data.files import IN_MEMORY
from backfold.data.formats import MapDataset
from backfold.data.loading import default_workers
from backfold.data.open import open_source
from backfold.data.survey import StatsSettings, Survey, survey
from backfold.defects import DefectFinder
from backfold.embedding import EmbeddingChoice, embed
from backfold.errors import UserError
from backfold.exporting.export import Format, export_run
from backfold.inference.jobs import USUAL_BATCH, find_defects, open_data, usual_finder
from backfold.inference.restored import new_images, read_images
from backfold.pretext.corruption import Corruption
from backfold.pretext.hidden import hidden_by
from backfold.reporting.report import write_report
from backfold.restoration import RestorationResult, RestorationStatus, eval_mode, restore
from backfold.sparse import token_size
from backfold.training import pretrain as training
from backfold.training.config import config_from_dict, task_names
from backfold.training.run import Pretrained, load_pretrained

Images = Tensor | NDArray[Any] | Sequence[Image.Image | Path | str]

# Restored images may leave [0, 1] a little; images that somebody normalised leave it by more.
LOWEST, HIGHEST = -0.5, 1.5


class Backfold:
    """A run's energy, ready to use.

    Every method takes a batch of images: a tensor or array (batch, channels, height, width) of
    floats in [0, 1] (on their own scale, if the run's files held floating-point numbers) or uint8
    in 0..255, or a list of image files and Pillow images. Those are turned as their EXIF data say,
    scaled to cover the run's image size and cut to its centre. Normalising is done inside.

    Args:
        run: as `load_pretrained` gives it.
        path: where it was read.
    """

    def __init__(self, run: Pretrained, path: Path) -> None:
        self.run, self.path = run, path
        self._own_finder: DefectFinder | None = None  # what `score` compares with

    @classmethod
    def load(cls, path: str | Path, device: torch.device | str = "cpu") -> Self:
        """Read a run's folder (its last checkpoint) or a checkpoint file.

        Args:
            path: for instance ``runs/demo``.
            device: where the model is put.

        Raises:
            UserError: no checkpoint there, or one that does not fit.
        """
        return cls(load_pretrained(Path(path)), Path(path)).to(device)

    def to(self, device: torch.device | str) -> Self:
        """Move the model; images are moved to it by each call."""
        self.run.energy.to(device)
        return self

    @property
    def device(self) -> torch.device:
        """Where the model is."""
        return self.run.energy.head.weight.device

    def energy(self, images: Images) -> Tensor:
        """Energies ``(batch,)`` of whole images; lower is more plausible, within one run.

        A run on the conditional energy was not trained to tell them.

        Raises:
            UserError: images that the model can't take.
        """
        prepared = self._prepare(images)
        with eval_mode(self.run.energy), torch.no_grad():
            energies: Tensor = self.run.energy(prepared)
        return energies

    def embed(self, images: Images, choice: EmbeddingChoice | None = None) -> Tensor:
        """Embeddings ``(batch, features)`` in float32.

        Args:
            images: see the class.
            choice: layer and pooling; None takes the last layer's average.

        Raises:
            UserError: images that the model can't take, or a layer that it does not have.
        """
        prepared = self._prepare(images)
        with eval_mode(self.run.energy), torch.no_grad():
            return embed(self.run.energy.backbone, prepared, choice)

    def score(self, images: Images, usual: Images | None = None) -> dict[str, Tensor]:
        """How strange each image is, by several scores, ``(batch,)`` each; higher is stranger.

        Args:
            images: see the class.
            usual: images without defects to compare with, 8 or more; None takes 256 of the run's
                own data.

        Raises:
            UserError: images that the model can't take, too few usual ones, or a run's data that
                is not there any more.
        """
        return self._finder(usual)(self._prepare(images))[0]

    def defect_map(self, images: Images, usual: Images | None = None) -> Tensor:
        """Where images are strange: (batch, 1, height, width), in deviations from usual pixels.

        Arguments and errors are those of `score`; see `backfold.defects.DefectFinder`.
        """
        return self._finder(usual)(self._prepare(images))[1]

    def _finder(self, usual: Images | None) -> DefectFinder:
        if usual is not None:
            return find_defects(self.run, self._prepare(usual).split(USUAL_BATCH))
        if self._own_finder is None:
            try:
                source = open_data(self.run)
            except UserError as error:
                raise UserError(f"the run's own data are not there: {error}; or usual") from error
            self._own_finder = usual_finder(self.run, source)
        return self._own_finder

    def restore(
        self,
        images: Images,
        num_steps: int | None = None,
        step_size: float | None = None,
        mask: Tensor | None = None,
    ) -> RestorationResult:
        """Restore corrupted images by descending their energy.

        ``restored`` and ``trajectory`` of the result are in the units of the images given, where
        black is 0 and white is 1; they are not clamped.

        Args:
            images: see the class.
            num_steps: restoration steps; None takes as many as in training.
            step_size: factor of the energy gradient; None takes that of training.
            mask: bool, (batch, 1, height, width) or broadcastable to it, True where pixels are
                corrupted: these alone are restored, from the others. Where the run masked images,
                what stands there plays no part. A conditional energy needs a mask to restore well:
                without one it descends as a dense energy, which it was not trained as.

        Raises:
            UserError: images or a mask that the model can't take, or a negative ``num_steps``.
        """
        config, statistics = self.run.config, self.run.statistics
        steps = config.num_steps if num_steps is None else num_steps
        size = config.step_size if step_size is None else step_size
        if not (isinstance(steps, int) and steps >= 0 and size > 0):
            raise UserError(
                f"num_steps is {steps!r} and step_size {size!r}; give a whole number of 0 or more, "
                "and a number above 0"
            )
        prepared = self._prepare(images)
        if mask is None:
            result = restore(self.run.energy, prepared, steps, size)
        else:
            result = self._restore_where(mask, prepared, steps, size)
        return replace(
            result,
            restored=statistics.denormalize(result.restored),
            trajectory=statistics.denormalize(result.trajectory),
        )

    def sample(
        self, count: int = 64, levels: int = 50, fresh_noise: float = 0.5, seed: int = 0
    ) -> Tensor:
        """New images, (count, channels, *image_size), in the units of `restore`, not clamped.

        Arguments and errors are those of `backfold.inference.restored.new_images`.
        """
        made = new_images(self.run, count, levels, fresh_noise, seed)
        return self.run.statistics.denormalize(made)

    def _restore_where(
        self, mask: Tensor, prepared: Tensor, num_steps: int, step_size: float
    ) -> RestorationResult:
        """One image after the other, as each may have another number of hidden patches."""
        if not isinstance(mask, Tensor):
            raise UserError(f"mask is a {type(mask).__name__}; give a tensor")
        try:
            where = mask.to(self.device, torch.bool).expand(len(prepared), 1, *prepared.shape[2:])
        except RuntimeError as error:
            raise UserError(
                f"mask is {tuple(mask.shape)}, images are {tuple(prepared.shape)}; give one that "
                "fits them, with one channel"
            ) from error
        energy, config = self.run.energy, self.run.config
        is_conditional = config.energy == "conditional"
        size = math.lcm(*token_size(energy.backbone)) if is_conditional else 1
        masking = config.tasks.masking if "masking" in task_names(config) else None
        paths, energies, diverged = [], [], []
        for image, hidden in zip(prepared.split(1), where.split(1), strict=True):
            made = Corruption(image, hidden)
            if hidden.any():
                made = hidden_by(hidden, image, masking, size)
            if not is_conditional:
                made = replace(made, running=None)
            found = restore(energy.of(made), made.corrupted, num_steps, step_size)
            paths.append(torch.where(hidden, found.trajectory, image))
            energies.append(found.energies)
            diverged.append(found.status.diverged)
        path, status = torch.cat(paths, dim=1), RestorationStatus(torch.cat(diverged), step_size)
        return RestorationResult(path[-1], path, torch.cat(energies, dim=1), status)

    def _prepare(self, images: Images) -> Tensor:
        """Normalised images on the model's device, in float32."""
        if isinstance(images, np.ndarray):
            images = torch.from_numpy(images)
        if isinstance(images, Tensor):
            self._check(images)
            pixels = as_float(images.detach().to(self.device))
            return self.run.statistics.normalize(pixels.float())
        if isinstance(images, (str, Path, Image.Image)):
            raise UserError(f"images is one {type(images).__name__}; give a list, such as [image]")
        if not len(images):
            raise UserError("images is empty; give one or more")
        return read_images(images, self.run).to(self.device)

    def _check(self, images: Tensor) -> None:
        run = self.run
        shape = f"{tuple(images.shape)} of {images.dtype}"
        is_pixels = images.is_floating_point() or images.dtype == torch.uint8
        if images.ndim != 4 or not is_pixels or not len(images):
            raise UserError(
                f"images are {shape}; give floats in [0, 1] or uint8, of shape (batch, channels, "
                "height, width)"
            )
        if images.shape[1] != run.channels:
            raise UserError(
                f"images are {shape}, and the run was trained on {run.channels} channel(s); give "
                "as many"
            )
        low, high = (float(value) for value in as_float(images.detach()).aminmax())
        if not math.isfinite(low + high):
            raise UserError("images hold numbers that are not finite; give finite ones")
        # Floating-point files keep their own scale; all others lie in [0, 1].
        if run.statistics.in_unit_range and not LOWEST <= low <= high <= HIGHEST:
            warnings.warn(
                f"images hold values from {low:g} to {high:g}, and the run's lay in [0, 1]; give "
                "them as they were loaded: they are normalised inside",
                stacklevel=4,
            )
        size = (images.shape[2], images.shape[3])
        if size != run.image_size:
            check_image_size(run.energy.backbone, size, run.channels, run.config.backbone)


def pretrain(
    data: str | Path | MapDataset | None = None,
    *,
    resume: bool = False,
    overwrite: bool = False,
    callback: training.Callback | None = None,
    **settings: Any,
) -> Backfold:
    """Pretrain a backbone; see `backfold.training.config.PretrainConfig` for the settings.

    Args:
        data: a path or a name as ``--data`` takes it, images as a tensor (images, channels, height,
            width), or a `torch.utils.data.Dataset` of images; None takes the embedded ones.
        resume: go on with the run in ``out``; images in memory must be given again.
        overwrite: replace the run in ``out``.
        callback: called after every optimizer step with the steps done, the loss (on the device)
            and what the last part of the batch came to.
        **settings: of `PretrainConfig`; nested ones as mappings or as their own classes.

    Raises:
        UserError: bad settings or data, a folder that can't be used, a loss that is not finite.
    """
    in_memory = not (data is None or isinstance(data, (str, Path)))
    name = type(data).__name__ + IN_MEMORY if in_memory else data
    values = {**settings, "data": name}
    config = config_from_dict(
        {
            name: asdict(value) if is_dataclass(value) and not isinstance(value, type) else value
            for name, value in values.items()
        }
    )
    source = None
    if in_memory:
        if config.frames is not None:
            raise UserError(
                f"frames is {config.frames}, and images are in memory; stack their frames as "
                "channels yourself, and hide the latest with pretext bands and tasks.bands.groups"
            )
        source = open_source(data, "train", config.watch_labels, config.max_pixels)
    training.pretrain(config, resume=resume, overwrite=overwrite, source=source, callback=callback)
    return Backfold.load(config.out)


def load(path: str | Path, device: torch.device | str = "cpu") -> Backfold:
    """A run to use; see `Backfold.load`."""
    return Backfold.load(path, device)


def export(
    run: Backfold | str | Path,
    format: Format = "timm",
    out: str | Path = "exported",
    *,
    overwrite: bool = False,
) -> Path:
    """Write a backbone with a model card; see `backfold.exporting.export.export_run`.

    Returns:
        The folder.
    """
    export_run(_path(run), format, Path(out), overwrite)
    return Path(out)


def score(run: Backfold | str | Path, **settings: Any) -> pa.Table:
    """Scores and defects of many images; see `backfold.cli.inference.ScoreSettings`.

    Returns:
        The table that was written: path, energy, an error for each task, and scores of defects.
    """
    wanted = ScoreSettings(checkpoint=_path(run), **settings)
    run_score(wanted)
    read = csv.read_csv if wanted.out.suffix == ".csv" else parquet.read_table
    table: pa.Table = read(wanted.out)
    return table


def stats(
    data: str | Path | MapDataset | None = None,
    channels: int | None = None,
    max_images: int | None = None,
    seed: int = 0,
) -> Survey:
    """What a data set looks like; see `backfold.data.survey.StatsSettings`."""
    _ = StatsSettings(channels=channels, max_images=max_images, seed=seed)  # raises
    return survey(open_source(data, "train"), channels, max_images, seed, default_workers())


def report(run: Backfold | str | Path, out: str | Path | None = None) -> Path:
    """Write one HTML file on a run; returns its path."""
    return write_report(_path(run), None if out is None else Path(out))


def _path(run: Backfold | str | Path) -> Path:
    return run.path if isinstance(run, Backfold) else Path(run)
