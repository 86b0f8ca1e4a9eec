"""Scores and maps of defects, against slow references, and on images with a defect drawn in."""

from functools import partial

import pytest
import torch
from torch.nn import functional as F

from backfold import defects
from backfold.defects import DefectFinder, Usual, alone, alone_pixels, error_map, gradient_map
from backfold.energy import EnergyModel
from backfold.errors import UserError
from backfold.pretext import Masking

MASKING = Masking(mask_patch_size=4)
OPTIONS = {"patch_size": 4, "embed_dim": 32, "depth": 2, "num_heads": 2}


@pytest.fixture(scope="module")
def energy():
    torch.manual_seed(0)
    return EnergyModel(
        "vit_tiny_patch16_224", image_size=24, channels=2, backbone_options=OPTIONS
    ).eval()


def waves(count, seed=0):
    """Images of waves in any phase, normalised."""
    random = torch.Generator().manual_seed(seed)
    phases = 6.3 * torch.rand(count, 2, 1, 1, generator=random)
    x = torch.arange(24) * (2 * torch.pi / 6)
    noise = 0.1 * torch.randn(count, 2, 24, 24, generator=random)
    return 1.4 * torch.sin(x.expand(24, 24) + phases) + noise


def test_errors_are_those_of_the_conditional_energy_part_by_part(energy):
    images = waves(1)
    found = error_map(energy, images, MASKING, is_conditional=True)
    order = torch.rand(1, 36, generator=torch.Generator().manual_seed(0)).argsort(stable=True)
    expected = torch.zeros_like(found)
    for part in order.tensor_split(4, dim=1):
        hidden = torch.zeros(1, 36, dtype=torch.bool).scatter(1, part, True)
        mask = F.interpolate(hidden.view(1, 1, 6, 6).float(), scale_factor=4).bool()
        corrupted = images.masked_fill(mask, 0.0).requires_grad_()
        left = (~hidden).nonzero()[:, 1][None]
        energies = energy.given(images, part, left)(corrupted)
        (gradient,) = torch.autograd.grad(energies.sum(), corrupted)
        off = (corrupted - gradient - images).square().mean(dim=1, keepdim=True)
        expected = torch.where(mask, off, expected)
    torch.testing.assert_close(found, expected.detach())
    filled = error_map(energy, images, MASKING, is_conditional=False, num_steps=0)
    torch.testing.assert_close(filled, images.square().mean(dim=1, keepdim=True))


def test_the_gradient_s_map_is_that_of_finite_differences(energy):
    exact, images, squares = energy.double(), waves(1).double(), []
    energies, found = gradient_map(exact, images)
    for channel in range(2):
        at = torch.zeros_like(images)
        at[:, channel, 5, 7] = 1e-5
        with torch.no_grad():
            squares.append(((exact(images + at) - exact(images - at)) / 2e-5).square())
    assert found[0, 0, 5, 7] == pytest.approx(torch.stack(squares).mean().sqrt().item(), rel=1e-4)
    with torch.no_grad():
        torch.testing.assert_close(energies, exact(images))
    energy.float()


def test_mahalanobis_distance_of_known_features():
    random = torch.Generator().manual_seed(0)
    features = torch.randn(5000, 2, generator=random) * torch.tensor([1.0, 4.0]) + 3.0
    usual = Usual.of(features)
    found = usual.distance(torch.tensor([[3.0, 3.0], [5.0, 3.0], [3.0, 11.0]]))
    torch.testing.assert_close(found, torch.tensor([0.0, 2.0, 2.0]), atol=0.1, rtol=0)


def test_a_position_alone_is_far_from_the_others():
    features = torch.randn(2, 9, 5, generator=torch.Generator().manual_seed(0))
    unit = features / features.norm(dim=2, keepdim=True)
    expected = torch.cdist(unit, unit).sort(dim=2).values[:, :, 1:5].mean(dim=2)
    torch.testing.assert_close(alone(features), expected, rtol=1e-3, atol=0)


def test_a_square_that_the_image_has_once_stands_alone():
    image = torch.randn(1, 2, 4, 4, generator=torch.Generator().manual_seed(0)).repeat(1, 1, 13, 13)
    image[:, :, 20:24, 28:32] = image[:, :, 20:24, 28:32].flip(3)
    found = alone_pixels(image)  # squares of 4 pixels, as 52 // 12
    assert found.shape == (1, 1, 52, 52)
    assert found[0, 0, 22, 30] == found.max()
    assert found[0, 0, :16].max() < 1e-3
    cut = alone_pixels(image[..., :51])
    torch.testing.assert_close(cut[..., :40], found[..., :40])
    assert torch.equal(cut[..., 48:], cut[..., 47:48].expand(-1, -1, -1, 3))


