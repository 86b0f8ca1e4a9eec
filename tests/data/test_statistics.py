import os

import numpy as np
import pytest
import torch

from backfold.data.source import open_source
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
    statistics = measure_statistics(ListSource(images), 3)
    np.testing.assert_allclose(statistics.mean, pixels.mean(axis=(0, 2, 3)), rtol=1e-6)
    np.testing.assert_allclose(statistics.std, pixels.std(axis=(0, 2, 3)), rtol=1e-6)


def test_normalized_images_have_zero_mean_and_unit_deviation():
    images = random_images(20)
    statistics = measure_statistics(ListSource(images), 3)
    batch = torch.stack(images).float() / 255
    normalized = statistics.normalize(batch)
    assert normalized.dtype == torch.float32
    torch.testing.assert_close(normalized.mean(dim=(0, 2, 3)), torch.zeros(3), atol=1e-5, rtol=0)
    deviation = normalized.std(dim=(0, 2, 3), correction=0)
    torch.testing.assert_close(deviation, torch.ones(3), atol=1e-5, rtol=0)
    torch.testing.assert_close(statistics.denormalize(normalized), batch)


def test_images_weigh_the_same_whatever_their_size():
    small = torch.zeros(1, 2, 2, dtype=torch.uint8)
    large = torch.full((1, 40, 40), 255, dtype=torch.uint8)
    statistics = measure_statistics(ListSource([small, large]), 1)
    assert statistics.mean == pytest.approx((0.5,))
    assert statistics.std == pytest.approx((0.5,))


def test_channels_are_converted_and_floats_are_taken_as_they_are():
    grey = torch.rand(1, 6, 5)
    statistics = measure_statistics(ListSource([grey]), 3)
    assert statistics.mean == pytest.approx((float(grey.mean()),) * 3)


def test_constant_channels_do_not_divide_by_zero():
    image = torch.full((1, 4, 4), 99, dtype=torch.uint8)
    statistics = measure_statistics(ListSource([image] * 3), 1)
    assert statistics.std == pytest.approx((STD_FLOOR,))
    normalized = statistics.normalize(image[None].float() / 255)
    assert normalized.abs().max() < 1e-3


@pytest.mark.parametrize(("scale", "shift"), [(1e-7, 0.0), (3e5, -1e6), (1e-3, 0.5)])
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


@pytest.mark.parametrize(("value", "std"), [(7e4, 7e4), (-3e-5, 3e-5), (0.0, 1.0)])
def test_a_constant_float_channel_is_divided_by_its_own_size(value, std):
    statistics = measure_statistics(ListSource([torch.full((1, 4, 4), value)] * 3), 1)
    assert statistics.std == pytest.approx((std,))


def test_the_sample_is_limited_and_seeded():
    source = ListSource(random_images(50))
    measure_statistics(source, 3, max_images=10, seed=1)
    first, source.reads = source.reads, []
    assert len(set(first)) == 10
    measure_statistics(source, 3, max_images=10, seed=1)
    second, source.reads = source.reads, []
    assert first == second
    measure_statistics(source, 3, max_images=10, seed=2)
    assert source.reads != first


def test_broken_files_are_left_out():
    images = random_images(6)
    whole = measure_statistics(ListSource(images), 3)
    with_broken = measure_statistics(ListSource([None, *images, None]), 3)
    assert with_broken.mean == pytest.approx(whole.mean)
    assert with_broken.std == pytest.approx(whole.std)


@pytest.mark.parametrize("measure", [count_channels, lambda source: measure_statistics(source, 3)])
def test_all_broken_is_the_users_error(measure):
    with pytest.raises(UserError, match=r"list: none of 3 sampled images .*\(image \d: broken\)"):
        measure(ListSource([None] * 3))


def test_count_channels_takes_the_most_common():
    def source(*channels):
        return ListSource([torch.zeros(count, 2, 2) if count else None for count in channels])

    assert count_channels(source(1, 1, 3)) == 1
    assert count_channels(source(4, 4, 1)) == 4
    assert count_channels(source(12, 2, 2, 3)) == 2
    assert count_channels(source(1, 3)) == 3
    assert count_channels(source(0, 0, 1)) == 1
    assert count_channels(source(*[1] * 100)) == 1


def test_count_channels_reads_a_few_images_spread_over_the_source():
    source = ListSource([torch.zeros(1, 2, 2)] * 1000)
    count_channels(source, sample=5)
    assert source.reads == [0, 250, 500, 749, 999]


def test_embedded_images_have_one_channel_and_known_statistics():
    source = open_source(None, "train", labelled=False)
    assert count_channels(source) == 1
    statistics = measure_statistics(source, 1, max_images=500)
    # Widely used values for the whole of Fashion-MNIST are 0.286 and 0.353.
    assert statistics.mean == pytest.approx((0.286,), abs=0.015)
    assert statistics.std == pytest.approx((0.353,), abs=0.015)


def test_statistics_keep_the_images_dtype():
    statistics = ChannelStatistics((0.5,), (0.25,))
    images = torch.rand(2, 1, 3, 3, dtype=torch.float64)
    assert torch.equal(statistics.normalize(images), (images - 0.5) / 0.25)


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


@pytest.mark.filterwarnings("ignore:This process .* is multi-threaded:DeprecationWarning")
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
