"""What all pretext tasks have in common."""

import dataclasses

import docstring_parser
import pytest
import torch

from backfold.errors import UserError
from backfold.pretext import (
    Colorization,
    Denoising,
    Masking,
    Mixture,
    Sorting,
    SuperResolution,
)

DRAWING_TASKS = {
    "masking": Masking(mask_patch_size=8),
    "masking-noise": Masking(mask_patch_size=8, fill="noise"),
    "masking-mean-blocks": Masking(mask_patch_size=8, fill="mean", blocks=True),
    "sorting": Sorting(sorting_patch_size=8),
    "superresolution": SuperResolution(),
    "denoising": Denoising(),
    "fading": Colorization(0.2, 0.9),
    "mixture": Mixture(
        (Masking(mask_patch_size=8), Sorting(sorting_patch_size=8), SuperResolution(), Denoising()),
        (1.0, 1.0, 1.0, 1.0),
    ),
}
TASKS = DRAWING_TASKS | {"colorization": Colorization()}


def seeded(seed):
    return torch.Generator().manual_seed(seed)


def each(tasks):
    return pytest.mark.parametrize("task", tasks.values(), ids=tasks.keys())


@each(TASKS)
@pytest.mark.parametrize("size", [(64, 96), (61, 40), (16, 91)])
@pytest.mark.parametrize("channels", [1, 3, 5, 12])
def test_any_channel_count_and_size(task, channels, size, photographs_of):
    if isinstance(task, Colorization) and channels == 1:
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


@each(TASKS)
def test_corrupted_shares_no_memory_with_clean(task, photographs):
    clean = photographs.clone()
    task(clean, seeded(0)).corrupted.fill_(7.0)
    assert torch.equal(clean, photographs)


@each(DRAWING_TASKS)
def test_seed_decides_every_bit(task, photographs):
    first, again, other = (task(photographs, seeded(seed)) for seed in (3, 3, 4))
    assert torch.equal(first.corrupted, again.corrupted)
    assert torch.equal(first.loss_mask, again.loss_mask)
    assert not torch.equal(first.corrupted, other.corrupted)


@each(DRAWING_TASKS)
def test_generator_advances(task, photographs):
    generator = seeded(0)
    assert not torch.equal(
        task(photographs, generator).corrupted, task(photographs, generator).corrupted
    )


@each(TASKS)
def test_global_random_state_plays_no_part(task, photographs):
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(1)
        state = torch.get_rng_state()
        first = task(photographs, seeded(0)).corrupted
        assert torch.equal(torch.get_rng_state(), state)
        torch.manual_seed(2)
        assert torch.equal(task(photographs, seeded(0)).corrupted, first)


@each(DRAWING_TASKS)
def test_images_of_a_batch_are_corrupted_differently(task, photographs):
    same = photographs[:1].expand(8, -1, -1, -1)
    corrupted = task(same, seeded(0)).corrupted
    assert len({image.numpy().tobytes() for image in corrupted}) > 1


@each(TASKS)
@pytest.mark.parametrize(
    ("images", "shown"),
    [
        (torch.zeros(3, 32, 32), r"\(3, 32, 32\) of torch.float32"),
        (torch.zeros(1, 3, 32, 32, dtype=torch.uint8), "of torch.uint8"),
    ],
)
def test_refuses_what_is_no_batch_of_float_images(task, images, shown):
    with pytest.raises(UserError, match=shown):
        task(images, seeded(0))


@pytest.mark.parametrize("task", [Masking, Sorting, SuperResolution, Denoising, Colorization])
def test_every_field_is_documented_with_its_default(task):
    documented = {
        parameter.arg_name: parameter.description
        for parameter in docstring_parser.parse(task.__doc__).params
    }
    fields = {field.name: field.default for field in dataclasses.fields(task)}
    assert documented.keys() == fields.keys()
    for name, default in fields.items():
        shown = f'"{default}"' if isinstance(default, str) else default
        assert documented[name].endswith(f"(default: {shown}).")


@pytest.mark.parametrize("task", TASKS.values(), ids=TASKS.keys())
def test_tasks_are_frozen(task):
    with pytest.raises(dataclasses.FrozenInstanceError):
        task.mask_ratio = 0.1
