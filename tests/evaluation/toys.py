"""Images in memory, as a source, and what protocols are given of them."""

import os
import time
from types import SimpleNamespace

import torch

from backfold.data.statistics import ChannelStatistics
from backfold.errors import BrokenImage
from backfold.evaluation.images import Images, Parts
from backfold.evaluation.subject import Subject

CPU, PLAIN = torch.device("cpu"), ChannelStatistics((0.5,), (0.25,))


def evaluation(states, make, train, test, labels, **settings):
    """Of backbones by contender; a fifth of the training images is for choices."""
    subject = Subject("toy", states, make, 1, train.pixels.shape[-2:], PLAIN)
    fit, validation = torch.arange(len(train)).tensor_split([len(train) * 4 // 5])
    return SimpleNamespace(
        settings=SimpleNamespace(seed=0, label_counts=lambda: list(labels), **settings),
        subject=subject, statistics=PLAIN, device=CPU,
        parts=Parts(Images(train, subject), Images(test, subject), fit, validation),
        backbones={name: subject.backbone(name) for name in states},
    )  # fmt: skip


class ArraySource:
    """Bytes, (images, channels, height, width), and their labels or None.

    ``crash``, ``hang`` and ``broken`` are places of images that do this to whoever reads them.
    """

    name, class_names = "toys", ()

    def __init__(self, pixels, labels, crash=(), hang=(), broken=()):
        self.pixels, self.labels = pixels, labels
        self.crash, self.hang, self.broken = crash, hang, broken

    def __len__(self):
        return len(self.pixels)

    def read(self, index, _=None):
        if index in self.crash:
            os._exit(3)
        if index in self.hang:
            time.sleep(1000)
        if index in self.broken:
            raise BrokenImage("torn")
        return torch.from_numpy(self.pixels[index])

    def describe(self, index):
        return f"image {index}"
