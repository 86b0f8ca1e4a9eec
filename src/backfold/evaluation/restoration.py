"""How well the energy restores, by task, severity and number of steps, beside classical methods.

Every contender sees the same corrupted images, and PSNR and SSIM count only where the task's loss
does: other pixels are taken as clean. Nothing is clipped. The spread is that over the images, so it
says how much images differ and not how sure the mean is (divide by the root of the count for that).
"""

from collections.abc import Callable
from functools import partial
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from numpy.typing import NDArray
from skimage.restoration import denoise_nl_means, denoise_tv_chambolle, inpaint_biharmonic
from torch import Tensor

from backfold.data.statistics import ChannelStatistics
from backfold.errors import UserError
from backfold.evaluation.results import Row, severity_case
from backfold.evaluation.severities import SEVERITIES, pretext_severities, seeded_batches
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
from backfold.restoration import restore

if TYPE_CHECKING:
    from backfold.evaluation.evaluate import Evaluation

PROTOCOL, BATCH_SIZE = "restoration", 256
PSNR, SSIM, CHROMA = "PSNR (dB)", "SSIM", "chroma error"
PLACED_RIGHT = "patches placed right"

# The best of a few multiples of the noise on 40 CIFAR-10 images, noise_std 0.25 to 1.2.
TV_WEIGHT, NLM_STRENGTH = 0.75, 0.6


def restoration(given: "Evaluation") -> list[Row]:
    """PSNR, SSIM and the tasks' own measures of every contender in every case.

    Cases are "denoising, severity 3" (see `pretext_severities`). Contenders are "energy, 2 steps"
    for each number of steps, and those of `classical_restorations`. Metrics are PSNR and SSIM;
    of sorting the share of patches placed right, and of the other tasks the chroma error, in images
    of several channels, in units of the data set's deviation.

    Classical methods take 10 ms (denoising) and 20 ms (inpainting) an image and severity at 32
    pixels, 60 and 200 ms at 160.
    """
    run, settings = given.subject.run, given.settings
    assert run is not None
    if not settings.num_steps or min(settings.num_steps) < 1:
        raise UserError(
            f"numbers of steps are {tuple(settings.num_steps)}; give one or more, each 1 or more"
        )
    run.energy.to(given.device).eval()
    images, _ = given.parts.test.load(settings.test_images, settings.seed)
    rows = []
    tasks = pretext_severities(run.config.tasks, run.channels, run.image_size)
    for name, levels in tasks.items():
        for severity, task in zip(SEVERITIES, levels, strict=True):
            found: dict[tuple[str, str], list[float]] = {}
            batches = (
                run.statistics.normalize(batch.to(given.device))
                for batch in images.split(BATCH_SIZE)
            )
            for clean, generator in seeded_batches(batches, settings.seed):
                corruption = task(clean, generator)
                path = restore(
                    run.energy, corruption.corrupted, max(settings.num_steps), run.config.step_size
                ).trajectory
                contenders = {
                    f"energy, {steps} step{'s' if steps > 1 else ''}": path[steps]
                    for steps in settings.num_steps
                } | classical_restorations(task, corruption)
                for contender, restored in contenders.items():
                    measured = _measures(task, corruption, restored, clean, run.statistics)
                    for metric, values in measured.items():
                        found.setdefault((contender, metric), []).extend(values.double().tolist())
            case = severity_case(name, severity)
            rows += [Row.of(PROTOCOL, case, *key, values) for key, values in found.items()]
    return rows


def classical_restorations(task: PretextTask, corruption: Corruption) -> dict[str, Tensor]:
    """Restorations by methods that learn nothing, shaped as the corrupted images.

    - identity: the corrupted image; of super-resolution, this is the small image's enlargement and
      called "bicubic";
    - mean fill: each image's mean colour, over its visible pixels where some are hidden;
    - masking: biharmonic inpainting;
    - denoising: total variation (Chambolle) and non-local means, both told the true noise_std (the
      task has a single one), on patches of 5 pixels up to 6 away.
    """
    corrupted = corruption.corrupted
    unchanged = "bicubic" if isinstance(task, SuperResolution) else "identity"
    found = {unchanged: corrupted, "mean fill": mean_fill(corruption)}
    if isinstance(task, Masking):
        masks = corruption.loss_mask[:, 0].cpu().numpy()
        found["biharmonic inpainting"] = _by_image(inpaint_biharmonic, corrupted, masks)
    if isinstance(task, Denoising):
        noise_std = task.max_noise_std
        variation = partial(denoise_tv_chambolle, weight=TV_WEIGHT * noise_std)
        means = partial(
            denoise_nl_means,
            patch_size=5,
            patch_distance=6,
            h=NLM_STRENGTH * noise_std,
            sigma=noise_std,
        )
        found["total variation"] = _by_image(variation, corrupted)
        found["non-local means"] = _by_image(means, corrupted)
    return found


def _by_image(method: Callable[..., NDArray[np.float64]], images: Tensor, *more: Any) -> Tensor:
    """What scikit-image makes of each image, which it takes as (height, width, channels)."""
    arrays = images.permute(0, 2, 3, 1).double().cpu().numpy()
    found = [method(*each, channel_axis=-1) for each in zip(arrays, *more, strict=True)]
    restored = torch.from_numpy(np.stack(found).reshape(arrays.shape))  # it may drop one channel
    return restored.permute(0, 3, 1, 2).to(images.device, torch.float32).contiguous()


def mean_fill(corruption: Corruption) -> Tensor:
    """Each channel's mean over the pixels where the loss does not count, or else over all."""
    hidden = corruption.loss_mask.float()
    visible = torch.where(hidden.mean(dim=(2, 3), keepdim=True) < 1, 1 - hidden, 1.0)
    total = (corruption.corrupted * visible).sum(dim=(2, 3), keepdim=True)
    means = total / visible.sum(dim=(2, 3), keepdim=True)
    return means.expand_as(corruption.corrupted)


def _measures(
    task: PretextTask,
    corruption: Corruption,
    restored: Tensor,
    clean: Tensor,
    statistics: ChannelStatistics,
) -> dict[str, Tensor]:
    """What is measured in this task, (images,) each."""
    mean, std = torch.tensor(statistics.mean), torch.tensor(statistics.std)
    compared = torch.where(corruption.loss_mask, restored, clean)
    found = {PSNR: psnr_db(compared, clean, std), SSIM: ssim(compared, clean, mean, std)}
    if isinstance(task, Sorting):
        found[PLACED_RIGHT] = patches_placed_right(restored, clean, task.sorting_patch_size)
    elif clean.shape[1] > 1:
        found[CHROMA] = chroma_error(restored, clean)
    return found
