"""A finished or running pretraining, read back from its checkpoint."""

import copy
import logging
from collections.abc import Mapping
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import Tensor, nn

from backfold.backbone import ImageSize
from backfold.batch_norm import batch_norms
from backfold.data.statistics import ChannelStatistics
from backfold.energy import EnergyModel
from backfold.errors import UserError
from backfold.training.config import PretrainConfig
from backfold.training.config_file import config_from_dict
from backfold.training.run_folder import RunFolder, load_checkpoint
from backfold.training.setup import build_energy

LOGGER = logging.getLogger("backfold")


@dataclass(frozen=True)
class Pretrained:
    """An energy with what is needed to use it: eval mode, on the CPU."""

    energy: EnergyModel
    config: PretrainConfig
    statistics: ChannelStatistics
    channels: int
    image_size: ImageSize
    step: int


def load_pretrained(path: Path) -> Pretrained:
    """Read a run's folder (its last checkpoint) or one checkpoint file.

    Raises:
        UserError: missing, truncated, not ours, of another version, or weights that do not fit.
    """
    content = load_checkpoint(path)
    try:
        config = config_from_dict(_without_gone(content["config"]))
        energy = build_energy(config, content["channels"])
        energy.load_state_dict(content["model"])
        return Pretrained(
            energy.eval(),
            config,
            ChannelStatistics(tuple(content["mean"]), tuple(content["std"])),
            content["channels"],
            (content["image_size"][0], content["image_size"][1]),
            content["state"]["step"],
        )
    except (KeyError, RuntimeError) as error:
        reason = " ".join(str(error).split())[:200]
        raise UserError(
            f"{path} does not fit this version of backfold or timm: {reason}; "
            "use the versions in the run's run.json"
        ) from error


def exported_backbone(run: Pretrained, folder: Path | None) -> nn.Module:
    """A copy of the run's backbone on the CPU, in eval mode.

    Batch norms are refreshed at a run's end, so that fine-tuning in train mode starts near the same
    function; those weights are taken where the run's folder has them of this very checkpoint.
    """
    backbone = copy.deepcopy(run.energy.backbone).cpu().eval()
    norms = set(batch_norms(backbone))
    if not norms:
        return backbone
    refreshed: dict[str, Tensor] = {}
    if folder is not None:
        with suppress(OSError, SafetensorError):
            refreshed = load_file(RunFolder(folder).backbone)
    own = backbone.state_dict()
    outside = own.keys() - {
        f"{prefix}.{name}"
        for prefix, part in backbone.named_modules()
        if part in norms
        for name in part.state_dict()
    }
    if refreshed.keys() == own.keys() and all(
        torch.equal(refreshed[name], own[name]) for name in outside
    ):
        backbone.load_state_dict(refreshed)
    else:
        LOGGER.warning(
            "the batch norms have the statistics of the run's start: there are no refreshed ones "
            "of this checkpoint; to fine-tune in train mode, export a finished run"
        )
    return backbone


def _without_gone(settings: Mapping[str, Any]) -> dict[str, Any]:
    """The settings without those that older runs had beside today's."""
    if (head := settings.get("head", "linear")) != "linear":
        raise UserError(
            f"the run has a {head} head, and this backfold knows the linear one alone; "
            "use the versions in the run's run.json"
        )
    tasks = {name: task for name, task in settings["tasks"].items() if name != "exchange"}
    return {name: value for name, value in settings.items() if name != "head"} | {"tasks": tasks}
