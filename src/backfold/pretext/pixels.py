"""Tasks at every pixel: colours fade, noise is added, fine detail goes; the loss counts everywhere.

Luminance means the weighted sum of normalised channels. It is not the photometric one: undoing the
normalisation turns equal channels into the data set's average tint, not into neutral grey.
"""

import math
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor
from torch.nn import functional as F

from backfold.errors import UserError, at_least, check_ranges, share
from backfold.pretext.corruption import (
    Corruption,
    check_images,
    enlarge,
    host_random,
    loss_everywhere,
    random_order,
)

REC_601_WEIGHTS = (0.299, 0.587, 0.114)
LARGEST_FACTOR_STEP = 0.25


def _uniform(low: float, high: float, clean: Tensor, generator: torch.Generator) -> Tensor:
    """One number an image, (batch, 1, 1, 1)."""
    return clean.new_empty(len(clean), 1, 1, 1).uniform_(low, high, generator=generator)


@dataclass(frozen=True)
class Colorization:
    """Moves every channel to the luminance, all the way or in part.

    Each image's share of the chroma that is gone is drawn uniformly from the range. Training on all
    the way alone leaves an energy that knows grey images, but not faded ones.

    Args:
        min_faded: smallest share of the chroma that is gone, above 0; 1 is grey.
        max_faded: largest share, min_faded or more and at most 1.
    """

    min_faded: float = 1.0
    max_faded: float = 1.0

    def __post_init__(self) -> None:
        if not 0 < self.min_faded <= self.max_faded <= 1:
            raise UserError(
                f"min_faded is {self.min_faded} and max_faded {self.max_faded}; "
                "give 0 < min_faded <= max_faded <= 1"
            )

    def __call__(self, clean: Tensor, generator: torch.Generator) -> Corruption:
        """See `PretextTask`."""
        check_images(clean)
        if clean.shape[1] == 1:
            raise UserError(
                "colorization got images of 1 channel, which have no colours; "
                "load the images in colour or choose another pretext task"
            )
        share: float | Tensor = self.min_faded
        if self.max_faded > self.min_faded:
            share = _uniform(self.min_faded, self.max_faded, clean, generator)
        return Corruption(torch.lerp(clean, luminance(clean), share), loss_everywhere(clean))


def luminance(images: Tensor) -> Tensor:
    """Weighted sum of the channels, (batch, 1, height, width).

    Three channels are red, green and blue with the weights of Rec. 601; others weigh the same.
    """
    if images.shape[1] != len(REC_601_WEIGHTS):
        return images.mean(dim=1, keepdim=True)
    # Numbers, as a tensor of them would be copied to the device, and the host would wait for it.
    red, green, blue = REC_601_WEIGHTS
    return red * images[:, :1] + green * images[:, 1:2] + blue * images[:, 2:]


def chroma_error(restored: Tensor, clean: Tensor) -> Tensor:
    """Mean absolute difference of the channels less their luminance, (batch,), normalised."""
    # Chroma is linear: the difference of two chromas is the chroma of the difference.
    difference = restored - clean
    return (difference - luminance(difference)).abs().mean(dim=(1, 2, 3))


@dataclass(frozen=True)
class Bands:
    """Hides bands (channels) of each image, to be restored from its others.

    One group of bands is drawn evenly for each image, or for each square of it, and becomes 0, the
    data set's mean. The loss counts on all bands: those that were not hidden shall stay. Not one of
    the paper's tasks; for images of several sensors, after CrossDiff (Xing et al., 2024).

    Args:
        groups: bands that are hidden together, counted from 0; none hides each alone.
        band_patch_size: side in pixels of the squares that draw for themselves; 0 draws once for
            the whole image.
        share: of the squares that lose bands, above 0 and at most 1; one does.
    """

    groups: tuple[tuple[int, ...], ...] = ()
    band_patch_size: int = 0
    share: float = 1.0

    def __post_init__(self) -> None:
        check_ranges(self, [at_least(0, "band_patch_size"), share("share")])

    def __call__(self, clean: Tensor, generator: torch.Generator) -> Corruption:
        """See `PretextTask`."""
        check_images(clean)
        channels, height, width = clean.shape[1:]
        groups = self.groups or tuple((band,) for band in range(channels))
        if not all(set() < set(group) < set(range(channels)) for group in groups):
            raise UserError(
                f"groups of bands are {groups} and images have {channels} channel(s); give some "
                f"from 0 to {channels - 1} in each group, never all of them"
            )
        size = self.band_patch_size or max(height, width)
        shape = (len(clean), math.ceil(height / size), math.ceil(width / size))
        drawn = torch.randint(len(groups), shape, generator=generator, device=clean.device)
        if self.share < 1:
            order = random_order(len(clean), shape[1] * shape[2], generator)
            loses = order < max(1, round(self.share * order.shape[1]))
            drawn = torch.where(loses.view(shape), drawn, -1)
        hidden = clean.new_zeros(len(clean), channels, *shape[1:], dtype=torch.bool)
        for number, group in enumerate(groups):
            for band in group:
                hidden[:, band] |= drawn == number
        hidden = enlarge(hidden, size, height, width)
        return Corruption(clean.masked_fill(hidden, 0), loss_everywhere(clean))


