import numpy as np
import pytest
import skimage.data
import torch
from PIL import Image

from backfold.errors import UserError
from backfold.pretext import Colorization, chroma_error, luminance


def generator():
    return torch.Generator().manual_seed(0)


def test_luminance_agrees_with_pillow():
    pixels = np.array(skimage.data.astronaut())
    expected = np.asarray(Image.fromarray(pixels).convert("L")).astype(np.float32)
    images = torch.from_numpy(pixels).permute(2, 0, 1)[None].float()
    # Pillow rounds to whole grey levels.
    np.testing.assert_allclose(luminance(images)[0, 0].numpy(), expected, rtol=0, atol=0.51)


@pytest.mark.parametrize("channels", [2, 5, 12])
def test_luminance_of_other_channel_counts_is_the_mean(photographs_of, channels):
    images = photographs_of(channels)
    expected = images.numpy().astype(np.float64).mean(axis=1, keepdims=True)
    np.testing.assert_allclose(luminance(images).numpy(), expected, atol=1e-6)


@pytest.mark.parametrize("channels", [2, 3, 5])
def test_all_channels_become_the_luminance(photographs_of, channels):
    clean = photographs_of(channels)
    corruption = Colorization()(clean, generator())
    for channel in range(channels):
        assert torch.equal(corruption.corrupted[:, [channel]], luminance(clean))
    assert corruption.loss_mask.all()


@pytest.mark.parametrize("channels", [2, 3, 5])
def test_colours_fade_by_a_share_drawn_for_each_image(photographs_of, channels):
    clean = photographs_of(channels)
    corrupted = Colorization(0.25, 0.75)(clean, generator()).corrupted
    grey = luminance(clean)
    shares = ((clean - corrupted) / (clean - grey)).flatten(1).median(dim=1).values
    assert shares.unique().numel() == len(clean)
    assert shares.min() >= 0.25
    assert shares.max() <= 0.75
    expected = clean + shares[:, None, None, None] * (grey - clean)
    torch.testing.assert_close(corrupted, expected, atol=1e-5, rtol=0)


def test_a_share_that_is_fixed_is_not_drawn(photographs):
    before, after = generator(), generator()
    corrupted = Colorization(0.5, 0.5)(photographs, after).corrupted
    assert torch.equal(before.get_state(), after.get_state())
    expected = (photographs + luminance(photographs)) / 2
    torch.testing.assert_close(corrupted, expected)


@pytest.mark.parametrize("bounds", [(0.0, 1.0), (0.6, 0.5), (0.5, 1.1), (float("nan"), 1.0)])
def test_refuses_shares_out_of_range(bounds):
    with pytest.raises(UserError, match=f"min_faded is {bounds[0]} and max_faded {bounds[1]};"):
        Colorization(*bounds)


def test_images_without_colours_stay_as_they_are(photographs_of):
    grey = photographs_of(1).repeat(1, 3, 1, 1)
    torch.testing.assert_close(Colorization()(grey, generator()).corrupted, grey)


def test_chroma_error_in_closed_form():
    clean = torch.zeros(2, 3, 1, 2)
    restored = clean.clone()
    restored[0, 0, 0, 1] = 1.0  # one pixel of two turns red
    # Its luminance is 0.299, so its chroma is (0.701, -0.299, -0.299).
    expected = (0.701 + 0.299 + 0.299) / 6
    torch.testing.assert_close(chroma_error(restored, clean), torch.tensor([expected, 0.0]))


@pytest.mark.parametrize("channels", [1, 3, 5])
def test_chroma_error_ignores_brightness(photographs_of, channels):
    clean = photographs_of(channels)
    brighter = clean + torch.randn(8, 1, 64, 96, generator=generator())
    torch.testing.assert_close(chroma_error(clean, clean), torch.zeros(8))
    torch.testing.assert_close(chroma_error(brighter, clean), torch.zeros(8), atol=1e-6, rtol=0)


def test_chroma_error_of_a_corrupted_image_is_its_colourfulness(photographs):
    corrupted = Colorization()(photographs, generator()).corrupted
    expected = (photographs - luminance(photographs)).abs().mean(dim=(1, 2, 3))
    assert expected.min() > 0.01
    torch.testing.assert_close(chroma_error(corrupted, photographs), expected)


def test_refuses_one_channel(photographs_of):
    with pytest.raises(UserError, match=r"1 channel.*choose another pretext task"):
        Colorization()(photographs_of(1), generator())
