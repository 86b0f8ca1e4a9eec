"""The race's rivals train a timm backbone, go on when cut, and can't be mistaken for each other."""

import importlib
import json
from dataclasses import replace
from itertools import product

import pytest
import torch
import yaml
from safetensors.torch import load_file
from torch.nn.functional import interpolate
from torch.utils.data import TensorDataset

from backfold.data import loading
from backfold.data.augmentation import Augmentation
from backfold.data.open import EMBEDDED, open_source
from backfold.data.source import SubsetSource
from backfold.errors import UserError
from backfold.evaluation.results import Row
from backfold.training.config import OptimizerSettings, config_from_dict
from backfold.training.images import open_images
from backfold.training.run import RunFolder
from tiny_run import tiny_config

pytest.importorskip("transformers")
pytest.importorskip("lightly")
from race import contest, race
from race.crops import DeviceCrops, crops


@pytest.fixture
def settings(tmp_path):
    return tiny_config(
        out=tmp_path, batch_size=16, checkpoint_minutes=0.0, optimizer=OptimizerSettings()
    )


@pytest.fixture
def images(settings):
    source = open_source(EMBEDDED / "fashion_mnist_train.parquet", "train")
    return open_images(settings, source=SubsetSource(source, range(72)))


def trained(method, images, settings):
    module = importlib.import_module(f"race.{method}")
    return module.train(settings.backbone, settings.backbone_options, images, settings)


@pytest.mark.parametrize("method", ["mae", "simmim", "simclr", "vicreg"])
def test_a_rival_goes_on_where_it_was_cut(method, images, settings, tmp_path, monkeypatch):
    first = contest.start(settings.backbone, settings.backbone_options, images, settings)
    whole = trained(method, images, replace(settings, out=tmp_path / "whole"))
    assert type(whole) is type(first)
    weights = whole.state_dict()
    for name, value in first.state_dict().items():
        assert weights[name].isfinite().all()
        assert not torch.equal(weights[name], value) or name.endswith("k_bias")

    def cut(path, content):
        save(path, content)
        if content["step"] == 2:
            raise KeyboardInterrupt

    save = contest.save_checkpoint
    monkeypatch.setattr(contest, "save_checkpoint", cut)
    with pytest.raises(KeyboardInterrupt):
        trained(method, images, settings)
    resumed = trained(method, images, settings).state_dict()
    assert all(torch.equal(resumed[name], value) for name, value in weights.items())


def test_the_masked_autoencoder_s_decoder_knows_where_patches_lie(images, settings):
    """transformers 5.24 makes it with positions of zeros."""
    mae = importlib.import_module("race.mae")
    given = (settings.backbone, settings.backbone_options, images, settings)
    decoder = mae.MaskedAutoencoder(*contest.start_vit(*given), settings).rival.decoder
    places = decoder.decoder_pos_embed[0, 1:]
    assert (torch.cdist(places, places) + torch.eye(len(places)) > 0.5).all()
    assert decoder.mask_token.std() > 0.01


def test_a_refined_run_goes_on_from_a_conditional_one(settings, tmp_path):
    given = torch.randint(0, 256, (264, 1, 28, 28), dtype=torch.uint8)  # 256 of them a step
    cell = race.Cell("refined", 0, 1e-3, 4.5, race.TEST)
    race.train(cell, settings, TensorDataset(given), tmp_path)
    cells = (cell, cell._replace(epochs=0.5, method="conditional"))
    runs = [RunFolder(tmp_path / each.run) for each in cells]
    refined, before = (config_from_dict(yaml.safe_load(run.config.read_text())) for run in runs)
    assert (before.epochs, refined.epochs, refined.invariance) == (0.5, 4, 0.1)
    assert refined.tasks.masking == replace(before.tasks.masking, mask_ratio=0.25)
    start, end = (load_file(path) for path in (runs[0].initial, runs[1].backbone))
    assert all(torch.equal(start[name], value) for name, value in end.items())


def test_swapped_contenders_and_settings_are_noticed(images, settings):
    trained("simmim", images, settings)
    with pytest.raises(UserError, match="simmim"):
        trained("mae", images, settings)
    with pytest.raises(UserError, match="remove it"):
        trained("simmim", images, replace(settings, seed=1))
    row = {"part": race.VALIDATION, "rate": 1e-3, "mean": 40.0}
    assert race.best_rate([row, row | {"rate": 1e-2, "mean": 41.0}]) == 1e-2
    with pytest.raises(UserError, match="test images"):
        race.best_rate([row | {"part": race.TEST}])


