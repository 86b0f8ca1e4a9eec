"""The optimizer, its schedule, and which parameters it can train at all."""

import logging
from textwrap import shorten

import torch
from timm.optim import param_groups_weight_decay
from timm.scheduler import CosineLRScheduler
from torch import Tensor, nn
from torch.optim import AdamW, Optimizer

from backfold.energy import EnergyModel
from backfold.pretext.corruption import RunningSquares
from backfold.restoration import training_step
from backfold.sparse import running_tokens
from backfold.training.config import OptimizerSettings

LOGGER = logging.getLogger("backfold")
LARGEST_WARMUP_SHARE = 1 / 3


def freeze_unreachable(
    energy: EnergyModel,
    images: Tensor,
    plausibility_weight: float = 0.0,
    running: RunningSquares | None = None,
) -> list[str]:
    """Freeze the parameters that the training loss does not depend on; returns their names.

    The last norm's bias and unused layers get no gradient from restoration, and
    DistributedDataParallel would wait for them. Biases before piecewise linear activations are not
    frozen: they have a gradient, of zeros. It is found out on two or more normalised ``images``,
    (batch, channels, height, width), of which ``running`` is what training runs on.
    """
    mask, clean = torch.ones_like(images[:, :1], dtype=torch.bool), torch.zeros_like(images)
    tokens = running_tokens(running, energy.backbone, (images.shape[2], images.shape[3]))
    energy_fn = energy.given(images, *tokens)
    loss, _, _ = training_step(energy_fn, images, clean, mask, 1.0, plausibility_weight)
    # The projector is for another loss.
    named = {n: p for n, p in energy.named_parameters() if not n.startswith("projector.")}
    gradients = torch.autograd.grad(loss, list(named.values()), allow_unused=True)
    frozen = [name for name, grad in zip(named, gradients, strict=True) if grad is None]
    for name in frozen:
        named[name].requires_grad_(False)
    if told := [name for name in frozen if not name.endswith("norm.bias")]:  # which is by design
        shown = shorten(", ".join(told), 200, placeholder=" ...")
        LOGGER.info(f"{len(told)} parameter(s) get no gradient and stay as they are: {shown}")
    return frozen


def build_optimizer(module: nn.Module, settings: OptimizerSettings, batch_size: int) -> AdamW:
    """AdamW over the trainable parameters; norms, biases and the linear head do not decay.

    The learning rate is base_lr x batch / 256 for the global batch. One kernel updates all weights
    where the device has such a one.
    """
    by_timm = getattr(getattr(module, "backbone", None), "no_weight_decay", set)
    exempt = [f"backbone.{name}" for name in by_timm()]
    groups = param_groups_weight_decay(module, settings.weight_decay, no_weight_decay_list=exempt)
    lr = settings.base_lr * batch_size / 256
    fused = next(module.parameters()).device.type in ("cpu", "cuda")
    return AdamW(groups, lr=lr, betas=settings.betas, fused=fused)


def build_schedule(
    optimizer: Optimizer, settings: OptimizerSettings, total_steps: int, steps_per_epoch: int
) -> CosineLRScheduler:
    """Linear warm-up, then a cosine; ``step_update(step)`` depends on the step alone."""
    longest = int(total_steps * LARGEST_WARMUP_SHARE)
    warmup = min(round(settings.warmup_epochs * steps_per_epoch), longest)
    return CosineLRScheduler(
        optimizer,
        t_initial=max(1, total_steps - warmup),
        lr_min=optimizer.defaults["lr"] * settings.final_lr_share,
        warmup_t=warmup,
        warmup_lr_init=optimizer.defaults["lr"] * 1e-3,
        warmup_prefix=True,
        t_in_epochs=False,
    )
