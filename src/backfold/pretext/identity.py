"""Identity: images that stay as they are, for the energy to know what clean ones look like."""

from dataclasses import dataclass

import torch
from torch import Tensor

from backfold.pretext.corruption import Corruption, check_images, loss_everywhere


@dataclass(frozen=True)
class Identity:
    """Leaves images clean; the loss counts everywhere, so that restoring them changes nothing.

    There is nothing to learn from it alone: it belongs in a `Mixture`, where it makes clean images
    points at which the energy is flat, and gives `backfold.restoration.plausibility_loss` its clean
    images. Not one of the paper's tasks (Wang et al., ICLR 2023).
    """

    def __call__(self, clean: Tensor, generator: torch.Generator) -> Corruption:  # noqa: ARG002
        """Leave normalised images (batch, channels, height, width); nothing is drawn."""
        check_images(clean)
        return Corruption(clean.clone(), loss_everywhere(clean))
