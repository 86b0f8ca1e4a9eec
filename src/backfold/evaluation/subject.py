"""What is judged: a backbone, and the same before its training, however they were given."""

import copy
import json
import logging
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import timm
import torch
from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import Tensor, nn

from backfold.backbone import (
    ImageSize,
    check_image_size,
    check_options,
    default_image_size,
    use_plain_attention,
)
from backfold.data.arrays import MAX_PIXELS
from backfold.data.statistics import ChannelStatistics
from backfold.errors import UserError
from backfold.evaluation.results import BEFORE, PRETRAINED, RANDOM
from backfold.training.initial import initialise
from backfold.training.pretrained import Pretrained, exported_backbone, load_pretrained
from backfold.training.run_folder import RunFolder
from backfold.training.setup import build_energy

LOGGER = logging.getLogger("backfold")
CONFIG = "config.json"
# What not every timm model takes.
OPTIONAL_ARGUMENTS = ("img_size", "drop_path_rate")

Weights = Mapping[str, Tensor]


@dataclass(frozen=True)
class Subject:
    """A backbone's weights by contender, and what its images are like.

    Args:
        name: for messages.
        weights: "pretrained" first; "before" and "random" where they are known.
        make: from a drop path rate to the architecture with any weights, on the CPU.
        channels: of the images.
        image_size: (height, width) in pixels.
        statistics: normalise the images; None measures them on the labelled images.
        started_random: whether "before" is random.
        run: with its energy; None where the backbone is not ours.
        folder: the run's; None where there is none.
        max_pixels: larger images are counted as broken.
        max_broken_share: share of unreadable images at which an evaluation stops.
    """

    name: str
    weights: Mapping[str, Weights]
    make: Callable[[float], nn.Module]
    channels: int
    image_size: ImageSize
    statistics: ChannelStatistics | None
    started_random: bool = True
    run: Pretrained | None = None
    folder: Path | None = None
    max_pixels: int = MAX_PIXELS
    max_broken_share: float = 0.01

    def backbone(self, contender: str, drop_path: float = 0.0) -> nn.Module:
        """A fresh copy of a contender's backbone in eval mode, on the CPU.

        Raises:
            UserError: weights that do not fit; only with another timm than the run's.
        """
        backbone = self.make(drop_path)
        try:
            backbone.load_state_dict(self.weights[contender])
        except RuntimeError as error:
            reason = " ".join(str(error).split())[:200]
            raise UserError(
                f"the weights do not fit {self.name}: {reason}; use the versions in the run's "
                "run.json"
            ) from error
        return backbone.eval()

    @property
    def scratch(self) -> str | None:
        """The contender with random weights, which training from scratch starts from."""
        if BEFORE in self.weights and self.started_random:
            return BEFORE
        return RANDOM if RANDOM in self.weights else None


def open_subject(
    given: Path | str | nn.Module,
    *,
    weights: Path | str | None = None,
    image_size: ImageSize | None = None,
    channels: int = 3,
    seed: int = 0,
) -> Subject:
    """Take up whatever is to be judged.

    Args:
        given: a run's folder or a checkpoint of it, an exported folder, a timm name, or a module
            whose feature map is read.
        weights: of a timm name: a file or folder as ``--init`` takes it, or "timm" for its own.
        image_size: (height, width); None takes the run's, or the backbone's own.
        channels: of the images, where a timm name or a module does not say it.
        seed: of the random weights beside a backbone that is not a run's.

    Raises:
        UserError: nothing of these, or weights that do not fit.
    """
    if isinstance(given, nn.Module):
        return _of_module(given, image_size, channels)
    path = Path(given)
    if path.exists() and weights is not None:
        LOGGER.warning("weights has no effect on %s, which has its own", path)
    if path.is_dir() and (path / CONFIG).is_file() and not RunFolder(path).config.exists():
        return _of_export(path, image_size, seed)
    if path.exists():
        if image_size is not None:
            LOGGER.warning("image_size has no effect on a run, which has its own")
        return _of_run(path)
    name = str(given)
    if not _is_timm(name):
        raise UserError(
            f"{name} is no run's folder, checkpoint, exported folder or timm model; check "
            "the path, or pretrain a run first"
        )
    return _of_timm(name, weights, image_size, channels, seed)


def _is_timm(name: str) -> bool:
    try:
        timm.get_pretrained_cfg(name)
    except RuntimeError:  # a model with such a name, but no weights with such a tag
        return False
    return timm.is_model(name)


def _of_run(path: Path) -> Subject:
    run = load_pretrained(path)
    folder = RunFolder.of(path)
    config = run.config
    options = {"in_chans": run.channels, "img_size": run.image_size, **config.backbone_options}
    found: dict[str, Weights] = {PRETRAINED: exported_backbone(run, folder).state_dict()}
    before = _before(run, folder)
    if before is not None:
        found[BEFORE] = before
    if config.init is not None and before is not None:  # random alone would flatter an --init
        found[RANDOM] = build_energy(config, run.channels).backbone.state_dict()
    return Subject(
        str(path),
        found,
        lambda drop_path: _create(config.backbone, options, drop_path),
        run.channels,
        run.image_size,
        run.statistics,
        config.init is None,
        run,
        folder,
        config.max_pixels,
        config.max_broken_share,
    )


