"""How well the energy restores, by task, severity and number of steps, beside classical methods.

Every contender sees the same corrupted images, and PSNR and SSIM count only where the task's loss
does: other pixels are taken as clean. Nothing is clipped. The spread is that over the images, so it
says how much images differ and not how sure the mean is (divide by the root of the count for that).
"""

from collections.abc import Iterator, Sequence
from typing import TYPE_CHECKING

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
from backfold.restoration import EnergyFn, restore

if TYPE_CHECKING:
    from backfold.evaluation.evaluate import Evaluation

PROTOCOL, BATCH_SIZE = "restoration", 256
PSNR, SSIM, CHROMA = "PSNR (dB)", "SSIM", "chroma error"
PLACED_RIGHT = "patches placed right"

# The best of a few multiples of the noise on 40 CIFAR-10 images, noise_std 0.25 to 1.2.
TV_WEIGHT, NLM_STRENGTH = 0.75, 0.6
NLM_PATCH_SIZE, NLM_PATCH_DISTANCE = 5, 6

Image = NDArray[np.float64]


def restoration(given: "Evaluation") -> list[Row]:
    """PSNR, SSIM and the tasks' own measures of every contender in every case.

    Cases are "denoising, severity 3" (see `pretext_severities`). Contenders are "energy, 2 steps"
    for each number of steps, and those of `classical_restorations`. Metrics are PSNR and SSIM;
    of sorting the share of patches placed right, and of the other tasks the chroma error, in images
    of several channels, in units of the data set's deviation.

    Classical methods take 10 ms (denoising) and 20 ms (inpainting) an image and severity at 32
    pixels, 60 and 200 ms at 160.

    Raises:
        UserError: no or unfit numbers of steps, or what a measure raises.
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
                contenders = {
                    **restorations(
                        run.energy, corruption.corrupted, settings.num_steps, run.config.step_size
                    ),
                    **classical_restorations(task, corruption),
                }
                for contender, restored in contenders.items():
                    for metric, values in _measures(
                        task, corruption, restored, clean, run.statistics
                    ):
                        found.setdefault((contender, metric), []).extend(values.double().tolist())
            case = severity_case(name, severity)
            rows += [Row.of(PROTOCOL, case, *key, values) for key, values in found.items()]
    return rows


def restorations(
    energy: EnergyFn, corrupted: Tensor, num_steps: Sequence[int], step_size: float
) -> dict[str, Tensor]:
    """What the energy makes of the images, by contender: "energy, 1 step", "energy, 2 steps"..."""
    trajectory = restore(energy, corrupted, max(num_steps), step_size).trajectory
    return {
        f"energy, {steps} step{'s' if steps > 1 else ''}": trajectory[steps] for steps in num_steps
    }


def classical_restorations(task: PretextTask, corruption: Corruption) -> dict[str, Tensor]:
    """Restorations by methods that learn nothing, shaped as the corrupted images.

    - identity: the corrupted image; of super-resolution, this is the small image's enlargement and
      called "bicubic";
    - mean fill: each image's mean colour, over its visible pixels where some are hidden;
    - masking: biharmonic inpainting;
    - denoising: total variation (Chambolle) and non-local means, both told the true noise_std, on
      patches of 5 pixels up to 6 away.

    Args:
        task: with a single noise_std, if it is denoising.
        corruption: what it did.
    """
    corrupted = corruption.corrupted
    unchanged = "bicubic" if isinstance(task, SuperResolution) else "identity"
    found = {unchanged: corrupted, "mean fill": mean_fill(corruption)}
    if isinstance(task, Masking):
        masks = corruption.loss_mask[:, 0].cpu().numpy()
        found["biharmonic inpainting"] = _stacked(
            (
                inpaint_biharmonic(image, mask, channel_axis=-1)
                for image, mask in zip(_arrays(corrupted), masks, strict=True)
            ),
            corrupted,
        )
    if isinstance(task, Denoising):
        noise_std = task.max_noise_std
        found["total variation"] = _stacked(
            (
                denoise_tv_chambolle(image, weight=TV_WEIGHT * noise_std, channel_axis=-1)
                for image in _arrays(corrupted)
            ),
            corrupted,
        )
        found["non-local means"] = _stacked(
            (_non_local_means(image, noise_std) for image in _arrays(corrupted)), corrupted
        )
    return found


def mean_fill(corruption: Corruption) -> Tensor:
    """Each channel's mean over the pixels where the loss does not count, or else over all."""
    hidden = corruption.loss_mask.float()
    visible = torch.where(hidden.mean(dim=(2, 3), keepdim=True) < 1, 1 - hidden, 1.0)
    total = (corruption.corrupted * visible).sum(dim=(2, 3), keepdim=True)
    means = total / visible.sum(dim=(2, 3), keepdim=True)
    return means.expand_as(corruption.corrupted)


def _non_local_means(image: Image, noise_std: float) -> Image:
    found: Image = denoise_nl_means(
        image,
        patch_size=NLM_PATCH_SIZE,
        patch_distance=NLM_PATCH_DISTANCE,
        h=NLM_STRENGTH * noise_std,
        sigma=noise_std,
        channel_axis=-1,
    )
    return found.reshape(image.shape)  # a single channel's axis is dropped


def _arrays(images: Tensor) -> Iterator[Image]:
    """Each image as scikit-image takes it: (height, width, channels)."""
    yield from images.permute(0, 2, 3, 1).double().cpu().numpy()


def _stacked(arrays: Iterator[Image], like: Tensor) -> Tensor:
    images = torch.stack([torch.from_numpy(array).permute(2, 0, 1) for array in arrays])
    return images.to(like.device, torch.float32).contiguous()


def _measures(
    task: PretextTask,
    corruption: Corruption,
    restored: Tensor,
    clean: Tensor,
    statistics: ChannelStatistics,
) -> Iterator[tuple[str, Tensor]]:
    """Names and values, (images,), of what is measured in this task."""
    mean, std = torch.tensor(statistics.mean), torch.tensor(statistics.std)
    compared = torch.where(corruption.loss_mask, restored, clean)
    yield PSNR, psnr_db(compared, clean, std)
    yield SSIM, ssim(compared, clean, mean, std)
    if isinstance(task, Sorting):
        yield PLACED_RIGHT, patches_placed_right(restored, clean, task.sorting_patch_size)
    elif clean.shape[1] > 1:
        yield CHROMA, chroma_error(restored, clean)
