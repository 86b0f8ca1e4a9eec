"""What all tests share."""

from collections.abc import Callable
from pathlib import Path

import pytest
import torch


@pytest.fixture(autouse=True)
def _seed():
    torch.manual_seed(0)


@pytest.fixture
def snapshot() -> Callable[[Path], dict[str, bytes | None]]:
    def take(folder: Path) -> dict[str, bytes | None]:
        """Every path below a folder with its content."""
        return {
            str(path.relative_to(folder)): path.read_bytes() if path.is_file() else None
            for path in folder.rglob("*")
        }

    return take
