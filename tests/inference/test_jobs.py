"""What embedding and scoring give for each image."""

import json
from dataclasses import replace

import pytest
import torch
from torch.nn import functional as F

from backfold.embedding import EmbeddingChoice, embed
from backfold.inference.jobs import (
    EmbeddingJob,
    ScoringJob,
    image_seed,
    weights_digest,
)
from backfold.pretext import Corruption, Masking, Sorting

CPU = torch.device("cpu")


@pytest.fixture
def pixels(pictures):
    """As loaded: uint8."""
    source = pictures(6)
    return torch.stack([source.pixels(i) for i in range(6)])


@pytest.fixture
def clean(run, pixels):
    return run.statistics.normalize(pixels / 255)


def scoring(run, **changes):
    tasks = {"masking": Masking(mask_patch_size=7), "sorting": Sorting(sorting_patch_size=7)}
    return replace(ScoringJob(run, tasks, 1, 1.0, 0, CPU), **changes)


def test_vectors_are_the_embeddings(run, pixels, clean):
    for choice in (EmbeddingChoice(), EmbeddingChoice(pooling="class_token")):
        columns = EmbeddingJob(run, choice, CPU)(pixels, range(6))
        with torch.no_grad():
            expected = embed(run.energy.backbone, clean, choice)
        assert list(columns) == ["vector"]
        assert columns["vector"].type.list_size == 16
        torch.testing.assert_close(torch.tensor(columns["vector"].to_pylist()), expected)


def test_energies_are_those_of_the_clean_images(run, pixels, clean):
    columns = scoring(run)(pixels, range(6))
    with torch.no_grad():
        expected = run.energy(clean)
    assert list(columns) == ["energy", "error_masking", "error_sorting"]
    torch.testing.assert_close(torch.tensor(columns["energy"].to_pylist()), expected)


def test_errors_are_the_training_loss_image_by_image(run, pixels, clean):
    job = scoring(run, num_steps=2, step_size=0.5, seed=3)
    given = job(pixels, range(6))["error_masking"].to_pylist()
    for index in range(6):
        generator = torch.Generator().manual_seed(image_seed(3, index))
        corruption = job.tasks["masking"](clean[index : index + 1], generator)
        image = corruption.corrupted
        for _ in range(2):
            image = image.detach().requires_grad_()
            (gradient,) = torch.autograd.grad(run.energy(image).sum(), image)
            image = image - 0.5 * gradient
        hidden = corruption.loss_mask.expand_as(image)
        expected = F.smooth_l1_loss(image[hidden], clean[index : index + 1][hidden])
        assert given[index] == pytest.approx(expected.item(), rel=1e-4)


def test_a_corruption_depends_on_seed_and_index_alone(run, pixels):
    job = scoring(run)
    whole = job(pixels, range(6))["error_masking"].to_pylist()
    part = job(pixels[2:4], [2, 3])["error_masking"].to_pylist()
    assert part == pytest.approx(whole[2:4], rel=1e-5)
    elsewhere = job(pixels[2:4], [12, 13])["error_masking"].to_pylist()
    reseeded = scoring(run, seed=1)(pixels[2:4], [2, 3])["error_masking"].to_pylist()
    for other in (elsewhere, reseeded):
        assert all(abs(a - b) > 1e-4 * a for a, b in zip(other, part, strict=True))
    assert len({image_seed(seed, index) for seed in range(30) for index in range(30)}) == 900


def test_a_diverging_image_has_an_infinite_error(run, pixels):
    def leave_first_alone(images, generator):
        factor = 1.0 if generator.initial_seed() == image_seed(0, 0) else torch.inf
        return Corruption(images * factor, torch.ones_like(images[:, :1], dtype=torch.bool))

    columns = scoring(run, tasks={"blow": leave_first_alone})(pixels[:2], [0, 1])
    first, second = columns["error_blow"].to_pylist()
    assert 0 < first < 100
    assert second == float("inf")


def test_weights_and_settings_tell_jobs_apart(run):
    before = weights_digest(run)
    assert before == weights_digest(run)
    with torch.no_grad():
        run.energy.head.weight[0] += 1e-6
    assert weights_digest(run) != before
    facts = [
        scoring(run).facts(),
        scoring(run, seed=1).facts(),
        scoring(run, num_steps=2).facts(),
        scoring(run, step_size=0.9).facts(),
        scoring(run, tasks={"masking": Masking(mask_patch_size=7, mask_ratio=0.3)}).facts(),
        EmbeddingJob(run, EmbeddingChoice(), CPU).facts(),
        EmbeddingJob(run, EmbeddingChoice(layer=-2), CPU).facts(),
    ]
    assert len({json.dumps(each) for each in facts}) == len(facts)
