"""An image that crashes its decoder is skipped before the first step, too."""

import os

import pytest

from backfold.data.open import open_source
from backfold.data.source import stratified_split
from backfold.training import images
from backfold.training.pretrain import pretrain
from backfold.training.run import RunFolder

pytestmark = [
    # From Python 3.12 on, forking a process with threads warns; torch has threads and forks.
    pytest.mark.filterwarnings("ignore:This process .* is multi-threaded:DeprecationWarning"),
]


class Deadly:
    """Another source, in which some images end whoever reads them."""

    labels, class_names = None, ()

    def __init__(self, source, crash):
        self.source, self.crash, self.name = source, crash, source.name
        self.describe = source.describe

    def __len__(self):
        return len(self.source)

    def read(self, index, min_side=None):
        if index in self.crash:
            os._exit(3)
        return self.source.read(index, min_side)


def test_a_run_starts_and_ends_beside_an_image_that_crashes(tiny, quiet, monkeypatch):
    config = tiny(num_workers=1, prefetch=1, channels=1, max_broken_share=0.5)
    whole = open_source(config.data, "train")
    _, held_out = stratified_split(len(whole), 8 / len(whole), config.seed)
    crash = int(held_out[0])
    monkeypatch.setattr(images, "open_source", lambda *_: Deadly(whole, [crash]))
    pretrain(config, console=quiet)
    folder = RunFolder(config.out)
    assert folder.backbone.exists()
    assert f"skipped: {whole.describe(crash)}" in folder.log.read_text()
