"""Five lines of Python: energies, restored images and vectors from images in [0, 1]."""

from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from torch.nn import functional as F

from backfold import Backfold, UserError
from backfold.data.statistics import ChannelStatistics
from backfold.embedding import EmbeddingChoice, embed
from backfold.energy import EnergyModel
from backfold.restoration import restore
from backfold.training.config import PretrainConfig
from backfold.training.run import Pretrained

OPTIONS = {"patch_size": 7, "embed_dim": 16, "depth": 1, "num_heads": 2}
NAME = "vit_tiny_patch16_224"
MEAN, STD = (0.4, 0.5, 0.3), (0.2, 0.3, 0.25)


def make(**settings):
    torch.manual_seed(0)
    config = PretrainConfig(backbone=NAME, backbone_options=OPTIONS, **settings)
    energy = EnergyModel(NAME, image_size=(28, 35), backbone_options=OPTIONS)
    statistics = ChannelStatistics(MEAN, STD)
    return Backfold(Pretrained(energy.eval(), config, statistics, 3, (28, 35), 3), Path("run"))


@pytest.fixture(scope="module")
def model():
    return make()


@pytest.fixture
def images():
    return torch.rand(4, 3, 28, 35, generator=torch.Generator().manual_seed(0))


def normalised(images):
    return (images - torch.tensor(MEAN).view(3, 1, 1)) / torch.tensor(STD).view(3, 1, 1)


def test_energies_and_vectors_are_those_of_normalised_images(model, images):
    with torch.no_grad():
        energies = model.run.energy(normalised(images))
        vectors = embed(model.run.energy.backbone, normalised(images))
    torch.testing.assert_close(model.energy(images), energies)
    torch.testing.assert_close(model.embed(images), vectors)
    levels = (images * 255).round().to(torch.uint8)
    torch.testing.assert_close(model.energy(levels), model.energy(levels.float() / 255))
    tokens = EmbeddingChoice(pooling="class_token")
    assert not torch.allclose(model.embed(images, tokens), vectors)


def test_restored_images_come_back_in_the_units_given(images):
    model = make(num_steps=3, step_size=0.5)  # the run's own, unless given
    given = model.restore(images)
    expected = restore(model.run.energy, normalised(images), 3, 0.5)
    scale, shift = torch.tensor(STD).view(3, 1, 1), torch.tensor(MEAN).view(3, 1, 1)
    torch.testing.assert_close(given.restored, expected.restored * scale + shift)
    torch.testing.assert_close(given.trajectory[0], images)
    torch.testing.assert_close(given.trajectory[-1], given.restored)
    torch.testing.assert_close(given.energies, expected.energies)
    assert model.restore(images, num_steps=1).energies.shape == (2, 4)
    near = model.restore(images, num_steps=1, step_size=0.01)
    torch.testing.assert_close(model.energy(near.restored), near.energies[-1])


@pytest.mark.parametrize("form", ["conditional", "dense"])
def test_what_a_mask_marks_is_restored_from_the_rest(images, form):
    model = make(energy=form, num_steps=2)
    mask = torch.zeros(4, 1, 28, 35, dtype=torch.bool)
    mask[0, :, 3:9, 2] = True  # in two patches of 7 pixels
    mask[1, :, 20:, 10:20] = True
    mask[3, :, :, 34] = True
    result, energy = model.restore(images, mask=mask), model.run.energy
    known = ~mask.expand_as(images)
    assert torch.equal(result.restored[2], result.trajectory[0, 2])
    torch.testing.assert_close(result.restored[known], images[known])
    hidden_value = torch.tensor(MEAN).view(3, 1, 1).expand_as(images)  # masks hide under zeros
    filled = torch.where(mask, hidden_value, images)
    torch.testing.assert_close(result.trajectory[0], filled)
    other = torch.where(mask, 1 - images, images)  # what stands there plays no part
    torch.testing.assert_close(model.restore(other, mask=mask).restored, result.restored)
    assert result.energies.shape == (3, 4)
    if form == "dense":
        expected = restore(energy, normalised(filled), 2).restored
    else:  # each image alone, its patches' tokens row by row
        expected = normalised(images).clone()
        for number, hidden in ((0, [0, 5]), (1, [11, 12, 16, 17]), (3, [4, 9, 14, 19])):
            seen = torch.tensor([[token for token in range(20) if token not in hidden]])
            whole = normalised(images[[number]])
            for token in hidden:
                row, column = divmod(token, 5)
                whole[:, :, 7 * row : 7 * row + 7, 7 * column : 7 * column + 7] = 0
            with torch.no_grad():
                function = energy.given(whole, torch.tensor([hidden]), seen)
            expected[number] = restore(function, whole, 2).restored[0]
    torch.testing.assert_close(normalised(result.restored)[~known], expected[~known])
    assert (result.restored[~known] != hidden_value[~known]).all()


