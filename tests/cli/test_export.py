"""`backfold export` on a run of its own."""

import json
import shutil

import pytest
import timm
import torch

from backfold import Backfold
from backfold.cli.main import main


def test_a_run_is_exported_to_timm(run_folder, tmp_path, capsys):
    out = tmp_path / "for-timm"
    assert main(["export", f"--checkpoint={run_folder}", f"--out={out}"]) == 0
    captured = capsys.readouterr()
    assert captured.out == f"timm: {out}\n"
    assert captured.err == ""
    ours = Backfold.load(run_folder)
    images = torch.rand(2, 1, 28, 28)
    theirs = timm.create_model(f"local-dir:{out}", pretrained=True).eval()
    with torch.no_grad():
        output = theirs(ours.run.statistics.normalize(images))
    torch.testing.assert_close(output, ours.embed(images), rtol=1e-5, atol=1e-5)


def test_the_card_has_what_was_measured(run_folder, tmp_path, capsys):
    arguments = ["--labels=all,2", "--draws=2", "--accelerator=cpu", "--protocols=knn"]
    assert main(["evaluate", f"--checkpoint={run_folder}", *arguments]) == 0
    out = tmp_path / "out"
    assert (
        main(["export", f"--checkpoint={run_folder}", "--format=huggingface", f"--out={out}"]) == 0
    )
    card = (out / "README.md").read_text()
    rows = json.loads((run_folder / "evaluation.json").read_text())
    for row in (row for row in rows if " over " not in row["contender"]):
        line = f"| knn | {row['case']} | {row['contender']} | {row['mean']:.2f} |"
        assert line in card
    facts = json.loads((run_folder / "run.json").read_text())
    assert f"torch {facts['versions']['torch']}" in card
    assert str(tmp_path) not in card
    capsys.readouterr()


def test_an_export_is_replaced_on_request(run_folder, tmp_path, refused):
    command = ["export", f"--checkpoint={run_folder}", f"--out={tmp_path / 'out'}"]
    assert main(command) == 0
    refused(command, "out exists; give --overwrite")
    assert main([*command, "--format=pt2", "--overwrite"]) == 0
    assert (tmp_path / "out" / "model.pt2").is_file()
    assert not (tmp_path / "out" / "config.json").exists()


@pytest.mark.parametrize(
    ("arguments", "parts"),
    [
        (["--format=torchscript"], ["--format", "torchscript", "pt2"]),
        (["--checkpoint=nowhere"], ["there is no checkpoint at nowhere"]),
    ],
)
def test_unfit_arguments_are_refused(refused, arguments, parts, monkeypatch, tmp_path):
    monkeypatch.chdir(tmp_path)
    refused(["export", *arguments], *parts)
    assert list(tmp_path.iterdir()) == []


def test_without_a_run_it_says_so(refused, monkeypatch, tmp_path):
    monkeypatch.chdir(tmp_path)
    refused(["export"], "there is no checkpoint at runs/demo")


def test_without_arguments_the_demo_is_exported(run_folder, monkeypatch, tmp_path, capsys):
    monkeypatch.chdir(tmp_path)
    shutil.copytree(run_folder, tmp_path / "runs" / "demo")
    assert main(["export"]) == 0
    assert capsys.readouterr().out == "timm: exported\n"
    assert (tmp_path / "exported" / "model.safetensors").is_file()
