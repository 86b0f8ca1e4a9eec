"""Each mistake of a user gives one line with the remedy, exit code 2, and nothing half-written."""

import subprocess
import sys
from pathlib import Path

import pytest

from backfold.cli.main import main, recipe_names
from backfold.data.files import WAYS

# From Python 3.12 on, forking a process with threads warns; the evaluation's loaders fork workers.
pytestmark = pytest.mark.filterwarnings(
    "ignore:This process .* is multi-threaded:DeprecationWarning"
)


@pytest.fixture
def pretrain_refused(refused, tiny, tmp_path):
    """Refuse a pretraining, of which no folder may be left."""

    def run(arguments, *parts, out=tmp_path / "out"):
        line = refused(["pretrain", *tiny, f"--out={out}", *arguments], *parts)
        assert not out.exists()
        return line

    return run


def test_data_that_are_not_there(pretrain_refused, tmp_path):
    (tmp_path / "empty").mkdir()
    texts = tmp_path / "texts"
    texts.mkdir()
    (texts / "a.txt").write_text("no image")
    pretrain_refused([f"--data={tmp_path / 'missing'}"], "missing does not exist; give a folder")
    pretrain_refused([f"--data={tmp_path / 'empty'}"], "empty holds no images; give a folder")
    pretrain_refused([f"--data={texts}"], "texts holds no images", "*.png")
    pretrain_refused([f"--data={texts / 'a.txt'}"], "is a single file; give a folder")
    (texts / "a.parquet").write_bytes(b"PAR1")
    pretrain_refused([f"--data={texts / 'a.parquet'}"], "no readable parquet file", "replace it")


def test_a_broken_file_is_skipped_and_named(make_folder, tiny, tmp_path, capsys):
    out = tmp_path / "out"
    folder = make_folder(broken=1)
    arguments = [f"--data={folder}", "--max-steps=9", f"--out={out}"]
    assert main(["pretrain", *tiny, *arguments]) == 0
    line = f"skipped: {folder / '039.png'}: not an image"
    assert capsys.readouterr().err.count(line) == 1
    assert (out / "train.log").read_text().count(line) == 1


def test_too_many_broken_files(make_folder, refused, tiny, tmp_path):
    arguments = [f"--data={make_folder(broken=6)}", "--max-steps=9", f"--out={tmp_path / 'out'}"]
    refused(
        ["pretrain", *tiny, *arguments], "images can't be read, 1 are allowed", "mend or remove"
    )


def test_nothing_but_broken_files(make_folder, pretrain_refused):
    pretrain_refused([f"--data={make_folder(broken=40)}"], "none of 16 sampled images can be read")


@pytest.mark.parametrize(
    ("argument", "parts"),
    [
        ("--backbone=vit_smal_patch16_224", ("'vit_smal_patch16_224'", "vit_small_patch16_224")),
        ("--pretext=maskin", ("'maskin'", "nearest: masking", "denoising")),
        ("--tasks.mixture.sortin=1", ("'sortin'", "nearest: sorting")),
        ("--image-size=30", ("30x30 is no multiple of the 7x7 patches", "give a multiple")),
        ("--image-size=28x", ("'28x' is neither N nor HxW; give",)),
        ("--image-size=0", ("neither N nor HxW",)),
        ("--backbone-options.depht=1", ("'depht' is no part", "nearest: depth")),
        ("--tasks.masking.mask-patch-size=29", ("29, larger than the 28x28", "give 28 or less")),
        ("--tasks.masking.mask-ratio=1.5", ("mask_ratio is 1.5; give a share",)),
        ("--tasks.sorting.sorting-patch-size=20", ("1 whole patches",)),
        ("--pretext=colorization", ("colorization needs more than 1 channel",)),
        ("--batch-size=64", ("54 images are fewer than one global batch of 64", "--batch-size")),
        ("--micro-batch=0", ("micro_batch is 0", "give 1 or more")),
        ("--micro-batch=some", ("--micro-batch",)),
        ("--derivative=forward", ("--derivative",)),
        (
            "--derivative=finite-difference --precision=bf16-mixed",
            ("finite-difference step needs float32", "--precision 32-true"),
        ),
        (
            "--tasks.masking.hidden-share=0.5 --tasks.masking.mask-patch-size=5",
            ("no multiple", "hidden_share"),
        ),
        ("--init=nowhere.safetensors", ("nowhere.safetensors",)),
        ("--accelerator=abacus", ("can't use accelerator 'abacus'", "--accelerator auto")),
        ("--max-steps=0", ("max_steps is 0; give 1 or more",)),
        ("--epochs=-3", ("epochs is -3; give a positive number",)),
        ("--precision=64", ("--precision", "32-true")),
        ("--batch-size=many", ("--batch-size", "many")),
        ("--batch-sise=8", ("batch", "sise")),
        ("--recipe=mnist", ("unknown recipe 'mnist'; choose from", *recipe_names())),
        ("--embedding.layer=0", ("embedding layer 0 is not negative", "-1")),
        ("--config=nowhere.yaml", ("--config", "nowhere.yaml")),
    ],
)
def test_settings_that_cannot_be(argument, parts, pretrain_refused, make_parquet):
    task = ["--pretext=sorting"] if "sorting" in argument else []
    task = ["--pretext=mixture"] if "mixture" in argument else task
    line = pretrain_refused([f"--data={make_parquet()}", *task, *argument.split()])
    for part in parts:
        assert part in line.replace("_", "-") or part in line


