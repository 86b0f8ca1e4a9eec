"""Samples against distributions whose energy is known."""

import math
from dataclasses import replace

import pytest
import torch
from PIL import Image

import backfold
from backfold.cli.main import main
from backfold.errors import UserError
from backfold.inference.restored import new_images
from backfold.sampling import noise_levels, sample

SPREAD, CENTRE = 0.5, 0.3
SHAPE = (16, 3, 16, 16)


def gaussian(images):
    """Of images N(CENTRE, SPREAD^2): the gradient is the noise that is expected in an image.

    In so many pixels the level is known from the image itself: r^2 = SPREAD^2 + level^2, of which
    the noise's part is (1 - SPREAD^2 / r^2) (x - CENTRE), the gradient of this radial energy.
    """
    off = (images - CENTRE).flatten(1)
    squares = off.square().mean(dim=1)
    return off.shape[1] / 2 * (squares - SPREAD**2 * squares.log())


def drawn(levels, **options):
    noise = torch.randn(SHAPE, generator=torch.Generator().manual_seed(0))
    return sample(gaussian, noise, levels, **options)


@pytest.mark.parametrize("fresh_noise", [0.0, 1.0])
def test_samples_of_a_gaussian_have_its_mean_and_deviation(fresh_noise):
    options = {"fresh_noise": fresh_noise, "generator": torch.Generator().manual_seed(1)}

    def check(levels):
        images = drawn(levels, **options)
        # Three standard errors of one image's mean, and the error of the levels.
        error = 3 * SPREAD / math.sqrt(images.numel())
        assert float(images.mean()) == pytest.approx(CENTRE, abs=error + 0.01)
        assert float(images.std()) == pytest.approx(SPREAD, rel=0.03)

    levels = noise_levels(300, 10.0, 0.01)
    check(levels)
    with pytest.raises(AssertionError):  # noise is left
        check([level for level in levels if level > 0.3])


def test_a_single_image_is_found_by_every_step():
    clean = torch.linspace(-1, 1, math.prod(SHAPE)).view(SHAPE)
    noise = torch.randn(SHAPE, generator=torch.Generator().manual_seed(0))
    energy = lambda images: (images - clean).square().sum(dim=(1, 2, 3)) / 2  # noqa: E731
    torch.testing.assert_close(sample(energy, noise, [3.0, 0.0]), clean)
    half = sample(energy, noise, [3.0, 1.5])
    torch.testing.assert_close(half - clean, (3 * noise - clean) / 2)


def test_fresh_noise_alone_is_random():
    levels = noise_levels(10, 5.0, 0.1)
    assert torch.equal(drawn(levels), drawn(levels))
    first, other = (
        drawn(levels, fresh_noise=0.5, generator=torch.Generator().manual_seed(seed))
        for seed in (0, 1)
    )
    assert not torch.allclose(first, other)


def test_levels_fall_to_nothing():
    levels = noise_levels(12, 8.0, 0.02)
    assert len(levels) == 13
    assert levels[0] == pytest.approx(8.0)
    assert levels[-2:] == [pytest.approx(0.02), 0.0]
    assert levels == sorted(levels, reverse=True)


@pytest.fixture(scope="module")
def denoiser(tmp_path_factory):
    data = torch.randint(0, 256, (40, 3, 16, 16), generator=torch.Generator().manual_seed(0))
    return backfold.pretrain(
        data=data.to(torch.uint8), out=tmp_path_factory.mktemp("runs") / "noise",
        backbone="vit_tiny_patch16_224", image_size=16, energy="dense", pretext="denoising",
        backbone_options={"patch_size": 4, "embed_dim": 32, "depth": 1, "num_heads": 1},
        epochs=1, batch_size=8, num_workers=0, accelerator="cpu",
        tasks={"denoising": {"max_noise_std": 2.0}},
    )  # fmt: skip


def test_a_run_draws_images(denoiser, tmp_path):
    images = denoiser.sample(3, levels=4, seed=5)
    assert images.shape == (3, 3, 16, 16)
    assert torch.equal(images, denoiser.sample(3, levels=4, seed=5))
    out = tmp_path / "drawn.png"
    arguments = ["--count=3", "--levels=4", f"--out={out}", "--accelerator=cpu"]
    assert main(["sample", f"--checkpoint={denoiser.path}", *arguments]) == 0
    with Image.open(out) as picture:
        assert picture.width == picture.height > 16  # two rows of two


def changed(run, pretext="denoising", **wanted):
    config = run.config
    tasks = replace(config.tasks, denoising=replace(config.tasks.denoising, **wanted))
    return replace(run, config=replace(config, tasks=tasks, pretext=pretext))


def test_what_can_not_be_drawn_is_said_and_little_noise_can(denoiser, capsys):
    run = denoiser.run
    for given, said in (
        ((run, 0, 4), "count is 0"),
        ((run, 1, 1), "levels 1"),
        ((changed(run, octaves=3), 1, 4), "octaves"),
        ((changed(run, pretext="masking"), 1, 4), "--pretext denoising"),
    ):
        with pytest.raises(UserError, match=said):
            new_images(*given)
    assert main(["sample", f"--checkpoint={denoiser.path}", "--out=x.txt"]) == 2
    assert "ends in .png" in capsys.readouterr().err
    little = changed(run, max_noise_std=0.02, min_noise_std=0.0)
    assert new_images(little, 1, 3).isfinite().all()
