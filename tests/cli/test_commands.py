"""What the commands print and leave when all is well."""

import dataclasses
import json
import os
import re
import shlex
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import timm
import torch
import yaml

from backfold import Backfold
from backfold.cli.inference import ScoreSettings
from backfold.cli.main import COMMANDS, main, recipe_names, recipe_path
from backfold.evaluation.evaluate import EvaluateSettings
from backfold.training.config import PretrainConfig, config_from_dict
from backfold.training.run import RunFolder, load_pretrained
from backfold.version import __version__

DEMO = yaml.safe_load(recipe_path("demo").read_text()) | {"out": "runs/demo"}


def test_pretrain_names_the_run_on_stdout(tiny, make_parquet, tmp_path, capsys):
    arguments = ["pretrain", f"--data={make_parquet()}", f"--out={tmp_path / 'a b'}", *tiny]
    assert main(arguments) == 0
    assert capsys.readouterr().out == f"run: {tmp_path / 'a b'}\n"
    facts = json.loads((tmp_path / "a b" / "run.json").read_text())
    assert shlex.split(facts["command"]) == ["backfold", *arguments]


def test_overwriting_replaces_a_run_its_rows_and_its_start(tiny, run_folder, make_parquet):
    folder = RunFolder(run_folder)
    folder.evaluation.write_text("[]")
    start = folder.initial.read_bytes()
    arguments = ["pretrain", f"--data={make_parquet()}", f"--out={run_folder}", *tiny]
    assert main([*arguments, "--overwrite", "--seed=4"]) == 0
    assert not folder.evaluation.exists()
    assert folder.initial.read_bytes() != start
    assert yaml.safe_load(folder.config.read_text())["seed"] == 4


def printed_settings(arguments, capsys):
    """What ``--print_config`` shows."""
    with pytest.raises(SystemExit) as stopped:
        main(["pretrain", *arguments, "--print_config"])
    assert stopped.value.code == 0
    return yaml.safe_load(capsys.readouterr().out)


def test_dashes_underscores_and_printed_settings_can_be_given(tiny, tmp_path, capsys):
    dashed = [
        "--watch-labels=true", "--optimizer.base-lr=0.02", "--tasks.masking.mask-ratio=0.3",
        "--augmentation.crop-scale=[0.5,1.0]", *tiny,
    ]  # fmt: skip
    scored = [re.sub(r"(?<=\w)-(?=[^=]*=)", "_", part) for part in dashed]
    assert "--optimizer.base_lr=0.02" in scored
    config = printed_settings(dashed, capsys)
    assert printed_settings(scored, capsys) == config
    (tmp_path / "printed.yaml").write_text(yaml.safe_dump(config))
    assert printed_settings([f"--config={tmp_path / 'printed.yaml'}"], capsys) == config
    assert config["optimizer"]["base_lr"] == 0.02
    assert config["tasks"]["masking"]["mask_ratio"] == 0.3
    assert config["watch_labels"] is True


def test_flags_override_files_and_recipes_of_which_the_later_wins(tiny, tmp_path, capsys):
    settings = tmp_path / "settings.yaml"
    settings.write_text("seed: 7\nnum_steps: 2\n")
    given = ["--recipe=demo", f"--config={settings}", "--num-steps=3", *tiny]
    config = printed_settings(given, capsys)
    found = (config["optimizer"]["base_lr"], config["seed"], config["num_steps"])
    assert found == (8e-3, 7, 3)
    settings.write_text("tasks: {masking: {mask_ratio: 0.6, mask_patch_size: 5}}\nepochs: 9\n")
    config = printed_settings(["--epochs=2", "--config", str(settings), "--recipe=refine"], capsys)
    masking = config["tasks"]["masking"]
    assert (masking["mask_ratio"], masking["mask_patch_size"], config["epochs"]) == (0.25, 5, 2)
    assert main(["pretrain", "--recipe", "--seed=1"]) == main(["pretrain", "--config="]) == 2
    assert capsys.readouterr().err.count("names nothing; give it") == 2
    config = printed_settings(["--mixture", "masking=3,sorting=1", *tiny], capsys)
    assert config["pretext"] == "mixture"
    assert config["tasks"]["mixture"] == {"masking": 3, "sorting": 1}


def test_without_data_and_backbone_the_demo_s_settings_are_used(monkeypatch, tmp_path, capsys):
    monkeypatch.chdir(tmp_path)
    arguments = ["--max-steps=1", "--held-out=8", "--watch-labels=false", "--num-workers=0"]
    arguments += ["--accelerator=cpu", "--devices=1", "--precision=32-true"]
    assert main(["pretrain", *arguments]) == 0
    captured = capsys.readouterr()
    assert "the demo's recipe on the embedded images" in captured.err
    assert captured.out == "run: runs/pretrain\n"
    config = yaml.safe_load((tmp_path / "runs" / "pretrain" / "config.yaml").read_text())
    assert config["optimizer"]["base_lr"] == 8e-3
    assert config["data"] is None


def help_text(capsys, *command):
    assert main([*command]) == 0
    return capsys.readouterr().out


def option_names(settings, prefix="--"):
    """Options of all settings, with dots where they are nested, and their defaults."""
    for field in dataclasses.fields(settings):
        value, name = getattr(settings, field.name, None), prefix + field.name.replace("_", "-")
        yield from (
            option_names(value, f"{name}.") if dataclasses.is_dataclass(value) else [(name, value)]
        )


