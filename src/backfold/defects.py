"""How unlike the usual images an image is, and where: from one energy and its backbone.

Maps are (batch, 1, height, width), higher where stranger:

    gradient     |dE/dx|: how far the energy would move each pixel;
    error        |restored - x|^2, each square restored from the others alone (`error_map`);
    distance     Mahalanobis distance of the features at each position from those of usual images,
                 as in PaDiM (Defard et al., 2020), here with one distribution for all positions;
    alone        distance of those features from the nearest ones in the same image, which needs no
                 other image (Aota et al., WACV 2023): what breaks a texture stands alone in it;
    pixels       the same of squares of pixels: no backbone at all, for comparison and of use.

That a gradient's statistics tell defects at least as well as the energy is from arXiv 2105.03270.
"""

import hashlib
from collections.abc import Callable, Sequence
from contextlib import suppress
from dataclasses import dataclass, replace
from functools import partial

import torch
from sklearn.covariance import LedoitWolf
from torch import Tensor
from torch.nn import functional as F
from torchvision.transforms.v2.functional import gaussian_blur

from backfold.backbone import feature_map
from backfold.embedding import grid_shape
from backfold.energy import EnergyModel
from backfold.errors import UserError
from backfold.metrics import knn_distance
from backfold.pretext.corruption import Corruption, RunningSquares
from backfold.pretext.masking import Masking
from backfold.restoration import energy_gradient, eval_mode, restore

PARTS = 4  # each square is restored from the three quarters that it is no part of
MOST_POSITIONS = 20_000  # features that a distribution is fitted to
FEWEST = 8  # usual images
LEAST_SPREAD = 1e-6  # of a map's pixels
ACROSS = 12  # squares that are compared in the shorter side
COMPANY = 4  # positions that one is compared to
SMOOTHING = 24  # of the image's shorter side: the radius within which maps are averaged


def gradient_map(energy: EnergyModel, images: Tensor) -> tuple[Tensor, Tensor]:
    """Energies (batch,) of whole images, and the gradient's root mean square over channels."""
    with eval_mode(energy):
        energies, gradient = energy_gradient(energy, images)
    return energies, gradient.square().mean(dim=1, keepdim=True).sqrt()


def error_map(
    energy: EnergyModel,
    images: Tensor,
    masking: Masking,
    *,
    is_conditional: bool,
    num_steps: int = 1,
    step_size: float = 1.0,
) -> Tensor:
    """Mean over channels of each pixel's squared error, every square hidden once.

    The squares are dealt to `PARTS` parts, alike for all images. A part is filled as in training
    and restored from the squares of the other parts: by the conditional energy, or else by the
    dense one of the filled image. Where restoring diverges the error is infinite. Squares that do
    not fit the images raise a UserError.

    The energy's first head restores pixels; images are normalised, (batch, channels, height,
    width); ``num_steps`` and ``step_size`` are as for `backfold.restoration.restore`.
    """
    # Drawn on the CPU, and for one image: the same whatever the device and the batch.
    generator = torch.Generator().manual_seed(0)
    order, _ = replace(masking, blocks=False).draw(images[:1].cpu(), generator)
    parts = order.to(images.device).tensor_split(min(PARTS, order.shape[1]), dim=1)
    errors = images.new_zeros(len(images), 1, *images.shape[2:])
    for index, part in enumerate(parts):
        others = torch.cat([*parts[:index], *parts[index + 1 :]], dim=1)
        hidden, visible = (each.expand(len(images), -1) for each in (part, others))
        mask = masking.pixels(hidden, images)
        if masking.fill == "noise":
            filling = torch.randn(images[:1].shape, generator=generator).to(images)
        else:
            filling = masking.filling(images, mask, generator)
        corrupted = torch.where(mask, filling, images)
        squares = RunningSquares(hidden, masking.mask_patch_size, visible)
        made = Corruption(corrupted, mask, squares if is_conditional else None)
        result = restore(energy.of(made), corrupted, num_steps, step_size)
        found = (result.restored - images).square().mean(dim=1, keepdim=True)
        found[result.status.diverged] = torch.inf
        errors = torch.where(mask, found, errors)
    return errors


