"""A run's backbone as it was before training: what pretraining is held against."""

import torch
from torch import Tensor, nn

from backfold.backbone import ImageSize
from backfold.batch_norm import measure_batch_norm
from backfold.evaluation.segmenter import resized
from backfold.training.pretrained import Pretrained
from backfold.training.setup import build_energy


def untrained_backbone(
    run: Pretrained, images: Tensor, device: torch.device, image_size: ImageSize | None = None
) -> nn.Module:
    """The backbone with the run's own first weights, in eval mode on the device.

    Args:
        run: whose configuration and seed decide the weights.
        images: some of those to train on, normalised, (images, channels, height, width); batch
            norms get their statistics.
        device: where the backbone goes, and where batch norms are measured.
        image_size: (height, width) that it is to take; None takes the run's.

    Raises:
        UserError: an image size that the backbone can't take.
    """
    backbone = build_energy(run.config, run.channels).backbone.eval()
    if image_size is not None:
        backbone = resized(backbone, image_size, run.channels, run.config.backbone)
    measure_batch_norm(backbone.to(device), images.to(device))
    return backbone
