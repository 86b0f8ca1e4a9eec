"""The folder that a run leaves: what lies where, and who may write there."""

import fcntl
import io
import json
import os
import shutil
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import yaml
from safetensors.torch import save

from backfold.data.statistics import ChannelStatistics
from backfold.errors import UserError
from backfold.version import __version__

FORMAT = "backfold-checkpoint"
FORMAT_VERSION = 1
LOCK = ".lock"
DEMO_RUN = Path("runs/demo")
OURS = {
    "config.yaml", "run.json", "checkpoints", "initial.safetensors", "backbone.safetensors",
    "metrics.csv", "previews", "health.json", "evaluation.json", "evaluation", "train.log",
    "tensorboard", "report.html", LOCK,
    "measures",  # of older runs
}  # fmt: skip


@dataclass(frozen=True)
class RunFolder:
    """Paths in a run's folder."""

    root: Path

    @staticmethod
    def of(path: str | Path) -> Path | None:
        """The run's folder that this is, or that this checkpoint lies in; else None."""
        given = Path(path)
        if given.is_file():
            given = given.parent.parent
        return given if RunFolder(given).config.is_file() else None

    @property
    def config(self) -> Path:
        """All settings, enough to repeat the run."""
        return self.root / "config.yaml"

    @property
    def facts(self) -> Path:
        """What was run, on what."""
        return self.root / "run.json"

    @property
    def checkpoints(self) -> Path:
        """The newest steps' checkpoints, beside the last and the best."""
        return self.root / "checkpoints"

    @property
    def last_checkpoint(self) -> Path:
        """The newest checkpoint."""
        return self.root / "checkpoints" / "last.ckpt"

    @property
    def best_checkpoint(self) -> Path:
        """The checkpoint with the highest held-out PSNR gain."""
        return self.root / "checkpoints" / "best.ckpt"

    @property
    def initial(self) -> Path:
        """The backbone's weights before the first step."""
        return self.root / "initial.safetensors"

    @property
    def backbone(self) -> Path:
        """The backbone's weights under timm's names."""
        return self.root / "backbone.safetensors"

    @property
    def metrics(self) -> Path:
        """Training numbers by step."""
        return self.root / "metrics.csv"

    @property
    def health(self) -> Path:
        """Held-out measures by step."""
        return self.root / "health.json"

    @property
    def evaluation(self) -> Path:
        """What the evaluation found."""
        return self.root / "evaluation.json"

    @property
    def pictures(self) -> Path:
        """Pictures that the evaluation left."""
        return self.root / "evaluation"

    @property
    def log(self) -> Path:
        """All messages."""
        return self.root / "train.log"

    @property
    def previews(self) -> Path:
        """Pictures of restorations."""
        return self.root / "previews"

    @property
    def tensorboard(self) -> Path:
        """TensorBoard's events."""
        return self.root / "tensorboard"


def write_atomically(path: Path, content: bytes) -> None:
    """Write beside the path, sync, rename: a reader sees the old file or the new one.

    Raises:
        UserError: the disk is full or the folder can't be written; the old file is intact.
    """
    temporary = path.with_name(f".{path.name}.tmp")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        with temporary.open("wb") as file:
            file.write(content)
            file.flush()
            os.fsync(file.fileno())
        temporary.replace(path)
    except OSError as error:
        temporary.unlink(missing_ok=True) if path.parent.is_dir() else None
        raise UserError(
            f"can't write {path}: {error.strerror or error}; free space or choose another --out"
        ) from error


def write_json(path: Path, content: Any) -> None:
    """`write_atomically` for JSON."""
    write_atomically(path, (json.dumps(content, indent=2) + "\n").encode())


def write_yaml(path: Path, content: Mapping[str, Any]) -> None:
    """`write_atomically` for YAML, in the mapping's order."""
    write_atomically(path, yaml.safe_dump(dict(content), sort_keys=False).encode())


def write_tensors(path: Path, tensors: Mapping[str, torch.Tensor]) -> None:
    """`write_atomically` for safetensors."""
    write_atomically(
        path, save({name: t.detach().cpu().contiguous() for name, t in tensors.items()})
    )


