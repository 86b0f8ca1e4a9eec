import json
import os
from dataclasses import asdict

import numpy as np
import pytest
import torch

from backfold.data.formats import DatasetSource
from backfold.data.open import open_source
from backfold.data.statistics import ChannelStatistics
from backfold.data.survey import STD_FLOOR, Survey, survey
from backfold.errors import UserError


@pytest.fixture
def folder(tmp_path, encode):
    """Seven readable images, of which three are one, and two broken ones."""
    random = np.random.default_rng(0)
    place = tmp_path / "data"
    place.mkdir()

    def colours(height, width, channels=3):
        return random.integers(0, 256, (height, width, channels), dtype=np.uint8)

    twin = encode(colours(10, 20))
    images = {
        "a.png": twin, "b.jpg": encode(colours(30, 8), "JPEG"), "c.png": twin, "d.png": twin,
        "e.png": encode(colours(5, 5, 4)), "f.png": encode(colours(6, 6)[..., 0]),
        "g.tif": encode(np.full((4, 4), 2.5, dtype=np.float32), "TIFF"),
        "h.png": b"nothing", "i.png": twin[:50],
    }  # fmt: skip
    for name, content in images.items():
        (place / name).write_bytes(content)
    return place


@pytest.mark.parametrize("num_workers", [0, 2])
def test_everything_is_counted(folder, num_workers):
    source = open_source(folder, "train")
    seen = []
    found = survey(source, num_workers=num_workers, progress=seen.append)
    assert (found.images, found.looked_at, found.broken_count) == (9, 9, 2)
    assert [line.split(": ")[0] for line in found.broken] == [f"{folder}/h.png", f"{folder}/i.png"]
    assert found.formats == {"PNG": 5, "JPEG": 1, "TIFF": 1}
    assert found.kinds == {"uint8": 6, "float32": 1}
    assert found.channel_counts == {"3": 5, "1": 2}
    assert found.conversions == {"alpha composited on black": 1}
    assert (found.height, found.width) == ([4, 10, 30], [4, 8, 20])
    assert found.highest == 2.5
    assert found.duplicate_count == 2
    assert found.duplicates == [[f"{folder}/{name}.png" for name in "acd"]]
    assert seen[-1] == 9
    assert found.channels == 3


def test_images_of_unfit_channels_do_not_count(folder):
    np.save(folder / "j.npy", np.zeros((40, 50, 5), dtype=np.uint8))
    found = survey(open_source(folder, "train"))
    assert (found.unfit_count, found.channel_counts["5"]) == (1, 1)


def test_a_sample_is_seeded_and_of_its_size(folder):
    source = open_source(folder, "train")
    first, again = survey(source, 3, 6, seed=1), survey(source, 3, 6, seed=1)
    assert first == again
    assert (first.images, first.looked_at) == (9, 6)
    assert any(survey(source, 3, 6, seed=seed).mean != first.mean for seed in (2, 3, 4))
    assert Survey(**json.loads(json.dumps(asdict(first)))) == first  # plain data


def test_python_data_sets_are_looked_at_too():
    found = survey(DatasetSource([torch.full((2, 3, 4), value) for value in (0.0, 8.0, 8.0)]))
    assert (found.formats, found.kinds) == ({"Python": 3}, {"float32": 3})
    assert found.duplicate_count == 1


class Crashing(DatasetSource):
    def read(self, index, min_side=None):
        if index == 2:
            os._exit(1)
        return super().read(index, min_side)


@pytest.mark.parametrize("channels", [1, None])
def test_a_decoder_that_crashes_is_a_broken_file(channels):
    source = Crashing([torch.full((1, 3, 4), float(number)) for number in range(20)])
    found = survey(source, channels, num_workers=1)
    assert found.broken_count == found.channels == 1
    assert found.broken[0].startswith("list item 2: ends the process")
    assert found.mean == pytest.approx([(sum(range(20)) - 2) / 19])


def test_nothing_to_use_is_the_users_error(tmp_path, encode):
    (tmp_path / "a.png").write_bytes(b"nothing")
    for channels in (3, None):
        with pytest.raises(UserError, match=r"none of 1 images can be used \(.*not an image"):
            survey(open_source(tmp_path, "train"), channels)
    (tmp_path / "a.png").write_bytes(encode(np.zeros((3, 3, 3), dtype=np.uint8)))
    with pytest.raises(UserError, match="none can be given 5 channels"):
        survey(open_source(tmp_path, "train"), channels=5)


def measured(images, channels):
    return survey(DatasetSource(images), channels).statistics


def test_images_weigh_the_same_whatever_their_size():
    statistics = measured([torch.zeros(1, 2, 2), torch.ones(1, 40, 40)], 1)
    assert (statistics.mean, statistics.std) == ((0.5,), (0.5,))


@pytest.mark.parametrize(("scale", "shift"), [(1e-7, 0.0), (3e5, -1e6)])
def test_floats_of_any_scale_are_normalised(scale, shift):
    random = np.random.default_rng(1)
    values = random.random((20, 2, 6, 5)) * np.array([1, 7]).reshape(1, 2, 1, 1) * scale + shift
    images = torch.from_numpy(values.astype(np.float32))
    statistics, pixels = measured(list(images), 2), images.double()
    np.testing.assert_allclose(statistics.mean, pixels.mean(dim=(0, 2, 3)), rtol=1e-6)
    np.testing.assert_allclose(statistics.std, pixels.std(dim=(0, 2, 3), correction=0), rtol=1e-4)
    normalized = statistics.normalize(images)
    torch.testing.assert_close(normalized.mean(dim=(0, 2, 3)), torch.zeros(2), atol=1e-3, rtol=0)


@pytest.mark.parametrize(("value", "std"), [(7e4, 7e4), (-3e-5, 3e-5), (0.0, 1.0), (99, STD_FLOOR)])
def test_a_constant_channel_does_not_divide_by_zero(value, std):
    image = torch.full((1, 4, 4), value)  # a float is divided by its own size
    image = image.byte() if value == 99 else image
    assert measured([image] * 3, 1).std == pytest.approx((std,))


@pytest.mark.parametrize(
    ("counts", "channels"), [((1, 1, 3), 1), ((12, 2, 2, 3), 2), ((1, 3), 3), ((0, 0, 1), 1)]
)
def test_the_most_common_channels_count(counts, channels):
    images = [torch.zeros(count, 2, 2) if count else None for count in counts]
    assert survey(DatasetSource(images)).channels == channels


def test_bytes_are_normalised_as_their_floats():
    images = torch.randint(256, (4, 2, 6, 5), dtype=torch.uint8)
    before = images.clone()
    statistics = ChannelStatistics((0.4, 0.5), (0.2, 0.25))
    normalized = statistics.normalize(images)
    assert normalized.dtype == torch.float32
    for channel, (mean, std) in enumerate(((0.4, 0.2), (0.5, 0.25))):
        expected = (images[:, channel] / 255 - mean) / std
        torch.testing.assert_close(normalized[:, channel], expected)
    assert torch.equal(images, before)
    torch.testing.assert_close(statistics.denormalize(normalized), images / 255)
    assert statistics.normalize(images.double() / 255).dtype == torch.float64
