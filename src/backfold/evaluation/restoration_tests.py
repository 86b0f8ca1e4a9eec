"""How well the energy restores, by task, severity and number of steps, beside classical methods.

Every contender sees the same corrupted images, and PSNR and SSIM count only where the task's loss
does: other pixels are taken as clean. Nothing is clipped. The spread is that over the images, so it
says how much images differ and not how sure the mean is (divide by the root of the count for that).
"""

from collections.abc import Iterator, Sequence

import numpy as np
import torch
from numpy.typing import NDArray
from skimage.restoration import denoise_nl_means, denoise_tv_chambolle, inpaint_biharmonic
from torch import Tensor

from backfold.errors import UserError
from backfold.evaluation.measures import MeasureRow
from backfold.evaluation.severities import SEVERITIES, pretext_severities, severity_case
from backfold.metrics import psnr_db, ssim
from backfold.pretext import (
    Corruption,
    Denoising,
    Masking,
    PretextTask,
    Sorting,
    SuperResolution,
    chroma_error,
    patches_placed_right,
)
from backfold.restoration import EnergyFn, restore
from backfold.training.pretrained import Pretrained

PROTOCOL = "restoration"
NUM_STEPS = (1, 2, 4)
PSNR, SSIM, CHROMA = "PSNR (dB)", "SSIM", "chroma error"
PLACED_RIGHT = "patches placed right"

# The best of a few multiples of the noise on 40 CIFAR-10 images, noise_std 0.25 to 1.2.
TV_WEIGHT, NLM_STRENGTH = 0.75, 0.6
NLM_PATCH_SIZE, NLM_PATCH_DISTANCE = 5, 6

Image = NDArray[np.float64]


def restoration_rows(
    run: Pretrained,
    images: Tensor,
    *,
    num_steps: Sequence[int] = NUM_STEPS,
    step_size: float | None = None,
    seed: int = 0,
    batch_size: int = 256,
    device: torch.device | str = "cpu",
) -> list[MeasureRow]:
    """PSNR, SSIM and the tasks' own measures of every contender in every case.

    Cases are "denoising, severity 3" (see `pretext_severities`). Contenders are "energy, 2 steps"
    for each number of steps, and those of `classical_restorations`. Metrics are PSNR and SSIM;
    of sorting the share of patches placed right, and of the other tasks the chroma error, in images
    of several channels, in units of the data set's deviation.

    Classical methods take 10 ms (denoising) and 20 ms (inpainting) an image and severity at 32
    pixels, 60 and 200 ms at 160.

    Args:
        run: its energy must be on ``device``.
        images: (images, channels, height, width), normalised, not seen in training.
        num_steps: of the restorations, 1 or more each.
        step_size: factor of the energy gradient; None takes the run's.
        seed: of the corruptions.
        batch_size: images that the energy restores at once.
        device: where the energy is.

    Raises:
        UserError: no or unfit numbers of steps, or what a measure raises.
    """
    if not num_steps or min(num_steps) < 1:
        raise UserError(
            f"numbers of steps are {tuple(num_steps)}; give one or more, each 1 or more"
        )
    factor = run.config.step_size if step_size is None else step_size
    rows = []
    severities = pretext_severities(run.config.tasks, run.channels, run.image_size)
    for name, tasks in severities.items():
        for severity, task in zip(SEVERITIES, tasks, strict=True):
            corruption = task(images, torch.Generator().manual_seed(seed))
            contenders = {
                **restorations(
                    run.energy, corruption.corrupted, num_steps, factor, batch_size, device
                ),
                **classical_restorations(task, corruption),
            }
            for contender, restored in contenders.items():
                for metric, values in _measures(task, corruption, restored, images, run):
                    case = severity_case(name, severity)
                    found = values.double().tolist()
                    rows.append(MeasureRow.of(PROTOCOL, case, contender, metric, found))
    return rows


def restorations(
    energy: EnergyFn,
    corrupted: Tensor,
    num_steps: Sequence[int],
    step_size: float,
    batch_size: int,
    device: torch.device | str,
) -> dict[str, Tensor]:
    """What the energy makes of the images, by contender: "energy, 1 step", "energy, 2 steps"..."""
    parts = []
    for batch in corrupted.split(batch_size):
        result = restore(energy, batch.to(device), max(num_steps), step_size)
        parts.append(result.trajectory[list(num_steps)].cpu())
    by_steps = torch.cat(parts, dim=1)
    return {
        f"energy, {steps} step{'s' if steps > 1 else ''}": images
        for steps, images in zip(num_steps, by_steps, strict=True)
    }