def check_available(root: Path, *, resume: bool, overwrite: bool) -> None:
    """Refuse, without touching anything, a folder that a run could not claim.

    Raises:
        UserError: the folder exists and neither flag is given, holds files of others that would be
            overwritten, or is missing though a resumption is asked for.
    """
    if resume and not RunFolder(root).config.exists():
        raise UserError(f"{root} holds no run to resume; check --out or leave --resume out")
    if root.exists() and not root.is_dir():
        raise UserError(f"{root} is a file; choose another --out")
    found = {path.name for path in root.iterdir()} if root.is_dir() else set()
    if not (resume or overwrite) and any(map(_is_worth_keeping, found)):
        raise UserError(
            f"{root} exists; give --resume to go on, --overwrite to replace it, or another --out"
        )
    # A mistyped --out must not cost anybody their files.
    foreign = sorted(name for name in found if not _is_ours(name))
    if foreign and not resume:
        raise UserError(
            f"{root} holds files that are no run's ({', '.join(foreign[:3])}); choose another --out"
        )


def _is_ours(name: str) -> bool:
    return name in OURS or _is_temporary(name)


def _is_worth_keeping(name: str) -> bool:
    # A run that was killed before it wrote its settings has nothing to go on from.
    return name not in (LOCK, RunFolder(Path()).log.name) and not _is_temporary(name)


def _is_temporary(name: str) -> bool:
    # A run that was killed while it wrote leaves such a file.
    return name.startswith(".") and name.endswith(".tmp")


@contextmanager
def claim(root: Path, *, resume: bool, overwrite: bool) -> Iterator[RunFolder]:
    """Make, empty or enter a run's folder, and hold it until the block ends.

    The claim is a file lock, which the system drops when a process dies.

    Raises:
        UserError: as `check_available`; the folder is in use or can't be written.
    """
    check_available(root, resume=resume, overwrite=overwrite)
    try:
        root.mkdir(parents=True, exist_ok=True)
        lock = (root / LOCK).open("w")
    except OSError as error:
        raise UserError(
            f"can't write to {root}: {error.strerror or error}; choose another --out"
        ) from error
    # Else loading workers, which outlive a killed run by seconds, would hold its lock.
    os.register_at_fork(after_in_child=lock.close)
    with lock:
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError as error:
            raise UserError(
                f"{root} is in use by another process; wait for it or choose another --out"
            ) from error
        if resume:
            _drop_half_written(root)
        else:
            _empty(root)
        yield RunFolder(root)


def _empty(root: Path) -> None:
    for path in root.iterdir():
        if path.is_dir():
            shutil.rmtree(path)
        elif path.name != LOCK:
            path.unlink()


def _drop_half_written(root: Path) -> None:
    # A killed run's half checkpoint is of a step that the next one may never save.
    for path in list(root.rglob(".*.tmp")):
        path.unlink()


def save_checkpoint(path: Path, content: Mapping[str, Any]) -> None:
    """Write tensors and plain values, marked as ours, atomically."""
    buffer = io.BytesIO()
    marked = {
        "format": FORMAT,
        "format_version": FORMAT_VERSION,
        "backfold": __version__,
        **content,
    }
    torch.save(marked, buffer)
    write_atomically(path, buffer.getvalue())


def add_checkpoint(folder: RunFolder, step: int, content: Mapping[str, Any], keep: int) -> None:
    """Write a step's checkpoint, make it the last, and drop the oldest beyond ``keep``.

    At every moment ``last_checkpoint`` is a whole one.

    Raises:
        UserError: the disk is full or the folder can't be written; the last checkpoint is intact.
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


def load_statistics(path: Path) -> ChannelStatistics:
    """What normalises a checkpoint's images.

    Raises:
        UserError: as `load_checkpoint`.
    """
    content = load_checkpoint(path)
    return ChannelStatistics(tuple(content["mean"]), tuple(content["std"]))


def load_checkpoint(path: Path) -> dict[str, Any]:
    """Read a checkpoint onto the CPU; only tensors and plain values are ever unpickled.

    Args:
        path: the file, or a run's folder, of which the last checkpoint is taken.

    Raises:
        UserError: missing, truncated, not ours, or of another version.
    """
    if path.is_dir():
        path = RunFolder(path).last_checkpoint
    if not path.exists():
        raise UserError(f"there is no checkpoint at {path}; give a run's folder or a .ckpt file")
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
