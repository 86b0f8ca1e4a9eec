"""Corruptions at five severities: the pretext tasks', and those that a classifier may meet.

Severity 3 of a pretext task is about the middle of what training draws by default. What is random
is drawn from the seed, not from the severity: in each image, noise grows, and what is hidden or
moved stays so, from one severity to the next (but for masks of `Masking.blocks`).
"""

import math
from collections.abc import Iterable, Iterator
from dataclasses import replace

import torch
from torch import Generator, Tensor
from torchvision.transforms.v2 import functional as TF

from backfold.backbone import ImageSize
from backfold.data.statistics import ChannelStatistics
from backfold.errors import UserError
from backfold.pretext import Colorization, Denoising, PretextTask, SuperResolution
from backfold.pretext.superresolution import down_and_up
from backfold.training.config import TaskSettings

SEVERITIES = (1, 2, 3, 4, 5)
MASK_RATIOS = (0.2, 0.4, 0.6, 0.75, 0.9)
FACTORS = (1.5, 2.0, 3.0, 4.0, 6.0)
CHROMA_SHARES = (0.25, 0.5, 0.75, 0.9, 1.0)
CORRUPTIONS = {
    "noise": (0.04, 0.08, 0.12, 0.18, 0.26),
    "blur": (0.5, 0.75, 1.0, 1.5, 2.0),
    "low resolution": FACTORS,
    "gray": CHROMA_SHARES,
    "occlusion": (0.05, 0.1, 0.2, 0.3, 0.45),
}
PATCHES_ACROSS, BLUR_RADIUS_SIGMAS, ROUNDING = 4, 4, 1e-3


def pretext_severities(
    settings: TaskSettings, channels: int, image_size: ImageSize
) -> dict[str, tuple[PretextTask, ...]]:
    """Each pretext task at severities 1 to 5; images of one channel have no colorization.

    - masking: 20, 40, 60, 75 and 90 % of the patches hidden;
    - sorting: 20, 35, 50, 75 and 100 % of the patches moved, two at least;
    - superresolution: scaled down by 1.5, 2, 3, 4 and 6, and up again;
    - denoising: noise_std 0.1, 0.25, 0.45, 0.8 and 1.2;
    - colorization: 25, 50, 75, 90 and 100 % of the chroma gone (training: 100, by default).

    Patch sizes and the masking's fill are the settings'; a patch size that does not fit twice into
    the shorter side of the images (height, width) becomes a quarter of that side.
    """
    side = min(image_size)

    def fitting(patch_size: int) -> int:
        return patch_size if 2 * patch_size <= side else max(1, side // PATCHES_ACROSS)

    size = fitting(settings.masking.mask_patch_size)
    masking = replace(settings.masking, mask_patch_size=size, hidden_share=1.0)
    size = fitting(settings.sorting.sorting_patch_size)
    sorting = replace(settings.sorting, sorting_patch_size=size)
    tasks: dict[str, tuple[PretextTask, ...]] = {
        "masking": tuple(replace(masking, mask_ratio=ratio) for ratio in MASK_RATIOS),
        "sorting": tuple(replace(sorting, share=share) for share in (0.2, 0.35, 0.5, 0.75, 1.0)),
        "superresolution": tuple(SuperResolution(factor, factor) for factor in FACTORS),
        "denoising": tuple(Denoising(std, std) for std in (0.1, 0.25, 0.45, 0.8, 1.2)),
    }
    if channels > 1:
        tasks["colorization"] = tuple(Colorization(share, share) for share in CHROMA_SHARES)
    return tasks


def seeded_batches(batches: Iterable[Tensor], seed: int) -> Iterator[tuple[Tensor, Generator]]:
    """Each batch with a generator on its device, the same again at the next severity."""
    for number, batch in enumerate(batches):
        yield batch, Generator(batch.device).manual_seed(seed + number)


def corruption_names(channels: int) -> tuple[str, ...]:
    """What `corrupt_images` can do to images of so many channels."""
    return tuple(name for name in CORRUPTIONS if name != "gray" or channels == 3)


def corrupt_images(
    images: Tensor, name: str, severity: int, statistics: ChannelStatistics, seed: int
) -> Tensor:
    """Corrupt pixels in [0, 1], keep them there, and normalise again.

    - noise: Gaussian, of deviation 0.04, 0.08, 0.12, 0.18 and 0.26;
    - blur: Gaussian, of sigma 0.5, 0.75, 1, 1.5 and 2 pixels;
    - low resolution: scaled down by 1.5, 2, 3, 4 and 6, and up again, both bicubic;
    - gray: 25, 50, 75, 90 and 100 % of the chroma gone, by Rec. 601; three channels only;
    - occlusion: a rectangle shaped as the image, over 5, 10, 20, 30 and 45 % of it, at a random
      place in each, in the data set's mean colour.

    Blur and low resolution are counted in pixels, so large images suffer less from them.

    Args:
        images: (images, channels, height, width), normalised, of pixels that were in [0, 1].
        name: one of `corruption_names`.
        severity: 1 to 5.
        statistics: of the normalisation.
        seed: of what is drawn; the images are drawn for in one go, on the CPU.

    Raises:
        UserError: pixels outside [0, 1].
    """
    level, generator = CORRUPTIONS[name][severity - 1], Generator().manual_seed(seed)
    height, width = images.shape[-2:]
    if name == "occlusion":
        places = torch.rand(2, len(images), 1, generator=generator).to(images.device)
        rows, columns = _covered(height, places[0], level), _covered(width, places[1], level)
        return images.masked_fill((rows[:, :, None] & columns[:, None, :])[:, None], 0.0)
    pixels = statistics.denormalize(images)
    lowest, highest = float(pixels.min()), float(pixels.max())
    if not -ROUNDING <= lowest <= highest <= 1 + ROUNDING:
        raise UserError(
            f"pixels lie between {lowest:.3g} and {highest:.3g}, and corruptions are defined for 0 "
            "to 1; give images of 8 bits, or values scaled to 0..1"
        )
    if name == "noise":
        pixels = pixels + level * torch.randn(pixels.shape, generator=generator).to(pixels)
    elif name == "blur":
        # The reflected border can't be wider than the image.
        radius = min(round(BLUR_RADIUS_SIGMAS * level), height - 1, width - 1)
        pixels = TF.gaussian_blur(pixels, [2 * radius + 1] * 2, [level, level])
    elif name == "low resolution":
        pixels = down_and_up(pixels, level)
    else:
        pixels = torch.lerp(pixels, TF.rgb_to_grayscale(pixels, 3), level)
    return statistics.normalize(pixels.clamp(0.0, 1.0))


def _covered(length: int, place: Tensor, area: float) -> Tensor:
    """Which of 0 .. length - 1 are in an interval of share sqrt(area): bool, (images, length).

    Intervals of one place lie within each other as the area grows.
    """
    extent = max(1, round(math.sqrt(area) * length))
    start = (place * (length - extent + 1)).floor()
    positions = torch.arange(length, device=place.device)
    return (positions >= start) & (positions < start + extent)
