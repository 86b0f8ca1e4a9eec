"""Tasks that change every pixel: colorization, denoising and super-resolution."""

import numpy as np
import pytest
import scipy.stats
import skimage.data
import torch
from PIL import Image

from backfold.errors import UserError
from backfold.pretext import (
    Bands,
    Colorization,
    Denoising,
    SuperResolution,
    chroma_error,
    luminance,
    spectral_angle,
)
from tiny_run import seeded


def test_luminance_agrees_with_pillow():
    pixels = np.array(skimage.data.astronaut())
    expected = np.asarray(Image.fromarray(pixels).convert("L")).astype(np.float32)
    images = torch.from_numpy(pixels).permute(2, 0, 1)[None].float()
    # Pillow rounds to whole grey levels.
    np.testing.assert_allclose(luminance(images)[0, 0].numpy(), expected, rtol=0, atol=0.51)


@pytest.mark.parametrize("channels", [2, 3, 5])
def test_all_channels_become_the_luminance(photographs_of, channels):
    clean = photographs_of(channels)
    corruption = Colorization()(clean, seeded(0))
    grey = luminance(clean)
    assert torch.equal(corruption.corrupted, grey.expand_as(clean))
    assert corruption.loss_mask.all()
    if channels != 3:
        torch.testing.assert_close(grey, clean.mean(dim=1, keepdim=True))


def test_colours_fade_by_a_share_drawn_for_each_image(photographs):
    clean = photographs
    corrupted = Colorization(0.25, 0.75)(clean, seeded(0)).corrupted
    grey = luminance(clean)
    shares = ((clean - corrupted) / (clean - grey)).flatten(1).median(dim=1).values
    assert shares.unique().numel() == len(clean)
    assert shares.min() >= 0.25
    assert shares.max() <= 0.75
    expected = clean + shares[:, None, None, None] * (grey - clean)
    torch.testing.assert_close(corrupted, expected, atol=1e-5, rtol=0)
    fixed = Colorization(0.5, 0.5)(clean, seeded(0)).corrupted
    torch.testing.assert_close(fixed, (clean + grey) / 2)


def test_chroma_error_in_closed_form():
    clean = torch.zeros(2, 3, 1, 2)
    restored = clean.clone()
    restored[0, 0, 0, 1] = 1.0  # one pixel of two turns red
    # Its luminance is 0.299, so its chroma is (0.701, -0.299, -0.299).
    expected = (0.701 + 0.299 + 0.299) / 6
    torch.testing.assert_close(chroma_error(restored, clean), torch.tensor([expected, 0.0]))


@pytest.mark.parametrize(("noise_std", "channels"), [(0.05, 1), (0.5, 3), (2.0, 12)])
def test_noise_is_gaussian_of_the_given_deviation(photographs_of, noise_std, channels):
    clean = photographs_of(channels)
    corrupted = Denoising(noise_std, noise_std)(clean, seeded(0)).corrupted
    noise = (corrupted - clean).double().flatten(0, 1).flatten(1).numpy()
    # The measured deviation of n draws itself deviates by 1 / sqrt(2 n).
    tolerance = 5 * noise_std / (2 * noise.shape[1]) ** 0.5
    np.testing.assert_allclose(noise.std(axis=1), noise_std, rtol=0, atol=tolerance)
    assert scipy.stats.kstest(noise.ravel() / noise_std, "norm").pvalue > 0.005
    # Images and channels have noise of their own, which knows nothing of them.
    related = np.corrcoef(noise, clean.flatten(0, 1).flatten(1))[: len(noise)]
    np.fill_diagonal(related, 0)
    assert np.abs(related).max() < 5 / noise.shape[1] ** 0.5


def test_deviation_is_uniform_over_the_range():
    corrupted = Denoising(0.1, 0.8)(torch.zeros(500, 3, 40, 40), seeded(0)).corrupted
    measured = corrupted.flatten(1).std(dim=1).numpy()
    # 2 % is five times the error of a deviation measured from 4800 values.
    assert measured.min() > 0.1 * 0.95
    assert measured.max() < 0.8 * 1.05
    assert scipy.stats.kstest(measured, scipy.stats.uniform(0.1, 0.7).cdf).pvalue > 0.01


@pytest.mark.parametrize(("octaves", "height", "width"), [(1, 32, 40), (4, 32, 40), (3, 19, 9)])
def test_each_octave_has_its_share_of_the_variance(octaves, height, width):
    clean = torch.zeros(4000, 1, height, width)
    noise = Denoising(1.0, 1.0, octaves)(clean, seeded(0)).corrupted[:, 0]

    def covariance(row, column):
        """With the pixel in the corner, over the images."""
        return float((noise[:, 0, 0] * noise[:, row, column]).mean())

    # A pixel shares the squares of 1, 2, 4, ... pixels with those at most so far from the corner.
    for distance in range(9):
        shared = sum(2**octave > distance for octave in range(octaves)) / octaves
        for row, column in ((distance, 0), (0, distance), (distance, distance)):
            if row < height and column < width:
                assert covariance(row, column) == pytest.approx(shared, abs=5 * (2 / 4000) ** 0.5)


def fixed(factor):
    return SuperResolution(factor, factor)


def pillow_down_and_up(channel, factor):
    picture = Image.fromarray(channel.numpy())
    size = [max(1, round(side / factor)) for side in picture.size]
    small = picture.resize(size, Image.Resampling.BICUBIC)
    return torch.tensor(np.array(small.resize(picture.size, Image.Resampling.BICUBIC)))


