import itertools

import numpy as np
import pytest
import scipy.ndimage
import scipy.stats
import torch
from torch._subclasses.fake_tensor import FakeTensorMode

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


SPARSE_CASES = pytest.mark.parametrize(
    ("size", "patch_size", "ratio", "share", "hidden", "kept"),
    [
        ((64, 96), 16, 0.75, 0.33, 18, 6),  # 5.94
        ((64, 96), 8, 0.75, 1 / 3, 72, 24),
        ((64, 96), 8, 0.6, 0.999, 58, 58),  # rounded up to all
        ((64, 96), 16, 0.6, 0.001, 14, 1),  # one at least
        ((16, 16), 8, 0.25, 0.4, 1, 1),
        ((8, 8), 8, 0.5, 0.5, 1, 1),  # a single patch
    ],
)


@SPARSE_CASES
@pytest.mark.parametrize("blocks", [False, True])
def test_visible_patches_and_an_exact_number_of_hidden_ones_run(
    blocks, size, patch_size, ratio, share, hidden, kept
):
    task = Masking(ratio, patch_size, blocks=blocks, hidden_share=share)
    clean = torch.randn(16, 2, *size, generator=seeded(1))
    sparse, dense = (
        masking(clean, seeded(0)) for masking in (task, Masking(ratio, patch_size, blocks=blocks))
    )
    rows, columns = size[0] // patch_size, size[1] // patch_size
    assert sparse.running.square_size == patch_size
    assert sparse.running.indices.dtype == torch.int64
    assert sparse.running.indices.shape == (16, rows * columns - hidden + kept)
    for indices, mask, dense_mask in zip(
        sparse.running.indices.tolist(), sparse.loss_mask[:, 0], dense.loss_mask[:, 0], strict=True
    ):
        assert indices == sorted(set(indices))
        all_hidden = {r * columns + c for r, c in hidden_patches(dense_mask, patch_size)}
        counted = {r * columns + c for r, c in hidden_patches(mask, patch_size)}
        assert len(all_hidden) == hidden
        assert len(counted) == kept
        assert counted == all_hidden & set(indices)
        assert set(range(rows * columns)) - all_hidden <= set(indices)


@pytest.mark.parametrize("blocks", [False, True])
@pytest.mark.parametrize("fill", FILLS)
def test_hidden_share_does_not_change_the_images(photographs, fill, blocks):
    dense = Masking(0.6, 8, fill, blocks)(photographs, seeded(0))
    sparse = Masking(0.6, 8, fill, blocks, hidden_share=0.3)(photographs, seeded(0))
    assert torch.equal(sparse.corrupted, dense.corrupted)


def test_a_hidden_share_of_one_is_dense_with_the_same_bits(photographs):
    corruption = Masking(0.6, 8, hidden_share=1.0)(photographs, seeded(0))
    assert corruption.running is None
    # 96 squares, of which the 58 that draw the lowest numbers are hidden.
    drawn = torch.rand(8, 96, generator=seeded(0))
    hidden = (drawn <= drawn.sort(dim=1).values[:, 57:58]).view(8, 1, 8, 12)
    mask = torch.nn.functional.interpolate(hidden.float(), scale_factor=8) > 0
    assert torch.equal(corruption.loss_mask, mask)
    assert torch.equal(corruption.corrupted, photographs.masked_fill(mask, 0))


@pytest.mark.parametrize("blocks", [False, True])
def test_hidden_patches_run_at_random(blocks):
    """Each hidden patch runs equally often, and neighbours run no more often together."""
    count, clean = 2000, torch.zeros(1, 1, 12, 12).expand(2000, 1, 12, 12)
    hidden = Masking(0.5, 1, blocks=blocks).draw_mask(count, 12, 12, seeded(0)).double()
    task = Masking(0.5, 1, blocks=blocks, hidden_share=0.25)
    runs = task(clean, seeded(0)).loss_mask.double()  # 18 of 72
    share = runs.sum(dim=0) / hidden.sum(dim=0)
    spread = (0.25 * 0.75 / hidden.sum(dim=0)).sqrt()
    assert ((share - 0.25).abs() < 5 * spread).all()

    def neighbours(mask):
        return (mask[..., 1:] * mask[..., :-1]).sum(dim=(1, 2, 3))

    excess = neighbours(runs) - neighbours(hidden) * (18 * 17) / (72 * 71)
    assert excess.mean().abs() < 5 * excess.std() / count**0.5


def test_the_running_patches_do_not_depend_on_data():
    """Traced without values: any shape or number that depends on them would raise."""
    generator = seeded(0)
    with FakeTensorMode():
        corruption = Masking(0.75, 8, blocks=True, hidden_share=0.33)(
            torch.empty(4, 3, 32, 32), generator
        )
    assert corruption.running.indices.shape == (4, 8)


@pytest.mark.parametrize("share", [0.0, -0.5, 1.01, float("nan")])
def test_refuses_a_hidden_share_out_of_range(share):
    with pytest.raises(UserError, match=f"^hidden_share is {share}; give a share above 0"):
        Masking(hidden_share=share)


@pytest.mark.parametrize("size", [(60, 96), (64, 90)])
def test_a_hidden_share_needs_whole_squares(size):
    clean = torch.zeros(1, 3, *size)
    with pytest.raises(UserError, match=rf"mask_patch_size 16.* {size[0]}x{size[1]} pixel"):
        Masking(hidden_share=0.5)(clean, seeded(0))
    assert Masking(hidden_share=1.0)(clean, seeded(0)).running is None
