"""Random crops and flips of whole batches on a device, for small images that outrun the loader.

The same distribution as `backfold.data.augmentation`'s, not the same draws.
"""

import math
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from backfold.data import loading
from backfold.data.augmentation import CROP_RATIO
from backfold.data.decode import to_channels
from backfold.training.devices import choose_device

TRIES = 10  # of a crop that fits, as in torchvision


def crops(images: Tensor, size: int, least: float, generator: torch.Generator) -> Tensor:
    """uint8 (batch, channels, size, size) of square uint8 images; ``least`` is an area's share."""
    count, _, _, side = images.shape
    shape, device = (count, TRIES), images.device
    area = side**2 * torch.empty(shape, device=device).uniform_(least, 1, generator=generator)
    low, high = map(math.log, CROP_RATIO)
    ratio = torch.empty(shape, device=device).uniform_(low, high, generator=generator).exp()
    width, height = ((area * each).sqrt().round().long() for each in (ratio, 1 / ratio))
    fits = (width <= side) & (height <= side)
    first = fits.long().argmax(dim=1, keepdim=True)
    width, height = (
        torch.where(fits.any(dim=1), each.gather(1, first)[:, 0], side) for each in (width, height)
    )
    top, left, flip = torch.rand(3, count, device=device, generator=generator)
    rows = _axis((top * (side - height + 1)).long(), height, size)
    columns = _axis((left * (side - width + 1)).long(), width, size)
    mirrored = (flip < 0.5)[:, None]
    near, far, share = (torch.where(mirrored, each.flip(1), each) for each in columns)
    pixels, which = images.permute(0, 2, 3, 1), torch.arange(count, device=device)[:, None, None]
    share = share[:, None, :, None]

    def line(row: Tensor) -> Tensor:
        values = [pixels[which, row[:, :, None], each[:, None]].float() for each in (near, far)]
        return torch.lerp(*values, share)

    found = torch.lerp(line(rows[0]), line(rows[1]), rows[2][:, :, None, None])
    return found.round().to(torch.uint8).permute(0, 3, 1, 2).contiguous()


def _axis(start: Tensor, length: Tensor, size: int) -> tuple[Tensor, Tensor, Tensor]:
    """Of bilinear enlargement: two places, (batch, size) each, and the second one's share."""
    places = torch.arange(size, device=start.device) + 0.5
    places = (places * (length[:, None] / size) - 0.5).clamp(min=0)
    near = torch.minimum(places.long(), length[:, None] - 1)
    far = torch.minimum(near + 1, length[:, None] - 1)
    return start[:, None] + near, start[:, None] + far, places - near


class Cropped(loading.Batch):
    """On the device already."""

    def pin_memory(self) -> "Cropped":
        """Itself."""
        return self


class DeviceCrops(loading.BatchDataset):
    """In the place of `BatchDataset`: all images lie on the device; what is unchanged is loaded."""

    def __getitem__(self, keys: Sequence[loading.Key]) -> loading.Batch:
        """See `BatchDataset`."""
        if self.augmentation == loading.UNCHANGED:
            return super().__getitem__(keys)
        if not hasattr(self, "_whole"):
            read: Any = self.source.read
            whole = [to_channels(read(at), self.channels) for at in range(len(self.source))]
            self._whole = torch.stack(whole).to(choose_device("auto"))
        places = torch.tensor([place for _, place in keys])
        images = self._whole[places.to(self._whole.device)]
        seed = hash((self.seed, *keys[0])) % 2**63
        generator = torch.Generator(images.device).manual_seed(seed)
        least = self.augmentation.crop_scale[0]
        return Cropped(crops(images, self.image_size[0], least, generator), places, [])
