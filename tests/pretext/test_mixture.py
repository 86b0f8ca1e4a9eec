import pytest
import torch

from backfold.errors import UserError
from backfold.pretext import (
    Colorization,
    Corruption,
    Denoising,
    Masking,
    Mixture,
    Sorting,
    SuperResolution,
)

TASKS = (
    Masking(mask_patch_size=8),
    Sorting(sorting_patch_size=8),
    SuperResolution(),
    Denoising(),
    Colorization(),
)
SPARSE = Masking(mask_patch_size=8, hidden_share=0.5)


def seeded(seed):
    return torch.Generator().manual_seed(seed)


def mark(number):
    """A task that adds a number to the images."""
    return lambda clean, _: Corruption(clean + number, torch.ones_like(clean[:, :1]).bool())


def test_shares_follow_the_weights():
    weights = (1e-60, 2e-60, 0.0, 5e-60)  # of any scale
    assigned = Mixture(TASKS[:4], weights).assign(8000, seeded(0))
    counts = torch.bincount(assigned, minlength=4)
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


def test_a_mixture_is_a_pretext_task(photographs):
    inner = Mixture((mark(1), mark(2)), (1.0, 1.0))
    outer = Mixture((inner, mark(3)), (1.0, 0.0))
    added = (outer(photographs, seeded(0)).corrupted - photographs).mean(dim=(1, 2, 3)).round()
    assert set(added.tolist()) == {1.0, 2.0}


@pytest.mark.parametrize(
    ("tasks", "weights", "shown"),
    [
        ((), (), r"weights is \(\)"),
        (TASKS[:2], (1.0,), "1 numbers for 2 tasks"),
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


def test_sparse_masking_alone_keeps_what_runs(photographs):
    mixture = Mixture((Denoising(), SPARSE), (0.0, 2.0))
    mixed, generator = mixture(photographs, seeded(0)), seeded(0)
    mixture.assign(len(photographs), generator)
    expected = SPARSE(photographs, generator)
    assert torch.equal(mixed.corrupted, expected.corrupted)
    assert torch.equal(mixed.running.indices, expected.running.indices)
