"""What is judged: a backbone, and the same before its training, however they were given."""

import copy
import json
import logging
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import timm
import torch
from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import Tensor, nn

from backfold import backbone as backbones
from backfold.backbone import ImageSize
from backfold.data.decode import MAX_PIXELS
from backfold.data.statistics import ChannelStatistics
from backfold.errors import UserError
from backfold.evaluation.results import BEFORE, PRETRAINED, RANDOM
from backfold.training import run as runs
from backfold.training.init import initialise

LOGGER = logging.getLogger("backfold")
CONFIG = "config.json"
# What not every timm model takes.
OPTIONAL_ARGUMENTS = ("img_size", "drop_path_rate")

Weights = Mapping[str, Tensor]


@dataclass(frozen=True)
class Subject:
    """A backbone's weights by contender, and what its images are like."""

    name: str  # for messages
    weights: Mapping[str, Weights]  # "pretrained" first; "before" and "random" where they are known
    make: Callable[[float], nn.Module]  # from a drop path rate, with any weights, on the CPU
    channels: int
    image_size: ImageSize
    statistics: ChannelStatistics | None  # None measures them on the labelled images
    started_random: bool = True  # whether "before" is random
    run: runs.Pretrained | None = None  # with its energy; None where the backbone is not ours
    folder: Path | None = None  # the run's
    max_pixels: int = MAX_PIXELS  # larger images are counted as broken
    max_broken_share: float = 0.01  # of unreadable images, at which an evaluation stops

    def backbone(self, contender: str, drop_path: float = 0.0) -> nn.Module:
        """A fresh copy of a contender's backbone in eval mode, on the CPU."""
        backbone = self.make(drop_path)
        try:
            backbone.load_state_dict(self.weights[contender])
        except RuntimeError as error:  # of another timm than the run's
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
    """Take up a run's folder or checkpoint, an exported folder, a timm name, or a module.

    ``weights``, as ``--init`` takes them, are a timm name's, and so are ``channels``. An image size
    of None takes the backbone's own. The seed is that of random weights beside it. Nothing of
    these, or weights that do not fit, raise a `UserError`.
    """
    if isinstance(given, nn.Module):
        return _of_module(given, image_size, channels)
    path = Path(given)
    if path.exists() and weights is not None:
        LOGGER.warning("weights has no effect on %s, which has its own", path)
    if path.is_dir() and (path / CONFIG).is_file() and not runs.RunFolder(path).config.exists():
        return _of_export(path, image_size, seed)
    if path.exists():
        if image_size is not None:
            LOGGER.warning("image_size has no effect on a run, which has its own")
        return _of_run(path)
    name = str(given)
    try:
        timm.get_pretrained_cfg(name)  # raises where a model has no weights with such a tag
        is_known = timm.is_model(name)
    except RuntimeError:
        is_known = False
    if not is_known:
        kinds = "run's folder, checkpoint, exported folder or timm model"
        raise UserError(f"{name} is no {kinds}; check the path, or pretrain a run first")
    return _of_timm(name, weights, image_size, channels, seed)


def _of_run(path: Path) -> Subject:
    run, folder = runs.load_pretrained(path), runs.RunFolder.of(path)
    config, before = run.config, _before(run, folder)
    options = {"in_chans": run.channels, "img_size": run.image_size, **config.backbone_options}
    found: dict[str, Weights] = {PRETRAINED: runs.exported_backbone(run, folder).state_dict()}
    if before is not None:
        found[BEFORE] = before
        if config.init is not None:  # random alone would flatter an --init
            found[RANDOM] = runs.build_energy(config, run.channels).backbone.state_dict()
    return Subject(
        str(path), found, partial(_create, config.backbone, options),
        run.channels, run.image_size, run.statistics, config.init is None, run, folder,
        config.max_pixels, config.max_broken_share,
    )  # fmt: skip


def _before(run: runs.Pretrained, folder: Path | None) -> Weights | None:
    """What training wrote before its first step; of older runs, the same made anew."""
    path = runs.RunFolder(folder or Path()).initial
    if folder is not None and path.is_file():
        try:
            found: Weights = load_file(path)
        except (OSError, SafetensorError) as error:
            raise UserError(f"{path} can't be read: {error}; remove it") from error
        return found
    energy = runs.build_energy(run.config, run.channels)
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
    backbones.check_options(
        name, {key: options[key] for key in options if key not in OPTIONAL_ARGUMENTS}
    )
    size = image_size or (own[0], own[1])
    make = partial(_create, name, {**options, "img_size": size})
    if size != (own[0], own[1]):
        backbone = make(0.0)
        backbones.check_image_size(backbone, size, channels, name)
        initialise(backbone, folder)
        weights = backbone.state_dict()
    found = {PRETRAINED: weights, RANDOM: _random(make, seed)}
    return Subject(str(folder), found, make, channels, size, statistics)


def _of_timm(
    name: str,
    weights: Path | str | None,
    image_size: ImageSize | None,
    channels: int,
    seed: int,
) -> Subject:
    config = timm.get_pretrained_cfg(name)
    size = image_size or backbones.default_image_size(config)
    make = partial(_create, name, {"in_chans": channels, "img_size": size})
    backbone, random = make(0.0), _random(make, seed)
    backbones.check_image_size(backbone, size, channels, name)
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
    size = image_size or backbones.default_image_size(getattr(module, "pretrained_cfg", None))
    name = type(module).__name__

    def make(drop_path: float) -> nn.Module:
        if drop_path:
            LOGGER.warning(f"drop_path {drop_path:g} has no effect on a given {name}")
        return copy.deepcopy(module).cpu()

    backbones.check_image_size(make(0.0), size, channels, name)
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
                backbones.use_plain_attention(backbone)
            return backbone
