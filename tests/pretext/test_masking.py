import itertools

import numpy as np
import pytest
import scipy.ndimage
import scipy.stats
import torch

from backfold.errors import UserError
from backfold.pretext import Masking
from tiny_run import seeded

FILLS = ("zero", "noise", "mean")


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
        ((60, 90), 16, 0.6, 14),  # cut off at both edges, still 24
        ((16, 91), 16, 0.5, 3),  # one row of 6
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


def test_fills(photographs):
    zero, mean = (Masking(fill=fill)(photographs, seeded(0)) for fill in ("zero", "mean"))
    assert not zero.corrupted[zero.loss_mask.expand_as(photographs)].any()
    for image, clean, mask in zip(mean.corrupted, photographs, mean.loss_mask[:, 0], strict=True):
        expected = clean[:, ~mask].double().mean(dim=1).float()[:, None].expand(3, int(mask.sum()))
        torch.testing.assert_close(image[:, mask], expected, rtol=0, atol=1e-5)
    alone = Masking(fill="mean", mask_patch_size=8)(torch.ones(2, 3, 8, 8), seeded(0)).corrupted
    assert not alone.any()  # nothing is visible
    noisy = Masking(fill="noise")(photographs, seeded(0))
    noise = noisy.corrupted[noisy.loss_mask.expand_as(photographs)].numpy()
    assert scipy.stats.kstest(noise, "norm").pvalue > 0.01
    assert abs(np.corrcoef(noise[:-1], noise[1:])[0, 1]) < 5 / len(noise) ** 0.5  # white


@pytest.mark.parametrize("blocks", [False, True])
@pytest.mark.parametrize("ratio", [0.1, 0.4, 0.9])
def test_every_patch_is_hidden_about_equally_often(ratio, blocks):
    masks = Masking(ratio, 1, blocks=blocks)(torch.zeros(2000, 1, 14, 14), seeded(0)).loss_mask
    spread = 0.2 * ratio if blocks else 5 * (ratio * (1 - ratio) / 2000) ** 0.5
    assert (masks.double().mean(dim=0) - ratio).abs().max() < spread


@pytest.mark.parametrize("ratio", [0.1, 0.4, 0.75])
def test_blocks_are_few_and_compact(ratio):
    clean = torch.zeros(50, 1, 14, 14)
    maskings = Masking(ratio, 1, blocks=True), Masking(ratio, 1)
    masks = [masking(clean, seeded(0)).loss_mask[:, 0].numpy() for masking in maskings]
    boundaries = [sum(np.diff(each, axis=axis).sum() for axis in (1, 2)) for each in masks]
    assert boundaries[0] < 0.6 * boundaries[1]
    assert np.mean([scipy.ndimage.label(mask)[1] for mask in masks[0]]) < 4


@pytest.mark.parametrize(
    ("fields", "shown"),
    [
        ({"mask_ratio": 1.0}, "mask_ratio is 1; "),
        ({"hidden_share": 0.0}, "^hidden_share is 0; give a share above 0"),
        ({"mask_ratio": float("nan")}, "mask_ratio is nan"),
        ({"mask_patch_size": 0}, "mask_patch_size is 0"),
        ({"fill": "grey"}, "fill is 'grey'; choose from zero, noise, mean"),
        ({"mask_patch_size": 65}, "mask_patch_size is 65, larger than .* give 64 or less"),
        ({"hidden_share": 0.5}, "mask_patch_size is 16 .* 64x90 pixels; .* such as 2"),
    ],
)
def test_refusals(fields, shown):
    with pytest.raises(UserError, match=shown):
        Masking(**fields)(torch.zeros(1, 3, 64, 90), seeded(0))


@pytest.mark.parametrize("blocks", [False, True])
@pytest.mark.parametrize(
    ("size", "patch_size", "ratio", "share", "hidden", "kept"),
    [
        ((64, 96), 16, 0.75, 0.33, 18, 6),  # 5.94
        ((64, 96), 8, 0.6, 0.999, 58, 58),  # rounded up to all
        ((64, 96), 16, 0.6, 0.001, 14, 1),  # one at least
    ],
)
def test_visible_patches_and_an_exact_number_of_hidden_ones_run(
    blocks, size, patch_size, ratio, share, hidden, kept
):
    clean = torch.randn(16, 2, *size, generator=seeded(1))
    sparse, dense = (
        Masking(ratio, patch_size, blocks=blocks, hidden_share=given)(clean, seeded(0))
        for given in (share, 1.0)
    )
    assert torch.equal(sparse.corrupted, dense.corrupted)
    rows, columns = size[0] // patch_size, size[1] // patch_size
    assert sparse.running.square_size == patch_size
    assert sparse.running.indices.shape == (16, rows * columns - hidden + kept)
    masks = sparse.loss_mask[:, 0], dense.loss_mask[:, 0]
    for indices, mask, dense_mask in zip(sparse.running.indices.tolist(), *masks, strict=True):
        assert indices == sorted(set(indices))
        all_hidden = {r * columns + c for r, c in hidden_patches(dense_mask, patch_size)}
        counted = {r * columns + c for r, c in hidden_patches(mask, patch_size)}
        assert (len(all_hidden), len(counted)) == (hidden, kept)
        assert counted == all_hidden & set(indices)
        assert set(range(rows * columns)) - all_hidden <= set(indices)


@pytest.mark.parametrize("blocks", [False, True])
def test_hidden_patches_run_at_random(blocks):
    """Each hidden patch runs equally often, and neighbours run no more often together."""
    count, clean = 2000, torch.zeros(1, 1, 12, 12).expand(2000, 1, 12, 12)
    hidden = Masking(0.5, 1, blocks=blocks)(clean, seeded(0)).loss_mask.double()
    task = Masking(0.5, 1, blocks=blocks, hidden_share=0.25)
    runs = task(clean, seeded(0)).loss_mask.double()  # 18 of 72
    share = runs.sum(dim=0) / hidden.sum(dim=0)
    spread = (0.25 * 0.75 / hidden.sum(dim=0)).sqrt()
    assert ((share - 0.25).abs() < 5 * spread).all()

    def neighbours(mask):
        return (mask[..., 1:] * mask[..., :-1]).sum(dim=(1, 2, 3))

    excess = neighbours(runs) - neighbours(hidden) * (18 * 17) / (72 * 71)
    assert excess.mean().abs() < 5 * excess.std() / count**0.5
