from types import SimpleNamespace

import numpy as np
import pytest
import torch
from PIL import Image
from skimage.metrics import peak_signal_noise_ratio
from skimage.restoration import denoise_nl_means, denoise_tv_chambolle, inpaint_biharmonic
from torch import nn

from backfold.data.statistics import ChannelStatistics
from backfold.errors import UserError
from backfold.evaluation.restoration import classical_restorations, mean_fill, restoration
from backfold.evaluation.severities import SEVERITIES, pretext_severities
from backfold.pretext import Corruption, Denoising, Masking, Sorting, SuperResolution, chroma_error
from backfold.training.config import PretrainConfig, TaskSettings
from backfold.training.pretrained import Pretrained

STATISTICS = ChannelStatistics((0.4, 0.5, 0.6), (0.2, 0.25, 0.3))
TASKS = TaskSettings(Masking(mask_patch_size=4), Sorting(sorting_patch_size=8))
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


def evaluate(model, images, num_steps=(1, 2), step_size=1.0, seed=0):
    config = PretrainConfig(tasks=TASKS, step_size=step_size)
    run = Pretrained(model, config, STATISTICS, 3, SIZE, step=0)
    loaded = STATISTICS.denormalize(images), torch.arange(len(images))
    given = SimpleNamespace(
        settings=SimpleNamespace(num_steps=num_steps, test_images=500, seed=seed),
        subject=SimpleNamespace(run=run),
        device=torch.device("cpu"),
        parts=SimpleNamespace(test=SimpleNamespace(load=lambda _limit, _seed: loaded)),
    )
    return {(row.case, row.contender, row.metric): row for row in restoration(given)}


def generator():
    return torch.Generator().manual_seed(0)


@pytest.fixture(scope="module")
def perfect(images):
    return evaluate(Bowl(images), images)


def test_a_perfect_energy_restores_perfectly_and_another_images_energy_does_not(perfect, images):
    best = {"PSNR (dB)": 100.0, "SSIM": 1.0, "chroma error": 0.0, "patches placed right": 1.0}
    bent = evaluate(Bowl(images.roll(1, 0)), images)
    ours = [row for row in perfect.values() if row.contender.startswith("energy")]
    for row in ours:
        assert row.mean == pytest.approx(best[row.metric], abs=1e-3)
        assert row.count == 3
        if row.metric == "PSNR (dB)":
            assert bent[row.case, row.contender, row.metric].mean < 40
    for key, row in perfect.items():
        if not row.contender.startswith("energy"):
            assert bent[key] == row


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
        last = "patches placed right" if name == "sorting" else "chroma error"
        for severity in SEVERITIES:
            keys = [key[1:] for key in perfect if key[0] == f"{name}, severity {severity}"]
            assert {contender for contender, _ in keys} == common | contenders
            assert {metric for _, metric in keys} == {"PSNR (dB)", "SSIM", last}
    levels = pretext_severities(TASKS, 3, SIZE)["colorization"]
    for severity, task in zip(SEVERITIES, levels, strict=True):
        corrupted = task(images, generator()).corrupted
        row = perfect[f"colorization, severity {severity}", "identity", "chroma error"]
        assert row.mean == pytest.approx(chroma_error(corrupted, images).mean().item(), rel=1e-4)


def test_half_steps_halve_the_error(images):
    found = evaluate(Bowl(images), images, num_steps=(1, 3), step_size=0.5)
    for case in ("denoising, severity 4", "sorting, severity 5"):
        before, once, thrice = (
            found[case, contender, "PSNR (dB)"].mean
            for contender in ("identity", "energy, 1 step", "energy, 3 steps")
        )
        assert once - before == pytest.approx(20 * np.log10(2), abs=1e-2)
        assert thrice - before == pytest.approx(60 * np.log10(2), abs=1e-2)


def test_psnr_counts_where_the_loss_does(perfect, images):
    corruption = pretext_severities(TASKS, 3, SIZE)["masking"][2](images, generator())
    scale = np.array(STATISTICS.std)[:, None, None]
    expected = [
        peak_signal_noise_ratio(
            clean.numpy() * scale, np.where(mask, found, clean) * scale, data_range=1
        )
        for clean, mask, found in zip(
            images, corruption.loss_mask.numpy(), mean_fill(corruption).numpy(), strict=True
        )
    ]
    row = perfect["masking, severity 3", "mean fill", "PSNR (dB)"]
    assert row.mean == pytest.approx(np.mean(expected), abs=1e-3)
    assert row.std == pytest.approx(np.std(expected, ddof=1), abs=1e-3)


def test_classical_methods_are_scikit_image_s_and_pillow_s(images):
    noisy = Denoising(0.4, 0.4)(images, generator())
    found = classical_restorations(Denoising(0.4, 0.4), noisy)
    array = noisy.corrupted[1].permute(1, 2, 0).double().numpy()
    variation = denoise_tv_chambolle(array, weight=0.3, channel_axis=-1)
    means = denoise_nl_means(
        array, patch_size=5, patch_distance=6, h=0.24, sigma=0.4, channel_axis=-1
    )
    for name, expected in (("total variation", variation), ("non-local means", means)):
        np.testing.assert_allclose(found[name][1].permute(1, 2, 0).numpy(), expected, atol=1e-5)
    task = Masking(0.4, 4)
    hidden = task(images, generator())
    painted = classical_restorations(task, hidden)["biharmonic inpainting"][0]
    array, mask = hidden.corrupted[0].permute(1, 2, 0).double().numpy(), hidden.loss_mask[0, 0]
    expected = inpaint_biharmonic(array, mask.numpy(), channel_axis=-1)
    np.testing.assert_allclose(painted.permute(1, 2, 0).numpy(), expected, atol=1e-5)
    task = SuperResolution(4.0, 4.0)
    found = classical_restorations(task, task(images, generator()))
    small = Image.fromarray(images[2, 0].numpy()).resize((6, 4), Image.BICUBIC)
    expected = np.asarray(small.resize((SIZE[1], SIZE[0]), Image.BICUBIC))
    np.testing.assert_allclose(found["bicubic"][2, 0].numpy(), expected, atol=1e-4)


def test_mean_fill_sees_only_what_is_visible():
    corrupted = torch.tensor([[1.0, 3.0], [8.0, 100.0]])[None, None].repeat(2, 1, 1, 1)
    mask = torch.tensor([[[False, False], [False, True]], [[True, True], [True, True]]])[:, None]
    filled = mean_fill(Corruption(corrupted, mask))
    assert filled.flatten(1).tolist() == [[4.0] * 4, [28.0] * 4]


@pytest.mark.parametrize("num_steps", [(), (0, 1)])
def test_bad_numbers_of_steps(images, num_steps):
    with pytest.raises(UserError, match="numbers of steps are"):
        evaluate(Bowl(images), images, num_steps=num_steps)
