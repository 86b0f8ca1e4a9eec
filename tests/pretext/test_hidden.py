"""Tasks in conditional form, held against what each says of itself, square by square."""

import numpy as np
import pytest
import torch

from backfold.errors import UserError
from backfold.pretext import (
    Bands,
    Colorization,
    Corruption,
    Denoising,
    HiddenPatches,
    Identity,
    Masking,
    Sorting,
    SuperResolution,
)
from backfold.pretext.hidden import hidden_by
from backfold.pretext.masking import FLAT, normalise_squares
from backfold.pretext.sorting import patchify
from tiny_run import seeded

SIZE = 8
MASKING = Masking(0.75, SIZE, normalised_share=0.5)
ALL = (MASKING, Sorting(SIZE), SuperResolution(), Denoising(), Colorization(), Bands(), Identity())


def images_of(count=6, height=32, width=48):
    return torch.randn(count, 3, height, width, generator=seeded(1))


def take(images, indices):
    """The squares of these indices, (batch, count, channels, size, size)."""
    return patchify(images, SIZE)[torch.arange(len(images))[:, None], indices]


def only(task, **changes):
    return HiddenPatches((task,), (1.0,), Masking(0.75, SIZE, **changes))


@pytest.mark.parametrize("blocks", [False, True])
@pytest.mark.parametrize(("share", "hidden_share"), [(1.0, 1.0), (0.5, 1.0), (1.0, 0.3)])
def test_as_many_squares_of_each_image_are_hidden_and_the_others_are_clean(
    share, hidden_share, blocks
):
    clean, masking = images_of(400), Masking(0.75, SIZE, blocks=blocks, hidden_share=hidden_share)
    made = HiddenPatches((masking,), (1.0,), masking, share)(clean, seeded())
    hidden, visible = made.running.indices, made.running.visible
    used = round(share * 24)
    assert hidden.shape == (400, max(1, round(hidden_share * round(0.75 * used))))
    assert visible.shape == (400, used - round(0.75 * used))
    for of_hidden, of_visible in zip(hidden.tolist(), visible.tolist(), strict=True):
        assert len({*of_hidden, *of_visible}) == len(of_hidden) + len(of_visible)
    assert torch.equal(take(made.corrupted, visible), take(clean, visible))
    assert not take(made.corrupted, hidden).any()
    counted = patchify(made.loss_mask, SIZE).all(dim=(2, 3, 4))
    assert torch.equal(counted, torch.zeros(400, 24, dtype=torch.bool).scatter(1, hidden, True))
    assert counted.sum() == made.loss_mask.sum() / SIZE**2
    if not blocks:
        frequency = np.bincount(hidden.flatten().numpy(), minlength=24) / 400
        np.testing.assert_allclose(frequency, hidden.shape[1] / 24, atol=5 * 0.5 / 400**0.5)


def test_hidden_squares_become_the_mean_of_what_is_visible():
    clean = images_of()
    made = only(Masking(fill="mean"))(clean, seeded())
    mean = take(clean, made.running.visible).mean(dim=(1, 3, 4))[:, None, :, None, None]
    shown = take(made.corrupted, made.running.indices)
    torch.testing.assert_close(shown, mean.expand_as(shown))


def test_sorted_squares_change_places_with_each_other():
    clean = images_of()
    made = only(Sorting(3))(clean, seeded())
    before, after = (take(images, made.running.indices) for images in (clean, made.corrupted))
    for old, new in zip(before, after, strict=True):
        same = (new[:, None] == old[None]).all(dim=(2, 3, 4))
        assert (same.sum(dim=0) == 1).all()
        assert (same.sum(dim=1) == 1).all()
        assert not same.diagonal().any()


