import itertools

import numpy as np
import pytest
import scipy.ndimage
import scipy.stats
import torch

from backfold.errors import UserError
from backfold.pretext import Masking

FILLS = ("zero", "noise", "mean")


def seeded(seed):
    return torch.Generator().manual_seed(seed)


def hidden_patches(mask, patch_size):
    """A pixel mask (height, width) as its set of hidden patches; fails on a half-hidden patch."""
    height, width = mask.shape
    hidden = set()
    for row, column in itertools.product(range(0, height, patch_size), range(0, width, patch_size)):
        patch = mask[row : row + patch_size, column : column + patch_size]
        assert patch.all() or not patch.any()
        if patch.all():
            hidden.add((row // patch_size, column // patch_size))
    return hidden


@pytest.mark.parametrize("blocks", [False, True])
@pytest.mark.parametrize(
    ("size", "patch_size", "ratio", "count"),
    [
        ((64, 96), 16, 0.6, 14),  # 24 patches, 14.4
        ((64, 96), 8, 0.75, 72),
        ((60, 90), 16, 0.6, 14),  # cut off at both edges, still 24
        ((16, 91), 16, 0.5, 3),  # one row of 6
        ((91, 16), 16, 0.9, 5),
        ((64, 96), 16, 0.001, 1),
        ((64, 96), 16, 0.999, 23),
        ((64, 96), 4, 0.95, 365),  # 384 patches, 364.8
        ((8, 8), 8, 0.1, 1),  # a single patch
        ((10, 9), 8, 0.6, 2),  # 4 patches, of which 3 are slivers: 2.4
    ],
)
def test_exact_number_of_whole_squares(blocks, size, patch_size, ratio, count):
    task = Masking(ratio, patch_size, blocks=blocks)
    masks = task(torch.randn(16, 2, *size, generator=seeded(1)), seeded(0)).loss_mask
    for mask in masks[:, 0]:
        assert len(hidden_patches(mask, patch_size)) == count


@pytest.mark.parametrize("blocks", [False, True])
@pytest.mark.parametrize("fill", FILLS)
def test_visible_pixels_are_untouched_and_hidden_ones_leave_no_trace(photographs, fill, blocks):
    task = Masking(0.6, 10, fill, blocks)
    corruption = task(photographs, seeded(0))
    mask = corruption.loss_mask.expand_as(photographs)
    assert torch.equal(corruption.corrupted[~mask], photographs[~mask])
    # Other pixels below the mask, infinite ones too: the corrupted image must not show it.
    other = photographs.masked_fill(corruption.loss_mask, float("inf"))
    assert torch.equal(task(other, seeded(0)).corrupted, corruption.corrupted)


def test_fill_zero_is_the_mean_of_the_data(photographs):
    corruption = Masking()(photographs, seeded(0))
    assert not corruption.corrupted[corruption.loss_mask.expand_as(photographs)].any()


def test_fill_mean_is_that_of_the_visible_pixels(photographs):
    corruption = Masking(fill="mean")(photographs, seeded(0))
    for image, clean, mask in zip(
        corruption.corrupted.numpy(), photographs.numpy(), corruption.loss_mask.numpy(), strict=True
    ):
        for channel in range(3):
            expected = clean[channel][~mask[0]].astype(np.float64).mean()
            np.testing.assert_allclose(image[channel][mask[0]], expected, atol=1e-5)


def test_fill_mean_of_one_visible_pixel_is_that_pixel():
    clean = torch.tensor([[[[2.0, 3.0]]]])
    corruption = Masking(fill="mean", mask_patch_size=1)(clean, seeded(0))
    visible = clean[~corruption.loss_mask]
    assert torch.equal(corruption.corrupted, visible.expand(1, 1, 1, 2))


def test_fill_mean_of_a_single_hidden_patch_is_zero():
    corrupted = Masking(fill="mean", mask_patch_size=8)(torch.ones(2, 3, 8, 8), seeded(0)).corrupted
    assert torch.equal(corrupted, torch.zeros(2, 3, 8, 8))


def test_fill_noise_is_white_and_gaussian(photographs):
    corruption = Masking(fill="noise")(photographs, seeded(0))
    noise = corruption.corrupted[corruption.loss_mask.expand_as(photographs)].numpy()
    assert scipy.stats.kstest(noise, "norm").pvalue > 0.01
    neighbours = np.corrcoef(noise[:-1], noise[1:])[0, 1]
    assert abs(neighbours) < 5 / len(noise) ** 0.5


def test_every_patch_is_hidden_equally_often():
    masks = Masking(0.4, 4).draw_mask(4000, 12, 20, seeded(0))
    share = masks[:, 0, ::4, ::4].double().mean(dim=0)
    assert (share - 0.4).abs().max() < 5 * (0.4 * 0.6 / 4000) ** 0.5


@pytest.mark.parametrize("ratio", [0.1, 0.4, 0.9])
def test_blocks_hide_every_patch_about_equally_often(ratio):
    share = Masking(ratio, 1, blocks=True).draw_mask(2000, 14, 14, seeded(0)).double().mean(dim=0)
    assert share.min() > 0.8 * ratio
    assert share.max() < 1.2 * ratio


@pytest.mark.parametrize("ratio", [0.1, 0.4, 0.75])
def test_blocks_are_few_and_compact(ratio):
    def pieces_and_boundary(blocks):
        masks = Masking(ratio, 1, blocks=blocks).draw_mask(50, 14, 14, seeded(0))[:, 0].numpy()
        pieces = [scipy.ndimage.label(mask)[1] for mask in masks]
        boundary = sum(np.diff(masks, axis=axis).sum() for axis in (1, 2))
        return pieces, boundary

    scattered_pieces, scattered_boundary = pieces_and_boundary(blocks=False)
    block_pieces, block_boundary = pieces_and_boundary(blocks=True)
    assert block_boundary < 0.6 * scattered_boundary
    assert np.mean(block_pieces) < 4
    if ratio < 0.5:  # more scattered patches than that grow into one piece
        assert np.mean(scattered_pieces) > 3 * np.mean(block_pieces)


def test_a_block_mask_is_rectangles_and_one_that_is_cut_short():
    """Greedy reference: full rectangles inside the mask leave little of it uncovered."""
    for mask in Masking(0.3, 1, blocks=True).draw_mask(20, 14, 14, seeded(0))[:, 0].numpy():
        count = mask.sum()
        left = mask.copy()
        for _ in range(6):
            left[largest_rectangle(mask, left)] = False
        assert left.sum() <= 0.15 * count


def largest_rectangle(mask, wanted):
    """The rectangle inside mask that covers most of wanted, as slices; by trying all."""
    best, best_cover = (slice(0, 0), slice(0, 0)), 0
    rows, columns = mask.shape
    for top, left in zip(*np.nonzero(mask), strict=True):
        right = columns
        for bottom in range(top, rows):
            run = mask[bottom, left:right]
            right = left + (len(run) if run.all() else int(run.argmin()))
            if right == left:
                break
            where = (slice(top, bottom + 1), slice(left, right))
            if wanted[where].sum() > best_cover:
                best, best_cover = where, wanted[where].sum()
    return best


@pytest.mark.parametrize(
    ("fields", "shown"),
    [
        ({"mask_ratio": 0.0}, "mask_ratio is 0.0"),
        ({"mask_ratio": 1.0}, "mask_ratio is 1.0"),
        ({"mask_ratio": float("nan")}, "mask_ratio is nan"),
        ({"mask_patch_size": 0}, "mask_patch_size is 0"),
        ({"fill": "grey"}, "fill is 'grey'; choose from zero, noise, mean"),
    ],
)
def test_refuses_bad_fields(fields, shown):
    with pytest.raises(UserError, match=shown):
        Masking(**fields)


@pytest.mark.parametrize("size", [(15, 96), (96, 15)])
def test_refuses_patches_larger_than_the_image(size):
    with pytest.raises(UserError, match=r"mask_patch_size is 16, larger than .* give 15 or less"):
        Masking()(torch.zeros(1, 3, *size), seeded(0))
