import numpy as np
import pytest
import torch
from PIL import Image
from skimage.metrics import peak_signal_noise_ratio
from skimage.restoration import denoise_nl_means, denoise_tv_chambolle, inpaint_biharmonic
from torch import nn

from backfold.data.statistics import ChannelStatistics
from backfold.errors import UserError
from backfold.evaluation.restoration_tests import (
    classical_restorations,
    mean_fill,
    restoration_rows,
    restorations,
)
from backfold.evaluation.severities import SEVERITIES, pretext_severities
from backfold.pretext import Corruption, Denoising, Masking, Sorting, SuperResolution, chroma_error
from backfold.training.config import PretrainConfig, TaskSettings
from backfold.training.pretrained import Pretrained

STATISTICS = ChannelStatistics((0.4, 0.5, 0.6), (0.2, 0.25, 0.3))
SETTINGS = TaskSettings(Masking(mask_patch_size=4), Sorting(sorting_patch_size=8))
SIZE = (16, 24)


class Bowl(nn.Module):
    """E = |x - clean|^2 / 2: the step size 1 restores, each half step halves the error."""

    def __init__(self, clean):
        super().__init__()
        self.clean = clean

    def forward(self, images):
        return (images - self.clean).square().sum(dim=(1, 2, 3)) / 2


@pytest.fixture(scope="module")
def images():
    """Smooth shades with an edge, as (3, 3, 16, 24)."""
    rows, columns = torch.meshgrid(
        torch.linspace(-1, 1, SIZE[0]), torch.linspace(-1, 1, SIZE[1]), indexing="ij"
    )
    planes = [rows, columns, rows * columns, (columns > 0.2).float(), rows - columns]
    return torch.stack([torch.stack(planes[start : start + 3]) for start in range(3)])


def run_of(energy, step_size=1.0):
    config = PretrainConfig(tasks=SETTINGS, step_size=step_size)
    return Pretrained(energy, config, STATISTICS, 3, SIZE, step=0)


def table(rows):
    return {(row.case, row.contender, row.metric): row for row in rows}


def generator():
    return torch.Generator().manual_seed(0)


@pytest.fixture(scope="module")
def perfect(images):
    return restoration_rows(run_of(Bowl(images)), images, num_steps=(1, 2))


def test_a_perfect_energy_restores_perfectly(perfect):
    ours = [row for row in perfect if row.contender.startswith("energy")]
    assert {row.contender for row in ours} == {"energy, 1 step", "energy, 2 steps"}
    best = {"PSNR (dB)": 100.0, "SSIM": 1.0, "chroma error": 0.0, "patches placed right": 1.0}
    for row in ours:
        assert row.mean == pytest.approx(best[row.metric], abs=1e-3)
        assert row.count == 3


def test_every_case_has_its_contenders_and_measures(perfect, images):
    common = {"energy, 1 step", "energy, 2 steps", "mean fill"}
    extra = {
        "masking": {"identity", "biharmonic inpainting"},
        "sorting": {"identity"},
        "superresolution": {"bicubic"},
        "denoising": {"identity", "total variation", "non-local means"},
        "colorization": {"identity"},
    }
    for name, contenders in extra.items():
        for severity in SEVERITIES:
            rows = [row for row in perfect if row.case == f"{name}, severity {severity}"]
            assert {row.contender for row in rows} == common | contenders
            last = "patches placed right" if name == "sorting" else "chroma error"
            assert {row.metric for row in rows} == {"PSNR (dB)", "SSIM", last}
    found = table(perfect)
    tasks = pretext_severities(SETTINGS, 3, SIZE)
    for severity, task in zip(SEVERITIES, tasks["colorization"], strict=True):
        corrupted = task(images, generator()).corrupted
        row = found[f"colorization, severity {severity}", "identity", "chroma error"]
        assert row.mean == pytest.approx(chroma_error(corrupted, images).mean().item(), rel=1e-5)
    row = found["sorting, severity 5", "identity", "patches placed right"]
    assert row.mean < 0.5


def test_half_steps_halve_the_error(images):
    run = run_of(Bowl(images), step_size=0.5)
    found = table(restoration_rows(run, images, num_steps=(1, 3)))
    for case in ("denoising, severity 4", "sorting, severity 5"):
        before, once, thrice = (
            found[case, contender, "PSNR (dB)"].mean
            for contender in ("identity", "energy, 1 step", "energy, 3 steps")
        )
        assert once - before == pytest.approx(20 * np.log10(2), abs=1e-2)
        assert thrice - before == pytest.approx(60 * np.log10(2), abs=1e-2)


