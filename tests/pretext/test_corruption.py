"""What all pretext tasks have in common."""

import pytest
import torch

from backfold.errors import UserError
from backfold.pretext import (
    Bands,
    Colorization,
    Denoising,
    Masking,
    Mixture,
    Sorting,
    SuperResolution,
)
from tiny_run import seeded

DRAWING_TASKS = {
    "masking": Masking(mask_patch_size=8),
    "masking-mean-blocks": Masking(mask_patch_size=8, fill="mean", blocks=True),
    "sorting": Sorting(sorting_patch_size=8),
    "superresolution": SuperResolution(),
    "denoising": Denoising(),
    "fading": Colorization(0.2, 0.9),
    "bands": Bands(band_patch_size=16),
    "mixture": Mixture(
        (Masking(mask_patch_size=8), Sorting(sorting_patch_size=8), SuperResolution(), Denoising()),
        (1.0, 1.0, 1.0, 1.0),
    ),
}
TASKS = DRAWING_TASKS | {"colorization": Colorization()}


def each(tasks):
    return pytest.mark.parametrize("task", tasks.values(), ids=tasks.keys())


@each(TASKS)
@pytest.mark.parametrize(("channels", "size"), [(1, (61, 40)), (3, (64, 96)), (12, (16, 91))])
def test_any_channel_count_and_size(task, channels, size, photographs_of):
    if isinstance(task, (Bands, Colorization)) and channels == 1:
        channels = 2
    clean = photographs_of(channels, *size)
    before = clean.clone()
    corruption = task(clean, seeded(0))
    assert torch.equal(clean, before)
    assert corruption.corrupted.shape == clean.shape
    assert corruption.corrupted.dtype == clean.dtype
    assert corruption.loss_mask.shape == (len(clean), 1, *size)
    assert corruption.loss_mask.dtype == torch.bool
    assert corruption.loss_mask.flatten(1).any(dim=1).all()
    # Every image is corrupted, and only where the loss counts.
    changed = corruption.corrupted != clean
    assert changed.flatten(1).any(dim=1).all()
    assert not (changed & ~corruption.loss_mask).any()
    corruption.corrupted.fill_(7.0)  # shares no memory
    assert torch.equal(clean, before)


@each(DRAWING_TASKS)
def test_seed_decides_every_bit(task, photographs):
    same = photographs[:1].expand(8, -1, -1, -1)
    generator = seeded(3)
    first, next_one = task(same, generator), task(same, generator)
    again, other = task(same, seeded(3)), task(same, seeded(4))
    assert torch.equal(first.corrupted, again.corrupted)
    assert torch.equal(first.loss_mask, again.loss_mask)
    assert not torch.equal(first.corrupted, other.corrupted)
    assert not torch.equal(first.corrupted, next_one.corrupted)
    assert len(first.corrupted.unique(dim=0)) > 1  # images of a batch differ


@each(TASKS)
def test_refuses_what_is_no_batch_of_float_images(task):
    with pytest.raises(UserError, match=r"\(3, 32, 32\) of torch.float32"):
        task(torch.zeros(3, 32, 32), seeded(0))
    with pytest.raises(UserError, match=r"of torch\.uint8"):
        task(torch.zeros(1, 3, 32, 32, dtype=torch.uint8), seeded(0))
