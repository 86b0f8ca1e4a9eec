import json
from pathlib import Path

import pytest

from backfold.cli.main import main

pytestmark = pytest.mark.filterwarnings(
    "ignore:This process .* is multi-threaded:DeprecationWarning"
)


@pytest.mark.slow
def test_the_demo_from_images_to_report(tiny, make_parquet, monkeypatch, tmp_path, capsys):
    monkeypatch.chdir(tmp_path)
    data = make_parquet("data/train.parquet", count=240).parent
    make_parquet("data/test.parquet", count=60, first=300)
    small = [argument for argument in tiny if not argument.startswith("--max-steps")]
    assert main(["demo", "--data", str(data), "--max-steps", "20", *small]) == 0
    printed = capsys.readouterr().out
    lines = printed.splitlines()
    assert lines[-1] == "report: runs/demo/report.html"
    assert lines[-2].startswith("Did pretraining pay? ")
    for word in ("Nearest", "Linear", "all labels", "10 labels", "before", "pretrained", "pixels"):
        assert word in printed
    assert {path.name for path in Path("runs/demo").iterdir()} == {
        ".lock", "backbone.safetensors", "checkpoints", "config.yaml", "evaluation.json",
        "health.json", "initial.safetensors", "metrics.csv", "previews", "report.html",
        "run.json", "tensorboard", "train.log",
    }  # fmt: skip
    rows = json.loads(Path("runs/demo/evaluation.json").read_text())
    assert sum(row["protocol"] != "layers" for row in rows) == 4 * (3 + 2)
    assert Path("runs/demo/report.html").stat().st_size > 10_000
    # The demo may be run again: its folder is its own.
    assert main(["demo", "--data", str(data), "--max-steps", "2", *small]) == 0
    assert json.loads(Path("runs/demo/run.json").read_text())["steps"] == 2


def test_the_demo_leaves_folders_of_others_alone(make_parquet, tiny, refused, tmp_path):
    (tmp_path / "letters").mkdir()
    (tmp_path / "letters" / "love.txt").write_text("dear")
    arguments = ["demo", f"--data={make_parquet()}", f"--out={tmp_path / 'letters'}", *tiny]
    refused(arguments, "love.txt", "choose another --out")
