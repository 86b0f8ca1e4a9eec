"""Colorization: images lose their colours, to be restored.

Images are normalised channel by channel, so luminance means the weighted sum of channels that each
have zero mean and unit deviation over the data set. It is not the photometric luminance: undoing
the normalisation turns equal channels into the data set's average tint, not into neutral grey.
"""

from dataclasses import dataclass

import torch
from torch import Tensor

from backfold.errors import UserError
from backfold.pretext.corruption import Corruption, check_images, loss_everywhere

REC_601_WEIGHTS = (0.299, 0.587, 0.114)


@dataclass(frozen=True)
class Colorization:
    """Moves every channel to the luminance, all the way or in part; the loss counts everywhere.

    Each image's share of the chroma that is gone is drawn uniformly from the range; where that is
    one number, nothing is drawn. Training on all the way alone leaves an energy that knows grey
    images, but not faded ones.

    Args:
        min_faded: smallest share of the chroma that is gone, above 0; 1 is grey (default: 1.0).
        max_faded: largest share, min_faded or more and at most 1 (default: 1.0).

    Raises:
        UserError: a field out of its range or, when called, images of one channel.
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
        """Take the colours from normalised images (batch, channels, height, width)."""
        check_images(clean)
        if clean.shape[1] == 1:
            raise UserError(
                "colorization got images of 1 channel, which have no colours; "
                "load the images in colour or choose another pretext task"
            )
        grey = luminance(clean).repeat(1, clean.shape[1], 1, 1)
        if self.min_faded == 1:
            return Corruption(grey, loss_everywhere(clean))
        share = torch.full_like(clean[:, :1, :1, :1], self.min_faded)
        if self.max_faded > self.min_faded:
            drawn = torch.rand(
                share.shape, generator=generator, device=clean.device, dtype=clean.dtype
            )
            share += (self.max_faded - self.min_faded) * drawn
        return Corruption(torch.lerp(clean, grey, share), loss_everywhere(clean))


def luminance(images: Tensor) -> Tensor:
    """Weighted sum of the channels: (batch, channels, height, width) -> (batch, 1, height, width).

    Three channels are red, green and blue with the weights of Rec. 601; of any other number, all
    weigh the same.
    """
    channels = images.shape[1]
    if channels != len(REC_601_WEIGHTS):
        return images.mean(dim=1, keepdim=True)
    # Numbers, as a tensor of them would be copied to the device, and the host would wait for it.
    red, green, blue = REC_601_WEIGHTS
    grey: Tensor = red * images[:, :1] + green * images[:, 1:2] + blue * images[:, 2:]
    return grey


def chroma_error(restored: Tensor, clean: Tensor) -> Tensor:
    """Mean absolute difference of what remains of the channels after subtracting the luminance.

    Args:
        restored: (batch, channels, height, width), normalised.
        clean: as restored.

    Returns:
        (batch,), in units of the data set's deviation; 0 for one channel.
    """
    # Chroma is linear: the difference of two chromas is the chroma of the difference.
    difference = restored - clean
    return (difference - luminance(difference)).abs().mean(dim=(1, 2, 3))
