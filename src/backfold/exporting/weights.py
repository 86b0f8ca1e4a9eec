"""The backbone that leaves: a checkpoint's, with batch norms as the run refreshed them."""

import copy
import logging
from pathlib import Path

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import Tensor, nn

from backfold.batch_norm import batch_norms
from backfold.training.pretrained import Pretrained
from backfold.training.run_folder import RunFolder

LOGGER = logging.getLogger("backfold")


def exported_backbone(run: Pretrained, folder: Path | None) -> nn.Module:
    """A copy of the run's backbone on the CPU, in eval mode.

    Batch norms are refreshed at a run's end, so that fine-tuning in train mode starts near the same
    function; those weights are taken where they belong to this very checkpoint.

    Args:
        run: the checkpoint.
        folder: the run's.
    """
    backbone = copy.deepcopy(run.energy.backbone).cpu().eval()
    norms = {id(norm) for norm in batch_norms(backbone)}
    if not norms:
        return backbone
    refreshed = _read(RunFolder(folder).backbone) if folder is not None else {}
    own = backbone.state_dict()
    outside = {
        f"{prefix}.{name}"
        for prefix, part in backbone.named_modules()
        if id(part) in norms
        for name in part.state_dict()
    }
    same = refreshed.keys() == own.keys() and all(
        torch.equal(tensor, own[name]) for name, tensor in refreshed.items() if name not in outside
    )
    if same:
        backbone.load_state_dict(refreshed)
    else:
        LOGGER.warning(
            "the batch norms have the statistics of the run's start: there are no refreshed ones "
            "of this checkpoint; to fine-tune in train mode, export a finished run"
        )
    return backbone


def _read(path: Path) -> dict[str, Tensor]:
    try:
        weights: dict[str, Tensor] = load_file(path)
    except (OSError, SafetensorError):
        return {}
    return weights
