import pytest
import torch

from backfold.errors import UserError
from backfold.pretext import Exchange, Masking


def seeded(seed):
    return torch.Generator().manual_seed(seed)


def test_every_pixel_is_the_image_s_own_or_the_next_one_s(photographs):
    corrupted = Exchange(0.4, 16)(photographs, seeded(0)).corrupted
    for number, image in enumerate(corrupted):
        own, other = photographs[number], photographs[number - 1]
        assert ((image == own) | (image == other)).all()
        assert (image != own).any()


def test_squares_are_exchanged_whole_and_as_many_as_asked_for(photographs):
    size = 16
    corrupted = Exchange(0.25, size)(photographs, seeded(0)).corrupted
    for number, image in enumerate(corrupted):
        foreign = 0
        for top in range(0, 64, size):
            for left in range(0, 96, size):
                square = (slice(None), slice(top, top + size), slice(left, left + size))
                of_own = torch.equal(image[square], photographs[number][square])
                assert of_own or torch.equal(image[square], photographs[number - 1][square])
                foreign += not of_own
        assert foreign == round(0.25 * 4 * 6)


def test_places_are_those_that_masking_would_hide(photographs):
    corrupted = Exchange(0.5, 8)(photographs, seeded(3)).corrupted
    mask = Masking(0.5, 8).draw_mask(8, 64, 96, seeded(3)).expand_as(photographs)
    assert torch.equal(corrupted[~mask], photographs[~mask])
    assert torch.equal(corrupted[mask], photographs.roll(1, 0)[mask])


def test_the_loss_counts_everywhere_and_the_input_stays(photographs):
    before = photographs.clone()
    assert Exchange()(photographs, seeded(0)).loss_mask.all()
    assert torch.equal(photographs, before)


def test_a_single_image_stays_as_it_is(photographs):
    one = photographs[:1]
    assert torch.equal(Exchange()(one, seeded(0)).corrupted, one)


def test_the_same_seed_gives_the_same_bits_and_another_does_not(photographs):
    first, again, other = (Exchange()(photographs, seeded(s)).corrupted for s in (1, 1, 2))
    assert torch.equal(first, again)
    assert not torch.equal(first, other)


@pytest.mark.parametrize("ratio", [0.0, 1.0, -0.1, float("nan")])
def test_refuses_bad_ratios(ratio):
    with pytest.raises(UserError, match=f"exchange_ratio is {ratio}; give a share above 0"):
        Exchange(ratio)


def test_refuses_squares_of_no_pixel_or_beyond_the_image(photographs):
    with pytest.raises(UserError, match="exchange_patch_size is 0; give 1 pixel or more"):
        Exchange(0.4, 0)
    with pytest.raises(UserError, match="exchange_patch_size is 65, larger than the 64x96"):
        Exchange(0.4, 65)(photographs, seeded(0))
