"""A run: the folder that it leaves, who may write there, and what is read back from it."""

import copy
import io
import logging
import os
import shutil
from collections.abc import Iterator, Mapping
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save
from torch import Tensor, nn

from backfold.backbone import ImageSize
from backfold.batch_norm import batch_norms
from backfold.data.statistics import ChannelStatistics
from backfold.energy import EnergyModel
from backfold.errors import UserError
from backfold.files import LOCK, hold, refuse_missing_run, write_atomically
from backfold.training.config import PretrainConfig, config_from_dict, parse_image_size
from backfold.version import __version__

LOGGER = logging.getLogger("backfold")
FORMAT = "backfold-checkpoint"
FORMAT_VERSION = 1
DEMO_RUN = Path("runs/demo")
OTHERS = {LOCK, "report.html", "measures"}  # in a run's folder; the last of older runs


class RunFolder:
    """Paths in a run's folder."""

    def __init__(self, root: Path) -> None:
        self.root = root
        self.config = root / "config.yaml"  # all settings, enough to repeat the run
        self.facts = root / "run.json"  # what was run, on what
        self.checkpoints = root / "checkpoints"  # the newest steps', beside the last and the best
        self.last_checkpoint = self.checkpoints / "last.ckpt"
        self.best_checkpoint = self.checkpoints / "best.ckpt"  # of the highest held-out PSNR gain
        self.initial = root / "initial.safetensors"  # the backbone before the first step
        self.backbone = root / "backbone.safetensors"  # under timm's names
        self.metrics = root / "metrics.csv"  # training numbers by step
        self.health = root / "health.json"  # held-out measures by step
        self.evaluation = root / "evaluation.json"
        self.pictures = root / "evaluation"  # that the evaluation left
        self.log = root / "train.log"
        self.previews = root / "previews"  # pictures of restorations
        self.tensorboard = root / "tensorboard"

    def checkpoint_version(self) -> tuple[int, int] | None:
        """Differs where `last_checkpoint` was written again; None where there is none."""
        if not self.last_checkpoint.exists():
            return None
        found = self.last_checkpoint.stat()
        return found.st_ino, found.st_mtime_ns

    @staticmethod
    def of(path: str | Path) -> Path | None:
        """The run's folder that this is, or that this checkpoint lies in; else None."""
        given = Path(path)
        root = given.parent.parent if given.is_file() else given
        is_ours = root == given or given.parent == RunFolder(root).checkpoints
        return root if is_ours and RunFolder(root).config.is_file() else None


def write_tensors(path: Path, tensors: Mapping[str, Tensor]) -> None:
    """`write_atomically` for safetensors."""
    plain = {name: tensor.detach().cpu().contiguous() for name, tensor in tensors.items()}
    write_atomically(path, save(plain))


def check_available(
    root: Path, *, resume: bool, overwrite: bool, data: str | Path | None = None
) -> None:
    """Refuse, without touching anything, a folder that a run could not claim.

    One below the ``data`` would add the run's pictures to them.
    """
    folder, where = RunFolder(root), root.resolve()
    if data is not None and Path(data).resolve() in (where, *where.parents) and not resume:
        raise UserError(f"{root} lies among the images, in {data}; choose another --out")
    if resume and not folder.config.exists():
        raise UserError(f"{root} holds no run to resume; check --out or leave --resume out")
    if root.exists() and not root.is_dir():
        raise UserError(f"{root} is a file; choose another --out")
    found = {path.name for path in root.iterdir()} if root.is_dir() else set()
    # A run that was killed while it wrote leaves such files.
    found -= {name for name in found if name.startswith(".") and name.endswith(".tmp")}
    # One that was killed before it wrote its settings has nothing to go on from.
    if found - {LOCK, folder.log.name} and not (resume or overwrite):
        raise UserError(
            f"{root} exists; give --resume to go on, --overwrite to replace it, or another --out"
        )
    # A mistyped --out must not cost anybody their files.
    ours = {path.name for path in vars(folder).values() if path.parent == root} | OTHERS
    foreign = sorted(found - ours)
    if foreign and not resume:
        raise UserError(
            f"{root} holds files that are no run's ({', '.join(foreign[:3])}); choose another --out"
        )


@contextmanager
def claim(root: Path, *, resume: bool, overwrite: bool) -> Iterator[RunFolder]:
    """Make, empty or enter a run's folder, and hold it until the block ends."""
    check_available(root, resume=resume, overwrite=overwrite)
    with hold(root):
        # A killed run's half checkpoint is of a step that the next one may never save.
        for path in list(root.rglob(".*.tmp") if resume else root.iterdir()):
            if path.is_dir() and not resume:
                shutil.rmtree(path)
            elif path.name != LOCK:
                path.unlink()
        yield RunFolder(root)


