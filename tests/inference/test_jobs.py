"""What embedding and scoring give for each image."""

import json
from dataclasses import replace

import pytest
import torch
from torch.nn import functional as F

from backfold.embedding import EmbeddingChoice
from backfold.inference.jobs import EmbeddingJob, ScoringJob, image_seed
from backfold.pretext import Corruption, Masking, Sorting, patches_placed_right
from backfold.training.config import used_task

CPU, HALF = torch.device("cpu"), Masking(0.5, mask_patch_size=7)


@pytest.fixture
def pixels(pictures):
    """As loaded: uint8."""
    return torch.stack([pictures(6).pixels(index) for index in range(6)])


@pytest.fixture
def clean(run, pixels):
    return run.statistics.normalize(pixels / 255)


def generator_of(index, seed=0):
    return torch.Generator().manual_seed(image_seed(seed, index))


def scoring(run, **changes):
    tasks = {"masking": Masking(mask_patch_size=7), "sorting": Sorting(sorting_patch_size=7)}
    return replace(ScoringJob(run, tasks, 1, 1.0, 0, CPU), **changes)


def test_errors_are_the_training_loss_image_by_image(run, pixels, clean):
    job = scoring(run, num_steps=2, step_size=0.5, seed=3)
    given = job(pixels, range(6))["error_masking"].to_pylist()
    for index, single in enumerate(clean.split(1)):
        corruption = job.tasks["masking"](single, generator_of(index, 3))
        image = corruption.corrupted
        for _ in range(2):
            image = image.detach().requires_grad_()
            (gradient,) = torch.autograd.grad(run.energy(image).sum(), image)
            image = image - 0.5 * gradient
        hidden = corruption.loss_mask.expand_as(image)
        expected = F.smooth_l1_loss(image[hidden], single[hidden])
        assert given[index] == pytest.approx(expected.item(), rel=1e-4)


@pytest.mark.parametrize("energy", ["dense", "conditional"])
def test_misplaced_is_the_share_of_squares_that_sorting_leaves_elsewhere(
    run, pixels, clean, energy
):
    config = replace(run.config, energy=energy, tasks=replace(run.config.tasks, masking=HALF))
    task = used_task(Sorting(sorting_patch_size=7), config)
    job = scoring(run, tasks={"sorting": task}, num_steps=0)  # nothing is put back
    found = job(pixels, range(6))["misplaced"].to_pylist()
    for index, single in enumerate(clean.split(1)):
        corrupted = task(single, generator_of(index)).corrupted
        expected = 1 - patches_placed_right(corrupted, single, 7).item()
        assert found[index] == pytest.approx(expected)
    assert 0 < min(found) <= max(found) <= 1


def test_a_diverging_image_has_an_infinite_error(run, pixels):
    def leave_first_alone(images, generator):
        factor = 1.0 if generator.initial_seed() == image_seed(0, 0) else torch.inf
        return Corruption(images * factor, torch.ones_like(images[:, :1], dtype=torch.bool))

    columns = scoring(run, tasks={"blow": leave_first_alone})(pixels[:2], [0, 1])
    first, second = columns["error_blow"].to_pylist()
    assert 0 < first < 100
    assert second == float("inf")


def test_settings_tell_jobs_apart(run):
    other = {"masking": Masking(mask_patch_size=7, mask_ratio=0.3)}
    changes = ({}, {"seed": 1}, {"num_steps": 2}, {"step_size": 0.9}, {"tasks": other})
    jobs = [scoring(run, **change) for change in changes]
    jobs += [EmbeddingJob(run, EmbeddingChoice(layer=layer), CPU) for layer in (-1, -2)]
    assert len({json.dumps(job.facts()) for job in jobs}) == len(jobs)
