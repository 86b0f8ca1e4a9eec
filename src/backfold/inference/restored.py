"""Corrupting and restoring single image files, and new images, as pictures and numbers."""

import io
from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple

import torch
from PIL import Image
from torch import Tensor
from torchvision.transforms.v2.functional import to_pil_image

from backfold.data.augmentation import cover
from backfold.data.decode import decode, decode_pillow, to_channels
from backfold.data.loading import evaluation_batches, stack_images
from backfold.data.source import NoTestSplit, spread
from backfold.errors import BrokenImage, UserError
from backfold.files import write_atomically
from backfold.inference.jobs import open_data
from backfold.metrics import psnr_db, ssim
from backfold.pictures import png_bytes, restoration_grid, to_display
from backfold.pretext.corruption import PretextTask
from backfold.restoration import restore
from backfold.sampling import noise_levels, sample
from backfold.training.config import task_names
from backfold.training.run import Pretrained

FRAME_MILLISECONDS = 500
# The energy is not told how much noise is left, and takes little of it for content: samples leave
# the lowest levels out, and end with whole steps (measured: docs/method.md).
SMALLEST_NOISE, LAST_STEPS = 1 / 3, 2  # as a share of the largest


class RestoredImage(NamedTuple):
    """One image's numbers: PSNR, SSIM and energy before (corrupted) and after (restored)."""

    name: str
    psnr_db: tuple[float, float]
    ssim: tuple[float, float]
    energies: tuple[float, float]
    clean_energy: float
    diverged: bool


def read_images(given: Sequence[Image.Image | Path | str], run: Pretrained) -> Tensor:
    """Decode, scale and normalise images, as loading does, to (images, channels, *image_size).

    Raises:
        UserError: a file is missing, no image, larger than the run allows, or of unfit channels.
    """
    images = []
    for one in given:
        if not isinstance(one, (str, Path, Image.Image)):
            raise UserError(f"a {type(one).__name__}; give image files, or all images in a tensor")
        try:
            if isinstance(one, Image.Image):
                decoded = decode_pillow(one).image
            else:
                content = Path(one).read_bytes()
                decoded = decode(content, max(run.image_size), run.config.max_pixels)
            images.append(cover(to_channels(decoded, run.channels), run.image_size))
        except OSError as error:
            reason = error.strerror or error
            raise UserError(f"can't read {one}: {reason}; check the path") from error
        except BrokenImage as error:
            raise UserError(f"{one} is no image: {error}; give image files") from error
        except UserError as error:
            raise UserError(f"{one}: {error}") from error
    return run.statistics.normalize(stack_images(images))


def sample_images(run: Pretrained, count: int) -> tuple[list[str], Tensor]:
    """Names and normalised images spread over the run's own data, its test split if it has one."""
    try:
        source = open_data(run, split="test")
    except NoTestSplit:
        source = open_data(run)
    chosen = spread(source, count)
    (batch,) = evaluation_batches(chosen, run.image_size, run.channels, count)
    return [f"image-{index}" for index in chosen.indices], run.statistics.normalize(batch.images)


def new_images(
    run: Pretrained, count: int, levels: int, fresh_noise: float = 0.5, seed: int = 0
) -> Tensor:
    """Samples, normalised, (count, channels, *image_size), where the energy is; see `sample`.

    They start from the largest noise that the run was trained to remove.

    Raises:
        UserError: a run that was not trained to remove noise from whole images, arguments out of
            their ranges, or samples that are not finite.
    """
    config, device = run.config, run.energy.head.weight.device
    denoising, tasks = config.tasks.denoising, task_names(config)
    if config.energy == "conditional" or "denoising" not in tasks or denoising.octaves > 1:
        raise UserError(
            f"the run has a {config.energy} energy, the tasks {', '.join(tasks)} and noise of "
            f"{denoising.octaves} octave(s); samples need --energy dense, --pretext denoising and "
            "--tasks.denoising.octaves 1, best with --tasks.denoising.max_noise_std 3"
        )
    if count < 1 or levels < 2 or not 0 <= fresh_noise <= 1:
        raise UserError(
            f"count is {count}, levels {levels} and fresh_noise {fresh_noise:g}; give 1 or more, 2 "
            "or more, and 0 to 1"
        )
    generator, shape = torch.Generator(device).manual_seed(seed), (run.channels, *run.image_size)
    noise = torch.randn((count, *shape), generator=generator, device=device)
    largest, size = denoising.max_noise_std, config.step_size
    falling = noise_levels(levels, largest, largest * SMALLEST_NOISE)
    images = sample(run.energy, noise, falling, size, fresh_noise, generator)
    images = restore(run.energy, images, LAST_STEPS, size).restored
    if not images.isfinite().all():
        raise UserError("samples are not finite; train longer, or give more --levels")
    return images


def restore_images(
    run: Pretrained,
    names: list[str],
    clean: Tensor,
    task: PretextTask,
    out: Path,
    *,
    num_steps: int,
    step_size: float,
    seed: int = 0,
) -> list[RestoredImage]:
    """Write ``NAME.png`` (corrupted, restored, clean) and ``NAME.gif`` (the trajectory) an image.

    ``clean`` is (images, channels, height, width), normalised; names are all different.
    """
    made = task(clean, torch.Generator().manual_seed(seed))
    corrupted, energy_fn = made.corrupted, run.energy.of(made)
    result = restore(energy_fn, corrupted, num_steps, step_size)
    for number, name in enumerate(names):
        ends = result.trajectory[[0, -1]][:, [number]]
        picture = restoration_grid(ends, clean[[number]], run.statistics)
        write_atomically(out / f"{name}.png", png_bytes(picture))
        frames = map(to_pil_image, to_display(result.trajectory[:, number], run.statistics))
        buffer, options = io.BytesIO(), {"duration": FRAME_MILLISECONDS, "loop": 0}
        next(frames).save(buffer, "GIF", save_all=True, append_images=frames, **options)
        write_atomically(out / f"{name}.gif", buffer.getvalue())
    mean, std = torch.tensor(run.statistics.mean), torch.tensor(run.statistics.std)
    pairs = (corrupted, result.restored)
    with torch.no_grad():
        columns = (
            torch.stack([psnr_db(images, clean, std) for images in pairs], dim=1),
            torch.stack([ssim(images, clean, mean, std) for images in pairs], dim=1),
            result.energies[[0, -1]].T,
            energy_fn(clean),
            result.status.diverged,
        )
    return list(map(RestoredImage, names, *(column.tolist() for column in columns)))