def spectral_angle(restored: Tensor, clean: Tensor) -> Tensor:
    """Mean angle in degrees between pixels' bands, as in files: (batch,) (Kruse et al., 1993)."""
    cosine = F.cosine_similarity(restored.float(), clean.float(), dim=1)
    return cosine.clamp(-1, 1).acos().mean(dim=(1, 2)).rad2deg()


@dataclass(frozen=True)
class Denoising:
    """Adds Gaussian noise, whose noise_std is drawn uniformly from the range for each image.

    Args:
        min_noise_std: smallest standard deviation of the noise, 0 or more, in units of the data
            set's own deviation.
        max_noise_std: largest standard deviation of the noise, above 0 and min_noise_std or more,
            in the same units.
        octaves: how many resolutions the noise has, 1 or more: squares of 1, 2, 4, ... pixels, each
            of one colour, with equal shares in the noise's variance. 1 is noise of single pixels,
            which a backbone can remove without looking at anything coarse.
    """

    min_noise_std: float = 0.1
    max_noise_std: float = 0.8
    octaves: int = 1

    def __post_init__(self) -> None:
        if not (0 <= self.min_noise_std <= self.max_noise_std < math.inf and self.max_noise_std):
            raise UserError(
                f"min_noise_std is {self.min_noise_std} and max_noise_std {self.max_noise_std}; "
                "give 0 <= min_noise_std <= max_noise_std, the latter above 0"
            )
        check_ranges(self, [at_least(1, "octaves")])

    def __call__(self, clean: Tensor, generator: torch.Generator) -> Corruption:
        """See `PretextTask`."""
        check_images(clean)
        height, width = clean.shape[2:]
        largest = 2 ** (self.octaves - 1)
        if largest > min(height, width):
            raise UserError(
                f"octaves is {self.octaves}, which makes squares of {largest} pixels in a "
                f"{height}x{width} pixel image; give {min(height, width).bit_length()} or less"
            )
        noise = torch.zeros_like(clean)
        for side in (2**octave for octave in range(self.octaves)):
            shape = (*clean.shape[:2], math.ceil(height / side), math.ceil(width / side))
            squares = clean.new_empty(shape).normal_(generator=generator)
            noise += enlarge(squares, side, height, width)
        noise /= math.sqrt(self.octaves)
        noise_std = _uniform(self.min_noise_std, self.max_noise_std, clean, generator)
        return Corruption(clean + noise_std * noise, loss_everywhere(clean))


@dataclass(frozen=True)
class SuperResolution:
    """Scales images down and up again, both bicubic.

    Each image's factor is drawn from evenly spaced values, at most a quarter apart, from the
    smallest factor to the largest, both included. A factor of 1 leaves the image as it is.

    Args:
        min_factor: smallest factor by which height and width shrink, 1 or more.
        max_factor: largest factor, min_factor or more.
    """

    min_factor: float = 2.0
    max_factor: float = 4.0

    def __post_init__(self) -> None:
        if not 1 <= self.min_factor <= self.max_factor < math.inf:
            raise UserError(
                f"min_factor is {self.min_factor} and max_factor {self.max_factor}; "
                "give 1 <= min_factor <= max_factor"
            )

    @property
    def factors(self) -> tuple[float, ...]:
        """The factors that are drawn from, in rising order."""
        steps = math.ceil((self.max_factor - self.min_factor) / LARGEST_FACTOR_STEP)
        return tuple(np.linspace(self.min_factor, self.max_factor, steps + 1).tolist())

    def __call__(self, clean: Tensor, generator: torch.Generator) -> Corruption:
        """See `PretextTask`."""
        check_images(clean)
        factors = self.factors
        drawn = host_random(generator).integers(len(factors), size=len(clean))
        corrupted = clean.clone()
        for index in np.unique(drawn).tolist():
            images = torch.from_numpy(np.flatnonzero(drawn == index)).to(clean.device)
            corrupted[images] = down_and_up(clean[images], factors[index])
        return Corruption(corrupted, loss_everywhere(clean))


def down_and_up(images: Tensor, factor: float) -> Tensor:
    """Shrink height and width by 1 or more, to whole pixels, and enlarge again, as Pillow does."""
    height, width = images.shape[-2:]
    small_size = [max(1, round(height / factor)), max(1, round(width / factor))]
    try:
        small = F.interpolate(images, small_size, mode="bicubic", antialias=True)
        return F.interpolate(small, (height, width), mode="bicubic", antialias=True)
    except NotImplementedError:  # not every device has it
        if images.device.type == "cpu":
            raise
        return down_and_up(images.cpu(), factor).to(images.device)
