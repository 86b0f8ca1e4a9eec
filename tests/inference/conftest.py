from collections.abc import Callable

import pytest
import torch
from torch import Tensor

from backfold.data.statistics import ChannelStatistics
from backfold.embedding import EmbeddingChoice
from backfold.errors import BrokenImage
from backfold.inference.jobs import EmbeddingJob
from backfold.inference.parts import Parts
from backfold.training.run import Pretrained
from tiny_run import tiny_config, tiny_energy


class Pictures:
    """Images of noise that fill up from black to white with their index; some are broken."""

    labels, class_names, name = None, (), "pictures"
    stop: int | None = None  # reading this image is interrupted, as by a user

    def __init__(self, count: int, broken: tuple[int, ...] = ()) -> None:
        self.count, self.broken = count, broken
        self.seen: list[int] = []

    def __len__(self) -> int:
        return self.count

    def read(self, index: int, min_side: int | None = None) -> Tensor:  # noqa: ARG002
        if index == self.stop:
            raise KeyboardInterrupt
        self.seen.append(index)
        if index in self.broken:
            raise BrokenImage("torn")
        return self.pixels(index)

    def pixels(self, index: int) -> Tensor:
        generator = torch.Generator().manual_seed(index)
        noise = torch.randint(0, 256, (1, 28, 28), generator=generator).float()
        return (noise * (index + 1) / self.count).to(torch.uint8)

    def describe(self, index: int) -> str:
        return f"dir/{index:03}{'ä' * (index % 3)}.png"


@pytest.fixture
def pictures() -> type[Pictures]:
    return Pictures


@pytest.fixture
def run() -> Pretrained:
    """A small energy of grey images, as if it were read from a checkpoint."""
    config, energy = tiny_config(max_broken_share=0.5), tiny_energy(channels=1)
    return Pretrained(energy.eval(), config, ChannelStatistics((0.3,), (0.2,)), 1, (28, 28), 5)


@pytest.fixture
def parts_of(run, tmp_path) -> Callable[..., Parts]:
    embedding = EmbeddingJob(run, EmbeddingChoice(), torch.device("cpu"))

    def make(source, batch_size=4, part_size=8, out="out.parquet", job=embedding):
        return Parts(job, source, tmp_path / out, batch_size, part_size)

    return make
