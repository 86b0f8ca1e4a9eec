import os

import numpy as np
import pytest
import torch

from backfold.data.statistics import (
    STD_FLOOR,
    ChannelStatistics,
    count_channels,
    measure_statistics,
)
from backfold.errors import BrokenImage, UserError


class ListSource:
    """Images in memory; None stands for a broken file."""

    labels = None
    class_names = ()
    name = "list"

    def __init__(self, images):
        self.images = images
        self.reads = []

    def __len__(self):
        return len(self.images)

    def read(self, index):
        self.reads.append(index)
        if self.images[index] is None:
            raise BrokenImage("broken")
        return self.images[index]

    def describe(self, index):
        return f"image {index}"


def random_images(count, shape=(3, 6, 5), seed=0):
    random = np.random.default_rng(seed)
    scale = np.array([255, 128, 30])[: shape[0]].reshape(-1, 1, 1)
    return [torch.from_numpy((random.random(shape) * scale).astype(np.uint8)) for _ in range(count)]


def test_statistics_agree_with_numpy():
    images = random_images(20)
    pixels = np.stack([image.numpy() for image in images]) / 255
    statistics = measure_statistics(ListSource([None, *images, None]), 3)
    np.testing.assert_allclose(statistics.mean, pixels.mean(axis=(0, 2, 3)), rtol=1e-6)
    np.testing.assert_allclose(statistics.std, pixels.std(axis=(0, 2, 3)), rtol=1e-6)


def test_images_weigh_the_same_whatever_their_size():
    small = torch.zeros(1, 2, 2, dtype=torch.uint8)
    large = torch.full((1, 40, 40), 255, dtype=torch.uint8)
    statistics = measure_statistics(ListSource([small, large]), 1)
    assert statistics.mean == pytest.approx((0.5,))
    assert statistics.std == pytest.approx((0.5,))


@pytest.mark.parametrize(("scale", "shift"), [(1e-7, 0.0), (3e5, -1e6)])
def test_floats_of_any_scale_are_normalised(scale, shift):
    random = np.random.default_rng(1)
    values = random.random((20, 2, 6, 5)) * np.array([1, 7]).reshape(1, 2, 1, 1) * scale + shift
    images = [torch.from_numpy(value.astype(np.float32)) for value in values]
    pixels = torch.stack(images).double()
    statistics = measure_statistics(ListSource(images), 2)
    np.testing.assert_allclose(statistics.mean, pixels.mean(dim=(0, 2, 3)), rtol=1e-6)
    np.testing.assert_allclose(statistics.std, pixels.std(dim=(0, 2, 3), correction=0), rtol=1e-4)
    normalized = statistics.normalize(torch.stack(images))
    torch.testing.assert_close(normalized.mean(dim=(0, 2, 3)), torch.zeros(2), atol=1e-3, rtol=0)


@pytest.mark.parametrize(("value", "std"), [(7e4, 7e4), (-3e-5, 3e-5), (0.0, 1.0), (99, STD_FLOOR)])
def test_a_constant_channel_does_not_divide_by_zero(value, std):
    image = torch.full((1, 4, 4), value)  # a float is divided by its own size
    image = image.byte() if value == 99 else image
    assert measure_statistics(ListSource([image] * 3), 1).std == pytest.approx((std,))


def test_the_sample_is_limited_and_seeded():
    source = ListSource(random_images(50))
    for seed in (1, 1, 2):
        measure_statistics(source, 3, max_images=10, seed=seed)
    first, second, other = (source.reads[10 * n :][:10] for n in range(3))
    assert len(set(first)) == 10
    assert first == second != other


@pytest.mark.parametrize("measure", [count_channels, lambda source: measure_statistics(source, 3)])
def test_all_broken_is_the_users_error(measure):
    with pytest.raises(UserError, match=r"list: none of 3 sampled images .*\(image \d: broken\)"):
        measure(ListSource([None] * 3))


def test_count_channels_takes_the_most_common():
    def source(*channels):
        return ListSource([torch.zeros(count, 2, 2) if count else None for count in channels])

    assert count_channels(source(1, 1, 3)) == 1
    assert count_channels(source(12, 2, 2, 3)) == 2
    assert count_channels(source(1, 3)) == 3
    assert count_channels(source(0, 0, 1)) == 1
    many = source(*[1] * 1000)
    count_channels(many, sample=5)
    assert many.reads == [0, 250, 500, 749, 999]


def test_bytes_are_normalized_as_their_floats():
    statistics = ChannelStatistics((0.4, 0.5, 0.6), (0.2, 0.25, 0.3))
    images = torch.stack(random_images(4))
    expected = (images.double() / 255 - torch.tensor([0.4, 0.5, 0.6]).view(3, 1, 1)) / torch.tensor(
        [0.2, 0.25, 0.3]
    ).view(3, 1, 1)
    before = images.clone()
    normalized = statistics.normalize(images)
    assert normalized.dtype == torch.float32
    torch.testing.assert_close(normalized.double(), expected, atol=1e-6, rtol=0)
    assert torch.equal(normalized, statistics.normalize(images.float() / 255))
    assert torch.equal(images, before)
    torch.testing.assert_close(statistics.denormalize(normalized), images / 255)
    assert statistics.normalize(images.double() / 255).dtype == torch.float64


def test_count_channels_goes_on_past_a_decoder_that_crashes():
    class Deadly(ListSource):
        def read(self, index):
            if index == 1:
                os._exit(3)
            return super().read(index)

    images = [torch.zeros(count, 2, 2) for count in (3, 1, 3, 1, 1)]
    source = Deadly([*images[:2], None, *images[2:]])
    assert count_channels(source, apart=True) == 3
    assert source.reads == []  # in this process
    alone = Deadly([None, torch.zeros(1, 2, 2)])
    with pytest.raises(UserError, match=r"none of 2 sampled images .*\(image 0: broken\)"):
        count_channels(alone, apart=True)