@pytest.mark.parametrize(
    ("factor", "size"), [(1.0, (64, 96)), (2.25, (61, 33)), (4.0, (64, 96)), (8.0, (2, 3))]
)
def test_agrees_with_pillow(photographs_of, factor, size):
    clean = photographs_of(3, *size)
    found = fixed(factor)(clean, seeded(0)).corrupted.flatten(0, 1)
    expected = torch.stack([pillow_down_and_up(each, factor) for each in clean.flatten(0, 1)])
    torch.testing.assert_close(found, expected, atol=2e-5, rtol=0)


def test_factors_are_evenly_spaced_and_include_both_ends():
    assert SuperResolution(2.0, 3.0).factors == pytest.approx((2.0, 2.25, 2.5, 2.75, 3.0))
    assert fixed(3.0).factors == (3.0,)
    assert SuperResolution(2.0, 2.375).factors == pytest.approx((2.0, 2.1875, 2.375))


def test_each_image_has_its_own_factor_and_all_are_equally_frequent(photographs_of):
    task = SuperResolution(1.0, 2.0)
    clean = photographs_of(1, 16, 16)[:1]
    versions = torch.cat([fixed(factor)(clean, seeded(0)).corrupted for factor in task.factors])
    corrupted = task(clean.expand(1000, -1, -1, -1), seeded(0)).corrupted
    distances = (corrupted[:, None] - versions[None]).abs().amax(dim=(2, 3, 4))
    matches = distances < 1e-6
    assert (matches.sum(dim=1) == 1).all()
    # 5 standard deviations of a binomial with probability 1/5.
    assert (matches.sum(dim=0) - 200).abs().max() < 5 * (1000 * 0.16) ** 0.5


def test_one_group_of_bands_is_hidden_in_each_square(photographs_of):
    groups = (0, 1), (4,), (2, 3)
    clean = photographs_of(5, 40, 32)
    corrupted = Bands(groups, band_patch_size=16)(clean, seeded(0)).corrupted
    drawn = []
    for image, before in zip(corrupted, clean, strict=True):
        for row in range(0, 40, 16):
            for column in range(0, 32, 16):
                square = (slice(None), slice(row, row + 16), slice(column, column + 16))
                gone = (image[square] == 0).flatten(1).all(dim=1)
                kept = ~gone
                assert torch.equal(image[square][kept], before[square][kept])
                drawn.append(tuple(gone.nonzero().flatten().tolist()))
    assert set(drawn) == set(groups)
    some = Bands(groups, band_patch_size=8, share=0.3)(clean, seeded(0)).corrupted
    squares = (some == 0).any(dim=1, keepdim=True)[:, :, ::8, ::8]
    assert (squares.flatten(1).sum(dim=1) == 6).all()  # of 20
    whole = Bands()(clean, seeded(0)).corrupted
    assert ((whole == 0).flatten(2).all(dim=2).sum(dim=1) == 1).all()


@pytest.mark.parametrize(
    ("task", "fields", "channels", "shown"),
    [
        (Bands, {"groups": ((0, 3),)}, 3, "give some from 0 to 2 in each group, never all"),
        (Bands, {"groups": ((0, 1, 2),)}, 3, "never all"),
        (Bands, {"groups": ((0,), ())}, 3, "in each group"),
        (Bands, {"groups": ((-1,),)}, 3, "from 0"),
        (Bands, {}, 1, r"images have 1 channel\(s\)"),
        (Bands, {"share": 0}, 3, "share is 0"),
        (Bands, {"band_patch_size": -1}, 3, "band_patch_size is -1"),
        (Colorization, {}, 1, "colorization got images of 1 channel"),
        (Colorization, {"min_faded": 0.6, "max_faded": 0.5}, 3, "min_faded is 0.6 and max_faded"),
        (Colorization, {"max_faded": 1.1}, 3, "max_faded 1.1"),
        (Denoising, {"min_noise_std": 0.9}, 3, "min_noise_std is 0.9 and max_noise_std 0.8"),
        (Denoising, {"min_noise_std": 0, "max_noise_std": 0}, 3, "max_noise_std 0; .* above 0"),
        (Denoising, {"octaves": 0}, 3, "^octaves is 0; "),
        (Denoising, {"octaves": 8}, 3, "squares of 128 pixels in a 64x96 .* give 7 or less"),
        (SuperResolution, {"min_factor": 0.5}, 3, "min_factor is 0.5 and max_factor 4.0"),
        (SuperResolution, {"max_factor": float("nan")}, 3, "max_factor nan"),
    ],
)
def test_refusals(task, fields, channels, shown, photographs_of):
    with pytest.raises(UserError, match=shown):
        task(**fields)(photographs_of(channels), seeded(0))


def test_spectral_angle_of_known_spectra():
    clean = torch.tensor([1.0, 0.0, 0.0]).view(1, 3, 1, 1).expand(1, 3, 4, 4)
    turned = torch.tensor([1.0, 1.0, 0.0]).view(1, 3, 1, 1).expand(1, 3, 4, 4)
    assert spectral_angle(turned, clean).item() == pytest.approx(45, abs=1e-3)
    assert spectral_angle(7 * clean, clean).item() == pytest.approx(0, abs=0.05)
