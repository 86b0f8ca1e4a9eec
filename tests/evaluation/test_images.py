import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch

from backfold.data.source import EMBEDDED, open_source
from backfold.data.statistics import ChannelStatistics
from backfold.energy import EnergyModel
from backfold.errors import UserError
from backfold.evaluation.images import load_images
from backfold.training.config import PretrainConfig
from backfold.training.pretrained import Pretrained

STATISTICS = ChannelStatistics((0.3,), (0.4,))
COUNT = 40


def run_of(channels=1, image_size=(28, 28), statistics=STATISTICS, **settings):
    options = {"patch_size": 7, "embed_dim": 8, "depth": 1, "num_heads": 2}
    energy = EnergyModel(
        "vit_tiny_patch16_224", image_size=image_size, channels=channels, backbone_options=options
    )
    config = PretrainConfig(**settings)
    return Pretrained(energy, config, statistics, channels, image_size, step=0)


def table(count=COUNT):
    return pq.read_table(EMBEDDED / "fashion_mnist_train.parquet").slice(0, count)


def write(path, rows):
    pq.write_table(rows, path)
    return open_source(path, "train", labelled=True)


@pytest.fixture
def source(tmp_path):
    return write(tmp_path / "images.parquet", table())


@pytest.fixture
def pixels(source):
    return torch.stack([source.read(index) for index in range(COUNT)])


def test_all_images_come_normalised_with_their_labels(source, pixels):
    loaded = load_images(source, run_of(), batch_size=7)
    assert torch.allclose(loaded.images, (pixels / 255 - 0.3) / 0.4, atol=1e-6)
    assert loaded.images.dtype == torch.float32
    assert loaded.labels.tolist() == table()["label"].to_pylist()
    assert loaded.indices.tolist() == list(range(COUNT))


def test_part_is_drawn_by_the_seed_and_keeps_its_labels(source, pixels):
    first, again, other = (
        load_images(source, run_of(), 15, seed, normalised=False) for seed in (1, 1, 2)
    )
    assert len(first.indices.unique()) == 15
    assert first.indices.tolist() == sorted(first.indices.tolist())
    assert torch.equal(first.images, pixels[first.indices])
    assert first.images.dtype == torch.uint8
    assert first.labels.tolist() == [source.labels[index] for index in first.indices]
    assert torch.equal(first.indices, again.indices)
    assert not torch.equal(first.indices, other.indices)
    assert len(load_images(source, run_of(), COUNT + 1).images) == COUNT


def test_images_get_the_runs_size_and_channels(source):
    statistics = ChannelStatistics((0.0,) * 3, (1.0,) * 3)
    loaded = load_images(source, run_of(3, (14, 21), statistics), 5)
    assert loaded.images.shape == (5, 3, 14, 21)
    assert torch.equal(loaded.images[:, 0], loaded.images[:, 2])


def test_broken_file_is_replaced_label_and_all(tmp_path, pixels):
    rows = table().to_pydict()
    column = next(name for name in rows if name != "label")
    content = rows[column][4]
    rows[column][4] = {**content, "bytes": b"no"} if isinstance(content, dict) else b"no"
    rows["label"] = [100 + number for number in range(COUNT)]
    source = write(tmp_path / "broken.parquet", pa.table(rows))
    loaded = load_images(source, run_of(), normalised=False)
    assert loaded.indices.tolist() == [0, 1, 2, 3, 5, *range(5, COUNT)]
    assert torch.equal(loaded.images, pixels[loaded.indices])
    names = [source.class_names[label] for label in loaded.labels] if source.class_names else None
    found = names or loaded.labels.tolist()
    assert [int(name) for name in found] == [100 + index for index in loaded.indices.tolist()]


def test_too_many_broken_files_stop(tmp_path):
    rows = table().to_pydict()
    column = next(name for name in rows if name != "label")
    for number in range(6):
        content = rows[column][number]
        rows[column][number] = {**content, "bytes": b"no"} if isinstance(content, dict) else b"no"
    source = write(tmp_path / "broken.parquet", pa.table(rows))
    with pytest.raises(UserError, match="6 images can't be read, 4 are allowed"):
        load_images(source, run_of(max_broken_share=0.1))


def test_mixed_depths_become_floats(tmp_path):
    folder = tmp_path / "mixed"
    folder.mkdir()
    for number in range(3):
        np.save(folder / f"{number}.npy", np.full((28, 28), 51, np.uint8))
    np.save(folder / "3.npy", np.full((28, 28), 0.7, np.float32))
    source = open_source(folder, "train")
    loaded = load_images(source, run_of(), normalised=False, batch_size=2)
    assert loaded.labels is None
    assert loaded.images.dtype == torch.float32
    assert loaded.images[:, 0, 0, 0].tolist() == pytest.approx([0.2, 0.2, 0.2, 0.7])


def test_bad_limit(source):
    with pytest.raises(UserError, match="limit is 0 images; give 1 or more"):
        load_images(source, run_of(), 0)
