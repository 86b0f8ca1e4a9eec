import numpy as np
import pytest
import torch
from skimage.metrics import peak_signal_noise_ratio
from sklearn.metrics import roc_auc_score

from backfold.data.statistics import ChannelStatistics
from backfold.metrics import knn_accuracy
from backfold.pretext import Colorization, Denoising, Masking, Sorting
from backfold.training.config import PretrainConfig
from backfold.training.images import HeldOut
from backfold.training.watch import describe_health, watch, watch_task
from tiny_run import tiny_energy

STATISTICS = ChannelStatistics((0.4, 0.5, 0.6), (0.2, 0.25, 0.3))
CONFIG = PretrainConfig(num_steps=2, step_size=0.3)
MASKING = Masking(mask_patch_size=7)


def draw(count, seed):
    return torch.randn(count, 3, 14, 14, generator=torch.Generator().manual_seed(seed))


@pytest.fixture
def images():
    return draw(10, 1)


@pytest.fixture
def look(tmp_path):
    def make(energy, held_out, **tasks):
        return watch(energy, tasks, held_out, STATISTICS, CONFIG, 4, tmp_path / "look")

    return make


def test_measures_equal_written_out_ones(images):
    energy = tiny_energy(14)
    made = []
    kept = lambda *given: made.append(MASKING(*given)) or made[-1]  # noqa: E731
    measures, found = watch_task(energy, kept, images, STATISTICS, CONFIG, 4)
    corrupted, mask = (torch.cat([getattr(c, n) for c in made]) for n in ("corrupted", "loss_mask"))
    points = corrupted
    for _ in range(2):
        points = points.detach().requires_grad_()
        (gradient,) = torch.autograd.grad(energy(points).sum(), points)
        points = points - 0.3 * gradient
    with torch.no_grad():
        energies = {
            name: energy(values).double().numpy()
            for name, values in (("clean", images), ("corrupted", corrupted), ("restored", points))
        }
    for name, values in energies.items():
        np.testing.assert_allclose(found[name], values, rtol=1e-4, atol=1e-4)
    gap = energies["corrupted"].mean() - energies["clean"].mean()
    assert measures["energy_gap"] == pytest.approx(gap, rel=1e-3, abs=1e-4)
    labels = np.repeat([0, 1], 10)
    pooled = np.concatenate([energies["clean"], energies["corrupted"]])
    assert measures["auroc"] == pytest.approx(roc_auc_score(labels, pooled))
    scale = torch.tensor(STATISTICS.std)[:, None, None]
    variants = {"corrupted": corrupted, "restored": points.detach(), "mean_fill": 0 * images}
    for name, variant in variants.items():
        pixels = (torch.where(mask, variant, images) * scale).numpy()
        expected = [
            peak_signal_noise_ratio((clean * scale).numpy(), found, data_range=1)
            for clean, found in zip(images, pixels, strict=True)
        ]
        assert measures[f"psnr_{name}_db"] == pytest.approx(np.mean(expected), abs=1e-3)


def test_a_look_is_the_same_each_time_and_changes_nothing(images):
    energy = tiny_energy(14, drop_path_rate=0.5, proj_drop_rate=0.3).train()
    before = {name: value.clone() for name, value in energy.state_dict().items()}
    first = watch_task(energy.eval(), Denoising(), images, STATISTICS, CONFIG, 4)
    torch.manual_seed(77)
    assert watch_task(energy.train(), Denoising(), images, STATISTICS, CONFIG, 4) == first
    assert energy.training
    assert energy.backbone.blocks[0].training
    assert all(torch.equal(value, before[name]) for name, value in energy.state_dict().items())
    assert all(parameter.grad is None for parameter in energy.parameters())


def test_tasks_have_measures_in_their_own_terms(images):
    energy = tiny_energy(14)
    sorting, _ = watch_task(energy, Sorting(sorting_patch_size=7), images, STATISTICS, CONFIG, 4)
    assert sorting["patches_placed_right_corrupted"] == pytest.approx(0.5)
    assert 0 <= sorting["patches_placed_right_restored"] <= 1
    colour, _ = watch_task(energy, Colorization(), images, STATISTICS, CONFIG, 4)
    weights = torch.tensor([0.299, 0.587, 0.114])[:, None, None]
    chroma = images - (images * weights).sum(dim=1, keepdim=True)
    assert colour["chroma_error_corrupted"] == pytest.approx(float(chroma.abs().mean()), rel=1e-4)
    statistics = ChannelStatistics((0.4,), (0.2,))
    found, _ = watch_task(tiny_energy(14, 1), Denoising(), images[:, :1], statistics, CONFIG, 4)
    assert not any(name.startswith("chroma") for name in found)


def test_energies_that_are_not_finite_give_nan_and_no_crash(images, look):
    energy = tiny_energy(14)
    with torch.no_grad():
        energy.head.weight.fill_(float("nan"))
        energy.backbone.norm.weight.fill_(float("nan"))
    entry, _ = look(energy, HeldOut(images, None), denoising=Denoising())
    assert np.isnan(entry["auroc"])
    assert np.isnan(entry["rank_me"])
    assert "AUROC nan" in describe_health(entry)


def test_knn_uses_the_labelled_training_images(images, look):
    energy = tiny_energy(14)
    labels, bank, bank_labels = torch.arange(10) % 3, draw(30, 5), torch.arange(30) % 3
    tasks = {"denoising": Denoising(), "masking": MASKING}
    entry, energies = look(energy, HeldOut(images, labels, bank, bank_labels), **tasks)
    with torch.no_grad():
        pooled = [energy.backbone.forward_features(x)[:, 1:].mean(dim=1) for x in (bank, images)]
    expected = knn_accuracy(pooled[0], bank_labels, pooled[1], labels)
    assert entry["knn"] == pytest.approx(100 * expected)
    assert entry["embedding_size"] == 16
    assert set(energies) == set(entry["tasks"]) == set(tasks)
    line = describe_health(entry)
    assert f"kNN {entry['knn']:.1f} %" in line
    assert "denoising" in line
    assert "\n" not in line
    unlabelled, _ = look(energy, HeldOut(images, None), **tasks)
    assert unlabelled["knn"] is None
    assert "kNN" not in describe_health(unlabelled)
