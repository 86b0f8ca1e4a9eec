"""Crops, flips, erasing and mixing of whole batches, and the loss of mixed labels."""

import random

import numpy as np
import pytest
import torch
from torch import nn

from backfold.evaluation.batch_augmentation import Mixing, crop_and_flip

CPU = torch.device("cpu")


def ramp(count=400, size=16):
    """Each pixel holds its own column and row, both from -1 to 1 at the image's ends."""
    line = (torch.arange(size) + 0.5) / size * 2 - 1
    columns, rows = line.expand(size, size), line[:, None].expand(size, size)
    return torch.stack([columns, rows]).expand(count, 2, size, size).clone()


def test_crops_are_parts_of_the_asked_area_and_aspect():
    torch.manual_seed(0)
    cropped = crop_and_flip(ramp(), 0.25, horizontal_flip=False)
    # Columns of a part are a straight line: its slope is the part's width as a share.
    width = (cropped[:, 0, 8, 9] - cropped[:, 0, 8, 6]) / (3 * 2 / 16)
    height = (cropped[:, 1, 9, 8] - cropped[:, 1, 6, 8]) / (3 * 2 / 16)
    area, ratio = width * height, width / height
    assert width.max() <= 1 + 1e-5
    assert height.max() <= 1 + 1e-5
    assert area.min() > 0.24
    assert 0.45 < area.median() < 0.75
    assert area.max() > 0.9
    assert 0.75 - 1e-3 < ratio.min() < 0.8
    assert 1.25 < ratio.max() < 4 / 3 + 1e-3
    centre = cropped[:, 0, :, 7:9].mean(dim=(1, 2))
    reach = 1 - width
    assert (centre.abs() <= reach + 1e-4).all()
    assert (centre.abs() > 0.8 * reach).any()
    assert abs(float(centre.mean())) < 0.05


def test_flips_mirror_about_half_of_the_images_exactly():
    torch.manual_seed(0)
    images = torch.randn(400, 3, 6, 10)
    flipped = crop_and_flip(images, 1.0, horizontal_flip=True)
    same = (flipped - images).abs().amax(dim=(1, 2, 3)) < 1e-4
    mirrored = (flipped - images.flip(3)).abs().amax(dim=(1, 2, 3)) < 1e-4
    assert (same ^ mirrored).all()
    assert 150 < same.sum() < 250
    assert crop_and_flip(images, 1.0, horizontal_flip=False) is images


def mixed(images, labels, **on):
    settings = {"random_erasing": 0.0, "mixup": 0.0, "cutmix": 0.0, "label_smoothing": 0.0, **on}
    mixing = Mixing(3, **settings, device=CPU)
    new, targets = mixing(images.clone(), labels)
    return mixing, new, targets


def test_mixup_blends_an_image_and_its_label_with_the_same_weight():
    np.random.seed(0)  # noqa: NPY002
    images, labels = torch.randn(6, 3, 4, 4), torch.tensor([0, 1, 2, 1, 0, 2])
    _, new, targets = mixed(images, labels, mixup=1.0)
    weight = float(targets[0, 0])
    assert 0 < weight < 1
    torch.testing.assert_close(new, weight * images + (1 - weight) * images.flip(0))
    one_hot = nn.functional.one_hot(labels, 3).float()
    torch.testing.assert_close(targets, weight * one_hot + (1 - weight) * one_hot.flip(0))


def test_cutmix_weighs_labels_by_area():
    np.random.seed(2)  # noqa: NPY002
    images, labels = torch.randn(6, 3, 8, 8), torch.tensor([0, 1, 2, 1, 0, 2])
    _, new, targets = mixed(images, labels, cutmix=1.0)
    own = (new == images).all(dim=1)
    other = (new == images.flip(0)).all(dim=1)
    assert (own ^ other).all()
    assert 0 < own[0].sum() < 64
    assert float(targets[0, 0]) == pytest.approx(float(own[0].float().mean()))


def test_erasing_puts_noise_into_a_rectangle_of_some_images():
    random.seed(0)
    torch.manual_seed(0)
    images, labels = torch.zeros(200, 3, 8, 8), torch.zeros(200, dtype=torch.long)
    _, new, targets = mixed(images, labels, random_erasing=0.25)
    erased = (new != 0).any(dim=1)
    touched = erased.flatten(1).any(dim=1)
    assert 30 < touched.sum() < 70
    for image in erased[touched]:
        rows, columns = image.any(dim=1), image.any(dim=0)
        assert torch.equal(image, rows[:, None] & columns[None])
    assert torch.equal(targets, labels)


@pytest.mark.parametrize("mixup", [0.0, 1e-9])
def test_label_smoothing_is_in_the_loss_with_and_without_mixing(mixup):
    np.random.seed(0)  # noqa: NPY002
    labels, logits = torch.tensor([0, 1, 2, 2]), torch.randn(4, 3)
    # With so small a parameter the drawn weight is 0 or 1; both partners' labels are then whole.
    mixing, _, targets = mixed(torch.zeros(4, 3, 2, 2), labels, mixup=mixup, label_smoothing=0.3)
    if mixup:
        labels = targets.argmax(dim=1)
    expected = nn.functional.cross_entropy(logits, labels, label_smoothing=0.3)
    torch.testing.assert_close(mixing.loss(logits, targets), expected)
