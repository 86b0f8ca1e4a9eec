"""Excerpts: held against cutting squares out, corrupting them and putting them back one by one."""

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

HALF = ExcerptSettings(0.5, 8)
TASKS = {
    "smaller squares": Masking(0.5, 4, fill="mean"),
    "sorting": Sorting(8, 1.0),
    "denoising": Denoising(octaves=3),
    "colorization": Colorization(),
    "masking": Masking(0.6, 8),
    "mixture": Mixture((Masking(0.6, 8), Sorting(8), Identity()), (1, 1, 1)),
}
each_task = pytest.mark.parametrize("task", TASKS.values(), ids=TASKS)


def seeded(seed):
    return torch.Generator().manual_seed(seed)


def images_of(height, width, count=5):
    return torch.randn(count, 3, height, width, generator=seeded(1))


def squares_of(image, size):
    """A list of (row, column, square), row by row."""
    rows, columns = image.shape[1] // size, image.shape[2] // size
    return [
        image[:, size * r : size * (r + 1), size * c : size * (c + 1)]
        for r in range(rows)
        for c in range(columns)
    ]


@each_task
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
    for number, running in enumerate(corruption.running.indices.tolist()):
        taken = [squares_of(clean[number], 8)[index] for index in running]
        assert torch.equal(given[0][number], torch.cat(taken, dim=1))
        after = squares_of(corruption.corrupted[number], 8)
        masks = squares_of(corruption.loss_mask[number], 8)
        for index, before in enumerate(squares_of(clean[number], 8)):
            if index in running:
                place = slice(8 * running.index(index), 8 * running.index(index) + 8)
                assert torch.equal(after[index], part.corrupted[number, :, place])
                assert torch.equal(masks[index], part.loss_mask[number, :, place])
            else:
                assert torch.equal(after[index], before)
                assert not masks[index].any()


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


def test_refuses_bad_settings():
    with pytest.raises(UserError, match=r"^tasks\.excerpt\.share is nan; "):
        ExcerptSettings(share=float("nan"))
    with pytest.raises(UserError, match=r"^tasks\.excerpt\.excerpt_patch_size is 0; "):
        ExcerptSettings(excerpt_patch_size=0)


@pytest.mark.parametrize(("height", "width", "fitting"), [(32, 36, 4), (8, 8, 4), (9, 9, 3)])
def test_refuses_images_that_the_squares_do_not_tile_or_fill(height, width, fitting):
    shown = rf"^tasks.excerpt.excerpt_patch_size is 8 and images are {height}x{width} pixels; "
    with pytest.raises(UserError, match=shown) as refusal:
        Excerpt(Sorting(8), HALF)(images_of(height, width), seeded(0))
    assert str(refusal.value).endswith(f", such as {fitting}")
    mended = Excerpt(Sorting(fitting), ExcerptSettings(0.5, fitting))
    mended(images_of(height, width), seeded(0))
