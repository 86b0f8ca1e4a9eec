"""What is computed of each image: its embedding, or its energy and restoration errors."""

import hashlib
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any, Protocol

import numpy as np
import pyarrow as pa
import torch
from torch import Tensor

from backfold.embedding import EmbeddingChoice, embed_batches
from backfold.pretext import PretextTask
from backfold.restoration import eval_mode, restoration_loss, restore
from backfold.training.pretrained import Pretrained


class Job(Protocol):
    """Columns of images. It can be pickled, to run in other processes."""

    @property
    def run(self) -> Pretrained:
        """The energy."""
        ...

    @property
    def device(self) -> torch.device:
        """Where it is to be before the job is called."""
        ...

    def facts(self) -> dict[str, Any]:
        """What decides the columns besides the weights, plain values for JSON."""
        ...

    def __call__(self, images: Tensor, indices: Sequence[int]) -> dict[str, pa.Array]:
        """Columns by name, a value an image.

        Args:
            images: as loaded (see `Batch.images`), (batch, channels, height, width).
            indices: the images' indices in their source.
        """
        ...


@dataclass(frozen=True)
class EmbeddingJob:
    """``vector``: the embedding, float32.

    Args:
        run: its backbone is used.
        choice: layer and pooling.
        device: where it is computed.
    """

    run: Pretrained
    choice: EmbeddingChoice
    device: torch.device

    def facts(self) -> dict[str, Any]:
        """See `Job`."""
        return {"job": "embed", "embedding": asdict(self.choice)}

    def __call__(self, images: Tensor, indices: Sequence[int]) -> dict[str, pa.Array]:  # noqa: ARG002
        """See `Job`."""
        clean = normalised(self, images)
        vectors = embed_batches(self.run.energy.backbone, [clean], self.choice, self.device)
        flat = pa.array(vectors.flatten().numpy())
        return {"vector": pa.FixedSizeListArray.from_arrays(flat, vectors.shape[1])}


@dataclass(frozen=True)
class ScoringJob:
    """``energy`` of the clean image, and ``error_TASK``, float32.

    The error is what training lowers: the smooth L1 distance of the restored image from the clean
    one, in deviations of the data, averaged where the task's loss counts. An image whose
    restoration diverges has an infinite error. Its corruption depends on the seed and its index
    alone.

    Args:
        run: the energy.
        tasks: the pretext tasks by name; none leaves only the energy.
        num_steps: restoration steps.
        step_size: factor of the energy gradient.
        seed: of the corruptions.
        device: where it is computed.
    """

    run: Pretrained
    tasks: Mapping[str, PretextTask]
    num_steps: int
    step_size: float
    seed: int
    device: torch.device

    def facts(self) -> dict[str, Any]:
        """See `Job`."""
        return {
            "job": "score",
            "tasks": {name: repr(task) for name, task in self.tasks.items()},
            "num_steps": self.num_steps,
            "step_size": self.step_size,
            "seed": self.seed,
        }

    def __call__(self, images: Tensor, indices: Sequence[int]) -> dict[str, pa.Array]:
        """See `Job`."""
        energy, clean = self.run.energy, normalised(self, images)
        with eval_mode(energy), torch.no_grad():
            columns = {"energy": energy(clean).float()}
        for name, task in self.tasks.items():
            # Drawn on the CPU: the same corruption whatever the device.
            columns[f"error_{name}"] = self._errors(task, clean.cpu(), indices)
        return {name: pa.array(values.cpu().numpy()) for name, values in columns.items()}

    def _errors(self, task: PretextTask, clean: Tensor, indices: Sequence[int]) -> Tensor:
        corruptions = [
            task(clean[[row]], torch.Generator().manual_seed(image_seed(self.seed, index)))
            for row, index in enumerate(indices)
        ]
        corrupted = torch.cat([corruption.corrupted for corruption in corruptions])
        result = restore(self.run.energy, corrupted.to(self.device), self.num_steps, self.step_size)
        restored, diverged = result.restored.cpu(), result.status.diverged.cpu()
        errors = torch.stack(
            [
                restoration_loss(restored[[row]], clean[[row]], corruption.loss_mask)
                for row, corruption in enumerate(corruptions)
            ]
        )
        return torch.where(diverged, torch.inf, errors)


def normalised(job: Job, images: Tensor) -> Tensor:
    """Loaded images on the job's device, normalised there."""
    return job.run.statistics.normalize(images.to(job.device, non_blocking=True))


def image_seed(seed: int, index: int) -> int:
    """The seed of one image's corruption."""
    return int(np.random.SeedSequence((seed, index)).generate_state(1, np.uint64)[0] >> 1)


def weights_digest(run: Pretrained) -> str:
    """A hash of every weight: other weights, other rows."""
    digest = hashlib.sha256()
    for name, tensor in run.energy.state_dict().items():
        digest.update(name.encode())
        digest.update(tensor.detach().cpu().contiguous().flatten().view(torch.uint8).numpy().data)
    return digest.hexdigest()
