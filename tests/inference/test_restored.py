"""Files that are restored look as they did to training."""

import numpy as np
import pytest
import torch
from PIL import Image

from backfold.data.formats import FolderSource
from backfold.data.loading import evaluation_batches
from backfold.data.statistics import ChannelStatistics
from backfold.errors import UserError
from backfold.inference.restored import read_images
from backfold.pictures import to_display
from backfold.training.config import PretrainConfig
from backfold.training.run import Pretrained

SIZE = (16, 24)


def run_of(channels, **changes):
    statistics = ChannelStatistics((0.4,) * channels, (0.3,) * channels)
    # Reading asks for no energy.
    return Pretrained(torch.nn.Identity(), PretrainConfig(**changes), statistics, channels, SIZE, 5)


@pytest.fixture
def folder(tmp_path):
    """Files whose order of steps shows: JPEGs far too large, deep and shallow ones, alpha."""
    random = np.random.default_rng(0)
    coarse = Image.fromarray(random.integers(0, 256, (9, 13, 3), dtype=np.uint8))
    large = coarse.resize((230, 170), Image.Resampling.BICUBIC)
    large.save(tmp_path / "a-large.jpg")
    large.convert("CMYK").save(tmp_path / "b-cmyk.jpg")
    large.resize((29, 41)).save(tmp_path / "c-upright.png")
    large.convert("L").resize((31, 17)).save(tmp_path / "d-grey.png")
    deep = Image.fromarray(random.integers(0, 65536, (40, 50), dtype=np.uint16))
    deep.save(tmp_path / "e-deep.png")
    large.resize(SIZE[::-1]).convert("RGBA").save(tmp_path / "f-alpha.png")
    np.save(tmp_path / "g-float.npy", random.normal(size=(20, 30, 1)).astype(np.float32))
    return tmp_path


@pytest.mark.parametrize("channels", [1, 3])
def test_a_file_is_what_the_loader_makes_of_it(folder, channels):
    run, paths = run_of(channels), sorted(folder.iterdir())
    for size in (1, len(paths)):
        for batch in evaluation_batches(FolderSource(folder), SIZE, channels, size):
            given = read_images([paths[index] for index in batch.indices.tolist()], run)
            assert given.shape == (size, channels, *SIZE)
            assert torch.equal(given, run.statistics.normalize(batch.images))


def test_what_is_no_image_of_the_run_is_refused_by_name(folder):
    np.save(folder / "two.npy", np.zeros((20, 30, 2), dtype=np.float32))
    (folder / "torn.png").write_bytes(b"torn")
    for name, message in [
        ("two.npy", r"two\.npy: an image of 2 channels can't be given 3; it fits"),
        ("torn.png", r"torn\.png is no image: "),
        ("e-deep.png", r"e-deep\.png is no image: .*1000"),
    ]:
        with pytest.raises(UserError, match=message):
            read_images([folder / name], run_of(3, max_pixels=1000))


@pytest.mark.parametrize(
    ("mean", "std", "black", "white"),
    [(0.48, 0.25, 0.0, 1.0), (0.005, 0.002, 0.0, 0.011), (-40.0, 300.0, -940.0, 860.0)],
)
def test_photographs_are_shown_as_they_are_and_dim_images_are_seen(mean, std, black, white):
    values = torch.linspace(black, white, 256).view(1, 1, 16, 16)
    statistics = ChannelStatistics((mean,), (std,))
    shown = to_display(statistics.normalize(values), statistics)
    expected = torch.linspace(0, 1, 256).view(1, 1, 16, 16).expand(1, 3, 16, 16)
    torch.testing.assert_close(shown[:, :, 3::7, 3::7], expected, atol=1e-5, rtol=0)
