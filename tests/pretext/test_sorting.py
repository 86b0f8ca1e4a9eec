import itertools

import pytest
import torch

from backfold.errors import UserError
from backfold.pretext import Sorting, patches_placed_right
from backfold.pretext.sorting import patchify, unpatchify
from tiny_run import seeded


@pytest.mark.parametrize(
    ("share", "num_patches", "count"),
    [(0.5, 24, 12), (1.0, 24, 24), (0.01, 24, 2), (0.3, 2, 2), (0.9, 7, 6)],
)
def test_exactly_the_share_of_patches_moves(share, num_patches, count):
    sources = Sorting(share=share).draw_sources(200, num_patches, seeded(0))
    assert torch.equal(sources.sort(dim=1).values, torch.arange(num_patches).expand(200, -1))
    assert ((sources != torch.arange(num_patches)).sum(dim=1) == count).all()


def test_every_patch_moves_equally_often_and_anywhere():
    sources = Sorting(share=0.5).draw_sources(8000, 6, seeded(0))
    shares = torch.stack([(sources == source).double().mean(dim=0) for source in range(6)])
    # Half of the time a patch stays; else it comes from one of the five others.
    expected = torch.full((6, 6), 0.1, dtype=torch.float64).fill_diagonal_(0.5)
    assert (shares - expected).abs().max() < 5 * (0.25 / 8000) ** 0.5


def test_loss_counts_on_displaced_patches_only(photographs_of):
    clean = photographs_of(5, 59, 90)
    corruption = Sorting(sorting_patch_size=16)(clean, seeded(0))
    changed = (corruption.corrupted != clean).any(dim=1, keepdim=True)
    displaced, moved = (patchify(each, 16).flatten(2) for each in (corruption.loss_mask, changed))
    assert torch.equal(moved.any(dim=2), displaced.any(dim=2))
    assert torch.equal(moved.any(dim=2), displaced.all(dim=2))
    assert (displaced.any(dim=2).sum(dim=1) == 8).all()  # round(0.5 x 3 x 5), halves to even
    # The remainder at the edges stays where it is.
    assert not corruption.loss_mask[:, :, 48:].any()
    assert not corruption.loss_mask[:, :, :, 80:].any()


def test_placed_right_agrees_with_trying_all_permutations():
    clean, restored = torch.randn(2, 20, 2, 6, 4, generator=seeded(0)).unbind()
    restored = clean + 2 * restored
    expected = []
    for image, target in zip(patchify(restored, 2), patchify(clean, 2), strict=True):
        orders = list(itertools.permutations(range(6)))
        costs = [float((image - target[list(order)]).square().sum()) for order in orders]
        best = orders[costs.index(min(costs))]
        expected.append(sum(place == patch for place, patch in enumerate(best)) / 6)
    assert 0 < sum(expected) < 20
    torch.testing.assert_close(patches_placed_right(restored, clean, 2), torch.tensor(expected))


def test_equal_patches_are_right_in_each_others_place():
    clean = torch.zeros(1, 3, 8, 16)
    clean[..., :4, :4] = 1.0
    clean[..., 4:, 12:] = -1.0
    assert patches_placed_right(clean, clean, 4).tolist() == [1.0]
    # Moving the white patch leaves two patches wrong: the white one and one black one.
    swapped = clean.clone()
    swapped[..., :4, :4], swapped[..., :4, 4:8] = 0.0, 1.0
    assert patches_placed_right(swapped, clean, 4).tolist() == [0.75]


@pytest.mark.parametrize("value", [float("nan"), 1e30])
def test_an_image_out_of_range_scores_zero(photographs, value):
    restored = photographs.clone()
    restored[0, 0, 0, 0] = value
    assert patches_placed_right(restored, photographs, 16).tolist() == [0.0] + [1.0] * 7


def test_refusals():
    with pytest.raises(UserError, match="has 1 whole patches"):
        Sorting()(torch.zeros(1, 3, 31, 31), seeded(0))
    with pytest.raises(UserError, match="sorting_patch_size is 0"):
        Sorting(sorting_patch_size=0)
    with pytest.raises(UserError, match="share is 0; give"):
        Sorting(share=0.0)


@pytest.mark.parametrize("patch_size", [5, 16])
def test_patchify_cuts_row_by_row_and_unpatchify_inverts_it(photographs, patch_size):
    patches = patchify(photographs, patch_size)
    rows, columns = 64 // patch_size, 96 // patch_size
    expected = [
        photographs[:, :, top : top + patch_size, left : left + patch_size]
        for top in range(0, rows * patch_size, patch_size)
        for left in range(0, columns * patch_size, patch_size)
    ]
    assert torch.equal(patches, torch.stack(expected, dim=1))
    whole = photographs[:, :, : rows * patch_size, : columns * patch_size]
    assert torch.equal(unpatchify(patches, rows), whole)
