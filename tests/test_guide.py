"""The guides: every step of each page runs in order, on tiny images."""

import csv
import re
import shlex
from contextlib import redirect_stderr, redirect_stdout
from io import StringIO
from pathlib import Path

import numpy as np
import pytest
import tifffile
import timm
from PIL import Image
from safetensors.torch import load_file

from backfold import Backfold
from backfold.cli.main import main

DOCS = Path(__file__).parents[1] / "docs"
PAGE, DEFECTS = DOCS / "your-own-images.md", DOCS / "defects.md"
CLASSES = ("columns", "rows", "slanted")
HEIGHT, WIDTH, CHANNELS = 32, 48, 4
UNLABELLED, TRAIN, TEST = 16, 12, 6  # images a class
# The pages' numbers are for real images: these make them small.
SMALLER = {
    "192x320": f"{HEIGHT}x{WIDTH}",
    "--backbone vit_tiny_patch16_224": "--backbone test_vit",
    "--epochs 200": "--epochs 3",
    "--batch-size 64": "--batch-size 16",
    "SEEDS = 30, 32, 3e-4, (0, 1, 2)": "SEEDS = 8, 12, 1e-3, (0, 1)",
}
SMALLER_DEFECTS = {
    "--image-size 224": "--image-size 32 --batch-size 8 --tasks.masking.mask_patch_size 4",
    "vit_small_patch16_224": (
        "vit_tiny_patch16_224 --optimizer.base_lr 0.01 --backbone_options "
        "'{patch_size: 4, embed_dim: 32, depth: 2, num_heads: 2, weight_init: jax}'"
    ),
    "--epochs 400": "--epochs 10",
}
LAST = Path("runs/microscope/checkpoints/last.ckpt")


def draw(kind, random):
    """A 16-bit picture (channels, height, width) of waves, whose direction is the class."""
    y, x = np.mgrid[:HEIGHT, :WIDTH]
    along = {"columns": x, "rows": y, "slanted": (x + y) / np.sqrt(2)}[kind]
    wave = np.sin(along / 3 + random.uniform(0, 2 * np.pi))
    gains = random.uniform(4000, 10000, (CHANNELS, 1, 1))
    picture = 20000 + gains * wave + random.normal(0, 1500, (CHANNELS, HEIGHT, WIDTH))
    return picture.clip(0, 65535).astype(np.uint16)


def write_images():
    random = np.random.default_rng(0)
    for kind in CLASSES:
        names = [
            *(f"microscope/day{number % 2}/{kind}{number}.tif" for number in range(UNLABELLED)),
            *(f"labelled/train/{kind}/{number}.tif" for number in range(TRAIN)),
            *(f"labelled/test/{kind}/{number}.tiff" for number in range(TEST)),
        ]
        for name in names:
            Path(name).parent.mkdir(parents=True, exist_ok=True)
            tifffile.imwrite(name, draw(kind, random), photometric="minisblack")


def run_shell(code, outputs):
    for line in code.replace("\\\n", " ").splitlines():
        words = shlex.split(line)
        assert words[0] == "backfold", line
        name = "resume" if "--resume" in words else words[1]
        if name == "resume":  # as if the run had been killed behind the checkpoint before the last
            newest, previous = sorted(LAST.parent.glob("step-*.ckpt"), reverse=True)
            newest.unlink()
            LAST.unlink()
            LAST.write_bytes(previous.read_bytes())
        outputs[name] = capture(lambda given=words[1:]: main(given))


def capture(run):
    """What the call prints; it returns None or 0."""
    with redirect_stdout(StringIO()) as out, redirect_stderr(out):
        assert not run(), out.getvalue()
    return out.getvalue()


def follow(page, smaller_numbers):
    """What each command printed, and each Python block's names and print, in the page's order.

    Numbers are made small; each stands once on its page.
    """
    text, outputs, scripts = page.read_text(encoding="utf-8"), {}, []
    for given, smaller in smaller_numbers.items():
        assert text.count(given) == 1, given
        text = text.replace(given, smaller)
    blocks = re.findall(r"^```(sh|python)\n(.*?)^```$", text, flags=re.DOTALL | re.MULTILINE)
    for language, code in blocks:
        if language == "sh":
            run_shell(code, outputs)
            continue
        names = {"__name__": "__main__"}
        script = compile(code, str(page), "exec")
        scripts.append((names, capture(lambda s=script, n=names: exec(s, n))))
    return outputs, scripts


