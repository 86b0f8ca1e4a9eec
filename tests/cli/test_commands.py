"""What the commands print and leave when all is well."""

import csv
import dataclasses
import json
import os
import re
import shlex
import subprocess
import sys

import pytest
import torch
import yaml
from safetensors.torch import load_file

from backfold.cli.commands import EvaluateSettings
from backfold.cli.inference import ScoreSettings
from backfold.cli.main import COMMANDS, main, recipe_names
from backfold.evaluation.results import read_rows
from backfold.training.config import PretrainConfig
from backfold.training.pretrained import load_pretrained
from backfold.training.run_folder import RunFolder
from backfold.version import __version__

EVALUATE = ["--labels=all,2", "--draws=2", "--accelerator=cpu"]

# The evaluation's loaders may have worker processes. From Python 3.12 on, forking a process with
# threads warns; torch has threads and forks workers.
pytestmark = pytest.mark.filterwarnings(
    "ignore:This process .* is multi-threaded:DeprecationWarning"
)


@pytest.fixture(autouse=True)
def wide_terminal(monkeypatch):
    monkeypatch.setenv("COLUMNS", "200")


def test_pretrain_names_the_run_on_stdout(tiny, make_parquet, tmp_path, capsys):
    arguments = ["pretrain", f"--data={make_parquet()}", f"--out={tmp_path / 'a b'}", *tiny]
    assert main(arguments) == 0
    assert capsys.readouterr().out == f"run: {tmp_path / 'a b'}\n"
    facts = json.loads((tmp_path / "a b" / "run.json").read_text())
    assert shlex.split(facts["command"]) == ["backfold", *arguments]


def test_overwriting_replaces_a_run(tiny, run_folder, tmp_path):
    (run_folder / "report.html").write_text("old")
    data = f"--data={tmp_path / 'images.parquet'}"
    arguments = ["pretrain", data, f"--out={run_folder}", *tiny, "--overwrite", "--seed=4"]
    assert main(arguments) == 0
    assert not (run_folder / "report.html").exists()
    assert yaml.safe_load((run_folder / "config.yaml").read_text())["seed"] == 4


def test_dashes_and_underscores_both_work(tiny, make_parquet, tmp_path):
    data = [f"--data={make_parquet()}"]
    dashed = [
        "--watch-labels=true", "--optimizer.base-lr=0.02", "--tasks.masking.mask-ratio", "0.3",
        "--augmentation.crop-scale=[0.5,1.0]",
    ]  # fmt: skip
    configs = []
    for name, style in (("a", lambda text: text), ("b", lambda text: text.replace("-", "_"))):
        given = [
            "--" + style(part[2:]) if part.startswith("--") and "=" not in part
            else re.sub(r"^--([^=]*)", lambda match: "--" + style(match[1]), part)  # noqa: B023
            for part in [*dashed, *tiny]
        ]  # fmt: skip
        assert main(["pretrain", *data, f"--out={tmp_path / name}", *given]) == 0
        config = yaml.safe_load((tmp_path / name / "config.yaml").read_text())
        configs.append(config | {"out": None})
    assert configs[0] == configs[1]
    assert configs[0]["optimizer"]["base_lr"] == 0.02
    assert configs[0]["tasks"]["masking"]["mask_ratio"] == 0.3
    assert configs[0]["watch_labels"] is True


def test_flags_override_a_file_and_a_file_overrides_a_recipe(tiny, make_parquet, tmp_path):
    settings = tmp_path / "settings.yaml"
    settings.write_text("seed: 7\nnum_steps: 2\n")
    arguments = ["--recipe=demo", f"--config={settings}", "--num-steps=3", *tiny]
    out = tmp_path / "out"
    assert main(["pretrain", f"--data={make_parquet()}", f"--out={out}", *arguments]) == 0
    config = yaml.safe_load((out / "config.yaml").read_text())
    assert (config["pretext"], config["seed"], config["num_steps"]) == ("mixture", 7, 3)
    facts = json.loads((out / "run.json").read_text())
    assert facts["tasks"] == ["masking", "sorting", "superresolution", "denoising"]


def test_without_data_and_backbone_the_demo_s_settings_are_used(monkeypatch, tmp_path, capsys):
    monkeypatch.chdir(tmp_path)
    arguments = ["--max-steps=1", "--held-out=8", "--watch-labels=false", "--num-workers=0"]
    arguments += ["--accelerator=cpu", "--devices=1", "--precision=32-true"]
    assert main(["pretrain", *arguments]) == 0
    captured = capsys.readouterr()
    assert "the demo's recipe on the embedded images" in captured.err
    assert captured.out == "run: runs/pretrain\n"
    config = yaml.safe_load((tmp_path / "runs" / "pretrain" / "config.yaml").read_text())
    assert config["pretext"] == "mixture"
    assert config["data"] is None


