import json
import os
from dataclasses import asdict

import numpy as np
import pytest
import torch

from backfold.data.formats import DatasetSource
from backfold.data.open import open_source
from backfold.data.statistics import measure_statistics
from backfold.data.survey import Survey, survey
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
    assert [line.split(": ")[0] for line in found.broken] == [
        str(folder / "h.png"), str(folder / "i.png"),
    ]  # fmt: skip
    assert found.formats == {"PNG": 5, "JPEG": 1, "TIFF": 1}
    assert found.kinds == {"uint8": 6, "float32": 1}
    assert found.channel_counts == {"3": 5, "1": 2}
    assert found.conversions == {"alpha composited on black": 1}
    assert found.notes() == ["1 of 9 images: alpha composited on black"]
    assert (found.height, found.width) == ([4, 10, 30], [4, 8, 20])
    assert found.highest == 2.5
    assert found.duplicate_count == 2
    assert found.duplicates == [[str(folder / name) for name in ("a.png", "c.png", "d.png")]]
    assert seen[-1] == 9
    expected = measure_statistics(source, 3)
    assert found.channels == 3
    assert found.mean == pytest.approx(expected.mean, rel=1e-12)
    assert found.statistics.std == pytest.approx(expected.std, rel=1e-12)


def test_images_of_unfit_channels_do_not_count(folder):
    np.save(folder / "j.npy", np.zeros((40, 50, 5), dtype=np.uint8))
    found = survey(open_source(folder, "train"))
    assert (found.unfit_count, found.channel_counts["5"]) == (1, 1)
    one = survey(open_source(folder, "train"), channels=1)
    assert (len(one.mean), one.unfit_count) == (1, 1)


def test_a_sample_is_seeded_and_of_its_size(folder):
    source = open_source(folder, "train")
    first, again = survey(source, 3, 6, seed=1), survey(source, 3, 6, seed=1)
    assert first == again
    assert (first.images, first.looked_at) == (9, 6)
    assert any(survey(source, 3, 6, seed=seed).mean != first.mean for seed in (2, 3, 4))
    assert Survey(**json.loads(json.dumps(asdict(first)))) == first  # plain data


def test_python_data_sets_are_looked_at_too():
    images = [torch.full((2, 3, 4), value) for value in (0.0, 8.0, 8.0)]
    found = survey(DatasetSource(images))
    assert (found.formats, found.kinds) == ({"Python": 3}, {"float32": 3})
    assert found.duplicate_count == 1
    assert found.mean == pytest.approx([16 / 3] * 2)
    assert found.std == pytest.approx([float(np.std([0, 8, 8]))] * 2)


class Crashing(DatasetSource):
    def read(self, index, min_side=None):
        if index == 20:
            os._exit(1)
        return super().read(index, min_side)


def test_a_decoder_that_crashes_is_a_broken_file():
    source = Crashing([torch.full((1, 3, 4), float(number)) for number in range(40)])
    found = survey(source, channels=1, num_workers=1)
    assert found.broken_count == 1
    assert found.broken[0].startswith("list item 20: ends the process")
    assert found.mean == pytest.approx([(sum(range(40)) - 20) / 39])


def test_nothing_to_use_is_the_users_error(tmp_path, encode):
    (tmp_path / "a.png").write_bytes(b"nothing")
    with pytest.raises(UserError, match=r"none of 1 images can be used \(.*not an image"):
        survey(open_source(tmp_path, "train"), channels=3)
    (tmp_path / "a.png").write_bytes(encode(np.zeros((3, 3, 3), dtype=np.uint8)))
    with pytest.raises(UserError, match="none can be given 5 channels"):
        survey(open_source(tmp_path, "train"), channels=5)