def test_a_drawn_defect_is_found_and_where_it_is(energy):
    finder = DefectFinder(energy, waves(64).split(32), MASKING, is_conditional=True)
    good, broken = waves(12, seed=1), waves(12, seed=1)
    broken[:, :, 8:16, 12:20] = broken[:, :, 8:16, 12:20].transpose(2, 3)
    (usual, _), (strange, maps) = finder(good), finder(broken)
    assert set(usual) == {
        "energy", "gradient_norm", "nearest", "mahalanobis", "largest_gradient", "largest_error",
        "largest_distance", "largest_alone", "largest_pixels", "joined",
    }  # fmt: skip
    wins = (strange["largest_alone"] > usual["largest_alone"]).float().mean()
    assert wins > 0.9
    assert maps.shape == (12, 1, 24, 24)
    inside = torch.zeros(24, 24, dtype=torch.bool)
    inside[8:16, 12:20] = True
    assert maps[:, 0, inside].mean() > maps[:, 0, ~inside].mean() + 0.5
    assert (strange["joined"] >= 0).all()
    assert (strange["joined"] <= 1).all()
    # Ranks among the usual images: those themselves are ordinary, each alone or in a batch.
    assert 0.3 < usual["joined"].mean() < 0.7
    with pytest.raises(UserError, match="give them alike"):
        finder(broken[..., :20])
    alone_scores, alone_map = finder(broken[:1])
    assert alone_scores["joined"].item() == pytest.approx(strange["joined"][0].item(), abs=0.02)
    torch.testing.assert_close(alone_map, maps[:1], atol=1e-3, rtol=1e-3)


def test_a_restoration_that_diverges_is_the_strangest(energy):
    finder = DefectFinder(energy, waves(16).split(8), MASKING, is_conditional=True)
    finder._errors = partial(finder._errors, step_size=1e9)
    scores, _ = finder(waves(2))
    assert torch.isposinf(scores["largest_error"]).all()
    with pytest.raises(UserError, match="diverges for every usual image"):
        DefectFinder(energy, [waves(16)], MASKING, is_conditional=True, step_size=1e9)
    with pytest.raises(UserError, match="7 usual images; give 8 or more"):
        DefectFinder(energy, [waves(7)], MASKING)
    assert "largest_error" not in DefectFinder(energy, [waves(8)])(waves(2))[0]


def test_usual_images_may_come_in_any_order(energy):
    """Sorted by class, as folders are: the bank and the levels have some of each."""
    kinds = [waves(16, seed) * factor for seed, factor in enumerate((0.3, 1.0, 2.0, 4.0))]
    finder = DefectFinder(energy, kinds, MASKING, is_conditional=True)
    for kind, factor in enumerate((0.3, 1.0, 2.0, 4.0)):
        scores, _ = finder(waves(16, 10 + kind) * factor)
        assert finder._levels["nearest"].max() > 0.5 * scores["nearest"].mean()
    mixed = torch.cat(kinds)[torch.randperm(64, generator=torch.Generator().manual_seed(1))]
    again = DefectFinder(energy, mixed.split(16), MASKING, is_conditional=True)
    ratio = again._levels["nearest"].median() / finder._levels["nearest"].median()
    assert 0.5 < ratio < 2
    assert again.fingerprint != finder.fingerprint


def test_an_image_s_noise_is_its_own(energy):
    masking, images = Masking(mask_patch_size=4, fill="noise"), waves(4)
    whole = error_map(energy, images, masking, is_conditional=True)
    one = error_map(energy, images[2:3], masking, is_conditional=True)
    torch.testing.assert_close(one, whole[2:3], rtol=1e-3, atol=1e-3)


@pytest.mark.parametrize("size", [(32, 32), (32, 64)])  # of one position, and of two
def test_a_convolutional_backbone_of_few_positions(size):
    torch.manual_seed(0)
    dense = EnergyModel("test_resnet", image_size=size, channels=1).eval()
    random = torch.Generator().manual_seed(0)
    images = torch.randn(24, 1, *size, generator=random)
    finder = DefectFinder(dense, images[:16].split(8), Masking(mask_patch_size=16))
    scores, maps = finder(images[16:])
    assert maps.shape == (8, 1, *size)
    assert maps.isfinite().all()
    assert all(found.isfinite().all() for found in scores.values())
    one_square = DefectFinder(dense, images.split(8), Masking(mask_patch_size=64))
    assert "largest_error" not in one_square(images)[0]


def test_a_distribution_is_fitted_to_a_fair_sample(monkeypatch):
    """A stride would see some columns alone."""
    monkeypatch.setattr(defects, "MOST_POSITIONS", 4_000)
    columns = torch.arange(28_000) % 28
    random = torch.Generator().manual_seed(0)
    features = torch.stack([columns.float(), torch.randn(28_000, generator=random)], dim=1)
    assert Usual.of(features).mean[0] == pytest.approx(13.5, abs=0.5)
