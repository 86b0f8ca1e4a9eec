from functools import cache
from itertools import product
from unittest.mock import Mock

import numpy as np
import pytest
import torch
from skimage.restoration import denoise_nl_means, denoise_tv_chambolle, inpaint_biharmonic
from torch import nn

from backfold.data.statistics import ChannelStatistics
from backfold.errors import UserError
from backfold.evaluation import restoration as module
from backfold.pretext import Corruption, Denoising, Masking, Sorting
from backfold.training.config import PretrainConfig, TaskSettings
from backfold.training.run import Pretrained

STATISTICS = ChannelStatistics((0.4, 0.5, 0.6), (0.2, 0.25, 0.3))
TASKS = TaskSettings(Masking(mask_patch_size=4), Sorting(sorting_patch_size=8))
IMAGES = torch.randn(3, 3, 16, 24, generator=torch.Generator().manual_seed(0))


def run_of(model, step_size=1.0):
    config = PretrainConfig(tasks=TASKS, step_size=step_size)
    return Pretrained(model, config, STATISTICS, 3, (16, 24), step=0)


@cache
def evaluate(clean, num_steps=(1, 2), step_size=1.0):
    """E = |x - clean|^2 / 2: the step size 1 restores, each half step halves the error."""
    model = nn.Module()
    model.forward = lambda images: (images - clean).square().sum(dim=(1, 2, 3)) / 2
    model.of = lambda _: model
    settings = Mock(num_steps=num_steps, test_images=500, seed=0)
    given = Mock(device="cpu", statistics=STATISTICS, settings=settings)
    given.subject.run = run_of(model, step_size)
    given.parts.test.load.return_value = STATISTICS.denormalize(IMAGES), torch.arange(len(IMAGES))
    return {(row.case, row.contender, row.metric): row for row in module.restoration(given)}


def test_a_perfect_energy_restores_perfectly_and_another_images_energy_does_not():
    best = {"PSNR (dB)": 100.0, "SSIM": 1.0, "chroma error": 0.0, "patches placed right": 1.0}
    best |= {"spectral angle (degrees)": 0.0}
    bent = evaluate(IMAGES.roll(1, 0))
    for key, row in evaluate(IMAGES).items():
        if row.contender.startswith("energy"):
            allowed = 0.05 if "angle" in row.metric else 1e-3  # of degrees: acos in float32
            assert row.mean == pytest.approx(best[row.metric], abs=allowed)
            assert row.metric != "PSNR (dB)" or bent[key].mean < 40
        else:
            assert bent[key] == row


def test_every_case_has_its_contenders_and_measures():
    more = {
        "masking": ["biharmonic inpainting"],
        "denoising": ["total variation", "non-local means"],
    }
    measures = {"sorting": "patches placed right", "bands": "spectral angle (degrees)"}
    for name in ("masking", "sorting", "superresolution", "denoising", "colorization", "bands"):
        unchanged = "bicubic" if name == "superresolution" else "identity"
        energies = "energy, 1 step", "energy, 2 steps"
        contenders = *energies, "mean fill", unchanged, *more.get(name, [])
        last = measures.get(name, "chroma error")
        for severity in module.SEVERITIES:
            case = f"{name}, severity {severity}"
            found = {key[1:] for key in evaluate(IMAGES) if key[0] == case}
            assert found == set(product(contenders, ("PSNR (dB)", "SSIM", last)))


def test_half_steps_halve_the_error():
    found = evaluate(IMAGES, num_steps=(1, 3), step_size=0.5)
    contenders = "identity", "energy, 1 step", "energy, 3 steps"
    psnr = [found["denoising, severity 4", each, "PSNR (dB)"].mean for each in contenders]
    assert np.diff(psnr) == pytest.approx([20 * np.log10(2), 40 * np.log10(2)], abs=1e-2)
    with pytest.raises(UserError, match="numbers of steps are"):
        evaluate(IMAGES, num_steps=(0, 1))


def test_psnr_counts_where_the_loss_does():
    task = module.pretext_severities(run_of(None))["masking, severity 3"]
    corruption = task(IMAGES, torch.Generator().manual_seed(0))
    errors = torch.where(corruption.loss_mask, module.mean_fill(corruption) - IMAGES, 0.0)
    scaled = errors * torch.tensor(STATISTICS.std)[:, None, None]
    expected = -10 * scaled.square().mean(dim=(1, 2, 3)).log10()
    row = evaluate(IMAGES)["masking, severity 3", "mean fill", "PSNR (dB)"]
    assert row.mean == pytest.approx(expected.mean().item(), abs=1e-3)
    assert row.std == pytest.approx(expected.std().item(), abs=1e-3)


def test_classical_methods_are_scikit_image_s():
    non_local = {"patch_size": 5, "patch_distance": 6, "h": 0.24, "sigma": 0.4}
    methods = (
        (Denoising(0.4, 0.4), "total variation", denoise_tv_chambolle, {"weight": 0.3}),
        (Denoising(0.4, 0.4), "non-local means", denoise_nl_means, non_local),
        (Masking(0.4, 4), "biharmonic inpainting", inpaint_biharmonic, {}),
    )
    for images, (task, name, method, options) in product((IMAGES, IMAGES[:, :1]), methods):
        corruption = task(images, torch.Generator().manual_seed(0))
        found = module.classical_restorations(task, corruption)[name][1].permute(1, 2, 0)
        array = corruption.corrupted[1].permute(1, 2, 0).double().numpy()
        masks = [corruption.loss_mask[1, 0].numpy()] if isinstance(task, Masking) else []
        expected = method(array, *masks, channel_axis=-1, **options).reshape(array.shape)
        np.testing.assert_allclose(found.numpy(), expected, atol=1e-5)


def test_mean_fill_sees_only_what_is_visible():
    corrupted = torch.tensor([[1.0, 3.0], [8.0, 100.0]])[None, None].repeat(2, 1, 1, 1)
    mask = torch.tensor([[[False, False], [False, True]], [[True, True], [True, True]]])[:, None]
    filled = module.mean_fill(Corruption(corrupted, mask))
    assert filled.flatten(1).tolist() == [[4.0] * 4, [28.0] * 4]