def help_text(capsys, *command):
    assert main([*command]) == 0
    return capsys.readouterr().out


def option_names(settings, prefix=""):
    """Names of all settings, with dots where they are nested."""
    for field in dataclasses.fields(settings):
        value = getattr(settings, field.name, None)
        if dataclasses.is_dataclass(value):
            yield from option_names(value, f"{prefix}{field.name}.")
        else:
            yield prefix + field.name, value


@pytest.mark.parametrize(
    ("command", "settings"),
    [
        ("pretrain", PretrainConfig()),
        ("demo", PretrainConfig()),
        ("evaluate", EvaluateSettings(None)),
        ("score", ScoreSettings()),
    ],
)
def test_help_has_every_option_with_dashes_and_its_default(command, settings, capsys):
    text = help_text(capsys, command, "--help", "all")
    assert not re.search(r"--[a-z.-]+_(?!config)", text.replace("--print_config", ""))
    for name, default in option_names(settings):
        option = "--" + name.replace("_", "-")
        entry = re.search(rf"^\s+{re.escape(option)}[ ,\n](.*?)(?=^\s+--|\Z)", text, re.M | re.S)
        assert entry, option
        described = " ".join(entry[1].split())
        assert re.search(r"[a-z]{3,}", described.partition("(")[0]), option
        assert "default:" in described or "required" in described, (option, described)
        if isinstance(default, (str, int, float)) and not isinstance(default, bool):
            assert f"default: {default}" in described, (option, described)


def test_help_of_the_whole_names_every_command(capsys):
    text = help_text(capsys, "--help")
    for command in COMMANDS:
        assert re.search(rf"^\s+{command}\s+\w+", text, re.M), command
    assert help_text(capsys, "--version") == f"{__version__}\n"


def test_pretraining_s_help_shows_what_is_usually_set(capsys):
    text = help_text(capsys, "pretrain", "--help")
    assert all(name in text for name in recipe_names())
    shown = set(re.findall(r"^  (--[\w-]+)", text, re.M))
    assert {"--data", "--image-size", "--mixture", "--seed"} <= shown
    assert len(shown) <= 18
    assert "--optimizer" not in text
    assert "Masking" not in text


def test_a_mixture_in_short(tiny, make_parquet, tmp_path):
    data, out = make_parquet(), tmp_path / "run"
    given = ["--mixture", "masking=3,sorting=1", f"--data={data}", f"--out={out}", *tiny]
    assert main(["pretrain", *given]) == 0
    config = yaml.safe_load((out / "config.yaml").read_text())
    assert config["pretext"] == "mixture"
    assert config["tasks"]["mixture"] == {"masking": 3, "sorting": 1}


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (["--help"], "pretrain"),
        (["pretrain", "--data=nowhere"], "nowhere does not exist"),
        (["pretrain", "--mixture=masking"], "give for instance masking=1"),
        (["evaluate", "--data", "no/where/at/all"], "does not exist"),
        (["score", "--batch-sise=3"], "no option --batch-sise; nearest: --batch-size"),
        (["pretrian"], "there is no command 'pretrian'"),
    ],
)
def test_torch_is_not_loaded_to_say_so(arguments, said, tmp_path):
    code = f"import sys; from backfold.cli.main import main; main({arguments}); "
    loaded = "print(sorted({'torch', 'timm', 'numpy', 'torchvision'} & set(sys.modules)))"
    finished = subprocess.run(
        [sys.executable, "-c", code + loaded],
        cwd=tmp_path, capture_output=True, text=True, check=True,
    )  # fmt: skip
    assert said in finished.stdout + finished.stderr
    assert finished.stdout.splitlines()[-1] == "[]"