@dataclass(frozen=True)
class Usual:
    """A normal distribution of features, shrunk as Ledoit and Wolf (2004) have it."""

    mean: Tensor  # (features,)
    precision: Tensor  # (features, features)

    @classmethod
    def of(cls, features: Tensor) -> "Usual":
        """Fitted to (any number, features) on the CPU, at most `MOST_POSITIONS` of them."""
        drawn = torch.randperm(len(features), generator=torch.Generator().manual_seed(0))
        fitted = LedoitWolf().fit(features[drawn[:MOST_POSITIONS]].double().numpy())
        return cls(torch.tensor(fitted.location_).float(), torch.tensor(fitted.precision_).float())

    def distance(self, features: Tensor) -> Tensor:
        """Mahalanobis distance of features (..., features), without the last axis."""
        off = features.float() - self.mean
        return ((off @ self.precision) * off).sum(dim=-1).clamp(min=0).sqrt()


def alone(features: Tensor) -> Tensor:
    """Mean distance, 0 to 2, of each position to the 4 nearest of its image, at unit length.

    (batch, positions, features) -> (batch, positions).
    """
    found = []
    for unit in F.normalize(features.float(), dim=2):  # one by one: positions squared are many
        apart = (2 - 2 * unit @ unit.T).clamp(min=0).sqrt().fill_diagonal_(torch.inf)
        count = min(COMPANY, len(apart) - 1)
        found.append(apart.topk(count, dim=1, largest=False).values.mean(dim=1))
    return torch.stack(found)