def test_a_mask_that_does_not_fit_is_refused(images):
    model = make(energy="conditional")
    with pytest.raises(UserError, match="mask is a str; give a tensor"):
        model.restore(images, mask="all")
    for wrong in ({"num_steps": "4"}, {"num_steps": -1}, {"step_size": float("nan")}):
        with pytest.raises(UserError, match="give a whole number of 0 or more"):
            model.restore(images, **wrong)
    with pytest.raises(UserError, match=r"mask is \(4, 3, 28, 35\), images are"):
        model.restore(images, mask=torch.ones(4, 3, 28, 35, dtype=torch.bool))
    with pytest.raises(UserError, match="leaves no patch untouched"):
        model.restore(images, mask=torch.ones(28, 35, dtype=torch.bool))


def test_images_that_were_normalised_already_are_warned_of(model, images):
    for method in (model.energy, model.embed, model.restore):
        with pytest.warns(UserWarning, match="they are normalised inside") as seen:
            method(normalised(images))
        assert seen[0].filename == __file__


def test_files_and_pillow_images_are_scaled_cut_and_normalised(model, tmp_path):
    random = np.random.default_rng(0)
    picture = Image.fromarray(random.integers(0, 256, (56, 90, 3), dtype=np.uint8))
    picture.save(tmp_path / "a.png")
    pixels = torch.from_numpy(np.array(picture)).permute(2, 0, 1)[None] / 255
    scaled = F.interpolate(pixels, (28, 45), mode="bilinear", antialias=True)[..., 5:40]
    given = [model.embed([each]) for each in (picture, tmp_path / "a.png", str(tmp_path / "a.png"))]
    assert torch.equal(given[0], given[1])
    assert torch.equal(given[1], given[2])
    # The loader rounds scaled pixels to whole levels.
    torch.testing.assert_close(given[0], model.embed(scaled), rtol=0, atol=0.03)
    assert (given[0] - model.embed(scaled.roll(2, dims=-1))).abs().max() > 0.1
    assert model.embed([picture, tmp_path / "a.png"]).shape == (2, 16)


@pytest.mark.parametrize("mode", ["P", "CMYK", "RGBA", "LA", "I;16"])
def test_pillow_images_of_any_mode_are_what_their_files_are(model, tmp_path, mode):
    grey = Image.fromarray(np.random.default_rng(0).integers(0, 256, (28, 35), dtype=np.uint8))
    picture = grey.convert("RGB").convert(mode) if mode != "I;16" else grey.convert("I;16")
    path = tmp_path / ("a.tif" if mode in ("CMYK", "I;16") else "a.png")
    picture.save(path)
    assert torch.equal(model.energy([picture]), model.energy([path]))
    turned = picture.transpose(Image.Transpose.ROTATE_90)
    turned.getexif()[0x0112] = 6  # to be turned by 90 degrees, clockwise
    assert torch.equal(model.energy([turned]), model.energy([picture]))


@pytest.mark.parametrize(
    ("images", "message"),
    [
        (torch.zeros(2, 1, 28, 35), r"trained on 3 channel\(s\); give as many"),
        (torch.zeros(3, 28, 35), "give floats in .* of shape"),
        (torch.zeros(2, 3, 28, 35, dtype=torch.int64), "give floats in .* or uint8"),
        (torch.full((1, 3, 28, 35), torch.nan), "not finite; give finite ones"),
        (torch.zeros(1, 3, 30, 35), "no multiple of the 7x7 patches"),
        ([], "images is empty"),
        ("picture.png", r"images is one str; give a list"),
        (["missing.png"], "can't read missing.png"),
        ([np.zeros((3, 28, 35), np.uint8)], "a ndarray; give image files"),
    ],
)  # fmt: skip
def test_unfit_images_are_refused_in_one_line(model, images, message):
    with pytest.raises(UserError, match=message) as caught:
        model.energy(images)
    assert len(str(caught.value).splitlines()) == 1