@pytest.mark.slow
def test_every_step_of_the_page_runs_and_does_what_it_says(tmp_path, monkeypatch):
    # One test, as processes that share tests out would each go through the whole page.
    monkeypatch.chdir(tmp_path)
    write_images()
    outputs, (fine_tuning, scores, vectors) = follow(PAGE, SMALLER)
    assert list(outputs) == [
        "stats", "pretrain", "resume", "report", "evaluate", "export", "score", "embed",
    ]  # fmt: skip
    assert "uint16 (48), from " in outputs["stats"]
    for word in ("loss ", "gain ", "images/s", "held out: masking ", "effective rank "):
        assert word in outputs["pretrain"]
    assert "Did pretraining pay?" in Path("runs/microscope/report.html").read_text()
    for word in ("Nearest", "Linear", "before", "pretrained", "pixels", "±"):
        assert word in outputs["evaluate"]
    step, total = re.search(r"resuming at step (\d+) of (\d+)", outputs["resume"]).groups()
    assert 0 < int(step) < int(total)
    check_fine_tuning(*fine_tuning)
    check_scores(scores[1])
    similarities = [float(line.split()[0]) for line in vectors[1].splitlines()]
    assert similarities[0] == 1.0
    assert similarities == sorted(similarities, reverse=True)


def check_fine_tuning(names, printed):
    trained, again = load_file("exported/model.safetensors"), names["create"](True, 0)
    assert all(again.state_dict()[name].equal(values) for name, values in trained.items())
    lines = printed.splitlines()
    assert [line.partition(":")[0] for line in lines] == ["pretrained", "from scratch"]
    for line, runs in zip(lines, names["results"].values(), strict=True):
        assert f": {runs.mean():.1f} ± {runs.std():.1f} % of 18 test images" in line
        # Waves by direction are easy: labels that were mixed up would leave chance.
        assert runs.mean() > 60


def check_scores(printed):
    rows = list(csv.DictReader(Path("scores.csv").read_text().splitlines()))
    assert Path("scores.html").is_file()
    highest = max(rows, key=lambda row: float(row["error_masking"]))
    assert printed.splitlines()[0].endswith(highest["path"])
    # bf16 and batches of other sizes round otherwise.
    energy = float(Backfold.load("runs/microscope").energy([highest["path"]]))
    assert energy == pytest.approx(float(highest["energy"]), rel=0.02, abs=0.5)


def write_parts():
    """Good parts are checked; a bad one has a grey square."""
    random = np.random.default_rng(0)
    names = [*(f"good/{number}" for number in range(48)), "new/0", "new/1"]
    names += [f"labelled/{kind}/{number}" for kind in ("good", "bad") for number in range(8)]
    y, x = np.mgrid[:32, :32]
    for name in names:
        shift = random.integers(0, 8)
        part = 70 + 110 * (((x + shift) // 4 + y // 4) % 2) + random.normal(0, 5, (32, 32))
        if "bad" in name or name == "new/1":
            part[8:20, 12:24] = 125 + random.normal(0, 5, (12, 12))
        path = Path("parts", name).with_suffix(".png")
        path.parent.mkdir(parents=True, exist_ok=True)
        Image.fromarray(np.stack([part] * 3, axis=2).clip(0, 255).astype(np.uint8)).save(path)


@pytest.mark.slow
def test_defects_are_found_as_the_page_says(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    write_parts()
    outputs, [(names, _)] = follow(DEFECTS, SMALLER_DEFECTS)
    assert list(outputs) == ["pretrain", "score", "export"]
    aurocs = {line.split()[2]: float(line.split()[1][:-1]) for line in
              outputs["score"].splitlines() if line.startswith("AUROC")}  # fmt: skip
    assert aurocs["largest_alone"] > 0.9
    assert aurocs["joined"] > 0.8
    found = tifffile.imread("maps/0000001.tiff")
    inside = np.zeros((32, 32), bool)
    inside[8:20, 12:24] = True
    assert found[inside].mean() > found[~inside].mean() + 1
    assert len(names["scores"]["joined"]) == 2
    assert timm.create_model("local-dir:exported-vit", pretrained=True).num_features == 32
