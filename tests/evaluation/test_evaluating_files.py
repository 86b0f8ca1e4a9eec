"""What evaluation does with files that can't be read, and with those that must not be."""

import logging
import os
import time

import numpy as np
import pytest
import torch
from PIL import Image

from backfold.data import guarded_loading
from backfold.data.arrays import BrokenImage
from backfold.data.statistics import ChannelStatistics
from backfold.embedding import EmbeddingChoice
from backfold.energy import EnergyModel
from backfold.errors import UserError
from backfold.evaluation import run as evaluation
from backfold.evaluation.run import LabelledImages, evaluate_run, open_labelled
from backfold.training.config import PretrainConfig
from backfold.training.pretrained import Pretrained

pytestmark = [
    # From Python 3.12 on, forking a process with threads warns; torch has threads and forks.
    pytest.mark.filterwarnings("ignore:This process .* is multi-threaded:DeprecationWarning"),
]
VIT = {"patch_size": 4, "embed_dim": 16, "depth": 1, "num_heads": 2}
CPU = torch.device("cpu")


class Shades:
    """Dark and bright images, two classes by turns; some are deadly."""

    name, class_names = "shades", ("dark", "bright")

    def __init__(self, count=24, **fates):
        self.labels = np.arange(count) % 2
        self.fates = fates

    def __len__(self):
        return len(self.labels)

    def read(self, index, _=None):
        if index in self.fates.get("crash", ()):
            os._exit(3)
        if index in self.fates.get("hang", ()):
            time.sleep(1000)
        if index in self.fates.get("broken", ()):
            raise BrokenImage("torn")
        noise = torch.randint(0, 60, (1, 8, 8), generator=torch.Generator().manual_seed(index))
        return (noise + 190 * int(self.labels[index])).to(torch.uint8)

    def describe(self, index):
        return f"image {index}"


@pytest.fixture
def pretrained():
    def make(**changes):
        config = PretrainConfig(
            backbone="vit_tiny_patch16_224", backbone_options=VIT, image_size=8, **changes
        )
        torch.manual_seed(0)
        energy = EnergyModel(config.backbone, image_size=8, channels=1, backbone_options=VIT)
        statistics = ChannelStatistics((0.5,), (0.4,))
        return Pretrained(energy.eval(), config, statistics, 1, (8, 8), 5)

    return make


def accuracies(run, images, num_workers):
    rows = evaluate_run(
        run, images, ["knn"], EmbeddingChoice(), labels_per_class=(None,), batch_size=5,
        num_workers=num_workers, device=CPU,
    )  # fmt: skip
    return [(row.backbone, row.accuracy_mean) for row in rows]


@pytest.fixture
def embedded(monkeypatch):
    """(embeddings, labels) that were evaluated."""
    seen = []
    original = evaluation.evaluate_embeddings

    def note(*arguments):
        seen.append(arguments[:4])
        return original(*arguments)

    monkeypatch.setattr(evaluation, "evaluate_embeddings", note)
    return seen


@pytest.mark.parametrize("fate", ["crash", pytest.param("hang", marks=pytest.mark.slow)])
def test_deadly_images_are_counted_and_skipped(pretrained, embedded, caplog, monkeypatch, fate):
    monkeypatch.setattr(guarded_loading, "BATCH_SECONDS", 2.0)
    monkeypatch.setattr(guarded_loading, "IMAGE_SECONDS", 0.5)
    run = pretrained()
    with caplog.at_level(logging.WARNING, "backfold"):
        found = accuracies(run, LabelledImages(Shades(**{fate: (7,)}), Shades(8)), 2)
    assert any(line.startswith("skipped: image 7: ") for line in caplog.messages)
    assert found == accuracies(run, LabelledImages(Shades(broken=(7,)), Shades(8)), 0)
    deadly, broken = embedded[:2], embedded[2:]
    for given, expected in zip(deadly, broken, strict=True):
        assert all(torch.equal(a, b) for a, b in zip(given, expected, strict=True))


def test_an_image_that_stands_in_keeps_its_own_label(pretrained, embedded):
    accuracies(pretrained(), LabelledImages(Shades(broken=(7,)), Shades(8, broken=(0,))), 0)
    for train, train_labels, test, test_labels in embedded:
        assert torch.equal(train[7], train[8])
        assert train_labels.tolist() == [0, 1, 0, 1, 0, 1, 0, 0, *[0, 1] * 8]
        assert torch.equal(test[0], test[1])
        assert test_labels.tolist() == [1, 1, 0, 1, 0, 1, 0, 1]


def test_too_many_end_the_evaluation(pretrained):
    images = LabelledImages(Shades(crash=(3, 7)), Shades(8))
    with pytest.raises(UserError, match="2 images can't be read, 1 are allowed: image 3: ends the"):
        accuracies(pretrained(), images, 1)


def test_too_large_images_are_broken_ones(tmp_path, pretrained):
    for part in ("train", "val"):
        for number in range(12):
            path = tmp_path / part / "ab"[number % 2] / f"{number:02}.png"
            path.parent.mkdir(parents=True, exist_ok=True)
            side = 20 if number == 5 else 10
            Image.new("L", (side, side), 20 * number).save(path)
    small = open_labelled(tmp_path, max_pixels=100)
    for source in (small.train, small.test):
        position = next(n for n in range(12) if "05.png" in source.describe(n))
        with pytest.raises(BrokenImage, match="100"):
            source.read(position)
    accuracies(pretrained(), small, 0)
    with pytest.raises(UserError, match="12 images in a row can't be read"):
        accuracies(pretrained(), open_labelled(tmp_path, max_pixels=99), 0)
