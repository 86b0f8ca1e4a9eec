import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

from backfold.cli.main import main
from tiny_run import write_images

# A run that takes a second on grey or colour images of 28 x 28 pixels.
TINY = [
    "--backbone=vit_tiny_patch16_224", "--backbone-options.patch_size=7",
    "--backbone-options.embed_dim=16", "--backbone-options.depth=1",
    "--backbone-options.num_heads=2", "--image-size=28", "--batch-size=8", "--max-steps=2",
    "--held-out=8", "--tasks.masking.mask-patch-size=7", "--tasks.sorting.sorting-patch-size=7",
    "--accelerator=cpu", "--devices=1", "--precision=32-true", "--num-workers=0",
]  # fmt: skip


@pytest.fixture
def tiny() -> list[str]:
    return list(TINY)


@pytest.fixture
def make_parquet(tmp_path) -> Callable[..., Path]:
    def make(name: str = "images.parquet", **kind: Any) -> Path:
        return write_images(tmp_path / name, **{"count": 60, **kind})

    return make


@pytest.fixture
def make_folder(tmp_path) -> Callable[..., Path]:
    def make(name: str = "images", count: int = 40, broken: int = 0) -> Path:
        """Colour images of 30 x 32 pixels, the last ones of which are broken."""
        folder = tmp_path / name
        folder.mkdir()
        random = np.random.default_rng(0)
        for number in range(count):
            coarse = Image.fromarray(random.integers(0, 256, (5, 5, 3), dtype=np.uint8))
            coarse.resize((32, 30)).save(folder / f"{number:03}.png")
        for number in range(count - broken, count):
            (folder / f"{number:03}.png").write_bytes(b"no image")
        return folder

    return make


@pytest.fixture(scope="session")
def finished(tmp_path_factory) -> Path:
    """A finished run on 60 labelled grey images; its data lie beside it."""
    folder = tmp_path_factory.mktemp("finished") / "run"
    data = write_images(folder.with_name("images.parquet"), 60)
    assert main(["pretrain", f"--data={data}", f"--out={folder}", *TINY]) == 0
    return folder


@pytest.fixture
def run_folder(tmp_path, finished, capsys) -> Path:
    """A copy of the finished run, to change at will."""
    capsys.readouterr()
    return shutil.copytree(finished, tmp_path / "finished")


@pytest.fixture
def refused(capsys) -> Callable[..., str]:
    def run(arguments: list[str], *parts: str) -> str:
        """The one line of a refused command, in which the parts occur."""
        capsys.readouterr()
        assert main([str(argument) for argument in arguments]) == 2
        captured = capsys.readouterr()
        lines = captured.err.splitlines()
        assert captured.out == ""
        assert "Traceback" not in captured.err
        assert [line for line in lines if line.startswith("backfold: error: ")] == lines[-1:]
        assert "; " in lines[-1]  # the remedy
        for part in parts:
            assert part in lines[-1]
        return lines[-1]

    return run
