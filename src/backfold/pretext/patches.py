"""Cutting images into square patches and putting them together again."""

import torch
from torch import Tensor
from torch.nn import functional as F

FLAT = 1e-4  # a variance, in units of the data's: what a square of one colour is divided by


def patchify(images: Tensor, patch_size: int) -> Tensor:
    """Whole patches, row by row: (batch, rows * columns, channels, patch_size, patch_size).

    What is left over at the bottom and right edges is not in them.
    """
    batch_size, channels, height, width = images.shape
    rows, columns = height // patch_size, width // patch_size
    whole = images[:, :, : rows * patch_size, : columns * patch_size]
    grid = whole.reshape(batch_size, channels, rows, patch_size, columns, patch_size)
    return grid.permute(0, 2, 4, 1, 3, 5).flatten(1, 2)


def unpatchify(patches: Tensor, rows: int) -> Tensor:
    """The inverse of `patchify` for images of this many rows of patches and no remainder."""
    batch_size, num_patches, *patch_shape = patches.shape
    grid = patches.reshape(batch_size, rows, num_patches // rows, *patch_shape)
    return grid.permute(0, 3, 1, 4, 2, 5).flatten(4, 5).flatten(2, 3)


def patch_mask_to_pixels(mask: Tensor, patch_size: int, height: int, width: int) -> Tensor:
    """A patch mask (batch, rows, columns) as pixels (batch, 1, height, width).

    Patches that reach over the bottom or right edge are cut off there; pixels that no patch covers
    are False.
    """
    pixels = mask.repeat_interleave(patch_size, dim=1).repeat_interleave(patch_size, dim=2)
    pixels = pixels[:, :height, :width]
    covering = mask.new_zeros(len(mask), 1, height, width)
    covering[:, 0, : pixels.shape[1], : pixels.shape[2]] = pixels
    return covering


def normalise_squares(images: Tensor, square_size: int) -> Tensor:
    """Each square's pixels minus their mean, over their deviation, of all channels together.

    The normalised pixels of masked autoencoders (He et al., CVPR 2022, section 3, "Reconstruction
    target"). Squares at the bottom and right edges end where the image does.

    Args:
        images: (batch, channels, height, width).
        square_size: side in pixels.
    """

    def means(values: Tensor) -> Tensor:
        pooled = F.avg_pool2d(values, square_size, ceil_mode=True).mean(dim=1, keepdim=True)
        pixels = pooled.repeat_interleave(square_size, dim=2).repeat_interleave(square_size, dim=3)
        return pixels[:, :, : images.shape[2], : images.shape[3]]

    centered = images - means(images)
    return centered / (means(centered.square()) + FLAT).sqrt()


def random_order(batch_size: int, length: int, generator: torch.Generator) -> Tensor:
    """A random order of 0 .. length - 1 for each image: int64, (batch_size, length)."""
    scores = torch.rand(batch_size, length, generator=generator, device=generator.device)
    return scores.argsort(dim=1, stable=True)
