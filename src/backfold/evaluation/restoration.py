"""How well the energy restores, by task, severity and number of steps, beside classical methods.

Every contender sees the same corrupted images, and PSNR and SSIM count only where the task's loss
does: other pixels are taken as clean. Nothing is clipped. The spread is that over the images, so it
says how much images differ and not how sure the mean is (divide by the root of the count for that).
"""

from collections.abc import Callable, Iterator, Sequence
from dataclasses import replace
from functools import partial
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from numpy.typing import NDArray
from skimage.restoration import denoise_nl_means, denoise_tv_chambolle, inpaint_biharmonic
from torch import Generator, Tensor

from backfold import pretext
from backfold.data.statistics import ChannelStatistics
from backfold.errors import UserError
from backfold.evaluation.results import Row, severity_case
from backfold.metrics import psnr_db, ssim
from backfold.restoration import restore
from backfold.training.config import used_task
from backfold.training.run import Pretrained

if TYPE_CHECKING:
    from backfold.evaluation.evaluate import Evaluation

PROTOCOL = "restoration"
PSNR, SSIM, CHROMA, ANGLE = "PSNR (dB)", "SSIM", "chroma error", "spectral angle (degrees)"
PLACED_RIGHT = "patches placed right"

SEVERITIES = (1, 2, 3, 4, 5)
MASK_RATIOS = (0.2, 0.4, 0.6, 0.75, 0.9)
MOVED_SHARES = (0.2, 0.35, 0.5, 0.75, 1.0)  # of the patches, two at least
FACTORS = (1.5, 2.0, 3.0, 4.0, 6.0)  # by which images are scaled down, and up again
NOISE_STDS = (0.1, 0.25, 0.45, 0.8, 1.2)
CHROMA_SHARES = (0.25, 0.5, 0.75, 0.9, 1.0)  # that are gone; training: all, by default
BAND_SHARES = (0.2, 0.4, 0.6, 0.8, 1.0)
PATCHES_ACROSS, BATCH_SIZE = 4, 256
# The best of a few multiples of the noise on 40 CIFAR-10 images, noise_std 0.25 to 1.2.
TV_WEIGHT, NLM_STRENGTH = 0.75, 0.6


def restoration(given: "Evaluation") -> list[Row]:
    """Rows of the energy after each number of steps and of `classical_restorations`."""
    run, settings = given.subject.run, given.settings
    assert run is not None
    if not settings.num_steps or min(settings.num_steps) < 1:
        raise UserError(
            f"numbers of steps are {tuple(settings.num_steps)}; give one or more, each 1 or more"
        )
    run.energy.to(given.device).eval()
    images, _ = given.parts.test.load(settings.test_images, settings.seed)
    rows = []
    for case, task in pretext_severities(run).items():
        found: dict[tuple[str, str], list[float]] = {}
        judged = task
        if isinstance(task, pretext.Sorting) and run.config.energy == "conditional":
            size = run.config.tasks.masking.mask_patch_size
            judged = replace(task, sorting_patch_size=size)
        for clean, generator in seeded_batches(given, images):
            corruption = used_task(task, run.config)(clean, generator)
            energy, most = run.energy.of(corruption), max(settings.num_steps)
            path = restore(energy, corruption.corrupted, most, run.config.step_size).trajectory
            contenders = {
                f"energy, {steps} step{'s' if steps > 1 else ''}": path[steps]
                for steps in settings.num_steps
            } | classical_restorations(task, corruption)
            for contender, restored in contenders.items():
                measured = _measures(judged, corruption, restored, clean, run.statistics)
                for metric, values in measured.items():
                    found.setdefault((contender, metric), []).extend(values.double().tolist())
        rows += [Row.of(PROTOCOL, case, *key, values) for key, values in found.items()]
    return rows