def alone_pixels(images: Tensor) -> Tensor:
    """As `alone`, of squares a twelfth of the shorter side across: (batch, 1, height, width)."""
    height, width = images.shape[2:]
    size = max(2, min(height, width) // ACROSS)
    squares = F.unfold(images, size, stride=size).transpose(1, 2)
    grid = alone(squares).unflatten(1, (height // size, width // size))[:, None]
    found = F.interpolate(grid, scale_factor=size, mode="bilinear")
    # Those at the right and bottom that fill no square are taken for the next ones.
    return F.pad(found, (0, width % size, 0, height % size), mode="replicate")


class DefectFinder:
    """Scores and maps of images, beside those of the usual ones that it was shown.

    Three quarters of those, drawn, are what distances are measured to; the others show how high the
    scores of usual images are. Images are normalised; all have the same shape.

    The ``usual`` are batches of images without defects, 8 images or more; for the other arguments
    see `error_map`. Without ``masking``, or where an image is one square, nothing is restored. Too
    few images, or none that can be restored, raise a UserError.
    """

    def __init__(
        self,
        energy: EnergyModel,
        usual: Sequence[Tensor],
        masking: Masking | None = None,
        *,
        is_conditional: bool = False,
        num_steps: int = 1,
        step_size: float = 1.0,
    ) -> None:
        count = sum(map(len, usual))
        if count < FEWEST:
            raise UserError(f"{count} usual images; give {FEWEST} or more")
        images = torch.cat([batch.cpu() for batch in usual])
        self._energy, self._shape = energy, images.shape[1:]
        self._errors: Callable[[Tensor], Tensor] | None = None
        if masking is not None and masking.mask_patch_size < max(images.shape[2:]):
            self._errors = partial(
                error_map, energy, masking=masking, is_conditional=is_conditional,
                num_steps=num_steps, step_size=step_size,
            )  # fmt: skip
        drawn = torch.randperm(count, generator=torch.Generator().manual_seed(0))
        known, others = drawn.tensor_split([3 * count // 4])
        batches = known.sort().values.split(len(usual[0]))
        positions = torch.cat([self._positions(images[part]) for part in batches])
        self._grid: tuple[int, int] | None = None
        if positions.shape[1] > 1:
            with suppress(UserError):  # branches of several resolutions are no grid
                self._grid = grid_shape(positions.shape[1], (images.shape[2], images.shape[3]))
        self._bank = positions.mean(dim=1)
        # Without what a position's features always have: its place in the image, above all.
        self._everywhere = positions.mean(dim=0)
        self._vectors, self._local = Usual.of(self._bank), Usual.of(positions.flatten(0, 1))
        measured = [self.measure(images[part]) for part in others.split(len(usual[0]))]
        scores, maps = zip(*measured, strict=True)
        self._levels = {
            name: torch.cat([each[name] for each in scores]).sort().values for name in scores[0]
        }
        self._spreads = {}
        for name in maps[0]:
            pixels = torch.cat([each[name].flatten() for each in maps])
            if not pixels.isfinite().any():
                raise UserError("restoring diverges for every usual image; lower step_size")
            self._spreads[name] = torch.std_mean(pixels[pixels.isfinite()])

    @property
    def fingerprint(self) -> str:
        """Differs where another finder's usual images do."""
        return hashlib.sha256(self._bank.numpy().tobytes()).hexdigest()

    def __call__(self, images: Tensor) -> tuple[dict[str, Tensor], Tensor]:
        """Scores (batch,) by name and a map, on the CPU; higher is stranger.

        The score of a map is its highest value above the image's own median. ``joined`` is the mean
        of the other scores' ranks among those of usual images, 0 to 1. The map is the mean of the
        maps, each in deviations from the mean of usual images' pixels. Images of another shape than
        the usual ones raise a UserError.
        """
        if images.shape[1:] != self._shape:
            given, known = tuple(images.shape[1:]), tuple(self._shape)
            raise UserError(f"images are {given} and the usual ones {known}; give them alike")
        scores, maps = self.measure(images)
        ranks = [
            torch.searchsorted(usual, scores[name]) / len(usual)
            for name, usual in self._levels.items()
        ]
        standard = [
            (maps[name] - mean) / std.clamp(min=LEAST_SPREAD)
            for name, (std, mean) in self._spreads.items()
        ]
        scores["joined"] = torch.stack(ranks).mean(dim=0)
        return scores, torch.stack(standard).mean(dim=0)

    @torch.no_grad()
    def _positions(self, images: Tensor) -> Tensor:
        with eval_mode(self._energy):
            images = images.to(self._energy.head.weight.device)
            return feature_map(self._energy.backbone, images).float().cpu()

    def measure(self, images: Tensor) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
        """The scores that are joined, and the maps by name, smoothed; on the CPU."""
        positions, images = self._positions(images), images.to(self._energy.head.weight.device)
        energies, gradient = gradient_map(self._energy, images)
        maps = {"gradient": gradient}
        if self._errors is not None:
            maps["error"] = self._errors(images)
        if self._grid is not None:
            pair = self._local.distance(positions), alone(positions - self._everywhere)
            grids = torch.stack(pair, dim=1).unflatten(2, self._grid)
            pixels = F.interpolate(grids, images.shape[2:], mode="bilinear")
            maps["distance"], maps["alone"] = pixels.split(1, dim=1)
        maps["pixels"] = alone_pixels(images)
        radius = max(1, min(images.shape[2:]) // SMOOTHING)
        kernel, deviation = [2 * radius + 1] * 2, [radius / 2] * 2
        maps = {name: gaussian_blur(each.cpu(), kernel, deviation) for name, each in maps.items()}
        pooled = positions.mean(dim=1)
        scores = {
            "energy": energies.float().cpu(),
            "gradient_norm": gradient.cpu().square().mean(dim=(1, 2, 3)).sqrt(),
            "nearest": knn_distance(self._bank, pooled).float(),
            "mahalanobis": self._vectors.distance(pooled),
        }
        for name, found in maps.items():
            pixels = found.flatten(1)
            largest = pixels.amax(dim=1) - pixels.median(dim=1).values
            # inf - inf, where restoring diverged everywhere
            scores[f"largest_{name}"] = largest.nan_to_num(torch.inf, posinf=torch.inf)
        return scores, maps