def test_colour_images_have_no_two_channels(pretrain_refused, make_folder):
    arguments = [f"--data={make_folder()}", "--channels=2"]
    pretrain_refused(arguments, "none can be given 2 channels", "--channels")


@pytest.mark.parametrize(
    ("text", "parts"),
    [
        ("batch_sise: 8\n", ("batch_sise",)),
        ("optimizer: {base_lrr: 8}\n", ("base_lrr",)),
        ("batch_size: many\n", ("batch", "size", "many")),
        ("tasks: {masking: {mask_ratio: most}}\n", ("mask_ratio", "most")),
        ("backbone: [a\nb: {\n", ("settings.yaml", "is no YAML", "line 2")),
        ("just words\n", ("settings.yaml", "holds no settings", "batch_size: 64")),
    ],
)
def test_broken_settings_files(text, parts, pretrain_refused, tmp_path):
    path = tmp_path / "settings.yaml"
    path.write_text(text)
    line = pretrain_refused([f"--config={path}"])
    for part in parts:
        assert part in line.replace("-", "_") or part in line


def test_evaluating_what_cannot_be(run_folder, refused, make_parquet, make_folder, snapshot):
    before = snapshot(run_folder)
    plain = make_parquet("plain.parquet", labelled=False)
    evaluate = ["evaluate", f"--checkpoint={run_folder}", "--accelerator=cpu"]
    refused([*evaluate, f"--data={plain}"], "plain.parquet has no labels; give a folder with one")
    refused([*evaluate, f"--data={make_folder()}"], "images has no labels")
    refused([*evaluate, "--data=nowhere"], "nowhere does not exist")
    refused([*evaluate, "--protocols=knn,linaer"], "unknown protocol 'linaer'; choose from knn")
    refused([*evaluate, "--protocols="], "unknown protocol ''")
    refused([*evaluate, "--draws=0"], "draws is 0; give 1 or more")
    refused([*evaluate, "--labels=1000"], "fewer than the 1000 labels a class")
    refused([*evaluate, "--embedding.layer=-9"], "has no embedding layer -9", "choose from layer")
    refused([*evaluate, "--accelerator=abacus"], "can't use accelerator 'abacus'", "try auto")
    assert snapshot(run_folder) == before


@pytest.mark.parametrize("place", ["file/run", "/proc/run"])
def test_an_evaluation_that_cannot_be_written(place, run_folder, refused, tmp_path):
    (tmp_path / "file").write_text("precious")
    arguments = ["evaluate", f"--checkpoint={run_folder}", f"--out={tmp_path / place}"]
    arguments += ["--accelerator=cpu", "--protocols=knn", "--labels=1", "--draws=1"]
    refused(arguments, "choose another --out")


def test_restoring_what_cannot_be(run_folder, refused, make_folder, tmp_path):
    good = make_folder() / "000.png"
    (tmp_path / "text.png").write_text("no image")
    out = tmp_path / "restored"
    restore = ["restore", f"--checkpoint={run_folder}", f"--out={out}"]
    refused([*restore, good, "missing.png"], "can't read missing.png: No such file", "check")
    refused([*restore, tmp_path / "text.png"], "text.png is no image", "give image files")
    refused([*restore, tmp_path], "can't read", "Is a directory")
    refused([*restore, good, "--pretext=maskin"], "nearest: masking")
    refused([*restore, good, "--pretext=colorization"], "colorization needs more than 1 channel")
    refused([*restore, good, "--num-steps=-1"], "num_steps is -1; give 0 or more")
    assert not out.exists()
    unwritable = [restore[0], restore[1], "--out=/proc/restored", good]
    refused(unwritable, "can't write /proc/restored", "choose another --out")


def test_without_the_demo_s_run_there_is_nothing_to_evaluate(refused, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    refused(["evaluate"], "runs/demo is no run")
    refused(["restore"], "no checkpoint at runs/demo")
    refused(["report"], "runs/demo")


def test_a_report_on_nothing(refused, tmp_path):
    refused(["report", tmp_path / "missing"])
    refused(["report", tmp_path])


def test_no_command_and_unknown_commands(refused):
    refused([])
    refused(["pretrian"], "pretrian")


def test_an_interrupted_run_says_how_to_go_on(monkeypatch, tiny, make_parquet, tmp_path, capsys):
    def interrupted(*_, **__):
        raise KeyboardInterrupt

    monkeypatch.setattr("backfold.training.recorder.write_preview", interrupted)
    arguments = ["pretrain", *tiny, f"--data={make_parquet()}", f"--out={tmp_path / 'out'}"]
    assert main(arguments) == 130
    assert "backfold pretrain --resume --out" in capsys.readouterr().err.splitlines()[-1]


def test_a_real_process_gives_one_line_and_code_2(tmp_path):
    finished = subprocess.run(
        [sys.executable, "-m", "backfold.cli.main", "pretrain", "--data", "nowhere"],
        cwd=tmp_path,
        capture_output=True,
        text=True,
        check=False,
    )
    assert finished.returncode == 2
    assert finished.stdout == ""
    assert finished.stderr == (f"backfold: error: nowhere does not exist; {WAYS}\n")
    assert list(Path(tmp_path).iterdir()) == []
