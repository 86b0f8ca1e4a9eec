"""What all rivals share: the start, the images and the loop, which a cut run goes on with."""

import random
import time
from typing import Any

import numpy as np
import torch
from torch import nn

from backfold.data.loading import default_workers, steps_per_epoch, training_loader
from backfold.errors import UserError
from backfold.training.config import PretrainConfig, parse_image_size
from backfold.training.devices import choose_device
from backfold.training.images import Images
from backfold.training.optimizer import build_optimizer, build_schedule
from backfold.training.run import build_energy, load_checkpoint, save_checkpoint


def start(
    name: str, options: dict[str, Any], images: Images, settings: PretrainConfig
) -> nn.Module:
    """A timm backbone as ours starts: the settings' seed, and positions as loud as the patches."""
    config = PretrainConfig(
        backbone=name, backbone_options=options, image_size=settings.image_size, seed=settings.seed
    )
    torch.manual_seed(settings.seed)  # of what a rival adds
    return build_energy(config, images.channels).backbone


def start_vit(*arguments: Any) -> tuple[Any, dict[str, int]]:
    """As `start`, a plain ViT with a class token, and its sizes by transformers' names."""
    vit: Any = start(*arguments)
    if getattr(vit, "num_prefix_tokens", 0) != 1:
        raise UserError(f"{arguments[0]} has no single class token; give a plain ViT")
    (size, _), (patch, _) = vit.patch_embed.img_size, vit.patch_embed.patch_size
    return vit, {
        "hidden_size": vit.embed_dim,
        "image_size": size,
        "patch_size": patch,
        "num_channels": vit.patch_embed.proj.in_channels,
        # Their own encoder is thrown away.
        "num_hidden_layers": 1,
        "num_attention_heads": 1,
        "intermediate_size": 1,
    }


def fit(method: str, model: nn.Module, images: Images, settings: PretrainConfig) -> nn.Module:
    """Train by ``model(batch)``, the loss of normalised images; returns ``model.backbone``.

    Optimizer, schedule, order and crops are those of `backfold.pretrain` with the same settings.

    Args:
        method: whose checkpoint ``rival.ckpt`` in the settings' ``out`` is gone on with.
        model: has ``backbone`` and ``augmentation``, the random changes before it.
        images: to train on.
        settings: ``checkpoint_minutes`` apart the state is saved, and at the end.

    Raises:
        UserError: the checkpoint is another method's, or was started otherwise.
    """
    device, path = choose_device(settings.accelerator), settings.out / "rival.ckpt"
    per_epoch = steps_per_epoch(images.count, settings.batch_size)
    total = settings.max_steps or round(settings.epochs * per_epoch)
    model.to(device).train()
    optimizer = build_optimizer(model, settings.optimizer, settings.batch_size)
    schedule = build_schedule(optimizer, settings.optimizer, total, per_epoch)
    signature = [method, settings.seed, settings.optimizer.base_lr, settings.batch_size, total]
    done = 0
    if path.exists():
        state = load_checkpoint(path)
        if state["signature"] != signature:
            raise UserError(f"{path} is of {state['signature']}, not of {signature}; remove it")
        done = state["step"]
        model.load_state_dict(state["model"])
        optimizer.load_state_dict(state["optimizer"])
    workers = default_workers() if settings.num_workers is None else settings.num_workers
    loader = training_loader(
        images.training, parse_image_size(settings.image_size), images.channels, model.augmentation,
        settings.batch_size, settings.seed, done, total, num_workers=workers,
    )  # fmt: skip
    mixed, saved = settings.precision == "bf16-mixed", time.monotonic()
    # As ours is where that pays; a CPU's short runs do not earn the time that compiling takes.
    compiled = device.type == "cuda" and settings.compile is not False
    forward = torch.compile(model) if compiled else model
    for step, batch in enumerate(loader, done + 1):
        for seed in (torch.manual_seed, np.random.seed, random.seed):
            seed(settings.seed * 1_000_003 + step)  # a resumed run draws what an unbroken one does
        schedule.step_update(step - 1)
        pixels = images.statistics.normalize(batch.images.to(device))
        with torch.autocast(device.type, torch.bfloat16, enabled=mixed):
            loss = forward(pixels)
        loss.backward()
        nn.utils.clip_grad_norm_(model.parameters(), settings.optimizer.max_gradient_norm)
        optimizer.step()
        optimizer.zero_grad()
        if step == total or time.monotonic() - saved > 60 * settings.checkpoint_minutes:
            if not torch.isfinite(loss):
                raise UserError(f"the loss of {method} is {loss:g}; lower the learning rate")
            state = {"model": model.state_dict(), "optimizer": optimizer.state_dict()}
            save_checkpoint(path, {"signature": signature, "step": step, **state})
            saved = time.monotonic()
    return model.backbone
