"""The wheel holds what the package needs when it is installed alone."""

import shutil
import subprocess
import sys
import zipfile
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent


@pytest.fixture(scope="module")
def wheel(tmp_path_factory: pytest.TempPathFactory) -> Path:
    copy = tmp_path_factory.mktemp("source")
    for name in ("pyproject.toml", "README.md", "LICENSE"):
        shutil.copy(ROOT / name, copy)
    shutil.copytree(ROOT / "src", copy / "src", ignore=shutil.ignore_patterns("*.egg-info"))
    out = copy / "dist"
    command = [sys.executable, "-m", "build", "--wheel", "--no-isolation", "--outdir", str(out)]
    done = subprocess.run(command, cwd=copy, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    (path,) = out.glob("*.whl")
    return path


def test_every_file_of_the_package_is_in_the_wheel(wheel: Path) -> None:
    package = ROOT / "src" / "backfold"
    expected = {
        f"backfold/{path.relative_to(package).as_posix()}"
        for path in package.rglob("*")
        if path.is_file() and "__pycache__" not in path.parts
    }
    with zipfile.ZipFile(wheel) as archive:
        assert expected <= set(archive.namelist())
    assert any(name.endswith("fashion_mnist_train.parquet") for name in expected)
    assert any(name.endswith("demo.yaml") for name in expected)
    assert any(name.endswith(".jinja") for name in expected)


def test_the_wheel_carries_both_licences_and_the_command(wheel: Path) -> None:
    with zipfile.ZipFile(wheel) as archive:
        names = archive.namelist()
        licences = {Path(name).name for name in names if "/licenses/" in name}
        entry_points = archive.read(
            next(name for name in names if name.endswith("entry_points.txt"))
        ).decode()
        metadata = archive.read(next(name for name in names if name.endswith("METADATA"))).decode()
    assert licences == {"LICENSE", "LICENSE-fashion-mnist.txt"}
    assert "backfold = backfold.cli.main:main" in entry_points
    assert "License-Expression: Apache-2.0" in metadata


def test_embedded_images_take_at_most_six_megabytes(wheel: Path) -> None:
    with zipfile.ZipFile(wheel) as archive:
        sizes = [i.file_size for i in archive.infolist() if i.filename.endswith(".parquet")]
    assert len(sizes) == 2
    assert sum(sizes) <= 6_000_000