def test_the_table_is_of_each_method_over_seeds(tmp_path, settings, monkeypatch):
    """Means and deviations by hand; a second call reads what the first has written."""
    truth = {("untrained", 0): 20.0, ("untrained", 1): 22.0, ("mae", 0): 30.0, ("mae", 1): 34.0}

    def rows(backbone, labels=None, **_):
        found = ("finetune", backbone + 10) if labels else ("knn", backbone)
        return [Row(found[0], "all labels", race.PRETRAINED, race.ACCURACY, found[1], 0.0, 1)]

    monkeypatch.setattr(race, "train", lambda cell, *_: truth[cell.method, cell.seed])
    monkeypatch.setattr(race.backfold, "evaluate", rows)
    monkeypatch.setattr(race, "decoded", lambda _: [(torch.zeros(1, 28, 28),)])
    monkeypatch.setattr(race, "open_source", lambda *_: None)
    given = (["untrained", "mae"], [0, 1], [1e-3], settings, tmp_path, None, "100")
    found = race.race(*given)
    monkeypatch.setattr(race, "train", None)
    assert race.race(*given) == json.loads(json.dumps(found))
    race.write_table(found, tmp_path)
    text = (tmp_path / "race.md").read_text()
    assert "| untrained | 0.001 | 2 | 21.0 ± 1.4 | 31.0 ± 1.4 |" in text
    line = "MAE (transformers), 100 epochs, batches of 16"
    assert f"| {line} | 0.001 | 2 | 32.0 ± 2.8 | 42.0 ± 2.8 |" in text
    swapped = {"untrained": "mae", "mae": "untrained"}
    bent = [row | {"method": swapped[row["method"]]} for row in found]
    assert race.summary(bent)["untrained"] == race.summary(found)[line]
    assert (tmp_path / "race.svg").read_text().count("MAE") == 1


def test_runs_of_other_crops_or_batches_are_told_apart():
    cells = [race.Cell("mae", 0, 1e-3, 9.0, race.TEST, *own) for own in ((), (0.5,), (0.2, 512))]
    assert len({cell.run for cell in cells}) == len({cell.file for cell in cells}) == 3
    titles = [race.title({**cell._asdict(), "contender": race.PRETRAINED}) for cell in cells]
    ends = ["", ", crops from 0.5", ", batches of 512"]
    assert titles == [titles[0] + end for end in ends]


def test_crops_on_a_device_are_boxes_of_the_image_enlarged():
    """Each is found among all boxes that torch enlarges, none smaller than the area allowed."""
    side, least = 6, 0.3
    image = torch.randint(0, 256, (1, 1, side, side), generator=torch.Generator().manual_seed(0))
    image = image.to(torch.uint8)
    boxes, areas = [], []
    for top, left in product(range(side), repeat=2):
        for height, width in product(range(1, side - top + 1), range(1, side - left + 1)):
            part = image[..., top : top + height, left : left + width]
            enlarged = interpolate(part, (side, side), mode="bilinear", antialias=True)
            boxes += [enlarged, enlarged.flip(3)]
            areas += 2 * [height * width / side**2]
    many = image.expand(300, -1, -1, -1)
    found = crops(many, side, least, torch.Generator().manual_seed(1))
    distances = (found.int()[:, None, 0] - torch.cat(boxes).int()[None, :, 0]).abs().amax((2, 3))
    nearest, which = distances.min(dim=1)
    assert nearest.max() <= 1  # rounding
    drawn = torch.tensor(areas)[which]
    assert drawn.min() >= least - 0.12  # sides are whole pixels
    assert float(drawn.mean()) == pytest.approx((1 + least) / 2, abs=0.06)
    assert 0.4 < float((which % 2).double().mean()) < 0.6  # mirrored


def test_a_run_takes_crops_from_the_device(images, monkeypatch):
    monkeypatch.setattr(loading, "BatchDataset", DeviceCrops)
    batches = [
        next(iter(loading.training_loader(images.training, (28, 28), 1, Augmentation(), 16, *rest)))
        for rest in ((0, 0, 3), (0, 1, 3), (0, 0, 3))
    ]
    assert batches[0].images.shape == (16, 1, 28, 28)
    assert torch.equal(batches[0].images, batches[2].images)
    assert not torch.equal(batches[0].indices, batches[1].indices)