def save_checkpoint(path: Path, content: Mapping[str, Any]) -> None:
    """Write tensors and plain values, marked as ours, atomically."""
    buffer = io.BytesIO()
    ours = {"format": FORMAT, "format_version": FORMAT_VERSION, "backfold": __version__}
    torch.save({**ours, **content}, buffer)
    write_atomically(path, buffer.getvalue())


def add_checkpoint(folder: RunFolder, step: int, content: Mapping[str, Any], keep: int) -> None:
    """Write a step's checkpoint, make it the last, and drop the oldest beyond ``keep``.

    At every moment ``last_checkpoint`` is a whole one, where the disk is full too.
    """
    path = folder.checkpoints / f"step-{step:09d}.ckpt"
    save_checkpoint(path, content)
    temporary = folder.last_checkpoint.with_name(f".{folder.last_checkpoint.name}.tmp")
    temporary.unlink(missing_ok=True)
    try:
        os.link(path, temporary)
    except OSError:  # a file system without links
        shutil.copyfile(path, temporary)
    temporary.replace(folder.last_checkpoint)
    for old in sorted(folder.checkpoints.glob("step-*.ckpt"))[:-keep]:
        old.unlink()


def load_checkpoint(path: Path) -> dict[str, Any]:
    """Read a checkpoint, or a folder's last one, onto the CPU; no code is ever unpickled."""
    if path.is_dir():
        path = RunFolder(path).last_checkpoint
    refuse_missing_run(path)
    try:
        content = torch.load(path, map_location="cpu", weights_only=True)
    except Exception as error:
        raise UserError(
            f"{path} can't be read as a checkpoint ({type(error).__name__}): truncated or not "
            "written by backfold; take another, such as checkpoints/best.ckpt"
        ) from error
    if not isinstance(content, dict) or content.get("format") != FORMAT:
        raise UserError(
            f"{path} was not written by backfold; give a run's folder or a .ckpt of one"
        )
    if content["format_version"] != FORMAT_VERSION:
        raise UserError(
            f"{path} has format version {content['format_version']}, this backfold reads "
            f"{FORMAT_VERSION}; use backfold {content.get('backfold', 'of that version')}"
        )
    return content


def statistics_of(content: Mapping[str, Any]) -> ChannelStatistics:
    """What normalises the images of a checkpoint that is read."""
    return ChannelStatistics(tuple(content["mean"]), tuple(content["std"]))


def build_energy(config: PretrainConfig, channels: int) -> EnergyModel:
    """The energy with random weights, which the seed alone decides; raises as `EnergyModel`."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(config.seed)
        return EnergyModel(
            config.backbone,
            image_size=parse_image_size(config.image_size),
            channels=channels,
            second_head=config.energy != "dense" and config.tasks.masking.normalised_share > 0,
            hidden_blocks=config.hidden_blocks,
            projector=config.invariance > 0,
            backbone_options=config.backbone_options,
            seed=config.seed,
        )


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
    """Read a run's folder (its last checkpoint) or one checkpoint file, or raise UserError."""
    content = load_checkpoint(path)
    try:
        # Older runs had other settings beside today's, and knew no energy but the dense one.
        settings = {"energy": "dense"} | content["config"]
        settings["tasks"] = {k: v for k, v in settings["tasks"].items() if k != "exchange"}
        settings.pop("derivative", None)  # how older runs trained
        if settings.get("head") == "linear":
            del settings["head"]
        config = config_from_dict(settings)
        channels, (height, width) = content["channels"], content["image_size"]
        energy = build_energy(config, channels)
        weights = dict(content["model"])
        if energy.second_head is None:  # of training alone; older dense runs had one
            weights.pop("second_head.weight", None)
        energy.load_state_dict(weights)
        statistics, step = statistics_of(content), content["state"]["step"]
        return Pretrained(energy.eval(), config, statistics, channels, (height, width), step)
    except (KeyError, RuntimeError, UserError) as error:
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
    if refreshed.keys() == own.keys() and all(
        torch.equal(refreshed[name], own[name])
        for name in own
        if backbone.get_submodule(name.rpartition(".")[0]) not in norms
    ):
        backbone.load_state_dict(refreshed)
    else:
        LOGGER.warning(
            "the batch norms have the statistics of the run's start: there are no refreshed ones "
            "of this checkpoint; to fine-tune in train mode, export a finished run"
        )
    return backbone
