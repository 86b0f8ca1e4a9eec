"""What trials change in the product: losses, corruptions, and methods at their first step."""

import itertools
from typing import Any

import torch
from timm.utils import ModelEmaV3
from torch import Tensor, nn
from torch.nn import functional as F

from backfold.pretext import Corruption, Masking, Mixture, PretextTask
from backfold.restoration import restoration_loss, restoration_step


def patches(images: Tensor, size: int = 8) -> Tensor:
    """(batch, patches, pixels x channels)."""
    return F.unfold(images.float(), size, stride=size).transpose(1, 2)


def patch_hidden(loss_mask: Tensor, size: int = 8) -> Tensor:
    """1 where a patch counts, (batch, patches)."""
    return F.max_pool2d(loss_mask.float(), size).flatten(1)


def _per_patch(distance: Tensor, loss_mask: Tensor) -> Tensor:
    counts = patch_hidden(loss_mask)
    per_image = (distance.mean(-1) * counts).sum(1) / counts.sum(1).clamp(min=1)
    return per_image.mean()


def normalised_target(restored: Tensor, clean: Tensor, loss_mask: Tensor) -> Tensor:
    """MAE's target: restores normalised values, not pixels."""
    target = patches(clean)
    target = (target - target.mean(-1, keepdim=True)) / (target.var(-1, keepdim=True) + 1e-4).sqrt()
    return _per_patch(F.smooth_l1_loss(patches(restored), target, reduction="none"), loss_mask)


def detail(
    restored: Tensor, clean: Tensor, loss_mask: Tensor, weight: float, floor: float = 0.1
) -> Tensor:
    """Pixels as they are, and what differs from each patch's mean in units of its deviation."""
    ours, target = patches(restored), patches(clean)
    plain = F.smooth_l1_loss(ours, target, reduction="none")
    ours, target = (part - part.mean(-1, keepdim=True) for part in (ours, target))
    deviation = (target.square().mean(-1, keepdim=True) + floor**2).sqrt()
    scaled = F.smooth_l1_loss(ours / deviation, target / deviation, reduction="none")
    return _per_patch(plain + weight * scaled, loss_mask)


def structure(
    restored: Tensor, clean: Tensor, loss_mask: Tensor, weight: float, floor: float = 0.1
) -> Tensor:
    """Pixels as they are, and each patch normalised by its own mean and deviation, both sides."""
    ours, target = patches(restored), patches(clean)
    plain = F.smooth_l1_loss(ours, target, reduction="none")

    def normalised(part: Tensor) -> Tensor:
        part = part - part.mean(-1, keepdim=True)
        return part / (part.square().mean(-1, keepdim=True) + floor**2).sqrt()

    scaled = F.smooth_l1_loss(normalised(ours), normalised(target), reduction="none")
    return _per_patch(plain + weight * scaled, loss_mask)


def bands(images: Tensor) -> list[Tensor]:
    """Means over squares of 8 pixels, and what squares of 4, 2 and 1 pixels add; their sum."""
    means = [
        F.interpolate(F.avg_pool2d(images.float(), size), scale_factor=size)
        for size in (8, 4, 2, 1)
    ]
    return [means[0], *(fine - coarse for coarse, fine in itertools.pairwise(means))]


def banded(restored: Tensor, clean: Tensor, loss_mask: Tensor, power: float) -> Tensor:
    """Coarse and fine errors in units of how much of each the data have.

    The same for all patches, and so restored to pixels: a linear map of the error.
    """
    scales = [band.square().mean().sqrt() ** power for band in bands(clean)]
    loudness = sum(
        (band / scale).square().mean() for band, scale in zip(bands(clean), scales, strict=True)
    )
    errors = zip(bands(restored - clean), scales, strict=True)
    error = sum(band / scale for band, scale in errors) / loudness**0.5
    return restoration_loss(error, torch.zeros_like(error), loss_mask)


def everywhere(restored: Tensor, clean: Tensor, _: Tensor) -> Tensor:
    """The loss counts on visible pixels too."""
    return F.smooth_l1_loss(restored.float(), clean.float())


def louder_head(factor: float, method: Any) -> None:
    """Start from a larger first gradient."""
    with torch.no_grad():
        method.module.head.weight.mul_(factor)


