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
        backbone.load_state_dict(self.weights[contender])
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

    ``weights``, as ``--init`` takes them, and ``channels`` are a timm name's; runs have their own
    image size, too. The seed is that of random weights beside it. Nothing of these, or weights that
    do not fit, raise a `UserError`.
    """
    if isinstance(given, nn.Module):
        return _of_module(given, image_size, channels)
    path, name = Path(given), str(given)
    if path.exists():
        is_export = (path / CONFIG).is_file() and not runs.RunFolder(path).config.exists()
        return _of_export(path, image_size, seed) if is_export else _of_run(path)
    try:
        config = timm.get_pretrained_cfg(name)
    except RuntimeError:  # it has no weights with such a tag
        config = None
    if config is None:
        kinds = "run's folder, checkpoint, exported folder or timm model"
        raise UserError(f"{name} is no {kinds}; check the path, or pretrain a run first")
    own = ChannelStatistics(tuple(config.mean), tuple(config.std)) if channels == 3 else None
    size = image_size or backbones.default_image_size(config)
    if weights is None:
        LOGGER.warning("no --weights are given: %s has random ones", name)
    return _of_timm(name, name, {"in_chans": channels}, size, own, weights, seed)


def _of_run(path: Path) -> Subject:
    run, folder = runs.load_pretrained(path), runs.RunFolder.of(path)
    config, initial = run.config, runs.RunFolder(folder or Path()).initial
    options = {"in_chans": run.channels, "img_size": run.image_size, **config.backbone_options}
    found: dict[str, Weights] = {PRETRAINED: runs.exported_backbone(run, folder).state_dict()}

    def random() -> Weights:
        return runs.build_energy(config, run.channels).backbone.state_dict()

    if folder is not None and initial.is_file():
        try:
            found[BEFORE] = load_file(initial)
        except (OSError, SafetensorError) as error:
            raise UserError(f"{initial} can't be read: {error}; remove it") from error
        if config.init is not None:  # random alone would flatter an --init
            found[RANDOM] = random()
    elif config.init is None:
        LOGGER.warning("%s is not there: the run's first weights are made anew", initial.name)
        found[BEFORE] = random()
    else:
        LOGGER.warning("%s is not there: the run's start is not compared", initial.name)
    return Subject(
        str(path), found, partial(_create, config.backbone, options),
        run.channels, run.image_size, run.statistics, config.init is None, run, folder,
        config.max_pixels, config.max_broken_share,
    )  # fmt: skip


def _of_export(folder: Path, image_size: ImageSize | None, seed: int) -> Subject:
    try:
        config = json.loads((folder / CONFIG).read_text())
        told, name = config["pretrained_cfg"], config["architecture"]
        channels, height, width = told["input_size"]
        statistics = ChannelStatistics(tuple(told["mean"]), tuple(told["std"]))
        options = {"in_chans": channels, **config.get("model_args", {})}
        weights = load_file(folder / "model.safetensors")
    except (OSError, KeyError, TypeError, ValueError, SafetensorError) as error:
        raise UserError(
            f"{folder} is no exported folder ({type(error).__name__}: {error}); export the run anew"
        ) from error
    options = {key: options[key] for key in options if key not in OPTIONAL_ARGUMENTS}
    size = image_size or (height, width)
    subject = _of_timm(str(folder), name, options, size, statistics, folder, seed)
    for key, own in subject.weights[PRETRAINED].items():  # of another timm, or of nobody
        resized = size != (height, width)
        if key not in weights or (not resized and weights[key].shape != own.shape):
            raise UserError(f"the weights of {folder} do not fit {name}: {key}; export anew")
    return subject


def _of_timm(
    label: str,
    name: str,
    options: Mapping[str, Any],
    size: ImageSize,
    statistics: ChannelStatistics | None,
    weights: Path | str | None,
    seed: int,
) -> Subject:
    channels = options["in_chans"]
    backbone = backbones.create_backbone(name, size, channels, options)  # refuses what can't be
    make = partial(_create, name, {**options, "img_size": size})
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        random = make(0.0).state_dict()
    backbone.load_state_dict(random)
    if weights is not None:
        initialise(backbone, weights)
    found = {PRETRAINED: backbone.state_dict(), RANDOM: random}
    return Subject(label, found, make, channels, size, statistics)


def _of_module(module: nn.Module, image_size: ImageSize | None, channels: int) -> Subject:
    size = image_size or backbones.default_image_size(getattr(module, "pretrained_cfg", None))
    name = type(module).__name__

    def make(_: float) -> nn.Module:
        return copy.deepcopy(module).cpu()

    backbones.check_image_size(make(0.0), size, channels, name)
    return Subject(name, {PRETRAINED: module.state_dict()}, make, channels, size, None)


def _create(name: str, options: Mapping[str, Any], drop_path: float) -> nn.Module:
    """As timm builds it, without classifier; drop paths and sizes where the family has them."""
    arguments = {**options, "drop_path_rate": drop_path}
    while True:
        try:
            backbone: nn.Module = timm.create_model(name, num_classes=0, **arguments)
            break
        except TypeError as error:
            unknown = [key for key in OPTIONAL_ARGUMENTS if key in str(error) and key in arguments]
            if not unknown:
                raise
            del arguments[unknown[0]]
    if not torch.cuda.is_available():
        backbones.use_plain_attention(backbone)
    return backbone