def pretext_severities(run: Pretrained) -> dict[str, pretext.PretextTask]:
    """By case each pretext task at severities 1 to 5, for a run's images.

    Severity 3 is about the middle of what training draws by default. What is random is drawn from
    the seed alone: in each image, noise grows, and what is hidden or moved stays so, from one
    severity to the next (but for masks of `Masking.blocks`). A patch size that does not fit twice
    into the shorter side of the images becomes a quarter of that side.
    """
    settings, side, frames = run.config.tasks, min(run.image_size), run.config.frames

    def fitting(patch_size: int) -> int:
        return patch_size if 2 * patch_size <= side else max(1, side // PATCHES_ACROSS)

    size = fitting(settings.masking.mask_patch_size)
    masking = replace(settings.masking, mask_patch_size=size, hidden_share=1.0)
    size = fitting(settings.sorting.sorting_patch_size)
    sorting = replace(settings.sorting, sorting_patch_size=size)
    tasks: dict[str, Sequence[pretext.PretextTask]] = {
        "masking": [replace(masking, mask_ratio=ratio) for ratio in MASK_RATIOS],
        "sorting": [replace(sorting, share=share) for share in MOVED_SHARES],
        "superresolution": [pretext.SuperResolution(factor, factor) for factor in FACTORS],
        "denoising": [pretext.Denoising(std, std) for std in NOISE_STDS],
    }
    if run.channels > 1:
        tasks["colorization"] = [pretext.Colorization(share, share) for share in CHROMA_SHARES]
        bands = replace(settings.bands, band_patch_size=masking.mask_patch_size)
        tasks["bands"] = [replace(bands, share=share) for share in BAND_SHARES]
        if frames is not None:
            bands = replace(bands, groups=(tuple(range(run.channels // frames)),))
            tasks["frames"] = [replace(bands, share=share) for share in BAND_SHARES]
    return {
        severity_case(name, severity): task
        for name, levels in tasks.items()
        for severity, task in zip(SEVERITIES, levels, strict=True)
    }


def seeded_batches(given: "Evaluation", images: Tensor) -> Iterator[tuple[Tensor, Generator]]:
    """Loaded images, normalised on the device, and a generator: the same at each severity."""
    for number, batch in enumerate(images.split(BATCH_SIZE)):
        generator = Generator(given.device).manual_seed(given.settings.seed + number)
        yield given.statistics.normalize(batch.to(given.device)), generator


def classical_restorations(
    task: pretext.PretextTask, corruption: pretext.Corruption
) -> dict[str, Tensor]:
    """Restorations by methods that learn nothing, shaped as the corrupted images.

    Total variation (Chambolle) and non-local means are told the task's single noise_std.
    """
    corrupted = corruption.corrupted
    unchanged = "bicubic" if isinstance(task, pretext.SuperResolution) else "identity"
    found = {unchanged: corrupted, "mean fill": mean_fill(corruption)}
    if isinstance(task, pretext.Masking):
        masks = corruption.loss_mask[:, 0].cpu().numpy()
        found["biharmonic inpainting"] = _by_image(inpaint_biharmonic, corrupted, masks)
    if isinstance(task, pretext.Denoising):
        noise_std = task.max_noise_std
        variation = partial(denoise_tv_chambolle, weight=TV_WEIGHT * noise_std)
        options = {"patch_size": 5, "patch_distance": 6, "h": NLM_STRENGTH * noise_std}
        means = partial(denoise_nl_means, sigma=noise_std, **options)
        found["total variation"] = _by_image(variation, corrupted)
        found["non-local means"] = _by_image(means, corrupted)
    return found


def _by_image(method: Callable[..., NDArray[np.float64]], images: Tensor, *more: Any) -> Tensor:
    """What scikit-image makes of each image, which it takes as (height, width, channels)."""
    arrays = images.permute(0, 2, 3, 1).double().cpu().numpy()
    found = [method(*each, channel_axis=-1) for each in zip(arrays, *more, strict=True)]
    restored = torch.from_numpy(np.stack(found).reshape(arrays.shape))  # it may drop one channel
    return restored.permute(0, 3, 1, 2).to(images.device, torch.float32).contiguous()


def mean_fill(corruption: pretext.Corruption) -> Tensor:
    """Each channel's mean over the pixels where the loss does not count, or else over all."""
    hidden = corruption.loss_mask.float()
    visible = torch.where(hidden.mean(dim=(2, 3), keepdim=True) < 1, 1 - hidden, 1.0)
    total = (corruption.corrupted * visible).sum(dim=(2, 3), keepdim=True)
    means = total / visible.sum(dim=(2, 3), keepdim=True)
    return means.expand_as(corruption.corrupted)


def _measures(
    task: pretext.PretextTask,
    corruption: pretext.Corruption,
    restored: Tensor,
    clean: Tensor,
    statistics: ChannelStatistics,
) -> dict[str, Tensor]:
    """What is measured in this task, (images,) each; chroma is in units of the set's deviation."""
    mean, std = torch.tensor(statistics.mean), torch.tensor(statistics.std)
    compared = torch.where(corruption.loss_mask, restored, clean)
    found = {PSNR: psnr_db(compared, clean, std), SSIM: ssim(compared, clean, mean, std)}
    if isinstance(task, pretext.Sorting):
        found[PLACED_RIGHT] = pretext.patches_placed_right(restored, clean, task.sorting_patch_size)
    elif isinstance(task, pretext.Bands):
        raw = (statistics.denormalize(images) for images in (restored, clean))
        found[ANGLE] = pretext.spectral_angle(*raw)
    elif clean.shape[1] > 1:
        found[CHROMA] = pretext.chroma_error(restored, clean)
    return found
