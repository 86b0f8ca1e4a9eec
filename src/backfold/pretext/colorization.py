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
    """Replaces every channel by the luminance; the loss counts everywhere.

    Nothing is drawn at random, and there is nothing to configure.

    Raises:
        UserError: when called, images of one channel.
    """

    def __call__(self, clean: Tensor, generator: torch.Generator) -> Corruption:  # noqa: ARG002
        """Take the colours from normalised images (batch, channels, height, width)."""
        check_images(clean)
        if clean.shape[1] == 1:
            raise UserError(
                "colorization got images of 1 channel, which have no colours; "
                "load the images in colour or choose another pretext task"
            )
        corrupted = luminance(clean).repeat(1, clean.shape[1], 1, 1)
        return Corruption(corrupted, loss_everywhere(clean))


def luminance(images: Tensor) -> Tensor:
    """Weighted sum of the channels: (batch, channels, height, width) -> (batch, 1, height, width).

    Three channels are red, green and blue with the weights of Rec. 601; of any other number, all
    weigh the same.
    """
    channels = images.shape[1]
    if channels != len(REC_601_WEIGHTS):
        return images.mean(dim=1, keepdim=True)
    weights = torch.tensor(REC_601_WEIGHTS, device=images.device, dtype=images.dtype)
    return (images * weights[:, None, None]).sum(dim=1, keepdim=True)


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
