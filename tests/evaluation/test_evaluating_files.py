"""What evaluation does with files that crash or hang a decoder, or can't be read."""

import logging
import os
import time

import numpy as np
import pytest
import torch

from backfold.data import loading
from backfold.data.statistics import ChannelStatistics
from backfold.errors import BrokenImage, UserError
from backfold.evaluation import images as module
from backfold.evaluation.images import Images
from backfold.evaluation.subject import Subject

# From Python 3.12 on, forking a process with threads warns; torch has threads and forks.
pytestmark = pytest.mark.filterwarnings(
    "ignore:This process .* is multi-threaded:DeprecationWarning"
)
STATISTICS = ChannelStatistics((0,), (1,))
SUBJECT = Subject("toy", {}, lambda _: torch.nn.Identity(), 1, (8, 8), STATISTICS)


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


@pytest.fixture(params=["kept", "streamed"], autouse=True)
def where(request, monkeypatch):
    if request.param == "streamed":
        monkeypatch.setattr(module, "KEPT_BYTES", 0)


def loaded(source, num_workers):
    images = Images(source, SUBJECT, num_workers)
    return images.load()[0], images.labels


def test_deadly_images_are_counted_and_skipped(caplog, monkeypatch):
    monkeypatch.setattr(loading, "IMAGE_SECONDS", 0.5)
    with caplog.at_level(logging.WARNING, "backfold"):
        found = loaded(Shades(200, crash=(7,), hang=(9,)), 2)
    assert [line[:18] for line in caplog.messages] == ["skipped: image 7: ", "skipped: image 9: "]
    expected = loaded(Shades(200, broken=(7, 9)), 0)
    assert all(torch.equal(given, wanted) for given, wanted in zip(found, expected, strict=True))


def test_too_many_end_the_evaluation():
    with pytest.raises(UserError, match="2 images can't be read, 1 are allowed: image 3: ends the"):
        loaded(Shades(crash=(3, 7)), 1)
