"""The wheel holds what the package needs when it is installed alone."""

import shutil
import subprocess
import sys
import zipfile
from pathlib import Path

ROOT = Path(__file__).parent.parent


def build_wheel(copy: Path) -> Path:
    for name in ("pyproject.toml", "README.md", "LICENSE"):
        shutil.copy(ROOT / name, copy)
    shutil.copytree(ROOT / "src", copy / "src", ignore=shutil.ignore_patterns("*.egg-info"))
    out = copy / "dist"
    command = [sys.executable, "-m", "build", "--wheel", "--no-isolation", "--outdir", str(out)]
    done = subprocess.run(command, cwd=copy, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    (path,) = out.glob("*.whl")
    return path


def test_the_wheel_holds_every_file_both_licences_and_the_command(tmp_path: Path) -> None:
    package = ROOT / "src" / "backfold"
    expected = {
        f"backfold/{path.relative_to(package).as_posix()}"
        for path in package.rglob("*")
        if path.is_file() and "__pycache__" not in path.parts
    }
    with zipfile.ZipFile(build_wheel(tmp_path)) as archive:
        names = archive.namelist()
        ends = [next(n for n in names if n.endswith(e)) for e in ("entry_points.txt", "METADATA")]
        entry_points, metadata = (archive.read(name).decode() for name in ends)
        sizes = [i.file_size for i in archive.infolist() if i.filename.endswith(".parquet")]
    assert expected <= set(names)
    for ending in ("fashion_mnist_train.parquet", "demo.yaml", ".jinja"):
        assert any(name.endswith(ending) for name in expected)
    licences = {Path(name).name for name in names if "/licenses/" in name}
    assert licences == {"LICENSE", "LICENSE-fashion-mnist.txt"}
    assert "backfold = backfold.cli.main:main" in entry_points
    assert "License-Expression: Apache-2.0" in metadata
    assert len(sizes) == 2
    assert sum(sizes) <= 6_000_000
