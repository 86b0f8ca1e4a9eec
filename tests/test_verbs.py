"""The verbs of the package: what the commands do, from Python, with images in memory too."""

import json
from pathlib import Path

import pyarrow.parquet as pq
import pytest
import torch
from torch.utils.data import Dataset

import backfold
from backfold.data.open import EMBEDDED, open_source
from backfold.errors import UserError
from backfold.pretext import Masking
from backfold.training.config import TaskSettings
from tiny_run import tiny_energy

SETTINGS = {
    "backbone": "vit_tiny_patch16_224", "image_size": 28, "batch_size": 8, "max_steps": 3,
    "backbone_options": {"patch_size": 7, "embed_dim": 16, "depth": 1, "num_heads": 2},
    "held_out": 8, "accelerator": "cpu", "devices": 1, "precision": "32-true", "num_workers": 0,
    "tasks": TaskSettings(masking=Masking(mask_patch_size=7)), "optimizer": {"base_lr": 1e-3},
}  # fmt: skip
NOTEBOOKS = Path(__file__).parent.parent / "docs" / "notebooks"
SMALLER = {"own_images": ("epochs=20", "epochs=2"), "own_loop": ("range(150)", "range(60)")}
HERE = {"accelerator": "cpu", "num_workers": 0}


class Pairs(Dataset):
    """Labelled images, as torchvision's data sets give them."""

    def __init__(self, count):
        source = open_source(EMBEDDED / "fashion_mnist_train.parquet", "train", labelled=True)
        self.images = torch.stack([source.read(index) for index in range(count)])
        self.targets = source.labels[:count].tolist()

    def __len__(self):
        return len(self.images)

    def __getitem__(self, index):
        return self.images[index], self.targets[index]


@pytest.fixture(scope="module")
def images():
    return Pairs(80)


@pytest.fixture(scope="module")
def run(images, tmp_path_factory):
    out = tmp_path_factory.mktemp("verbs") / "run"
    return backfold.pretrain(images.images, out=out, **SETTINGS)


@pytest.mark.parametrize("watch_labels", [False, True])
def test_a_callback_sees_every_step_and_labels_are_watched_if_asked_for(
    images, tmp_path, watch_labels
):
    seen = []
    backfold.pretrain(
        images, out=tmp_path, callback=lambda step, loss, last: seen.append((step, loss, last)),
        watch_labels=watch_labels, **SETTINGS,
    )  # fmt: skip
    assert [step for step, _, _ in seen] == [1, 2, 3]
    for _, loss, last in seen:
        assert loss > 0
        assert last.clean.shape == last.restored.shape == (8, 1, 28, 28)
    (*_, last) = json.loads((tmp_path / "health.json").read_text())["history"]
    assert (last["knn"] is not None) == watch_labels


def test_images_in_memory_are_files_images(images, run, tmp_path):
    """The same images in a file give the same weights."""
    table = pq.read_table(EMBEDDED / "fashion_mnist_train.parquet").slice(0, 80)
    pq.write_table(table, tmp_path / "images.parquet")
    other = backfold.pretrain(tmp_path / "images.parquet", out=tmp_path / "run", **SETTINGS)
    for ours, theirs in zip(
        run.run.energy.parameters(), other.run.energy.parameters(), strict=True
    ):
        assert torch.equal(ours, theirs)
    assert torch.equal(run.embed(images.images), backfold.load(run.path).embed(images.images))
    assert run.run.config.optimizer.base_lr == 1e-3


def test_a_run_goes_through_the_other_verbs(images, run, tmp_path):
    rows = backfold.evaluate(run, data=images, protocols=["knn"], labels=["2"], draws=2, **HERE)
    assert {row.data for row in rows} == {"Pairs in memory"}
    assert {"pretrained", "before", "pixels"} <= {row.contender for row in rows}
    assert (backfold.export(run, out=tmp_path / "timm") / "model.safetensors").is_file()
    data = EMBEDDED / "fashion_mnist_test.parquet"
    table = backfold.score(run, data=data, out=str(tmp_path / "scores.parquet"), **HERE)
    assert table.column_names == ["path", "energy", "error_masking"]
    table = backfold.score(run, data=images.images, out=tmp_path / "memory.csv", **HERE)
    assert table["path"].to_pylist()[:2] == ["Tensor item 0", "Tensor item 1"]
    found = backfold.stats(images.images, max_images=20)
    assert (found.images, found.looked_at, found.channels) == (80, 20, 1)


def test_images_in_memory_have_a_limit_too(images, tmp_path):
    with pytest.raises(UserError, match=r"none of .* can be used"):
        backfold.pretrain(images.images, out=tmp_path / "run", max_pixels=100, **SETTINGS)
    with pytest.raises(UserError, match=r"all pixels of 80 images are 0.027"):
        backfold.pretrain(torch.full_like(images.images, 7.0), out=tmp_path / "run", **SETTINGS)
    jittered = SETTINGS | {"augmentation": {"color_jitter": 0.4}, "out": tmp_path / "run"}
    with pytest.raises(UserError, match=r"color_jitter is 0.4, .*; it is for values of 0 to 1"):
        backfold.pretrain(300 + images.images.float(), **jittered)
    with pytest.raises(UserError, match="channels is -1"):
        backfold.stats(images.images, channels=-1)


def test_what_was_in_memory_has_no_file(run):
    with pytest.raises(UserError, match="Tensor in memory does not exist"):
        backfold.evaluate(run, **HERE)
    with pytest.raises(UserError, match=r"the run's own data are not there: .*; or usual"):
        run.score(torch.zeros(1, 1, 28, 28))
    with pytest.raises(UserError, match="optimizer"):
        backfold.pretrain(out=run.path / "x", optimizer={"base_lrr": 1.0})


def test_a_loss_of_one_s_own(images):
    clean, mask = images.images[:4].float() / 255, torch.ones(4, 1, 28, 28, dtype=torch.bool)

    def squares(restored, clean, loss_mask):
        return ((restored - clean).square() * loss_mask).mean()

    given = backfold.training_step(tiny_energy(28, 1), clean + 0.1, clean, mask, loss=squares)
    torch.testing.assert_close(given[0], (given[1] - clean).square().mean())


@pytest.mark.parametrize("path", sorted(NOTEBOOKS.glob("*.ipynb")), ids=lambda path: path.stem)
def test_notebooks_run(path, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    scope, text, (given, smaller) = {}, path.read_text(), SMALLER[path.stem]
    assert text.count(given) == 1
    for cell in json.loads(text.replace(given, smaller))["cells"]:
        if cell["cell_type"] == "code":
            assert not cell["outputs"]
            exec("".join(cell["source"]), scope)