def two_heads(method: Any) -> None:
    """A second head, to MAE's target, for every other image; the first restores pixels alone."""
    training = method.stepper.restoration
    energy = training.energy
    second = nn.Parameter(energy.head.weight.detach().roll(1).clone())
    method.optimizer.param_groups[0]["params"].append(second)

    def forward(features: Tensor) -> Tensor:
        weights = torch.stack([energy.head.weight, second]).repeat(len(features) // 2 + 1, 1)
        return (features.float() * weights[: len(features), None]).sum(dim=(1, 2))

    def restore(images: Tensor, clean: Tensor, loss_mask: Tensor, *_: Any) -> Any:
        energy.head.forward = forward
        restored, energies = restoration_step(energy, images, create_graph=True)
        parts = [
            loss(restored[start::2], clean[start::2], loss_mask[start::2])
            for start, loss in ((0, restoration_loss), (1, normalised_target))
        ]
        return sum(parts) / 2, restored.detach(), energies.detach()

    training.restore = restore


def noisy(std: float, method: Any) -> None:
    """Add Gaussian noise to the images before each restoration step, as Langevin dynamics do."""
    training = method.stepper.restoration
    restore = training.restore

    def restore_noisy(images: Tensor, *aim: Any) -> Any:
        return restore(images + std * torch.randn_like(images), *aim)

    training.restore = restore_noisy


def whole(loss_mask: Tensor) -> Tensor:
    """Images on which the loss counts everywhere: (batch,)."""
    return loss_mask.flatten(1).all(dim=1)


def normalised_where_masked(restored: Tensor, clean: Tensor, loss_mask: Tensor) -> Tensor:
    """MAE's target for masked images, pixels for those of the mixture's other tasks."""
    others = whole(loss_mask)
    parts = [
        loss(restored[chosen], clean[chosen], loss_mask[chosen]) * chosen.sum() / len(clean)
        for loss, chosen in ((normalised_target, ~others), (everywhere, others))
        if chosen.any()
    ]
    return torch.stack(parts).sum()


def surroundings(
    clean: Tensor, loss_mask: Tensor, size: int = 8, floor: float = 0.2
) -> tuple[Tensor, Tensor]:
    """Mean (per channel) and deviation of the visible pixels around each patch, as images."""
    visible = 1 - patch_hidden(loss_mask, size).view(len(clean), 1, clean.shape[2] // size, -1)
    means = F.avg_pool2d(clean.float(), size)
    variances = F.avg_pool2d(clean.float().square(), size) - means.square()
    steps = torch.arange(-2, 3, device=clean.device, dtype=torch.float32)
    kernel = torch.exp(-(steps[:, None].square() + steps.square()) / 2)

    def blurred(values: Tensor) -> Tensor:
        channels = values.shape[1]
        return F.conv2d(
            values, kernel.expand(channels, 1, 5, 5).contiguous(), padding=2, groups=channels
        )

    weight = blurred(visible) + 1e-4
    mean = blurred(means * visible) / weight
    spread = blurred(variances.mean(1, keepdim=True) * visible) / weight
    deviation = (spread + floor**2).sqrt()
    return tuple(F.interpolate(part, scale_factor=size) for part in (mean, deviation))


class Inpainted:
    """Masking that fills hidden squares with the mean of what is visible around them."""

    def __init__(self, task: Masking) -> None:
        self.task = task

    def __call__(self, clean: Tensor, generator: torch.Generator) -> Corruption:
        """Corrupt a batch."""
        mask = self.task(clean, generator).loss_mask
        fill, _ = surroundings(clean, mask)
        return Corruption(torch.where(mask, fill.to(clean.dtype), clean), mask)


def inpaint(method: Any) -> None:
    """Fill hidden squares from their surroundings, in a mixture too."""
    task = method.stepper.task
    if isinstance(task, Mixture):
        tasks = tuple(Inpainted(t) if isinstance(t, Masking) else t for t in task.tasks)
        method.stepper.task = Mixture(tasks, task.weights)
    else:
        method.stepper.task = Inpainted(task)


def local_scale(restored: Tensor, clean: Tensor, loss_mask: Tensor) -> Tensor:
    """The gradient is what is missing in units of the surroundings' deviation.

    With `inpaint`, hidden pixels are restored by a step as long as that deviation.
    """
    mean, deviation = surroundings(clean, loss_mask)
    target = torch.where(loss_mask, mean + (clean.float() - mean) / deviation, clean.float())
    return restoration_loss(restored, target, loss_mask)


def averaged(decay: float, method: Any) -> None:
    """Judge an exponential moving average of the weights."""
    average = ModelEmaV3(method.module, decay=decay, use_warmup=True)
    take_step = method.step

    def step(batch: Tensor, number: int) -> Tensor:
        loss: Tensor = take_step(batch, number)
        average.update(method.module, number)
        return loss

    method.step = step
    method.backbone = average.module.backbone.state_dict


def judge_patches(weight: float, method: Any) -> None:
    """Train each position's share of the energy to tell what was changed there from what was not.

    As `backfold.restoration.plausibility_loss`, patch by patch.
    """
    training = method.stepper.restoration
    energy, restore = training.energy, training.restore
    shares: list[Tensor] = []

    def forward(features: Tensor) -> Tensor:
        shares.append((features.float() * energy.head.weight).sum(2))
        return shares[-1].sum(1)

    def restore_and_judge(images: Tensor, clean: Tensor, loss_mask: Tensor, *_: Any) -> Any:
        shares.clear()
        energy.head.forward = forward
        loss, restored, energies = restore(images, clean, loss_mask)
        (found,) = shares
        changed = patch_hidden((images != clean).any(1, keepdim=True))
        logits = found / (images[0].numel() / found.shape[1]) ** 0.5
        more = F.binary_cross_entropy_with_logits(logits, changed)
        return loss + weight * more, restored, energies

    training.restore = restore_and_judge


class Compound:
    """Applies one task after another to the same images; the loss counts wherever one's does."""

    def __init__(self, tasks: tuple[PretextTask, ...]) -> None:
        self.tasks = tasks

    def __call__(self, clean: Tensor, generator: torch.Generator) -> Corruption:
        """Corrupt a batch."""
        images, mask = clean, torch.zeros_like(clean[:, :1], dtype=torch.bool)
        for task in self.tasks:
            part = task(images, generator)
            images, mask = part.corrupted, mask | part.loss_mask
        return Corruption(images, mask)


def compound(tasks: tuple[PretextTask, ...], method: Any) -> None:
    """Each image is corrupted by all of these."""
    method.stepper.task = Compound(tasks)
