"""Bringing an image to the training size, with or without random changes."""

import math
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor
from torch.nn import functional as F
from torchvision.transforms import v2
from torchvision.transforms.v2 import functional as TF

from backfold.errors import UserError, check_ranges, fraction

ImageSize = tuple[int, int]
CROP_RATIO = (3 / 4, 4 / 3)  # of a crop's aspect to that of the training size


@dataclass(frozen=True)
class Augmentation:
    """Random changes of a training image, drawn anew in every epoch.

    Args:
        random_crop: cut out a random part and scale it to the image size (default: true); if false,
            scale the image to cover the size and cut out the centre.
        crop_scale: smallest and largest area of the random part, as shares of the image's area,
            above 0 and at most 1 (default: 0.2 to 1.0).
        horizontal_flip: mirror half of the images, left to right (default: true).
        color_jitter: how much brightness, contrast, colours and each channel's share may change, 0
            to 1 (default: 0, not at all); half as large a share of the images loses all colour. For
            images whose black is 0 and white 1.

    Raises:
        UserError: a setting outside its range.
    """

    random_crop: bool = True
    crop_scale: tuple[float, float] = (0.2, 1.0)
    horizontal_flip: bool = True
    color_jitter: float = 0.0

    def __post_init__(self) -> None:
        low, high = self.crop_scale
        if not 0.0 < low <= high <= 1.0:
            raise UserError(
                f"crop_scale is {low:g} to {high:g}; give two rising numbers above 0, at most 1"
            )
        check_ranges(self, [fraction("color_jitter")], "augmentation.")


# Scales each image to cover the size, and cuts out the centre.
UNCHANGED = Augmentation(random_crop=False, horizontal_flip=False)


class Augmenter:
    """Applies an `Augmentation`; draws from torch's global generator."""

    def __init__(self, augmentation: Augmentation, image_size: ImageSize) -> None:
        self._augmentation, self._image_size = augmentation, image_size
        height, width = image_size
        low, high = (ratio * width / height for ratio in CROP_RATIO)
        self._crop = v2.RandomResizedCrop(image_size, augmentation.crop_scale, (low, high))

        # Pixels that an image's sides need for no crop to be smaller than the image size.
        self.min_side = max(image_size)
        if augmentation.random_crop:
            area = height * width * CROP_RATIO[1] / augmentation.crop_scale[0]
            self.min_side = max(self.min_side, math.ceil(math.sqrt(area)))

    def seeded(self, image: Tensor, *words: int) -> Tensor:
        """As a call, with draws that these numbers alone decide."""
        if self._augmentation != UNCHANGED:
            seed = np.random.SeedSequence(words).generate_state(1, np.uint64)
            torch.default_generator.manual_seed(int(seed[0]))
        return self(image)

    def __call__(self, image: Tensor) -> Tensor:
        """From (channels, any height, any width) to (channels, *image_size); same dtype."""
        if self._augmentation.random_crop:
            # The same bits as the transform's own call, in a third of the time on small images.
            top, left, height, width = self._crop.make_params([image]).values()
            part = image[None, :, top : top + height, left : left + width]
            image = F.interpolate(part, self._image_size, mode="bilinear", antialias=True)[0]
        else:
            image = cover(image, self._image_size)
        if self._augmentation.horizontal_flip and torch.rand(()).item() < 0.5:
            image = TF.horizontal_flip(image)
        strength = self._augmentation.color_jitter
        return jittered(image, strength) if strength else image


def jittered(image: Tensor, strength: float) -> Tensor:
    """Saturation, contrast, brightness and channels multiplied by random factors, in this order.

    As torchvision's ColorJitter, but of any number of channels, of which each has its own factor in
    place of hue. Factors are uniform, 1 - ``strength`` to 1 + ``strength``, those of channels a
    third as far from 1; ``strength`` / 2 is the share of images that lose all colour, as in SimCLR
    (Chen et al., ICML 2020, appendix A), where it is 0.2. (channels, height, width); same dtype:
    bytes are clamped, floats are not.
    """
    changes = strength * (2 * torch.rand(3 + len(image)) - 1)
    saturation, contrast, brightness = (1 + float(change) for change in changes[:3])
    gains: Tensor = brightness * (1 + changes[3:] / 3)
    pixels = image.float()
    grey = pixels.mean(dim=0, keepdim=True)
    pixels = torch.lerp(grey, pixels, saturation if torch.rand(()) >= strength / 2 else 0.0)
    pixels = gains[:, None, None] * torch.lerp(grey.mean(), pixels, contrast)
    if not image.is_floating_point():
        pixels = pixels.round().clamp(0, 255)
    return pixels.to(image.dtype)


def cover(image: Tensor, image_size: ImageSize) -> Tensor:
    """Scale a (channels, height, width) image to just cover the size; cut out the centre."""
    height, width = image.shape[-2:]
    if (height, width) == image_size:
        return image
    scale = max(image_size[0] / height, image_size[1] / width)
    scaled = [max(image_size[0], round(height * scale)), max(image_size[1], round(width * scale))]
    return TF.center_crop(TF.resize(image, scaled, antialias=True), list(image_size))