def test_each_hidden_square_has_one_task_drawn_by_its_weight():
    clean = images_of(400)
    weights = (3.0, 1.0, 2.0)
    tasks = (MASKING, Identity(), Colorization())
    made = HiddenPatches(tasks, weights, MASKING)(clean, seeded())
    shown, hidden = take(made.corrupted, made.running.indices), take(clean, made.running.indices)
    grey = take(Colorization()(clean, seeded()).corrupted, made.running.indices)
    kinds = torch.stack([
        (shown == other).all(dim=(2, 3, 4)) for other in (torch.zeros_like(hidden), hidden, grey)
    ])  # fmt: skip
    assert (kinds.sum(dim=0) == 1).all()
    np.testing.assert_allclose(kinds.double().mean(dim=(1, 2)), np.array(weights) / 6, atol=0.03)
    made = HiddenPatches(ALL, (1.0,) * len(ALL), MASKING)(clean, seeded())
    assert torch.equal(
        take(made.corrupted, made.running.visible), take(clean, made.running.visible)
    )


def test_squares_are_normalised_one_by_one():
    images = torch.randn(3, 2, 7, 10, dtype=torch.float64) * 3 + 1
    expected = torch.empty_like(images)
    for top in (0, 4):
        for left in (0, 4, 8):
            square = images[:, :, top : top + 4, left : left + 4]
            variance, mean = torch.var_mean(square, dim=(1, 2, 3), correction=0, keepdim=True)
            part = (square - mean) / (variance + FLAT) ** 0.5
            expected[:, :, top : top + 4, left : left + 4] = part
    torch.testing.assert_close(normalise_squares(images, 4), expected)


@pytest.mark.parametrize(("share", "count"), [(0.0, 0), (0.5, 9), (0.75, 14), (1.0, 17)])
def test_the_second_head_s_share_has_normalised_targets_and_one_is_left(share, count):
    clean = images_of()
    made = only(Masking(), normalised_share=share)(clean, seeded())
    normalised, hidden = made.running.normalised, made.running.indices
    if not count:
        assert normalised is None
        assert made.target is None
        return
    assert normalised.sum(dim=1).tolist() == [count] * len(clean)
    expected = torch.where(
        normalised[:, :, None, None, None], take(normalise_squares(clean, SIZE), hidden),
        take(clean, hidden),
    )  # fmt: skip
    assert torch.equal(take(made.target, hidden), expected)
    assert torch.equal(take(made.target, made.running.visible), take(clean, made.running.visible))


def test_parts_of_a_corruption_join_to_the_whole():
    whole = HiddenPatches(ALL, (1.0,) * 6, MASKING)(images_of(), seeded())
    parts = whole.split([1, 3, 2])
    assert [len(part.corrupted) for part in parts] == [1, 3, 2]
    joined = Corruption.join(parts)
    for name in ("corrupted", "loss_mask", "target"):
        assert torch.equal(getattr(joined, name), getattr(whole, name))
    for name in ("indices", "visible", "normalised"):
        assert torch.equal(getattr(joined.running, name), getattr(whole.running, name))


def test_a_mask_hides_the_patches_that_it_touches():
    image, mask = images_of(1), torch.zeros(1, 1, 32, 48, dtype=torch.bool)
    mask[..., 7:9, 20] = True  # in two patches
    for masking in (MASKING, None):
        made = hidden_by(mask, image, masking, SIZE)
        assert made.running.indices.tolist() == [[2, 8]]
        assert sorted(made.running.visible[0].tolist()) == [n for n in range(24) if n not in (2, 8)]
        shown = take(made.corrupted, made.running.indices)
        assert not shown.any() if masking else torch.equal(made.corrupted, image)
        assert torch.equal(made.loss_mask, mask)
    with pytest.raises(UserError, match="leaves no patch untouched"):
        hidden_by(torch.ones_like(mask), image, None, SIZE)


def test_refuses_images_that_the_squares_do_not_tile():
    with pytest.raises(UserError, match=r"^mask_patch_size is 8 and images are 32x36 .* as 4"):
        only(MASKING)(images_of(1, 32, 36), seeded())
