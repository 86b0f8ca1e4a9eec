"""Batch normalisation without a batch: fixed statistics while an energy is trained.

In train mode batch normalisation ties the images of a batch together, and the gradient of the
summed energy is then no longer each image's own. Here it always runs on its running statistics:
they are measured once before training and stay fixed, while weights and biases learn. Afterwards
they have drifted from what the activations have become, so `refresh_batch_norm` measures them anew
and moves the difference into weight and bias: the function stays the same, and fine-tuning in train
mode starts near it.
"""

from collections.abc import Iterable

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

    Args:
        backbone: in eval mode, on the batches' device.
        batches: normalised images, (batch, channels, height, width) each.
    """
    norms = [norm for norm in batch_norms(backbone) if norm.affine]
    moments = {norm: _Moments() for norm in norms}
    hooks = [norm.register_forward_pre_hook(moments[norm].add) for norm in norms]
    try:
        if norms:
            for images in batches:
                feature_map(backbone, images)
    finally:
        for hook in hooks:
            hook.remove()
    for norm in norms:
        if seen := moments[norm].count:
            _reparametrise(norm, moments[norm].mean, moments[norm].squares / seen)


class _Moments:
    """Mean and variance of a batch norm's inputs, by channel, over all batches.

    Each batch's are float32 on the device, which may have no doubles; they are joined in float64 on
    the CPU (Chan et al., 1979).
    """

    def __init__(self) -> None:
        self.count = 0
        self.mean, self.squares = torch.zeros((), dtype=torch.float64), torch.zeros(())

    def add(self, _: nn.Module, inputs: tuple[Tensor, ...]) -> None:
        values = inputs[0].detach().transpose(0, 1).flatten(1)
        values = values if values.dtype == torch.float64 else values.float()
        count = values.shape[1]
        variance, mean = (part.cpu().double() for part in torch.var_mean(values, 1, correction=0))
        total, ahead = self.count + count, mean - self.mean
        self.squares = (
            self.squares + variance * count + ahead.square() * (self.count * count / total)
        )
        self.mean = self.mean + ahead * (count / total)
        self.count = total


def _reparametrise(norm: _BatchNorm, mean: Tensor, variance: Tensor) -> None:
    assert norm.running_mean is not None
    assert norm.running_var is not None
    old_mean, old_variance, weight, bias = (
        part.detach().cpu().double()
        for part in (norm.running_mean, norm.running_var, norm.weight, norm.bias)
    )
    varies = variance > norm.eps
    mean = torch.where(varies, mean, old_mean)
    variance = torch.where(varies, variance, old_variance)
    old_deviation = (old_variance + norm.eps).sqrt()
    norm.bias.copy_(bias + weight * (mean - old_mean) / old_deviation)
    norm.weight.copy_(weight * (variance + norm.eps).sqrt() / old_deviation)
    norm.running_mean.copy_(mean)
    norm.running_var.copy_(variance)
