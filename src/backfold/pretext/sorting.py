"""Patch sorting: some patches change places, to be put back."""

from dataclasses import dataclass

import torch
from scipy.optimize import linear_sum_assignment
from torch import Tensor
from torch.nn import functional as F

from backfold.errors import UserError, at_least, check_ranges, share
from backfold.pretext.corruption import (
    Corruption,
    check_images,
    enlarge,
    random_order,
)

FARTHEST = 1e18  # between patches; beyond it an image is no longer one


@dataclass(frozen=True)
class Sorting:
    """Permutes a share of the patches among themselves; the loss counts on the displaced ones.

    Every chosen patch moves: the chosen ones, in random order, each take the next one's place.
    What is left over at the bottom and right edges stays where it is.

    Args:
        sorting_patch_size: side of the patches in pixels, 1 or more; independent of the backbone's
            patches.
        share: share of the whole patches that moves, above 0 and up to 1; two at least.
    """

    sorting_patch_size: int = 16
    share: float = 0.5

    def __post_init__(self) -> None:
        check_ranges(self, [at_least(1, "sorting_patch_size"), share("share")])

    def __call__(self, clean: Tensor, generator: torch.Generator) -> Corruption:
        """See `PretextTask`."""
        check_images(clean)
        height, width = clean.shape[2:]
        size = self.sorting_patch_size
        rows, columns = height // size, width // size
        if rows * columns < 2:
            raise UserError(
                f"sorting_patch_size is {size}: a {height}x{width} pixel image has "
                f"{rows * columns} whole patches of it; make it small enough for 2 or more"
            )
        sources = self.draw_sources(len(clean), rows * columns, generator)
        images = torch.arange(len(clean), device=clean.device)[:, None]
        moved = unpatchify(patchify(clean, size)[images, sources], rows)
        corrupted = clean.clone()
        corrupted[:, :, : rows * size, : columns * size] = moved
        displaced = sources != torch.arange(rows * columns, device=clean.device)
        displaced = displaced.view(len(clean), 1, rows, columns)
        return Corruption(corrupted, enlarge(displaced, size, height, width))

    def draw_sources(self, batch_size: int, num_patches: int, generator: torch.Generator) -> Tensor:
        """Where each position's patch comes from: int64, (batch_size, num_patches)."""
        count = min(num_patches, max(2, round(self.share * num_patches)))
        chosen = random_order(batch_size, num_patches, generator)[:, :count]
        in_place = torch.arange(num_patches, device=chosen.device).repeat(batch_size, 1)
        return in_place.scatter(1, chosen, chosen.roll(1, dims=1))


def patchify(images: Tensor, patch_size: int) -> Tensor:
    """Whole patches, row by row: (batch, rows * columns, channels, patch_size, patch_size).

    What is left over at the bottom and right edges is not in them.
    """
    height, width = (side - side % patch_size for side in images.shape[2:])
    squares: Tensor = F.pixel_unshuffle(images[:, :, :height, :width], patch_size).flatten(2)
    return squares.mT.reshape(len(images), -1, images.shape[1], patch_size, patch_size)


def unpatchify(patches: Tensor, rows: int) -> Tensor:
    """The inverse of `patchify` for images of this many rows of patches and no remainder."""
    grid = patches.flatten(2).mT.unflatten(2, (rows, -1))
    images: Tensor = F.pixel_shuffle(grid, patches.shape[-1])
    return images


def patches_placed_right(restored: Tensor, clean: Tensor, patch_size: int) -> Tensor:
    """The share of whole patches, (batch,), that stand at their place in the restored images.

    The clean image's patches are assigned to the restored image's positions so that the sum of
    squared distances is least. A patch is right at its own position, and at that of a pixelwise
    equal patch, such as another piece of a black background. An image with pixels that are not
    finite, or patches beyond 1e18 from each other, scores 0.
    """
    found, patches = (patchify(images, patch_size).flatten(2).cpu() for images in (restored, clean))
    # In float64, or squares expanded to a matrix product could not tell nearly equal patches apart.
    centre, fast = patches.double().mean(dim=1, keepdim=True), "use_mm_for_euclid_dist"
    costs = torch.cdist(found - centre, patches - centre, compute_mode=fast).square()
    # Between equal costs the solver prefers the order given, which would flatter a bad restoration.
    order = torch.randperm(costs.shape[1], generator=torch.Generator().manual_seed(0))
    sane = costs.flatten(1).amax(dim=1) < FARTHEST**2  # false for what is not finite
    shares = torch.zeros(len(clean))
    for image in sane.nonzero().squeeze(1).tolist():
        _, columns = linear_sum_assignment(costs[image, order].numpy())
        target = patches[image]
        placed_right = (target[torch.from_numpy(columns)] == target[order]).all(dim=1)
        shares[image] = placed_right.float().mean()
    return shares.to(clean.device)