def _before(run: Pretrained, folder: Path | None) -> Weights | None:
    """What training wrote before its first step; of older runs, the same made anew."""
    path = RunFolder(folder or Path()).initial
    if folder is not None and path.is_file():
        try:
            found: Weights = load_file(path)
        except (OSError, SafetensorError) as error:
            raise UserError(f"{path} can't be read: {error}; remove it") from error
        return found
    energy = build_energy(run.config, run.channels)
    if run.config.init is not None:
        try:
            initialise(energy.backbone, run.config.init)
        except UserError as error:
            LOGGER.warning("%s is not there, and %s: the run's start is not compared", path, error)
            return None
    LOGGER.warning("%s is not there: the run's first weights are made anew", path.name)
    return energy.backbone.state_dict()


def _of_export(folder: Path, image_size: ImageSize | None, seed: int) -> Subject:
    try:
        config = json.loads((folder / CONFIG).read_text())
        told, name = config["pretrained_cfg"], config["architecture"]
        channels, *own = told["input_size"]
        statistics = ChannelStatistics(tuple(told["mean"]), tuple(told["std"]))
        options = {"in_chans": channels, **config.get("model_args", {})}
        weights = load_file(folder / "model.safetensors")
    except (OSError, KeyError, TypeError, ValueError, SafetensorError) as error:
        raise UserError(
            f"{folder} is no exported folder ({type(error).__name__}: {error}); export the run anew"
        ) from error
    if not timm.is_model(name):
        raise UserError(f"{folder} names {name!r}, which is no timm model; export the run anew")
    check_options(name, {key: options[key] for key in options if key not in OPTIONAL_ARGUMENTS})
    size = image_size or (own[0], own[1])

    def make(drop_path: float) -> nn.Module:
        return _create(name, {**options, "img_size": size}, drop_path)

    if size != (own[0], own[1]):
        backbone = make(0.0)
        check_image_size(backbone, size, channels, name)
        initialise(backbone, folder)
        weights = backbone.state_dict()
    found = {PRETRAINED: weights, RANDOM: _random(make, seed)}
    return Subject(str(folder), found, make, channels, size, statistics)


def _of_timm(
    name: str, weights: Path | str | None, image_size: ImageSize | None, channels: int, seed: int
) -> Subject:
    config = timm.get_pretrained_cfg(name)
    size = image_size or default_image_size(config)

    def make(drop_path: float) -> nn.Module:
        return _create(name, {"in_chans": channels, "img_size": size}, drop_path)

    random = _random(make, seed)
    backbone = make(0.0)
    check_image_size(backbone, size, channels, name)
    backbone.load_state_dict(random)
    if weights is None:
        LOGGER.warning("no --weights are given: %s has random ones", name)
    else:
        initialise(backbone, weights)
    own = None
    if channels == 3 and config is not None:
        own = ChannelStatistics(tuple(config.mean), tuple(config.std))
    found = {PRETRAINED: backbone.state_dict(), RANDOM: random}
    return Subject(name, found, make, channels, size, own)


def _of_module(module: nn.Module, image_size: ImageSize | None, channels: int) -> Subject:
    size = image_size or default_image_size(getattr(module, "pretrained_cfg", None))
    name = type(module).__name__

    def make(drop_path: float) -> nn.Module:
        if drop_path:
            LOGGER.warning(f"drop_path {drop_path:g} has no effect on a given {name}")
        return copy.deepcopy(module).cpu()

    check_image_size(make(0.0), size, channels, name)
    return Subject(name, {PRETRAINED: module.state_dict()}, make, channels, size, None)


def _random(make: Callable[[float], nn.Module], seed: int) -> Weights:
    with torch.random.fork_rng(devices=[]):
        torch.default_generator.manual_seed(seed)
        weights: Weights = make(0.0).state_dict()
    return weights


def _create(name: str, options: Mapping[str, Any], drop_path: float) -> nn.Module:
    """As timm builds it, without classifier; drop paths and sizes where the family has them."""
    arguments = {**options, "drop_path_rate": drop_path}
    while True:
        try:
            backbone: nn.Module = timm.create_model(name, num_classes=0, **arguments)
        except TypeError as error:
            unknown = [key for key in OPTIONAL_ARGUMENTS if key in str(error) and key in arguments]
            if not unknown:
                raise UserError(f"timm can't build {name!r}: {error}; check its options") from error
            if unknown[0] == "drop_path_rate" and drop_path:
                LOGGER.warning(f"drop_path {drop_path:g} has no effect on {name!r}")
            del arguments[unknown[0]]
        else:
            if not torch.cuda.is_available():
                use_plain_attention(backbone)
            return backbone
