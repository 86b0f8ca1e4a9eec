"""Random changes of whole batches of training images, on their device."""

import math
from collections.abc import Callable
from functools import partial

import torch
from timm.data import Mixup
from timm.data.random_erasing import RandomErasing
from timm.loss import LabelSmoothingCrossEntropy, SoftTargetCrossEntropy
from torch import Tensor, nn
from torch.nn import functional as F

CROP_RATIO = (3 / 4, 4 / 3)


def crop_and_flip(images: Tensor, smallest_area: float, horizontal_flip: bool) -> Tensor:
    """Scale a random part of each image to the image's size, and mirror half of the images.

    The part's area is uniform in the given share to 1, its aspect log-uniform in 3/4 to 4/3 of the
    image's; a side that would be longer than the image's is as long. Draws from the generator of
    the images' device. Sampling is bilinear: parts are only ever enlarged.

    Args:
        images: floating point, (batch, channels, height, width).
        smallest_area: share of the image's area; 1 leaves images whole.
        horizontal_flip: mirror half of the images, left to right.
    """
    if smallest_area >= 1.0 and not horizontal_flip:
        return images
    uniform = partial(torch.rand, len(images), device=images.device)
    width, height = _part_sides(uniform, smallest_area)
    if horizontal_flip:
        width = torch.where(uniform() < 0.5, -width, width)
    # In affine_grid's coordinates the image goes from -1 to 1.
    left, top = ((1 - side.abs()) * (2 * uniform() - 1) for side in (width, height))
    zero = torch.zeros_like(width)
    transform = torch.stack([width, zero, left, zero, height, top], dim=1).view(-1, 2, 3)
    grid = F.affine_grid(transform, list(images.shape), align_corners=False)
    return F.grid_sample(images, grid.to(images.dtype), padding_mode="border", align_corners=False)


def _part_sides(uniform: Callable[[], Tensor], smallest_area: float) -> tuple[Tensor, Tensor]:
    """Width and height of random parts as shares of the image's."""
    area = smallest_area + (1 - smallest_area) * uniform()
    if smallest_area >= 1.0:
        return area, area
    low, high = map(math.log, CROP_RATIO)
    ratio = torch.exp(low + (high - low) * uniform())
    return (area * ratio).sqrt().clamp(max=1.0), (area / ratio).sqrt().clamp(max=1.0)


class Mixing(nn.Module):
    """Erasing and mixing of normalised images, and the loss that fits the mixed labels.

    Args:
        num_classes: of the labels, which are 0 to ``num_classes`` - 1.
        random_erasing: share of the images in which a rectangle becomes noise.
        mixup: parameter of the beta distribution that two images' weights are drawn from; 0 is off.
        cutmix: the same for the area that comes from another image; 0 is off. Where both are on,
            each batch gets one of them.
        label_smoothing: share of the label that is spread over all classes.
        device: of the images.
    """

    def __init__(
        self,
        num_classes: int,
        random_erasing: float,
        mixup: float,
        cutmix: float,
        label_smoothing: float,
        device: torch.device,
    ) -> None:
        super().__init__()
        self.erase = (
            RandomErasing(random_erasing, mode="pixel", device=device) if random_erasing else None
        )
        self.mix = (
            Mixup(mixup, cutmix, label_smoothing=label_smoothing, num_classes=num_classes)
            if mixup or cutmix
            else None
        )
        self.loss = (
            SoftTargetCrossEntropy() if self.mix else LabelSmoothingCrossEntropy(label_smoothing)
        )

    def forward(self, images: Tensor, labels: Tensor) -> tuple[Tensor, Tensor]:
        """Images and targets for ``loss``; the images given are written over.

        Args:
            images: normalised, (batch, channels, height, width), an even number where they mix.
            labels: (batch,).
        """
        if self.erase is not None:
            images = self.erase(images)
        return (images, labels) if self.mix is None else self.mix(images, labels)
