"""What `backfold restore` draws, measures and prints."""

import re

import numpy as np
import pytest
import torch
from PIL import Image
from skimage.metrics import peak_signal_noise_ratio, structural_similarity
from torchvision.transforms.v2.functional import pil_to_tensor

from backfold.cli.main import main
from backfold.data.decode import as_float
from backfold.data.open import open_source
from backfold.pictures import to_display
from backfold.training.config import used_task
from backfold.training.run import load_pretrained


def restoration(run, path, corrupt, num_steps, step_size):
    """PSNR, SSIM and energies of one image, computed apart from the command."""
    pixels = np.asarray(Image.open(path).convert("L"), dtype=np.float32)[None, None] / 255
    mean, std = run.statistics.mean[0], run.statistics.std[0]
    clean = (torch.from_numpy(pixels) - mean) / std
    made = corrupt(clean)
    points, energies, energy_fn = [made.corrupted], [], run.energy.of(made)
    for _ in range(num_steps):
        given = points[-1].detach().requires_grad_()
        energy = energy_fn(given)
        (gradient,) = torch.autograd.grad(energy.sum(), given)
        energies.append(energy.item())
        points.append((given - step_size * gradient).detach())
    with torch.no_grad():
        energies += [energy_fn(points[-1]).item(), energy_fn(clean).item()]
    shown = [(point * std + mean)[0, 0].numpy() for point in (*points, clean)]
    psnr = [peak_signal_noise_ratio(shown[-1], image, data_range=1) for image in shown[:-1]]
    options = {"gaussian_weights": True, "sigma": 1.5, "use_sample_covariance": False}
    ssim = [
        structural_similarity(shown[-1], image, data_range=1, **options) for image in shown[:-1]
    ]
    return psnr, ssim, energies


def test_restore_draws_and_measures(finished, tmp_path, capsys):
    path = tmp_path / "picture.png"
    random = np.random.default_rng(0).integers(0, 256, (7, 7), dtype=np.uint8)
    Image.fromarray(random).resize((28, 28)).save(path)
    out = tmp_path / "restored"
    arguments = ["restore", f"--checkpoint={finished}", f"--out={out}", "--seed=5", str(path)]
    assert main([*arguments, "--num-steps=3", "--step-size=0.2"]) == 0
    printed = capsys.readouterr().out
    assert printed.splitlines()[-1] == f"pictures: {out}"
    assert {file.name for file in out.iterdir()} == {"picture.png", "picture.gif"}
    with Image.open(out / "picture.png") as picture:
        assert picture.size == (3 * 112 + 4 * 4, 112 + 2 * 4)  # corrupted, restored, clean
    with Image.open(out / "picture.gif") as picture:
        assert picture.n_frames == 4
        assert picture.size == (112, 112)
    run = load_pretrained(finished)

    def corrupt(clean):
        task = used_task(run.config.tasks.masking, run.config)
        return task(clean, torch.Generator().manual_seed(5))

    psnr, ssim, energies = restoration(run, path, corrupt, num_steps=3, step_size=0.2)
    (line,) = [line for line in printed.splitlines() if "picture" in line and "->" in line]
    numbers = [float(number) for number in re.findall(r"-?\d+\.?\d*(?:e[+-]?\d+)?", line)]
    expected = [psnr[0], psnr[-1], ssim[0], ssim[-1], energies[0], energies[3], energies[4]]
    assert numbers[:2] == pytest.approx(expected[:2], abs=0.011)
    assert numbers[2:4] == pytest.approx(expected[2:4], abs=0.0011)
    assert numbers[4:] == pytest.approx(expected[4:], rel=2e-3, abs=2e-3)
    assert "diverged" not in printed
    assert "masking" in printed


def test_restore_without_images_takes_the_run_s_own(finished, tmp_path, capsys):
    out = tmp_path / "restored"
    assert main(["restore", f"--checkpoint={finished}", f"--out={out}"]) == 0
    names = {f"image-{round(i * (60 - 1) / 3)}" for i in range(4)}  # spread over the 60
    assert {file.stem for file in out.iterdir()} == names
    assert capsys.readouterr().out.count("image-") == 4
    run = load_pretrained(finished)
    source = open_source(run.config.data, "train")
    clean = to_display(run.statistics.normalize(as_float(source.read(0))[None]), run.statistics)[0]
    with Image.open(out / "image-0.png") as picture:
        drawn = pil_to_tensor(picture.convert("RGB"))[:, 4:116, 2 * 116 + 4 : 3 * 116]
    assert (drawn - clean * 255).abs().max() <= 1  # rounding


def test_restore_with_other_tasks_names_and_steps(finished, tmp_path, capsys):
    paths = [tmp_path / "a" / "same.png", tmp_path / "b" / "same.png"]
    for shade, path in enumerate(paths):
        path.parent.mkdir()
        Image.effect_noise((40, 33), 30 + shade).save(path)
    out = tmp_path / "restored"
    arguments = ["restore", f"--checkpoint={finished}", f"--out={out}", *map(str, paths)]
    assert main([*arguments, "--pretext=denoising", "--num-steps=0"]) == 0
    said = capsys.readouterr()
    assert "denoising" in said.out
    assert "and not denoising: expect little of it" in said.err
    assert {file.name for file in out.iterdir()} == {
        "same-0.png", "same-0.gif", "same-1.png", "same-1.gif",
    }  # fmt: skip
    with Image.open(out / "same-0.gif") as picture:
        assert getattr(picture, "n_frames", 1) == 1
    assert main([*arguments, "--step-size=1e6"]) == 0
    assert "diverged: lower --step-size" in capsys.readouterr().out
