"""Whether a run is healthy, measured on held-out images; labels are used only if there are any."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from backfold.data.statistics import ChannelStatistics
from backfold.embedding import EmbeddingChoice, embed_batches
from backfold.energy import EnergyModel
from backfold.metrics import energy_auroc, energy_gap, knn_accuracy, psnr_db, rank_me
from backfold.pretext import PretextTask, Sorting, chroma_error, patches_placed_right
from backfold.restoration import RestorationResult, restore

HEALTH_SEED = 20230201
SORTING_IMAGES = 128  # of a look; each takes some hundredths of a second at 224 px


@dataclass(frozen=True)
class HeldOut:
    """The images that watch a run: normalised, on the device, (images, channels, height, width)."""

    images: Tensor
    labels: Tensor | None
    knn_images: Tensor | None = None
    knn_labels: Tensor | None = None


@dataclass(frozen=True)
class TaskHealth:
    """One task's measures, and the energies that they come from.

    PSNR counts only the pixels where the task's loss counts; the others are taken as clean.
    """

    measures: dict[str, float]
    energies: dict[str, list[float]]


def watch_task(
    energy: EnergyModel,
    task: PretextTask,
    images: Tensor,
    statistics: ChannelStatistics,
    *,
    num_steps: int,
    step_size: float,
    batch_size: int,
) -> TaskHealth:
    """Corrupt the held-out images (the same way each time), restore them, and compare."""
    generator = torch.Generator(images.device).manual_seed(HEALTH_SEED)
    std = torch.tensor(statistics.std, device=images.device)
    columns: dict[str, list[Tensor]] = {}
    for number, clean in enumerate(images.split(batch_size)):
        corruption = task(clean, generator)
        result = restore(energy, corruption.corrupted, num_steps, step_size)
        found = {
            "clean": restore(energy, clean, num_steps=0).energies[0],
            "corrupted": result.energies[0],
            "restored": result.energies[-1],
        }
        variants = {
            "psnr_corrupted_db": corruption.corrupted,
            "psnr_restored_db": result.restored,
            "psnr_mean_fill_db": torch.zeros_like(clean),
        }
        for name, variant in variants.items():
            compared = torch.where(corruption.loss_mask, variant, clean)
            found[name] = psnr_db(compared, clean, std)
        sorted_ones = max(0, SORTING_IMAGES - number * batch_size)
        found |= _in_the_task_s_own_terms(task, clean, corruption.corrupted, result, sorted_ones)
        for name, values in found.items():
            columns.setdefault(name, []).append(values.float().cpu())
    table = {name: torch.cat(parts) for name, parts in columns.items()}
    energies = {name: table.pop(name) for name in ("clean", "corrupted", "restored")}
    measures = {name: float(values.nanmean()) for name, values in table.items()}
    measures["energy_gap"] = energy_gap(energies["clean"], energies["corrupted"])
    measures["auroc"] = _auroc_or_nan(energies["clean"], energies["corrupted"])
    return TaskHealth(measures, {name: values.tolist() for name, values in energies.items()})


def _auroc_or_nan(clean: Tensor, corrupted: Tensor) -> float:
    finite = bool(torch.isfinite(clean).all() and torch.isfinite(corrupted).all())
    return energy_auroc(clean, corrupted) if finite else float("nan")


def _in_the_task_s_own_terms(
    task: PretextTask,
    clean: Tensor,
    corrupted: Tensor,
    result: RestorationResult,
    sorted_ones: int,
) -> dict[str, Tensor]:
    pairs = {"corrupted": corrupted, "restored": result.restored}
    if isinstance(task, Sorting):
        size = task.sorting_patch_size
        return {
            f"patches_placed_right_{name}": patches_placed_right(
                images[:sorted_ones], clean[:sorted_ones], size
            )
            for name, images in pairs.items()
        }
    if clean.shape[1] > 1:
        return {
            f"chroma_error_{name}": chroma_error(images, clean) for name, images in pairs.items()
        }
    return {}


def watch(
    energy: EnergyModel,
    tasks: Mapping[str, PretextTask],
    held_out: HeldOut,
    statistics: ChannelStatistics,
    embedding: EmbeddingChoice,
    *,
    num_steps: int,
    step_size: float,
    batch_size: int,
) -> tuple[dict[str, Any], dict[str, dict[str, list[float]]]]:
    """One entry of the health history (see `docs/architecture.md`), and the energies by task."""
    by_task = {
        name: watch_task(
            energy,
            task,
            held_out.images,
            statistics,
            num_steps=num_steps,
            step_size=step_size,
            batch_size=batch_size,
        )
        for name, task in tasks.items()
    }
    measures = [health.measures for health in by_task.values()]
    gains = [row["psnr_restored_db"] - row["psnr_corrupted_db"] for row in measures]
    device = held_out.images.device
    batches = held_out.images.split(batch_size)
    embeddings = embed_batches(energy.backbone, batches, embedding, device)
    finite = bool(torch.isfinite(embeddings).all())
    entry = {
        "psnr_gain_db": _mean(gains),
        "energy_gap": _mean([row["energy_gap"] for row in measures]),
        "auroc": _mean([row["auroc"] for row in measures]),
        "rank_me": rank_me(embeddings) if finite else float("nan"),
        "embedding_size": embeddings.shape[1],
        "knn": _knn(energy, held_out, embeddings, embedding, batch_size),
        "tasks": {name: health.measures for name, health in by_task.items()},
    }
    return entry, {name: health.energies for name, health in by_task.items()}


def _knn(
    energy: EnergyModel,
    held_out: HeldOut,
    embeddings: Tensor,
    embedding: EmbeddingChoice,
    batch_size: int,
) -> float | None:
    """Accuracy in percent of the held-out images' labels among the labelled training images."""
    if held_out.labels is None or held_out.knn_images is None or held_out.knn_labels is None:
        return None
    batches = held_out.knn_images.split(batch_size)
    bank = embed_batches(energy.backbone, batches, embedding, held_out.images.device)
    return 100 * knn_accuracy(bank, held_out.knn_labels, embeddings, held_out.labels)


def _mean(values: Sequence[float]) -> float:
    return sum(values) / len(values)


def describe_health(entry: dict[str, Any]) -> str:
    """An entry of the health history in one line."""
    tasks = ", ".join(
        f"{name} {row['psnr_restored_db'] - row['psnr_corrupted_db']:+.2f} dB"
        for name, row in entry["tasks"].items()
    )
    knn = "" if entry["knn"] is None else f"; kNN {entry['knn']:.1f} %"
    return (
        f"held out: {tasks}; AUROC {entry['auroc']:.3f}; "
        f"effective rank {entry['rank_me']:.1f} of {entry['embedding_size']}{knn}"
    )
