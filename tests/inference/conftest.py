from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from torch import Tensor

from backfold.data.statistics import ChannelStatistics
from backfold.energy import EnergyModel
from backfold.errors import BrokenImage
from backfold.inference.run import make_plan
from backfold.pretext import Denoising, Masking
from backfold.training.config import PretrainConfig, TaskSettings
from backfold.training.pretrained import Pretrained

OPTIONS = {"patch_size": 7, "embed_dim": 16, "depth": 1, "num_heads": 2}


class Pictures:
    """Images of noise that fill up from black to white with their index; some are broken."""

    def __init__(self, count: int, broken: tuple[int, ...] = (), name: str = "pictures") -> None:
        self.count, self.broken, self.name = count, broken, name
        self.labels, self.class_names = None, ()
        self.seen: list[int] = []

    def __len__(self) -> int:
        return self.count

    def read(self, index: int, min_side: int | None = None) -> Tensor:  # noqa: ARG002
        self.seen.append(index)
        if index in self.broken:
            raise BrokenImage("torn")
        return self.pixels(index)

    def pixels(self, index: int) -> Tensor:
        generator = torch.Generator().manual_seed(index)
        noise = torch.randint(0, 256, (1, 28, 28), generator=generator).float()
        return (noise * (index + 1) / self.count).to(torch.uint8)

    def describe(self, index: int) -> str:
        return f"dir/{index:03}.png"


@pytest.fixture
def pictures() -> Callable[..., Pictures]:
    return Pictures


@pytest.fixture
def run() -> Pretrained:
    """A small energy of grey images, as if it were read from a checkpoint."""
    config = PretrainConfig(
        backbone="vit_tiny_patch16_224",
        backbone_options=OPTIONS,
        image_size=28,
        tasks=TaskSettings(masking=Masking(mask_patch_size=7), denoising=Denoising()),
    )
    torch.manual_seed(0)
    energy = EnergyModel(config.backbone, image_size=28, channels=1, backbone_options=OPTIONS)
    return Pretrained(energy.eval(), config, ChannelStatistics((0.3,), (0.2,)), 1, (28, 28), 5)


@pytest.fixture
def plan_of() -> Callable[..., object]:
    def make(job, source, batch_size=4, part_size=8):
        return make_plan(job, source, batch_size, part_size)

    return make


@pytest.fixture
def out(tmp_path) -> Path:
    return tmp_path / "out.parquet"
