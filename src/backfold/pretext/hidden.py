"""Tasks in conditional form: hidden patches are corrupted, the visible ones are clean context."""

from dataclasses import dataclass
from itertools import accumulate

import torch
from torch import Tensor
from torch.nn import functional as F

from backfold.errors import UserError
from backfold.pretext.corruption import (
    Corruption,
    PretextTask,
    RunningSquares,
    check_images,
    check_tiling,
    enlarge,
    random_order,
)
from backfold.pretext.masking import Masking, normalise_squares
from backfold.pretext.sorting import Sorting, patchify, unpatchify


@dataclass(frozen=True)
class HiddenPatches:
    """Corrupts the hidden patches of each image, each by one task; for the conditional energy.

    Which patches are hidden, how many of them run, and which are restored to normalised pixels is
    for ``masking`` to say, whatever the tasks: as many in every image. A masking task fills them,
    sorting lets them change places with each other, and of any other task they show what it makes
    of the image there. When called, patches that do not tile the image raise a UserError.

    Args:
        tasks: what hidden patches are given, one or more.
        weights: one number for each task, above 0; a patch's task is drawn by its weight.
        masking: draws the patches.
        share: of the patches that are used at all, hidden or visible; above 0 and at most 1.
    """

    tasks: tuple[PretextTask, ...]
    weights: tuple[float, ...]
    masking: Masking
    share: float = 1.0

    def __call__(self, clean: Tensor, generator: torch.Generator) -> Corruption:
        """See `PretextTask`."""
        check_images(clean)
        masking, size = self.masking, self.masking.mask_patch_size
        check_tiling(clean, "mask_patch_size", size)
        order, most = masking.draw(clean, generator)
        used = max(2, round(self.share * order.shape[1]))
        count = max(1, min(used - 1, most, round(masking.mask_ratio * used)))
        order = masking.shuffle(order, count, generator)
        hidden, visible = order[:, : masking.kept(count)], order[:, most:]
        if self.share < 1:
            some = random_order(len(clean), visible.shape[1], generator)[:, : used - count]
            visible = visible.gather(1, some)
        masked = masking.pixels(order[:, :count], clean)
        corrupted = clean
        drawn = self._drawn(hidden, generator)
        for number, task in enumerate(self.tasks):
            if isinstance(task, Masking):
                made = task.filling(clean, masked, generator)
            elif isinstance(task, Sorting):
                made = _swapped(clean, hidden, size)
            else:
                made = task(clean, generator).corrupted
            mine = masking.pixels(hidden, clean, drawn == number)
            corrupted = torch.where(mine, made, corrupted)
        normalised = target = None
        if masking.normalised_share:
            kept = hidden.shape[1]
            count = min(kept - 1, round(masking.normalised_share * kept))
            # They are in random order.
            normalised = (torch.arange(kept, device=clean.device) < count).expand_as(hidden)
            chosen = masking.pixels(hidden, clean, normalised)
            target = torch.where(chosen, normalise_squares(clean, size), clean)
        squares = RunningSquares(hidden, size, visible, normalised)
        return Corruption(corrupted, masking.pixels(hidden, clean), squares, target)

    def _drawn(self, hidden: Tensor, generator: torch.Generator) -> Tensor:
        """Each hidden patch's task, as an index; the host never asks for it."""
        drawn = torch.zeros_like(hidden)
        if len(self.tasks) > 1:
            places = torch.rand(hidden.shape, generator=generator, device=hidden.device)
            for bound in accumulate(weight / sum(self.weights) for weight in self.weights[:-1]):
                drawn += places >= bound
        return drawn


def _swapped(clean: Tensor, squares: Tensor, size: int) -> Tensor:
    """Each of the squares, (batch, count), shows the one before it; the first shows the last."""
    patches = patchify(clean, size).clone()
    images = torch.arange(len(clean), device=clean.device)[:, None]
    patches[images, squares] = patches[images, squares.roll(1, dims=1)]
    return unpatchify(patches, clean.shape[2] // size)


def hidden_by(mask: Tensor, images: Tensor, masking: Masking | None, size: int) -> Corruption:
    """What is corrupted of one image, (1, channels, height, width), where a bool mask says so.

    It hides every patch, ``size`` pixels across, that it touches; ``masking`` fills those, and None
    leaves them as they are. If no patch is left visible, that is a UserError.
    """
    touched = F.max_pool2d(mask.float(), size) > 0
    if touched.all():
        raise UserError("the mask leaves no patch untouched; give one that hides less")
    hidden, visible = (each.flatten().nonzero().T for each in (touched, ~touched))
    if masking is not None:
        pixels = enlarge(touched, size, *images.shape[2:])
        filling = masking.filling(images, pixels, torch.Generator(images.device).manual_seed(0))
        images = torch.where(pixels, filling, images)
    return Corruption(images, mask, RunningSquares(hidden, size, visible))
