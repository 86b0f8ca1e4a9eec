"""Pictures of images, of their restoration and of where they are strange."""

import io

import tifffile
import torch
from matplotlib import colormaps
from matplotlib.colors import to_hex
from PIL import Image
from torch import Tensor
from torch.nn import functional as F
from torchvision.transforms.v2.functional import to_pil_image
from torchvision.utils import make_grid

from backfold.data.statistics import ChannelStatistics

SMALLEST_SIDE = 112
LEAST_RANGE = 0.5
HOTTEST = 6.0  # deviations from usual images' pixels; whatever is above has the same colour
HEAT = colormaps["inferno"]
COVER = 0.75  # of the picture, where it is hottest
# What `heat_png` lays over a picture, from nothing to the hottest, for HTML.
HEAT_SCALE = [to_hex((*HEAT(at / 8)[:3], COVER * at / 8), keep_alpha=True) for at in range(9)]


def to_display(images: Tensor, statistics: ChannelStatistics) -> Tensor:
    """Normalised images as (images, 3, height, width) in [0, 1]; further channels are left out.

    Two channels show the first one in grey; small images are enlarged with their pixels visible.
    Black and white are 0 and 1; or three deviations from the data's means, where these are not half
    as far apart, or of another scale: so dim images are seen, too.
    """
    shown = statistics.denormalize(images.float()).cpu()
    shown = shown[:, :3] if shown.shape[1] >= 3 else shown[:, :1].expand(-1, 3, -1, -1)
    count = 3 if images.shape[1] >= 3 else 1
    mean, std = (torch.tensor(each[:count]) for each in (statistics.mean, statistics.std))
    low, high = float((mean - 3 * std).min()), float((mean + 3 * std).max())
    if statistics.in_unit_range:
        low, high = max(low, 0.0), min(high, 1.0)
        low, high = (low, high) if high - low < LEAST_RANGE else (0.0, 1.0)
    shown = ((shown - low) / (high - low)).clamp(0.0, 1.0)
    factor = max(1, round(SMALLEST_SIDE / min(shown.shape[-2:])))
    return F.interpolate(shown, scale_factor=factor, mode="nearest-exact")


def restoration_grid(
    trajectory: Tensor, clean: Tensor, statistics: ChannelStatistics
) -> Image.Image:
    """A row an image: corrupted, the points between, restored, clean.

    Normalised: (points, images, channels, height, width), and without points the clean ones.
    """
    columns = torch.cat([trajectory, clean[None]]).transpose(0, 1)
    tiles = to_display(columns.flatten(0, 1), statistics)
    grid = make_grid(tiles, nrow=columns.shape[1], padding=4, pad_value=1.0)
    picture: Image.Image = to_pil_image(grid)
    return picture


def png_bytes(picture: Image.Image) -> bytes:
    """The picture as a PNG file's content."""
    buffer = io.BytesIO()
    picture.save(buffer, format="PNG", optimize=True)
    return buffer.getvalue()


def heat_png(image: Tensor, found: Tensor, statistics: ChannelStatistics) -> bytes:
    """A normalised image (channels, height, width), and where its map is hot, a colour over it."""
    shown = to_display(image[None], statistics)
    level = (found / HOTTEST).clamp(0, 1)[None]
    level = F.interpolate(level, shown.shape[2:], mode="nearest-exact")[0]
    colours = torch.from_numpy(HEAT(level[0].numpy())[..., :3]).permute(2, 0, 1)
    cover = COVER * level
    return png_bytes(to_pil_image((cover * colours + (1 - cover) * shown[0]).float()))


def map_tiff(found: Tensor) -> bytes:
    """The map (1, height, width) as a float32 TIFF, in deviations from usual images' pixels."""
    buffer = io.BytesIO()
    tifffile.imwrite(buffer, found[0].float().numpy())
    return buffer.getvalue()
