"""Whether a run is healthy, on held-out images: measures, and pictures of restorations."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from backfold.data.statistics import ChannelStatistics
from backfold.embedding import embed_batches
from backfold.energy import EnergyModel
from backfold.files import write_atomically
from backfold.metrics import energy_auroc, energy_gap, knn_accuracy, psnr_db, rank_me
from backfold.pictures import png_bytes, restoration_grid
from backfold.pretext.corruption import PretextTask
from backfold.pretext.pixels import chroma_error
from backfold.pretext.sorting import Sorting, patches_placed_right
from backfold.restoration import restore
from backfold.training.config import PretrainConfig
from backfold.training.images import HeldOut

HEALTH_SEED = 20230201
SORTING_IMAGES = 128  # of a look; each takes some hundredths of a second at 224 px
PREVIEW_IMAGES, PREVIEW_SEED = 6, 7
ENERGIES = ("clean", "corrupted", "restored")

Energies = dict[str, list[float]]  # of these images


def watch_task(
    energy: EnergyModel,
    task: PretextTask,
    images: Tensor,
    statistics: ChannelStatistics,
    config: PretrainConfig,
    batch_size: int,
) -> tuple[dict[str, float], Energies]:
    """Corrupt the held-out images (the same way each time), restore them, and compare.

    PSNR counts only the pixels where the task's loss counts; the others are taken as clean.
    """
    generator = torch.Generator(images.device).manual_seed(HEALTH_SEED)
    std = torch.tensor(statistics.std, device=images.device)
    columns: dict[str, list[Tensor]] = {}
    for number, clean in enumerate(images.split(batch_size)):
        corruption = task(clean, generator)
        function = energy.of(corruption)
        result = restore(function, corruption.corrupted, config.num_steps, config.step_size)
        before = restore(function, clean, num_steps=0).energies[0]
        found = dict(zip(ENERGIES, (before, *result.energies[[0, -1]]), strict=True))
        pair = {"corrupted": corruption.corrupted, "restored": result.restored}
        for name, variant in (pair | {"mean_fill": torch.zeros_like(clean)}).items():
            compared = torch.where(corruption.loss_mask, variant, clean)
            found[f"psnr_{name}_db"] = psnr_db(compared, clean, std)
        first = slice(max(0, SORTING_IMAGES - number * batch_size))
        for name, variant in pair.items():  # and in the task's own terms
            if isinstance(task, Sorting):
                right = patches_placed_right(variant[first], clean[first], task.sorting_patch_size)
                found[f"patches_placed_right_{name}"] = right
            elif clean.shape[1] > 1:
                found[f"chroma_error_{name}"] = chroma_error(variant, clean)
        for name, values in found.items():
            columns.setdefault(name, []).append(values.float().cpu())
    table = {name: torch.cat(parts) for name, parts in columns.items()}
    energies = {name: table.pop(name) for name in ENERGIES}
    before, after = energies["clean"], energies["corrupted"]
    finite = bool(torch.isfinite(before).all() and torch.isfinite(after).all())
    measures = {name: float(values.nanmean()) for name, values in table.items()} | {
        "energy_gap": energy_gap(before, after),
        "auroc": energy_auroc(before, after) if finite else float("nan"),
    }
    return measures, {name: values.tolist() for name, values in energies.items()}


def watch(
    energy: EnergyModel,
    tasks: Mapping[str, PretextTask],
    held_out: HeldOut,
    statistics: ChannelStatistics,
    config: PretrainConfig,
    batch_size: int,
    pictures: Path,
) -> tuple[dict[str, Any], dict[str, Energies]]:
    """One entry of the health history, and the energies by task.

    ``knn`` is the accuracy in percent by the labelled training images; None without labels. Each
    task's restorations, of the same corruption each time, go to ``pictures`` with its name behind.
    """
    count = len(held_out.images)
    spread = torch.linspace(0, count - 1, min(PREVIEW_IMAGES, count)).round().long()
    shown = held_out.images[spread.to(held_out.images.device)]
    found = {}
    for name, task in tasks.items():
        found[name] = watch_task(energy, task, held_out.images, statistics, config, batch_size)
        made = task(shown, torch.Generator(shown.device).manual_seed(PREVIEW_SEED))
        result = restore(energy.of(made), made.corrupted, config.num_steps, config.step_size)
        grid = restoration_grid(result.trajectory, shown, statistics)
        write_atomically(pictures.with_name(f"{pictures.name}-{name}.png"), png_bytes(grid))
    rows = [measures for measures, _ in found.values()]
    gains = [row["psnr_restored_db"] - row["psnr_corrupted_db"] for row in rows]

    def embed(images: Tensor) -> Tensor:
        batches = images.split(batch_size)
        return embed_batches(energy.backbone, batches, config.embedding, images.device)

    embeddings, knn = embed(held_out.images), None
    known, classes = held_out.knn_images, held_out.knn_labels
    if held_out.labels is not None and known is not None and classes is not None:
        knn = 100 * knn_accuracy(embed(known), classes, embeddings, held_out.labels)
    finite = bool(torch.isfinite(embeddings).all())
    entry = {
        "psnr_gain_db": sum(gains) / len(rows),
        "energy_gap": sum(row["energy_gap"] for row in rows) / len(rows),
        "auroc": sum(row["auroc"] for row in rows) / len(rows),
        "rank_me": rank_me(embeddings) if finite else float("nan"),
        "embedding_size": embeddings.shape[1],
        "knn": knn,
        "tasks": dict(zip(found, rows, strict=True)),
    }
    return entry, {name: energies for name, (_, energies) in found.items()}


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
