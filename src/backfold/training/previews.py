"""Pictures of restorations: corrupted, the points between, restored, clean."""

import io
from pathlib import Path

import torch
from PIL import Image
from torch import Tensor
from torch.nn import functional as F
from torchvision.transforms.v2.functional import to_pil_image
from torchvision.utils import make_grid

from backfold.data.statistics import ChannelStatistics
from backfold.energy import EnergyModel
from backfold.pretext import PretextTask
from backfold.restoration import restore
from backfold.training.run_folder import write_atomically

SMALLEST_SIDE = 112
PREVIEW_SEED = 7


def to_display(images: Tensor, statistics: ChannelStatistics) -> Tensor:
    """Normalised images as (images, 3, height, width) in [0, 1]; further channels are left out.

    Two channels show the first one in grey; small images are enlarged with their pixels visible.
    """
    shown = statistics.denormalize(images.float()).clamp(0.0, 1.0).cpu()
    shown = shown[:, :3] if shown.shape[1] >= 3 else shown[:, :1].expand(-1, 3, -1, -1)
    factor = max(1, round(SMALLEST_SIDE / min(shown.shape[-2:])))
    return F.interpolate(shown, scale_factor=factor, mode="nearest-exact")


def restoration_grid(
    trajectory: Tensor, clean: Tensor, statistics: ChannelStatistics
) -> Image.Image:
    """A row an image: corrupted, the points between, restored, clean.

    Args:
        trajectory: (points, images, channels, height, width), normalised.
        clean: (images, channels, height, width), normalised.
        statistics: of the data.
    """
    columns = torch.cat([trajectory, clean[None]]).transpose(0, 1)
    tiles = to_display(columns.flatten(0, 1), statistics)
    picture: Image.Image = to_pil_image(
        make_grid(tiles, nrow=columns.shape[1], padding=4, pad_value=1.0)
    )
    return picture


def png_bytes(picture: Image.Image) -> bytes:
    """The picture as a PNG file's content."""
    buffer = io.BytesIO()
    picture.save(buffer, format="PNG", optimize=True)
    return buffer.getvalue()


def write_preview(
    path: Path,
    energy: EnergyModel,
    task: PretextTask,
    clean: Tensor,
    statistics: ChannelStatistics,
    *,
    num_steps: int,
    step_size: float,
) -> None:
    """Corrupt (the same way each time), restore and draw these normalised images."""
    generator = torch.Generator(clean.device).manual_seed(PREVIEW_SEED)
    corrupted = task(clean, generator).corrupted
    result = restore(energy, corrupted, num_steps, step_size)
    write_atomically(path, png_bytes(restoration_grid(result.trajectory, clean, statistics)))
