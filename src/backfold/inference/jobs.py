"""What is computed of each image: its embedding, or its energy, restoration errors and defects.

A job maps images as loaded (see `Batch.images`; batch, channels, height, width) and their indices
in the source to columns by name, a value an image. It can be pickled, to run in other processes.
Before it is called, the energy of its run is to be on its device.
"""

import logging
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, TypeAlias

import numpy as np
import pyarrow as pa
import torch
from torch import Tensor

from backfold.data.loading import evaluation_batches
from backfold.data.open import open_source
from backfold.data.source import ImageSource, Split, spread
from backfold.defects import DefectFinder
from backfold.embedding import EmbeddingChoice, embed_batches
from backfold.files import write_atomically
from backfold.pictures import heat_png, map_tiff
from backfold.pretext.corruption import Corruption, PretextTask
from backfold.pretext.hidden import HiddenPatches
from backfold.pretext.sorting import Sorting, patches_placed_right
from backfold.restoration import eval_mode, restoration_loss, restore
from backfold.training.config import task_names
from backfold.training.run import Pretrained

LOGGER = logging.getLogger("backfold")
USUAL_IMAGES, USUAL_BATCH = 256, 32
MAP = "map"
INDEX = "index"  # the column of an image's place in its source


@dataclass(frozen=True)
class EmbeddingJob:
    """``vector``: the embedding by the run's backbone, float32."""

    run: Pretrained
    choice: EmbeddingChoice
    device: torch.device

    def facts(self) -> dict[str, Any]:
        """What decides the columns besides the weights, plain values for JSON."""
        return {"job": "embed", "embedding": asdict(self.choice)}

    def __call__(self, images: Tensor, indices: Sequence[int]) -> dict[str, pa.Array]:  # noqa: ARG002
        """The column."""
        clean = self.run.statistics.normalize(images.to(self.device, non_blocking=True))
        vectors = embed_batches(self.run.energy.backbone, [clean], self.choice, self.device)
        flat = pa.array(vectors.flatten().numpy())
        return {"vector": pa.FixedSizeListArray.from_arrays(flat, vectors.shape[1])}


@dataclass(frozen=True)
class ScoringJob:
    """``energy`` of the clean image, ``error_TASK``, and the finder's scores, float32.

    After sorting also ``misplaced``, the share of squares that are not back in their place.

    The error is what training lowers: the smooth L1 distance of the restored image from the clean
    one, in deviations of the data, averaged where the task's loss counts. An image whose
    restoration diverges has an infinite error. Its corruption depends on the seed and its index
    alone. In the folder ``maps`` each image's map is written as NUMBER.tiff and, over the image,
    NUMBER.png; the column ``map`` has the number.
    """

    run: Pretrained
    tasks: Mapping[str, PretextTask]
    num_steps: int
    step_size: float
    seed: int
    device: torch.device
    finder: DefectFinder | None = None
    maps: Path | None = None

    def facts(self) -> dict[str, Any]:
        """As `EmbeddingJob.facts`."""
        return {
            "job": "score",
            "tasks": {name: repr(task) for name, task in self.tasks.items()},
            "num_steps": self.num_steps,
            "step_size": self.step_size,
            "seed": self.seed,
            "usual": "" if self.finder is None else self.finder.fingerprint,
            "maps": str(self.maps),
        }

    def __call__(self, images: Tensor, indices: Sequence[int]) -> dict[str, pa.Array]:
        """The columns."""
        energy = self.run.energy
        clean = self.run.statistics.normalize(images.to(self.device, non_blocking=True))
        with eval_mode(energy), torch.no_grad():
            columns = {"energy": energy(clean).float()}
        for name, task in self.tasks.items():
            # Drawn on the CPU: the same corruption whatever the device.
            columns[f"error_{name}"], restored = self._errors(task, clean.cpu(), indices)
            match task:
                case Sorting(sorting_patch_size=side):
                    pass
                case HiddenPatches(tasks=(Sorting(),)):
                    side = task.masking.mask_patch_size
                case _:
                    continue
            pairs = zip(restored.split(1), clean.cpu().split(1), strict=True)
            right = [patches_placed_right(*pair, side) for pair in pairs]  # for the memory
            columns["misplaced"] = 1 - torch.cat(right)
        numbers = [f"{index:07d}" for index in indices]
        if self.finder is not None:
            scores, maps = self.finder(clean)
            columns |= scores
            if self.maps is not None:
                for number, image, found in zip(numbers, clean, maps, strict=True):
                    write_atomically(self.maps / f"{number}.tiff", map_tiff(found))
                    picture = heat_png(image, found, self.run.statistics)
                    write_atomically(self.maps / f"{number}.png", picture)
        arrays = {name: pa.array(values.cpu().numpy()) for name, values in columns.items()}
        return arrays if self.maps is None else arrays | {MAP: pa.array(numbers)}

    def _errors(
        self, task: PretextTask, clean: Tensor, indices: Sequence[int]
    ) -> tuple[Tensor, Tensor]:
        """By image, and the restored images."""
        corruptions = [
            task(image, torch.Generator().manual_seed(image_seed(self.seed, index)))
            for image, index in zip(clean.split(1), indices, strict=True)
        ]
        made = Corruption.join(corruptions).to(self.device)
        energy_fn = self.run.energy.of(made)
        result = restore(energy_fn, made.corrupted, self.num_steps, self.step_size)
        restored = result.restored.cpu()
        errors = [
            restoration_loss(restored[[row]], clean[[row]], corruption.loss_mask)
            for row, corruption in enumerate(corruptions)
        ]
        return torch.where(result.status.diverged.cpu(), torch.inf, torch.stack(errors)), restored


def open_data(
    run: Pretrained, data: str | Path | None = None, split: Split = "train", labelled: bool = False
) -> ImageSource:
    """Images, read as the run read its own, which None takes."""
    config = run.config
    chosen = config.data if data is None else data
    return open_source(chosen, split, labelled, config.max_pixels, config.frames)


def usual_finder(
    run: Pretrained, source: ImageSource, count: int = USUAL_IMAGES, batch_size: int = USUAL_BATCH
) -> DefectFinder:
    """The run's finder, shown so many images spread over the source, or those that can be read."""
    images, indices = [], []
    chosen = spread(source, count)
    for batch in evaluation_batches(chosen, run.image_size, run.channels, batch_size, 1):
        for line in batch.broken:
            LOGGER.warning("skipped: %s", line)
        images.append(run.statistics.normalize(batch.images))
        indices += batch.indices.tolist()
    _, first = np.unique(indices, return_index=True)  # without those that stand in for broken ones
    return find_defects(run, torch.cat(images)[first].split(batch_size))


def find_defects(run: Pretrained, usual: Sequence[Tensor]) -> DefectFinder:
    """The run's finder, shown these batches; it restores if the run hid something."""
    config = run.config
    return DefectFinder(
        run.energy, usual, config.tasks.masking if "masking" in task_names(config) else None,
        is_conditional=config.energy == "conditional",
        num_steps=config.num_steps, step_size=config.step_size,
    )  # fmt: skip


Job: TypeAlias = EmbeddingJob | ScoringJob


def image_seed(seed: int, index: int) -> int:
    """The seed of one image's corruption."""
    return int(np.random.SeedSequence((seed, index)).generate_state(1, np.uint64)[0] >> 1)
