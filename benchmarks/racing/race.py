"""A race's files and what a piece of it needs to run."""

import importlib.metadata
import json
import platform
import shlex
import sys
import time
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field
from functools import cached_property
from pathlib import Path
from typing import Any, Literal

import torch
from lightning.fabric import Fabric
from safetensors.torch import load_file
from torch import Tensor

from backfold.errors import UserError
from backfold.training.config import PretrainConfig
from backfold.training.distribution import make_fabric
from backfold.training.run_folder import write_json
from backfold.training.setup import choose_precision
from racing.contenders import BY_NAME, CONTENDERS, Contender
from racing.images import RaceImages, load_race_images
from racing.judging import Judge
from racing.methods import Attention, Setting
from racing.pretraining import point_file
from racing.sizes import Size
from step_cost.environment import commit, hardware

PACKAGES = ("backfold", "torch", "timm", "transformers", "lightly", "scikit-learn")
HALF, WHOLE = "bf16-mixed", "32-true"


@dataclass
class Race:
    """One race: its extent, its folders and its end.

    Args:
        size: how large.
        data: where the images are; see `backfold.data.source.open_source`.
        out: folder of the JSON files.
        work: folder of weights and checkpoints, which nobody needs afterwards.
        accelerator: Lightning's name of the hardware.
        deadline: by ``time.monotonic``.
    """

    size: Size
    data: Path
    out: Path
    work: Path
    accelerator: str = "auto"
    deadline: float = float("inf")
    _fabrics: dict[str, Fabric] = field(default_factory=dict)

    @cached_property
    def images(self) -> RaceImages:
        """Decoded when first asked for."""
        return load_race_images(self.data, self.size)

    def fabric(self, precision: str) -> Fabric:
        """The device, in this precision."""
        if precision not in self._fabrics:
            self._fabrics[precision] = make_fabric(
                PretrainConfig(accelerator=self.accelerator, devices=1, precision=precision)  # type: ignore[arg-type]
            )
        return self._fabrics[precision]

    @property
    def device(self) -> torch.device:
        """Where everything runs."""
        return self.fabric(WHOLE).device

    @property
    def best_precision(self) -> Literal["32-true", "bf16-mixed"]:
        """What the product would choose here."""
        return choose_precision(PretrainConfig(), self.device)

    @property
    def precisions(self) -> list[str]:
        """Those that this hardware computes in."""
        return [WHOLE] if self.best_precision == WHOLE else [WHOLE, HALF]

    def judge(self, contender: Contender) -> Judge:
        """For this contender's backbone; runs as an ordinary training step runs fastest."""
        like = next(
            other
            for other in CONTENDERS
            if other.kind == "simclr" and other.backbone == contender.backbone
        )
        timing = self.timing(like)
        spec = self.size.backbones[contender.backbone]
        return Judge(
            self.size, spec, self.images, self.device, timing["precision"], timing["attention"]
        )

    @cached_property
    def on_device(self) -> Tensor:
        """The training images, uint8, on the device."""
        return self.images.training.images.to(self.device)

    def setting(
        self, contender: Contender, steps: int, lr: float, seed: int,
        precision: str, attention: Attention,
    ) -> Setting:  # fmt: skip
        """What the contender's method is built from."""
        return Setting(
            self.size.backbones[contender.backbone],
            self.on_device,
            self.size.image_size,
            self.images.statistics,
            self.size.batch,
            steps,
            self.size.warmup_share,
            lr,
            seed,
            self.fabric(precision),
            attention,
            self.size.workers,
            self.size.compiled,
        )

    @property
    def steps_per_epoch(self) -> int:
        """Whole batches."""
        return len(self.images.training.images) // self.size.batch

    def whole_steps(self, share: float = 1.0) -> int:
        """Steps of a share of the whole schedule."""
        return max(1, round(share * self.size.epochs * self.steps_per_epoch))

    def describe(self) -> None:
        """Write what is raced into the race's folder, or compare with what was.

        Raises:
            UserError: the folder holds a race of another extent.
        """
        path = self.out / "race.json"
        described = json.loads(json.dumps(asdict(self.size)))
        if not path.exists():
            write_json(path, described)
        elif json.loads(path.read_text()) != described:
            raise UserError(
                f"{path} describes a race of another extent than {self.size.name!r} with these "
                "options; give the options of that race, or another --out and --work"
            )

    def read(self, name: str) -> dict[str, Any]:
        """A piece's JSON."""
        content: dict[str, Any] = json.loads((self.out / name).read_text())
        return content

    def timing(self, contender: Contender) -> dict[str, Any]:
        """How the contender's step runs fastest, and how fast that is.

        Raises:
            UserError: another recipe was timed.
        """
        name = f"timing-{contender.backbone}.json"
        found: dict[str, Any] = self.read(name)["contenders"].get(contender.tuned, {})
        if found.get("recipe") != json.loads(json.dumps(contender.recipe)):
            raise UserError(
                f"{self.out / name} was measured with another recipe of {contender.tuned}; race "
                "into another --out, or delete what is there"
            )
        return found

    def total_steps(self, contender: Contender) -> int:
        """Of the contender's schedule; where it fills another's seconds, by the measured steps."""
        if contender.seconds_of is None:
            return self.whole_steps(contender.epochs_share)
        rival = BY_NAME[contender.seconds_of]
        seconds = self.timing(rival)["seconds_per_step"] * self.total_steps(rival)
        return max(1, round(seconds / self.timing(contender)["seconds_per_step"]))

    def point_steps(self, contender: Contender) -> list[int]:
        """After which steps the backbone is kept; the last is the run's last."""
        total = self.total_steps(contender)
        return sorted({max(1, round(share * total)) for share in self.size.points})

    def folder(self, name: str) -> Path:
        """For the weights and checkpoints of a run."""
        return self.work / name

    def weights(self, contender: Contender, seed: int, step: int) -> dict[str, Tensor] | None:
        """A run's backbone after so many steps; None for the untrained."""
        if not contender.is_trained:
            return None
        return load_file(point_file(self.folder(f"{contender.name}-seed{seed}"), step))

    def facts(self) -> Mapping[str, Any]:
        """On what, with what and how it ran."""
        return {
            "date": time.strftime("%Y-%m-%d", time.gmtime()),
            "command": shlex.join(["python", "benchmarks/race.py", *sys.argv[1:]]),
            "commit": commit(),
            "hardware": hardware(self.device),
            "threads": torch.get_num_threads(),
            "versions": {
                "python": platform.python_version(),
                **{name: importlib.metadata.version(name) for name in PACKAGES},
            },
        }