@pytest.mark.parametrize(
    ("command", "settings"),
    [
        ("pretrain", PretrainConfig()),
        ("demo", config_from_dict(DEMO)),
        ("evaluate", EvaluateSettings(None)),
        ("score", ScoreSettings()),
    ],
)
def test_help_has_every_option_with_dashes_and_its_default(command, settings, capsys):
    text = help_text(capsys, command, "--help", "all")
    assert not re.search(r"--[a-z.-]+_(?!config)", text.replace("--print_config", ""))
    for option, default in option_names(settings):
        entry = re.search(rf"^\s+{re.escape(option)}[ ,\n](.*?)(?=^\s+--|\Z)", text, re.M | re.S)
        assert entry, option
        described = " ".join(entry[1].split())
        assert re.search(r"[a-z]{3,}", described.partition("(")[0]), option
        shown = isinstance(default, (str, int, float)) and not isinstance(default, bool)
        assert f"default: {default}" in described or not shown, (option, described)


def test_help_names_every_command_and_what_is_usually_set(capsys):
    assert help_text(capsys, "--version") == f"{__version__}\n"
    text = help_text(capsys, "--help")
    for command in COMMANDS:
        assert re.search(rf"^\s+{command}\s+\w+", text, re.M), command
    text = help_text(capsys, "pretrain", "--help")
    assert all(name in text for name in recipe_names())
    shown = set(re.findall(r"^  (--[\w-]+)", text, re.M))
    assert {"--data", "--image-size", "--mixture", "--seed"} <= shown
    assert len(shown) <= 18


def test_torch_is_not_loaded_for_help_and_for_mistakes(tmp_path):
    said = {
        ("--help",): "pretrain",
        ("pretrain", "--data=nowhere"): "nowhere does not exist",
        ("pretrain", "--mixture=masking"): "give for instance masking=1",
        ("evaluate", "--data", "no/where/at/all"): "does not exist",
        ("restore", "--checkpoint=no/where"): "there is no checkpoint at no/where; give a run's",
        ("demo", "--resume"): "there is no option --resume",
        ("score", "--batch-sise=3"): "no option --batch-sise; nearest: --batch-size",
        ("pretrian",): "there is no command 'pretrian'",
    }
    code = (
        "import sys; from backfold.cli.main import main\n"
        f"for arguments in {list(said)}: main(list(arguments))\n"
        "print(sorted({'torch', 'timm', 'numpy', 'torchvision'} & set(sys.modules)))"
    )
    finished = subprocess.run(
        [sys.executable, "-c", code], cwd=tmp_path, capture_output=True, text=True, check=True
    )
    for words in said.values():
        assert words in finished.stdout + finished.stderr
    assert finished.stdout.splitlines()[-1] == "[]"


def test_a_run_is_exported_and_replaced_on_request(finished, tmp_path, refused, capsys):
    out = tmp_path / "out"
    command = ["export", f"--checkpoint={finished}", f"--out={out}"]
    assert main(command) == 0
    assert capsys.readouterr() == (f"timm: {out}\n", "")
    images = torch.rand(2, 1, 28, 28)
    ours, theirs = Backfold.load(finished), timm.create_model(f"local-dir:{out}", pretrained=True)
    with torch.no_grad():
        vectors = theirs.eval()(ours.run.statistics.normalize(images))
    torch.testing.assert_close(vectors, ours.embed(images), rtol=1e-5, atol=1e-5)
    refused(command, "out exists; give --overwrite")
    assert main([*command, "--format=pt2", "--overwrite"]) == 0
    assert (out / "model.pt2").is_file()
    assert not (out / "config.json").exists()


@pytest.mark.slow
def test_two_processes_make_one_run(tiny, make_parquet, tmp_path):
    arguments = [*tiny, "--devices=2", "--data", str(make_parquet()), "--out", "here"]
    finished = subprocess.run(
        [sys.executable, "-m", "backfold.cli.main", "pretrain", *arguments],
        cwd=tmp_path,
        env=os.environ
        | {"OMP_NUM_THREADS": "1", "PYTHONWARNINGS": "error::FutureWarning:backfold"},
        capture_output=True,
        text=True,
        check=False,
    )
    assert finished.returncode == 0, finished.stderr
    assert finished.stdout == "run: here\n"
    folder = RunFolder(tmp_path / "here")
    lines = folder.metrics.read_text().splitlines()
    assert [line.split(",")[0] for line in lines] == ["step", "1", "2"]
    assert folder.log.read_text().count("backbone written") == 1
    assert load_pretrained(folder.root).step == 2


@pytest.mark.slow
def test_the_demo_from_images_to_report(
    tiny, make_parquet, finished, monkeypatch, tmp_path, capsys
):
    monkeypatch.chdir(tmp_path)
    shutil.copytree(finished, "runs/demo")  # the demo may be run again: its folder is its own
    data = make_parquet("data/train.parquet", count=200).parent
    make_parquet("data/test.parquet", count=40, first=300)
    less = ["--max-steps=3", "--pretext=masking"]  # the last word counts
    assert main(["demo", "--data", str(data), *tiny, *less]) == 0
    printed = capsys.readouterr().out
    lines = printed.splitlines()
    assert lines[-1] == "report: runs/demo/report.html"
    assert lines[-2].startswith("Did pretraining pay? ")
    for word in ("Nearest", "Linear", "all labels", "10 labels", "before", "pretrained", "pixels"):
        assert word in printed
    rows = json.loads(Path("runs/demo/evaluation.json").read_text())
    assert sum(row["protocol"] != "layers" for row in rows) == 4 * (3 + 2)
    assert Path("runs/demo/report.html").stat().st_size > 10_000
    assert json.loads(Path("runs/demo/run.json").read_text())["steps"] == 3