def test_printed_settings_can_be_fed_back(tiny, make_parquet, tmp_path, capsys):
    data = make_parquet()
    given = [f"--data={data}", *tiny, "--tasks.masking.mask-ratio=0.35"]
    for flag in ("--print_config", "--print-config"):
        with pytest.raises(SystemExit) as stopped:
            main(["pretrain", *given, flag])
        assert stopped.value.code == 0
    printed = capsys.readouterr().out
    (tmp_path / "printed.yaml").write_text(printed[: len(printed) // 2])
    assert printed == 2 * printed[: len(printed) // 2]
    runs = [["--config", str(tmp_path / "printed.yaml")], given]
    for name, arguments in zip("ab", runs, strict=True):
        assert main(["pretrain", *arguments, f"--out={tmp_path / name}"]) == 0
    left, right = (load_file(tmp_path / name / "backbone.safetensors") for name in "ab")
    assert all(torch.equal(left[name], right[name]) for name in left)
    config = yaml.safe_load((tmp_path / "a" / "config.yaml").read_text())
    assert config["tasks"]["masking"]["mask_ratio"] == 0.35


def test_evaluate_gives_the_same_again(run_folder, capsys):
    arguments = ["evaluate", f"--checkpoint={run_folder}", *EVALUATE]
    assert main(arguments) == 0
    printed = capsys.readouterr().out
    path = RunFolder(run_folder).evaluation
    metrics = csv.DictReader(RunFolder(run_folder).metrics.read_text().splitlines())
    last_step = max(int(line["step"]) for line in metrics)
    rows = read_rows(path)
    assert {row.protocol for row in rows} == {"knn", "linear"}
    assert {(row.data, row.step) for row in rows} == {("images.parquet", last_step)}
    assert printed.splitlines()[-1] == f"rows: {path}"
    assert main(arguments) == 0
    assert read_rows(path) == rows
    assert capsys.readouterr().out == printed


def test_evaluate_takes_a_checkpoint_file_other_data_and_another_place(
    run_folder, make_parquet, tmp_path
):
    data = make_parquet("other/train.parquet", count=60, first=100).parent
    make_parquet("other/test.parquet", count=30, first=200)
    out = tmp_path / "elsewhere"
    arguments = ["evaluate", f"--checkpoint={run_folder / 'checkpoints' / 'best.ckpt'}", *EVALUATE]
    assert main([*arguments, f"--data={data}", f"--out={out}", "--protocols=knn"]) == 0
    rows = read_rows(out / "evaluation.json")
    assert {row.protocol for row in rows} == {"knn"}
    accuracies = [row.mean for row in rows if row.case == "all labels"]
    assert accuracies
    assert all(abs(value * 30 / 100 - round(value * 30 / 100)) < 1e-6 for value in accuracies)
    assert not RunFolder(run_folder).evaluation.exists()
    assert main([*arguments, f"--data={data}", "--protocols=knn"]) == 0
    assert read_rows(RunFolder(run_folder).evaluation) == rows


def test_report_writes_one_page(run_folder, tmp_path, capsys):
    assert main(["report", str(run_folder)]) == 0
    assert capsys.readouterr().out == f"report: {run_folder / 'report.html'}\n"
    page = tmp_path / "page.html"
    assert main(["report", str(run_folder), "--out", str(page)]) == 0
    assert page.read_bytes() == (run_folder / "report.html").read_bytes()
    assert b"<html" in page.read_bytes()


@pytest.mark.slow
def test_a_real_process_runs_and_resumes(tiny, make_parquet, tmp_path):
    command = [sys.executable, "-m", "backfold.cli.main", "pretrain", "--out", "here"]
    for arguments in (["--data", str(make_parquet()), *tiny], ["--resume"]):
        finished = subprocess.run(
            [*command, *arguments],
            cwd=tmp_path,
            env={**os.environ, "PYTHONWARNINGS": "error::FutureWarning:backfold"},
            capture_output=True,
            text=True,
            check=False,
        )
        assert finished.returncode == 0, finished.stderr
        assert finished.stdout == "run: here\n"
    assert load_pretrained(tmp_path / "here").step == 2


@pytest.mark.slow
def test_two_processes_make_one_run(tiny, make_parquet, tmp_path):
    arguments = [*tiny, "--devices=2", "--max-steps=4", "--data", str(make_parquet())]
    finished = subprocess.run(
        [sys.executable, "-m", "backfold.cli.main", "pretrain", "--out", "here", *arguments],
        cwd=tmp_path,
        env={**os.environ, "OMP_NUM_THREADS": "1"},
        capture_output=True,
        text=True,
        check=False,
    )
    assert finished.returncode == 0, finished.stderr
    assert finished.stdout == "run: here\n"
    folder = RunFolder(tmp_path / "here")
    assert [line.split(",")[0] for line in folder.metrics.read_text().splitlines()] == [
        "step", "1", "4",
    ]  # fmt: skip
    assert folder.log.read_text().count("backbone written") == 1
    assert load_pretrained(folder.root).step == 4
