"""Every shipped recipe takes two steps on small random images."""

import json

import pytest
import yaml

from backfold.cli.main import main, recipe_names, recipe_path

# What makes a recipe's own kind of backbone small, by the start of the timm model's name.
SMALLER = {
    "vit": {"depth": 1, "embed_dim": 48, "num_heads": 3},
    "swin": {"depths": [1, 1], "num_heads": [1, 2], "embed_dim": 16, "window_size": 4},
    "convnext": {"depths": [1, 1, 1, 1], "dims": [8, 16, 24, 32]},
    "resnet": {"layers": [1, 1, 1, 1], "channels": [8, 16, 24, 32]},
}
IMAGE_SIZES = {28: 28, 32: 32}  # of the recipes; larger ones shrink to 64


@pytest.mark.parametrize("name", recipe_names())
def test_a_recipe_runs(name, make_folder, tmp_path):
    text = recipe_path(name).read_text()
    assert text.startswith("# ")  # how to use it
    recipe = yaml.safe_load(text)
    # A recipe is about method: where data lie and what the machine has is not its business.
    assert not {"data", "out", "accelerator", "num_workers"} & recipe.keys()
    kind = next(kind for kind in SMALLER if recipe.get("backbone", "vit").startswith(kind))
    size = IMAGE_SIZES.get(recipe.get("image_size"), 64)
    out = tmp_path / "out"
    arguments = [
        f"--recipe={name}", f"--data={make_folder()}", f"--out={out}", f"--image-size={size}",
        "--batch-size=8", "--max-steps=2", "--held-out=4", "--accelerator=cpu", "--devices=1",
        "--num-workers=0", "--precision=32-true",
        *(f"--backbone-options.{key}={value}" for key, value in SMALLER[kind].items()),
    ]  # fmt: skip
    assert main(["pretrain", *arguments]) == 0
    facts = json.loads((out / "run.json").read_text())
    assert facts["steps"] == 2
    assert facts["image_size"] == [size, size]
    assert facts["channels"] == 3
    config = yaml.safe_load((out / "config.yaml").read_text())
    for key in {"backbone", "pretext", "epochs", "watch_every", "invariance"} & recipe.keys():
        assert config[key] == recipe[key]
    assert (out / "backbone.safetensors").exists()
