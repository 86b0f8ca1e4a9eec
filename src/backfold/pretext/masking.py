"""Masked image modelling: hide patches, to be restored from the visible ones."""

import math
from dataclasses import dataclass
from typing import Literal, get_args

import torch
from torch import Tensor
from torch.nn import functional as F

from backfold.errors import UserError, at_least, check_ranges, fraction, share
from backfold.pretext.corruption import (
    Corruption,
    RunningSquares,
    check_images,
    check_tiling,
    enlarge,
    random_order,
)

Fill = Literal["zero", "noise", "mean"]

# Enough to reach the highest ratios: each covers up to half of the hidden area.
NUM_RECTANGLES = 64
SMALLEST_RECTANGLE, LARGEST_RECTANGLE = 1 / 6, 1 / 2
LARGEST_ASPECT = 3.0
FLAT = 1e-4  # a variance, in units of the data's: what a square of one colour is divided by


@dataclass(frozen=True)
class Masking:
    """Hides random square patches; the loss counts on the hidden pixels.

    Every image loses exactly round(mask_ratio * patches) patches: at least one and, where there is
    more than one patch, at most all but one. Patches at the bottom and right edges are cut off
    where the image ends, and count as patches.

    With a hidden_share below 1 the backbone runs on the visible patches and on a random subset of
    the hidden ones, exactly max(1, round(hidden_share * hidden patches)) in every image, and the
    loss counts on the hidden patches that run.

    Args:
        mask_ratio: share of the patches that is hidden, above 0 and below 1.
        mask_patch_size: side of the hidden squares in pixels, 1 or more; for the conditional energy
            a multiple of the backbone's patches.
        fill: what hidden pixels become: "zero", the data set's mean; "noise", Gaussian noise of
            the data set's deviation; "mean", the mean of the image's own visible pixels in each
            channel, so that nothing hidden leaks into it.
        blocks: hide rectangles of neighbouring patches instead of scattered patches. Rectangles of
            a sixth to a half of the hidden area are laid at random until the ratio is reached; the
            last one is cut short.
        hidden_share: share of the hidden patches that the backbone runs on, above 0 and at most 1;
            below 1 the image's sides must be multiples of mask_patch_size.
        normalised_share: with the conditional energy, share of each image's hidden patches that a
            second head restores to normalised pixels, as masked autoencoders do: each square's
            minus their mean, over their deviation. That head serves training alone; the others are
            restored to their pixels, and one patch always is. 0 to 1.
    """

    mask_ratio: float = 0.75
    mask_patch_size: int = 16
    fill: Fill = "zero"
    blocks: bool = False
    hidden_share: float = 1.0
    normalised_share: float = 0.75

    def __post_init__(self) -> None:
        ranges = (
            ("mask_ratio", lambda ratio: 0 < ratio < 1, "a share above 0 and below 1"),
            at_least(1, "mask_patch_size"),
            share("hidden_share"),
            fraction("normalised_share"),
        )
        check_ranges(self, ranges)
        if self.fill not in get_args(Fill):
            raise UserError(f"fill is {self.fill!r}; choose from {', '.join(get_args(Fill))}")

    def __call__(self, clean: Tensor, generator: torch.Generator) -> Corruption:
        """See `PretextTask`."""
        check_images(clean)
        order, count = self.draw(clean, generator)
        mask = self.pixels(order[:, :count], clean)
        corrupted = torch.where(mask, self.filling(clean, mask, generator), clean)
        if self.hidden_share == 1:
            return Corruption(corrupted, mask)
        # Drawn last: the images are those of a hidden_share of 1.
        order = self.shuffle(order, count, generator)
        kept = self.kept(count)
        running = torch.cat([order[:, :kept], order[:, count:]], dim=1).sort(dim=1).values
        squares = RunningSquares(running, self.mask_patch_size)
        return Corruption(corrupted, self.pixels(order[:, :kept], clean), squares)

    def draw(self, clean: Tensor, generator: torch.Generator) -> tuple[Tensor, int]:
        """Each image's patches, (batch, patches), hidden ones first, and how many those are."""
        (height, width), size = clean.shape[2:], self.mask_patch_size
        if size > min(height, width):
            raise UserError(
                f"mask_patch_size is {size}, larger than the {height}x{width} pixel image; "
                f"give {min(height, width)} or less"
            )
        if self.hidden_share < 1:
            check_tiling(clean, "hidden_share is below 1, mask_patch_size", size)
        rows, columns = math.ceil(height / size), math.ceil(width / size)
        count = max(1, min(rows * columns - 1, round(self.mask_ratio * rows * columns)))
        if self.blocks:
            return _block_order(len(clean), rows, columns, count, generator), count
        return random_order(len(clean), rows * columns, generator), count

    def shuffle(self, order: Tensor, count: int, generator: torch.Generator) -> Tensor:
        """With the hidden patches, the first ``count``, in random order among themselves."""
        if not self.blocks:  # they lie in a random order already
            return order
        shuffled = order.gather(1, random_order(len(order), count, generator))
        return torch.cat([shuffled, order[:, count:]], dim=1)

    def kept(self, count: int) -> int:
        """How many of so many hidden patches run."""
        return max(1, round(self.hidden_share * count))

    def pixels(self, patches: Tensor, clean: Tensor, chosen: Tensor | None = None) -> Tensor:
        """Patches, (batch, any number), or those ``chosen``, as a mask of the images' pixels."""
        (height, width), size = clean.shape[2:], self.mask_patch_size
        rows, columns = math.ceil(height / size), math.ceil(width / size)
        mask = torch.zeros(len(patches), rows * columns, dtype=torch.bool, device=clean.device)
        mask = mask.scatter(1, patches, True if chosen is None else chosen)
        return enlarge(mask.view(-1, 1, rows, columns), size, height, width)

    def filling(self, clean: Tensor, mask: Tensor, generator: torch.Generator) -> Tensor:
        """What stands where the ``mask``, (batch, 1, height, width), hides the images."""
        if self.fill == "zero":
            return torch.zeros_like(clean)
        if self.fill == "noise":
            return clean.new_empty(clean.shape).normal_(generator=generator)
        # With a single patch nothing is visible; the fill is then the data set's mean, 0.
        num_visible = (~mask).sum(dim=(2, 3), keepdim=True).clamp(min=1)
        return clean.masked_fill(mask, 0).sum(dim=(2, 3), keepdim=True) / num_visible


