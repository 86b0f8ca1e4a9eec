"""Each mistake of a user gives one line with the remedy, exit code 2, and nothing half-written."""

import subprocess
import sys

import pytest

from backfold.cli.main import main, recipe_names
from backfold.data.files import WAYS


@pytest.fixture
def pretrain_refused(refused, tiny, tmp_path):
    """Refuse a pretraining, of which no folder may be left."""

    def run(arguments, *parts, out=tmp_path / "out"):
        line = refused(["pretrain", *tiny, f"--out={out}", *arguments], *parts)
        assert not out.exists()
        return line

    return run


def test_broken_files_are_skipped_and_named_until_there_are_too_many(
    make_folder, tiny, tmp_path, capsys, refused, pretrain_refused
):
    out = tmp_path / "out"
    folder = make_folder(broken=1)
    arguments = [f"--data={folder}", "--max-steps=9", f"--out={out}"]
    assert main(["pretrain", *tiny, *arguments]) == 0
    line = f"skipped: {folder / '039.png'}: not an image"
    assert capsys.readouterr().err.count(line) == 1
    assert (out / "train.log").read_text().count(line) == 1
    arguments = [f"--data={make_folder('six', broken=6)}", "--max-steps=9", f"--out={out}-six"]
    many = ("images can't be read, 1 are allowed", "mend or remove")
    refused(["pretrain", *tiny, *arguments], *many)
    colour = [f"--data={folder}", "--channels=2"]
    pretrain_refused(colour, "images can be used", "--channels", out=tmp_path / "two")
    among = folder / "runs" / "one"  # its pictures would be images of the next
    pretrain_refused([f"--data={folder}"], "lies among the images", "--out", out=among)


@pytest.mark.parametrize(
    ("argument", "parts"),
    [
        ("--backbone=vit_smal_patch16_224", ("'vit_smal_patch16_224'", "vit_small_patch16_224")),
        ("--pretext=maskin", ("'maskin'", "nearest: masking", "denoising")),
        ("--pretext=mixture --tasks.mixture.sortin=1", ("'sortin'", "nearest: sorting")),
        ("--image-size=30", ("30x30 is no multiple of the 7x7 patches", "give a multiple")),
        ("--backbone-options.depht=1", ("option depht is 1", "such as depth")),
        ("--tasks.masking.mask-patch-size=29", ("29, larger than the 28x28", "give 28 or less")),
        ("--pretext=colorization", ("colorization needs more than 1 channel",)),
        ("--batch-size=64", ("54 images are fewer than one global batch of 64", "--batch-size")),
        ("--init=nowhere.safetensors", ("nowhere.safetensors",)),
        ("--accelerator=abacus", ("can't use accelerator 'abacus'", "--accelerator auto")),
        ("--hidden-blocks=9", ("hidden_blocks is 9; give 1 to 1",)),
        ("--embedding.layer=-9", ("can't give layer -9",)),
        ("--data=x/nope.parquet", ("x/nope.parquet does not exist",)),
        ("--tasks.masking.mask-ration=1", ("mask_ration' is no option", "masking.mask-ratio")),
        ("photos", ("'photos' is no option, and none takes it",)),
        ("--data", ("--data", "expected one argument", "--help all")),
        ("--compile=maybe", ("--compile: Expected bool, Literal['auto']. Got value: maybe",)),
        ("--loggers=wandb", ("--loggers: Expected a list. Got value: wandb; write '[wandb]'",)),
        ("--epochs=-3", ("epochs is -3; give a positive number",)),
        ("--batch-size=many", ("--batch-size", "many")),
        ("--batch-sise=8", ("batch", "sise")),
        ("--recipe=mnist", ("unknown recipe 'mnist'; choose from", *recipe_names())),
        ("--config=nowhere.yaml", ("--config", "nowhere.yaml")),
        ("--strategy=FSDP2", ("--strategy FSDP2: ", "second derivative", "--shard-optimizer")),
    ],
)
def test_settings_that_cannot_be(argument, parts, pretrain_refused, make_parquet):
    line = pretrain_refused([f"--data={make_parquet()}", *argument.split()])
    for part in parts:
        assert part in line.replace("_", "-") or part in line


@pytest.mark.parametrize(
    ("text", "parts"),
    [
        ("batch_sise: 8\n", ("batch_sise",)),
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


def test_without_a_run_there_is_nothing_to_work_on(refused, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    refused(["evaluate"], "runs/demo is no run")
    refused(["report"], "runs/demo")
    refused(["report", tmp_path])
    for command in ("restore", "embed", "score", "export"):
        refused([command], "no checkpoint at runs/demo")
    refused([])
    refused(["pretrian"], "pretrian")
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize(
    ("command", "parts"),
    [
        ("embed --out=vectors.txt", ["vectors.txt", ".parquet or .npz"]),
        ("embed --batch-size=0", ["batch_size is 0"]),
        ("embed --num-workers=-1", ["num_workers is -1"]),
        ("embed --data=nowhere", ["nowhere does not exist"]),
        ("embed --split=test", ["has no test split"]),
        ("score --out=scores.npz", ["scores.npz", ".parquet or .csv"]),
        ("score --num-steps=-1", ["num_steps is -1"]),
        ("score --part-size=0", ["part_size is 0; give 1 or more"]),
        ("score --seed=-1", ["seed is -1"]),
        ("evaluate --num-workers=-1", ["num_workers is -1"]),
        (f"evaluate --out={__file__}", [__file__, "a file; give a folder"]),
        ("score --usual-images=-1", ["usual_images is -1"]),
        ("score --usual-images=5", ["5 usual images; give 8 or more"]),
        ("score --usual-images=0 --maps=maps", ["maps need usual images"]),
        ("score --good=torn", ["good is 'torn'", "has the classes T-shirt/top, Trouser"]),
        ("score --usual=nowhere", ["nowhere does not exist"]),
        ("export --format=torchscript", ["--format", "torchscript", "pt2"]),
        ("restore missing.png", ["can't read missing.png: No such file", "check"]),
        ("restore .", ["can't read", "Is a directory"]),
        ("restore --pretext=maskin", ["nearest: masking"]),
        ("restore --pretext=colorization", ["colorization needs more than 1 channel"]),
        ("restore --num-steps=-1", ["num_steps is -1; give 0 or more"]),
        ("restore --step-size=-1", ["step_size is -1; give a positive number"]),
        ("restore --out=/proc/x", ["can't write /proc/x", "choose another --out"]),
        ("stats --data=nowhere", ["nowhere does not exist"]),
        ("stats --max-images=0", ["max_images is 0; give 1 or more"]),
        ("stats --num-workers=-1", ["num_workers is -1; give 0 or more"]),
    ],
)
def test_what_the_other_commands_refuse(finished, refused, command, parts, monkeypatch, tmp_path):
    monkeypatch.chdir(tmp_path)
    name, *arguments = command.split()
    if name != "stats":
        arguments.append(f"--checkpoint={finished}")
    refused([name, *arguments], *parts)
    assert list(tmp_path.iterdir()) == []


def test_a_real_process_gives_one_line_and_code_2(tmp_path):
    command = [sys.executable, "-m", "backfold.cli.main", "pretrain", "--data", "nowhere"]
    finished = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True, check=False)
    assert finished.returncode == 2
    assert finished.stdout == ""
    assert finished.stderr == (f"backfold: error: nowhere does not exist; {WAYS}\n")
    assert list(tmp_path.iterdir()) == []
