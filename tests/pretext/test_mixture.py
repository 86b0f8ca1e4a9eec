"""Mixtures and excerpts, held against doing the same image by image, square by square."""

import numpy as np
import pytest
import torch

from backfold.errors import UserError
from backfold.pretext import (
    Colorization,
    Denoising,
    Excerpt,
    ExcerptSettings,
    Identity,
    Masking,
    Mixture,
    Sorting,
    SuperResolution,
)
from backfold.pretext.sorting import patchify
from tiny_run import seeded

TASKS = (
    Masking(mask_patch_size=8),
    Sorting(sorting_patch_size=8),
    SuperResolution(),
    Denoising(),
    Colorization(),
)
SPARSE = Masking(mask_patch_size=8, hidden_share=0.5)
HALF = ExcerptSettings(0.5, 8)
EXCERPT_TASKS = {
    "smaller squares": Masking(0.5, 4, fill="mean"),
    "sorting": Sorting(8, 1.0),
    "denoising": Denoising(octaves=3),
    "colorization": Colorization(),
    "masking": Masking(0.6, 8),
    "mixture": Mixture((Masking(0.6, 8), Sorting(8), Identity()), (1, 1, 1)),
}


def test_shares_follow_the_weights():
    weights = (1e-60, 2e-60, 0.0, 5e-60)  # of any scale
    assigned = Mixture(TASKS[:4], weights).assign(8000, seeded(0))
    counts = np.bincount(assigned, minlength=4)
    for count, weight in zip(counts.tolist(), weights, strict=True):
        share = weight / 8e-60
        assert abs(count - 8000 * share) <= 5 * (8000 * share * (1 - share)) ** 0.5


def test_each_image_is_what_its_own_task_makes_of_it(photographs):
    clean = photographs.repeat(4, 1, 1, 1)
    mixture = Mixture(TASKS, (1.0,) * 5)
    corruption = mixture(clean, seeded(7))
    generator = seeded(7)
    assigned = mixture.assign(32, generator).tolist()
    assert set(assigned) == set(range(5))
    for index, task in enumerate(TASKS):
        images = [image for image, its_task in enumerate(assigned) if its_task == index]
        expected = task(clean[images], generator)
        assert torch.equal(corruption.corrupted[images], expected.corrupted)
        assert torch.equal(corruption.loss_mask[images], expected.loss_mask)


@pytest.mark.parametrize(
    ("tasks", "weights", "shown"),
    [
        ((), (), r"weights is \(\)"),
        ((Mixture(TASKS[:2], (1.0, 1.0)), TASKS[2]), (1.0, 1.0), "^a mixture holds another one; "),
        (TASKS[:2], (1.0,), r"weights is \(1.0,\) for 2 tasks"),
        (TASKS[:2], (1.0, -1.0), r"weights is \(1.0, -1.0\)"),
        (TASKS[:2], (0.0, 0.0), r"weights is \(0.0, 0.0\)"),
        (TASKS[:2], (1.0, float("nan")), r"weights is \(1.0, nan\)"),
        ((SPARSE, Denoising()), (1.0, 1.0), r"^hidden_share is 0\.5 in a mixture"),
        ((SPARSE, Denoising()), (0.0, 1.0), r"^hidden_share is 0\.5 in a mixture"),
        ((SPARSE, Masking()), (1.0, 1.0), r"^hidden_share is 0\.5 in a mixture"),
    ],
)
def test_refuses_bad_fields(tasks, weights, shown):
    with pytest.raises(UserError, match=shown):
        Mixture(tasks, weights)
    with pytest.raises(UserError, match=r"^tasks\.excerpt\.share is nan; "):
        ExcerptSettings(share=float("nan"))
    with pytest.raises(UserError, match=r"^tasks\.excerpt\.excerpt_patch_size is 0; "):
        ExcerptSettings(excerpt_patch_size=0)


def test_sparse_masking_alone_keeps_what_runs(photographs):
    mixture = Mixture((Denoising(), SPARSE), (0.0, 2.0))
    mixed, generator = mixture(photographs, seeded(0)), seeded(0)
    mixture.assign(len(photographs), generator)
    expected = SPARSE(photographs, generator)
    assert torch.equal(mixed.corrupted, expected.corrupted)
    assert torch.equal(mixed.running.indices, expected.running.indices)


def images_of(height, width, count=5):
    return torch.randn(count, 3, height, width, generator=seeded(1))


@pytest.mark.parametrize("task", EXCERPT_TASKS.values(), ids=EXCERPT_TASKS)
def test_the_task_sees_the_squares_that_run_as_an_image_of_their_own(task):
    height, width = 16, 40
    clean = images_of(height, width)
    given = []

    def watched(images, generator):
        given.append(images)
        return task(images, generator)

    corruption = Excerpt(watched, HALF)(clean, seeded(0))
    generator = seeded(0)
    torch.rand(len(clean), height * width // 64, generator=generator)  # which squares run
    part = task(given[0], generator)
    before, after, masks = (
        patchify(each, 8) for each in (clean, corruption.corrupted, corruption.loss_mask)
    )
    for number, running in enumerate(corruption.running.indices.tolist()):
        assert torch.equal(given[0][number], torch.cat([*before[number, running]], dim=1))
        for index, square in enumerate(before[number]):
            if index in running:
                place = slice(8 * running.index(index), 8 * running.index(index) + 8)
                assert torch.equal(after[number, index], part.corrupted[number, :, place])
                assert torch.equal(masks[number, index], part.loss_mask[number, :, place])
            else:
                assert torch.equal(after[number, index], square)
                assert not masks[number, index].any()


@pytest.mark.parametrize(("share", "count"), [(1.0, 16), (0.5, 8), (0.4, 6), (0.01, 2)])
def test_every_image_runs_on_as_many_squares_drawn_evenly(share, count):
    task = Excerpt(Identity(), ExcerptSettings(share, 8))
    running = task(torch.zeros(2000, 1, 32, 32), seeded(0)).running
    assert running.square_size == 8
    assert running.indices.shape == (2000, count)
    assert (running.indices.diff(dim=1) > 0).all()
    frequency = np.bincount(running.indices.flatten().numpy(), minlength=16) / 2000
    np.testing.assert_allclose(frequency, count / 16, atol=5 * 0.5 / 2000**0.5)


@pytest.mark.parametrize(
    "task",
    [
        SuperResolution(), Masking(0.6, 8, hidden_share=0.5), Masking(0.6, 8, blocks=True),
        Masking(0.6, 16), Sorting(3), Denoising(octaves=5),
        Mixture((Identity(), SuperResolution()), (1.0, 1.0)),
    ],
    ids=repr,
)  # fmt: skip
def test_refuses_tasks_that_look_beyond_the_squares(task):
    with pytest.raises(UserError, match=r"share is 0\.5, and .* beyond the edges of squares of 8"):
        Excerpt(task, HALF)


@pytest.mark.parametrize(("height", "width", "fitting"), [(32, 36, 4), (8, 8, 4), (9, 9, 3)])
def test_refuses_images_that_the_squares_do_not_tile_or_fill(height, width, fitting):
    shown = rf"^tasks.excerpt.excerpt_patch_size is 8 and images are {height}x{width} pixels; "
    with pytest.raises(UserError, match=shown) as refusal:
        Excerpt(Sorting(8), HALF)(images_of(height, width), seeded(0))
    assert str(refusal.value).endswith(f", such as {fitting}")
    mended = Excerpt(Sorting(fitting), ExcerptSettings(0.5, fitting))
    mended(images_of(height, width), seeded(0))