def normalise_squares(images: Tensor, square_size: int) -> Tensor:
    """Each square's pixels minus their mean, over their deviation, of all channels together.

    As He et al., CVPR 2022, section 3, "Reconstruction target". Squares at the bottom and right
    edges end where the image does.
    """

    def means(values: Tensor) -> Tensor:
        pooled = F.avg_pool2d(values, square_size, ceil_mode=True).mean(dim=1, keepdim=True)
        return enlarge(pooled, square_size, *images.shape[2:])

    centered = images - means(images)
    return centered / (means(centered.square()) + FLAT).sqrt()


def _block_order(
    batch_size: int, rows: int, columns: int, count: int, generator: torch.Generator
) -> Tensor:
    """Patch indices in the order in which random rectangles hide them: (batch, rows * columns).

    Rectangles are cut off at the edges, so that they cover the border as often as the middle.
    """
    area, aspect, place_row, place_column = torch.rand(
        4, batch_size, NUM_RECTANGLES, 1, generator=generator, device=generator.device
    )
    area = count * (SMALLEST_RECTANGLE + (LARGEST_RECTANGLE - SMALLEST_RECTANGLE) * area)
    aspect = LARGEST_ASPECT ** (2 * aspect - 1)
    row_covered = _interval(rows, place_row, (area * aspect).sqrt())
    column_covered = _interval(columns, place_column, (area / aspect).sqrt())
    covered = row_covered[:, :, :, None] & column_covered[:, :, None, :]
    uncovered = torch.ones_like(covered[:, :1])
    # argmax finds the first rectangle over each patch; the appended one catches the rest.
    first = torch.cat([covered, uncovered], dim=1).to(torch.uint8).argmax(dim=1)
    return first.flatten(1).argsort(dim=1, stable=True)


def _interval(length: int, place: Tensor, extent: Tensor) -> Tensor:
    """Which of 0 .. length - 1 lie in an interval of this extent, rounded, 1 or more.

    A uniform place in [0, 1) makes all intervals that hold at least one of them equally likely.
    """
    extent = extent.round().clamp(1, length)
    start = (place * (length + extent - 1)).floor() - (extent - 1)
    positions = torch.arange(length, device=place.device)
    return (positions >= start) & (positions < start + extent)