def test_psnr_counts_where_the_loss_does(perfect, images):
    task = pretext_severities(SETTINGS, 3, SIZE)["masking"][2]
    corruption = task(images, generator())
    scale = np.array(STATISTICS.std)[:, None, None]
    filled = mean_fill(corruption)
    expected = [
        peak_signal_noise_ratio(
            clean.numpy() * scale, np.where(mask, found, clean) * scale, data_range=1
        )
        for clean, mask, found in zip(
            images, corruption.loss_mask.numpy(), filled.numpy(), strict=True
        )
    ]
    row = table(perfect)["masking, severity 3", "mean fill", "PSNR (dB)"]
    assert row.mean == pytest.approx(np.mean(expected), abs=1e-3)
    assert row.std == pytest.approx(np.std(expected, ddof=1), abs=1e-3)


def test_classical_methods_are_scikit_image_s(images):
    noisy = Denoising(0.4, 0.4)(images, generator())
    found = classical_restorations(Denoising(0.4, 0.4), noisy)
    array = noisy.corrupted[1].permute(1, 2, 0).double().numpy()
    variation = denoise_tv_chambolle(array, weight=0.3, channel_axis=-1)
    means = denoise_nl_means(
        array, patch_size=5, patch_distance=6, h=0.24, sigma=0.4, channel_axis=-1
    )
    for name, expected in (("total variation", variation), ("non-local means", means)):
        np.testing.assert_allclose(found[name][1].permute(1, 2, 0).numpy(), expected, atol=1e-5)
        assert (found[name] - images).square().mean() < 0.5 * 0.4**2
    task = Masking(0.4, 4)
    hidden = task(images, generator())
    painted = classical_restorations(task, hidden)["biharmonic inpainting"]
    expected = inpaint_biharmonic(
        hidden.corrupted[0].permute(1, 2, 0).double().numpy(),
        hidden.loss_mask[0, 0].numpy(),
        channel_axis=-1,
    )
    np.testing.assert_allclose(painted[0].permute(1, 2, 0).numpy(), expected, atol=1e-5)
    visible = ~hidden.loss_mask.expand_as(images)
    assert torch.allclose(painted[visible], images[visible], atol=1e-6)


def test_bicubic_is_pillow_s_enlargement(images):
    task = SuperResolution(4.0, 4.0)
    found = classical_restorations(task, task(images, generator()))
    assert set(found) == {"bicubic", "mean fill"}
    plane = Image.fromarray(images[2, 0].numpy())
    small = plane.resize((SIZE[1] // 4, SIZE[0] // 4), Image.BICUBIC)
    expected = np.asarray(small.resize((SIZE[1], SIZE[0]), Image.BICUBIC))
    np.testing.assert_allclose(found["bicubic"][2, 0].numpy(), expected, atol=1e-4)


def test_mean_fill_sees_only_what_is_visible():
    corrupted = torch.tensor([[1.0, 3.0], [8.0, 100.0]])[None, None].repeat(2, 1, 1, 1)
    mask = torch.tensor([[[False, False], [False, True]], [[True, True], [True, True]]])[:, None]
    filled = mean_fill(Corruption(corrupted, mask))
    assert filled.flatten(1).tolist() == [[4.0] * 4, [28.0] * 4]


def test_restorations_do_not_depend_on_the_batch(images):
    energy = Bowl(torch.zeros(3, *SIZE))
    whole, parts = (restorations(energy, images, (1, 4), 0.3, size, "cpu") for size in (8, 1))
    assert list(whole) == ["energy, 1 step", "energy, 4 steps"]
    for name, steps in (("energy, 1 step", 1), ("energy, 4 steps", 4)):
        assert torch.equal(whole[name], parts[name])
        assert torch.allclose(whole[name], 0.7**steps * images, atol=1e-6)


def test_same_seed_same_rows(images):
    run = run_of(Bowl(torch.zeros(3, *SIZE)))
    first, again, other = (
        restoration_rows(run, images[:1], num_steps=(1,), seed=seed) for seed in (1, 1, 2)
    )
    assert first == again
    assert first != other


@pytest.mark.parametrize("num_steps", [(), (0, 1)])
def test_bad_numbers_of_steps(images, num_steps):
    with pytest.raises(UserError, match="numbers of steps are"):
        restoration_rows(run_of(Bowl(images)), images, num_steps=num_steps)