def classical_restorations(task: PretextTask, corruption: Corruption) -> dict[str, Tensor]:
    """Restorations by methods that learn nothing, shaped as the corrupted images.

    - identity: the corrupted image; of super-resolution, this is the small image's enlargement and
      called "bicubic";
    - mean fill: each image's mean colour, over its visible pixels where some are hidden;
    - masking: biharmonic inpainting;
    - denoising: total variation (Chambolle) and non-local means, both told the true noise_std.

    Args:
        task: with a single noise_std, if it is denoising.
        corruption: what it did, on the CPU.
    """
    corrupted = corruption.corrupted
    unchanged = "bicubic" if isinstance(task, SuperResolution) else "identity"
    found = {unchanged: corrupted, "mean fill": mean_fill(corruption)}
    if isinstance(task, Masking):
        found["biharmonic inpainting"] = inpaint(corruption)
    if isinstance(task, Denoising):
        found["total variation"] = denoise_by_total_variation(corrupted, task.max_noise_std)
        found["non-local means"] = denoise_by_non_local_means(corrupted, task.max_noise_std)
    return found


def mean_fill(corruption: Corruption) -> Tensor:
    """Each channel's mean over the pixels where the loss does not count, or else over all."""
    hidden = corruption.loss_mask.float()
    visible = torch.where(hidden.mean(dim=(2, 3), keepdim=True) < 1, 1 - hidden, 1.0)
    total = (corruption.corrupted * visible).sum(dim=(2, 3), keepdim=True)
    means = total / visible.sum(dim=(2, 3), keepdim=True)
    return means.expand_as(corruption.corrupted)


def inpaint(corruption: Corruption) -> Tensor:
    """Biharmonic inpainting where the loss counts."""
    return _stacked(
        inpaint_biharmonic(image, mask, channel_axis=-1)
        for image, mask in zip(
            _arrays(corruption.corrupted), corruption.loss_mask[:, 0].cpu().numpy(), strict=True
        )
    )


def denoise_by_total_variation(images: Tensor, noise_std: float) -> Tensor:
    """Chambolle's method, its weight 0.75 times the noise."""
    weight = TV_WEIGHT * noise_std
    return _stacked(
        denoise_tv_chambolle(image, weight=weight, channel_axis=-1) for image in _arrays(images)
    )


def denoise_by_non_local_means(images: Tensor, noise_std: float) -> Tensor:
    """Non-local means on patches of 5 pixels up to 6 away, its cut-off 0.6 times the noise."""
    return _stacked(
        denoise_nl_means(
            image,
            patch_size=NLM_PATCH_SIZE,
            patch_distance=NLM_PATCH_DISTANCE,
            h=NLM_STRENGTH * noise_std,
            sigma=noise_std,
            channel_axis=-1,
        ).reshape(image.shape)  # a single channel's axis is dropped
        for image in _arrays(images)
    )


def _arrays(images: Tensor) -> Iterator[Image]:
    """Each image as scikit-image takes it: (height, width, channels)."""
    yield from images.permute(0, 2, 3, 1).double().cpu().numpy()


def _stacked(arrays: Iterator[Image]) -> Tensor:
    images = [torch.from_numpy(array).permute(2, 0, 1).float() for array in arrays]
    return torch.stack(images).contiguous()


def _measures(
    task: PretextTask, corruption: Corruption, restored: Tensor, clean: Tensor, run: Pretrained
) -> Iterator[tuple[str, Tensor]]:
    """Names and values, (images,), of what is measured in this task."""
    mean, std = torch.tensor(run.statistics.mean), torch.tensor(run.statistics.std)
    compared = torch.where(corruption.loss_mask, restored, clean)
    yield PSNR, psnr_db(compared, clean, std)
    yield SSIM, ssim(compared, clean, mean, std)
    if isinstance(task, Sorting):
        yield PLACED_RIGHT, patches_placed_right(restored, clean, task.sorting_patch_size)
    elif clean.shape[1] > 1:
        yield CHROMA, chroma_error(restored, clean)
