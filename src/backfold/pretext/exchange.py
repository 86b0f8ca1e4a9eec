"""Exchange: some squares show another image, and nothing tells which ones."""

from dataclasses import dataclass

import torch
from torch import Tensor

from backfold.errors import UserError
from backfold.pretext.corruption import Corruption, check_images, loss_everywhere
from backfold.pretext.masking import Masking


@dataclass(frozen=True)
class Exchange:
    """Random squares show the same place of the batch's next image; the loss counts everywhere.

    What is foreign must be found before it can be restored, by what fits together: a masking whose
    mask is secret. Not one of the paper's tasks (Wang et al., ICLR 2023). A single image has no
    next one and stays as it is.

    Args:
        exchange_ratio: share of the squares that are exchanged, above 0 and below 1
            (default: 0.4).
        exchange_patch_size: side of the squares in pixels, 1 or more; independent of the backbone's
            patches (default: 16).

    Raises:
        UserError: a field out of its range or, when called, squares larger than the image.
    """

    exchange_ratio: float = 0.4
    exchange_patch_size: int = 16

    def __post_init__(self) -> None:
        if not 0 < self.exchange_ratio < 1:
            raise UserError(
                f"exchange_ratio is {self.exchange_ratio}; give a share above 0 and below 1, "
                "such as 0.4"
            )
        if self.exchange_patch_size < 1:
            raise UserError(
                f"exchange_patch_size is {self.exchange_patch_size}; give 1 pixel or more"
            )

    def __call__(self, clean: Tensor, generator: torch.Generator) -> Corruption:
        """Exchange squares of normalised images (batch, channels, height, width)."""
        check_images(clean)
        batch_size, _, height, width = clean.shape
        if self.exchange_patch_size > min(height, width):
            raise UserError(
                f"exchange_patch_size is {self.exchange_patch_size}, larger than the "
                f"{height}x{width} pixel image; give {min(height, width)} or less"
            )
        squares = Masking(self.exchange_ratio, self.exchange_patch_size)
        mask = squares.draw_mask(batch_size, height, width, generator)
        return Corruption(torch.where(mask, clean.roll(1, dims=0), clean), loss_everywhere(clean))
