"""Batch normalisation without a batch: fixed statistics while an energy is trained.

In train mode batch normalisation ties the images of a batch together, and the gradient of the
summed energy is then no longer each image's own. Here it always runs on its running statistics:
they are measured once before training and stay fixed, while weights and biases learn. Afterwards
they have drifted from what the activations have become, so `refresh_batch_norm` measures them anew
and moves the difference into weight and bias: the function stays the same, and fine-tuning in train
mode starts near it.
"""

from collections.abc import Iterable
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm

from backfold.backbone import feature_map


def batch_norms(module: nn.Module) -> list[_BatchNorm]:
    """All batch normalisations that keep running statistics."""
    return [
        part
        for part in module.modules()
        if isinstance(part, _BatchNorm) and part.running_mean is not None
    ]


@torch.no_grad()
def measure_batch_norm(backbone: nn.Module, images: Tensor) -> None:
    """Set all running statistics to those of these images; leaves batch norms in eval mode."""
    norms = batch_norms(backbone)
    momenta = [norm.momentum for norm in norms]
    for norm in norms:
        norm.reset_running_stats()
        norm.momentum = None  # a cumulative average: one batch sets the statistics
        norm.train()
    if norms:
        feature_map(backbone, images)
    for norm, momentum in zip(norms, momenta, strict=True):
        norm.momentum = momentum
        norm.eval()


@torch.no_grad()
def refresh_batch_norm(backbone: nn.Module, batches: Iterable[Tensor]) -> None:
    """Measure running statistics anew without changing the backbone's function in eval mode.

    With running mean m and deviation s, measured m' and s' (both with epsilon), the weight becomes
    w s' / s and the bias b + w (m' - m) / s. Channels that do not vary keep what they have.
    The backbone is in eval mode, on the device of the batches of normalised images.
    """
    norms = [norm for norm in batch_norms(backbone) if norm.affine]
    seen: dict[nn.Module, list[Tensor]] = {norm: [] for norm in norms}

    def note(norm: nn.Module, inputs: tuple[Tensor, ...]) -> None:
        """Count, mean and variance of one batch by channel; the device may have no doubles."""
        values = inputs[0].detach().transpose(0, 1).flatten(1)
        values = values if values.dtype == torch.float64 else values.float()
        variance, mean = (part.cpu().double() for part in torch.var_mean(values, 1, correction=0))
        seen[norm].append(torch.stack([torch.full_like(mean, values.shape[1]), mean, variance]))

    hooks = [norm.register_forward_pre_hook(note) for norm in norms]
    try:
        if norms:
            for images in batches:
                feature_map(backbone, images)
    finally:
        for hook in hooks:
            hook.remove()
    for norm in norms:
        if seen[norm]:
            counts, means, variances = torch.stack(seen[norm], dim=1)
            share = counts / counts.sum(dim=0)
            mean = (share * means).sum(dim=0)
            variance = (share * (variances + (means - mean).square())).sum(dim=0)
            _reparametrise(norm, mean, variance)


def _reparametrise(norm: Any, mean: Tensor, variance: Tensor) -> None:
    parts = (norm.running_mean, norm.running_var, norm.weight, norm.bias)
    old_mean, old_variance, weight, bias = (part.detach().cpu().double() for part in parts)
    varies = variance > norm.eps
    mean = torch.where(varies, mean, old_mean)
    variance = torch.where(varies, variance, old_variance)
    old_deviation = (old_variance + norm.eps).sqrt()
    norm.bias.copy_(bias + weight * (mean - old_mean) / old_deviation)
    norm.weight.copy_(weight * (variance + norm.eps).sqrt() / old_deviation)
    norm.running_mean.copy_(mean)
    norm.running_var.copy_(variance)
