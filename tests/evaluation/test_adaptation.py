import math

import numpy as np
import pytest
import torch
from scipy.ndimage import gaussian_filter
from torch import nn

from backfold.data.statistics import ChannelStatistics
from backfold.errors import UserError
from backfold.evaluation import adaptation as module
from backfold.evaluation.adaptation import AS_THEY_ARE, IMPLAUSIBLE, RESTORED, UNCHANGED, Way
from backfold.evaluation.restoration import pretext_severities
from backfold.evaluation.results import ACCURACY, OVER, severity_case
from backfold.pretext import Masking, Sorting
from backfold.restoration import RestorationResult, RestorationStatus, restore
from backfold.training.config import PretrainConfig, TaskSettings
from backfold.training.run import Pretrained
from tiny_run import seeded

STATISTICS = ChannelStatistics((0.4, 0.5, 0.6), (0.2, 0.25, 0.3))
LABELS = torch.arange(60) % 4
NOISE, CPU = severity_case("noise", 5), torch.device("cpu")
CLEAN, HARD, SHARE = module.CLEAN, module.HARD, module.SHARE
# One image a class, as unlike as two opposite halves can be: corners differ slightly.
PIXELS = torch.full((4, 3, 12, 12), 0.5)
for label in range(4):
    PIXELS[label, :, :, :2] += 0.05 * label
    PIXELS[label, label % 3, :, 2:] = 0.9 if label < 3 else 0.1
TEMPLATES = STATISTICS.normalize(PIXELS)


def squares(images, side=12):
    """Squared distances of the upper left corners, (images, templates)."""
    return (images[:, None] - TEMPLATES)[..., :side, :side].square().sum(dim=(2, 3, 4))


def nearest_template(images):
    """E = |x - nearest template|^2 / 2: a step of size 1 puts the template in its place."""
    return squares(images).amin(dim=1) / 2


def spoils_clean(images):
    """The step from a clean image leads to the next class's template, whose energy is lower yet."""
    distances = squares(images.detach())
    nearest, is_clean = distances.argmin(dim=1), distances.amin(dim=1) < 1e-3
    targets = TEMPLATES[torch.where(is_clean, (nearest + 1) % 4, nearest)]
    steps = (images - targets).square().sum(dim=(1, 2, 3)) / 2
    return steps - steps.detach() + distances.amin(dim=1) / 2 - 1e-3 * nearest


def restorer_of(energy):
    """With a classifier that looks at one corner only, which little noise is enough to change."""
    return module.Restorer(energy, lambda images: -squares(images, 2), STATISTICS, CPU)


def table(restorer, **ways):
    chosen = {RESTORED: AS_THEY_ARE, IMPLAUSIBLE: AS_THEY_ARE}
    chosen |= {getattr(module, name): way for name, way in ways.items()}
    rows = module.adaptation_rows(restorer, chosen, TEMPLATES[LABELS], LABELS, 3)
    return {(row.case, row.contender, row.metric): row for row in rows}


def choose(restorer, *ways):
    ways = {RESTORED: ways, IMPLAUSIBLE: ways}
    return module.choose(restorer, TEMPLATES[LABELS[:16]], LABELS[:16], ways, 0)


@pytest.mark.parametrize("threshold", [-math.inf, 30.0, math.inf])
def test_rows_are_counted_as_by_hand(threshold):
    ways = {"RESTORED": Way(1, 1.0), "IMPLAUSIBLE": Way(1, 1.0, threshold=threshold)}
    found, hard = table(restorer_of(nearest_template), **ways), []
    for name in module.corruption_names(3):
        for level in module.SEVERITIES:
            images = module.corrupt_images(TEMPLATES[LABELS], name, level, STATISTICS, 3)
            right = (squares(images, 2).argmin(dim=1) == LABELS).double()
            after = (squares(images).argmin(dim=1) == LABELS).double()
            high = squares(images).amin(dim=1) / 2 > threshold
            expected = {UNCHANGED: right, RESTORED: after}
            expected[IMPLAUSIBLE] = torch.where(high, after, right)
            for contender in (RESTORED, IMPLAUSIBLE):
                expected[contender + OVER + UNCHANGED] = expected[contender] - right
            case = severity_case(name, level)
            for contender in expected:
                row, values = found[case, contender, ACCURACY], expected[contender]
                assert row.mean == pytest.approx(100 * float(values.mean()))
                assert row.std == pytest.approx(100 * float(values.std()) / 60**0.5, 0.25, 1e-9)
            share = 100 * float(high.sum()) / 60
            assert found[case, IMPLAUSIBLE, SHARE].mean == pytest.approx(share)
            hard += [expected] if level >= 3 else []
    for contender in hard[0]:
        each = 100 * torch.stack([values[contender] for values in hard])
        assert found[HARD, contender, ACCURACY].mean == pytest.approx(float(each.mean()))


def test_the_step_that_restores_is_chosen_and_a_bent_energy_is_not_used():
    good = restorer_of(nearest_template)
    assert choose(good, Way(1, 0.05), Way(1, 1.0))[RESTORED] == Way(1, 1.0)
    found = table(good, RESTORED=Way(1, 1.0))
    assert found[CLEAN, UNCHANGED, ACCURACY].mean == found[NOISE, RESTORED, ACCURACY].mean == 100
    assert found[NOISE, UNCHANGED, ACCURACY].mean < 60
    bent = restorer_of(lambda images: -squares(images).sum(dim=1))
    assert set(choose(bent, Way(1, 0.25), Way(2, 1.0)).values()) == {AS_THEY_ARE}


def test_clean_images_are_left_alone_where_restoring_them_hurts():
    chosen = choose(restorer_of(spoils_clean), Way(1, 1.0))
    assert chosen[RESTORED] == AS_THEY_ARE
    found = table(restorer_of(spoils_clean), IMPLAUSIBLE=chosen[IMPLAUSIBLE])
    assert found[CLEAN, IMPLAUSIBLE, ACCURACY].mean == 100
    assert found[CLEAN, IMPLAUSIBLE, SHARE].mean == 0
    assert found[HARD, IMPLAUSIBLE + OVER + UNCHANGED, ACCURACY].mean > 10


def test_images_without_an_energy_are_left_alone_but_refused_among_the_clean():
    broken = restorer_of(lambda images: images.sum(dim=(1, 2, 3)) * math.nan)
    assert table(broken, IMPLAUSIBLE=Way(1, 1.0))[NOISE, IMPLAUSIBLE, SHARE].mean == 0
    with pytest.raises(UserError, match="energies of clean validation images are not finite"):
        choose(broken, Way(1, 1.0))


def test_each_image_stays_where_its_energy_last_fell():
    energies = torch.tensor([[3.0, 3.0, 3.0], [2.0, 4.0, 2.0], [1.0, 1.0, 2.0], [0.0, 0.0, 0.0]])
    trajectory = torch.arange(12.0).view(4, 3, 1, 1, 1)
    status = RestorationStatus(energies[0] > 9, 1)
    result = RestorationResult(trajectory[-1], trajectory, energies, status)
    found = [module.settled(result, steps).flatten().tolist() for steps in (0, 1, 3)]
    assert found == [[0, 1, 2], [3, 1, 5], [9, 1, 5]]


class Blocks(nn.Module):
    """A classifier of four blocks and a norm, on the images' colours."""

    def __init__(self, norm):
        super().__init__()
        self.backbone = nn.Module()
        self.backbone.blocks = nn.Sequential(*(nn.Linear(3, 3) for _ in range(4)))
        self.norm = norm
        with torch.no_grad():
            for block in self.backbone.blocks:
                block.weight.copy_(torch.eye(3))
                block.bias.zero_()

    def forward(self, images):
        return self.norm(self.backbone.blocks(images.mean(dim=(2, 3))))


def coloured(count=400, shift=0.0):
    """Each image has more of one of three colours, its class."""
    labels = torch.arange(count) % 3
    noise = 0.3 * torch.randn(count, 3, 4, 4, generator=seeded())
    return noise + 2 * nn.functional.one_hot(labels, 3)[:, :, None, None] + shift, labels


def test_features_descend_behind_a_block_and_a_guess_is_kept():
    images, labels = coloured()
    toy = Blocks(nn.Identity()).eval()
    assert module.middle_blocks(toy, images[:1]) == [2, 3]
    restorer = module.Restorer(lambda images: images.sum(dim=(1, 2, 3)) * 0, toy, STATISTICS, CPU)
    guess = toy(images).argmax(dim=1)
    energy, start, read = restorer.descent(images, guess, Way(1, 0.1, block=2))
    torch.testing.assert_close(read(start), toy(images))
    moved = restore(energy, start, 1, 0.1)
    assert (moved.energies[1] < moved.energies[0]).all()
    assert (read(moved.restored).logsumexp(dim=1) > toy(images).logsumexp(dim=1)).all()
    energy, start, read = restorer.descent(images, guess, Way(1, 1.0, guide=1.0))
    before, after = (
        read(points).softmax(dim=1).gather(1, guess[:, None])
        for points in (start, restore(energy, start, 1, 1.0).restored)
    )
    assert (after > before).all()
    restorer = restorer._replace(classifier=Blocks(nn.LayerNorm(3)).eval())
    ways = Way(1, 0.1, block=2), Way(rate=1e-3)
    _, right = restorer.attempts(images, labels, ways)
    assert all(right(way).all() for way in ways)


def test_blocks_that_give_more_than_a_tensor_are_passed_over():
    toy, images = Blocks(nn.Identity()).eval(), coloured(1)[0]
    toy.backbone.blocks[1].register_forward_hook(lambda _, __, features: (features,))
    toy.backbone.blocks[2].register_forward_pre_hook(lambda _, given: given[0])
    assert module.middle_blocks(toy, images) == [3]
    toy.backbone.blocks = nn.Sequential(nn.Linear(3, 3))
    assert module.middle_blocks(toy, images) == []


@pytest.mark.parametrize(("rate", "least", "most"), [(0.03, 0.0, 0.8), (0.0, 0.9, 1.1)])
def test_entropy_falls_while_norms_adapt(rate, least, most):
    toy, said = Blocks(nn.LayerNorm(3)).eval(), []
    toy.norm.register_forward_hook(lambda _, __, logits: said.append(logits.detach()))
    module.by_entropy(toy, coloured(2000)[0], rate)
    entropies = [torch.distributions.Categorical(logits=each).entropy().mean() for each in said]
    assert least < entropies[-1] / entropies[0] < most


@pytest.mark.parametrize("norm", [nn.LayerNorm(3), nn.BatchNorm1d(3)])
def test_norms_adapt_by_entropy_and_the_classifier_stays(norm):
    toy = Blocks(norm).eval()
    before = {name: value.clone() for name, value in toy.state_dict().items()}
    images, labels = coloured(1801, shift=torch.tensor([4.0, 0.0, 0.0]).view(3, 1, 1))
    order = labels.argsort()  # as a folder of classes gives them
    images, labels = images[order], labels[order]
    found = module.by_entropy(toy, images, 0.03)
    assert all(torch.equal(before[name], value) for name, value in toy.state_dict().items())
    plain = float((toy(images).argmax(dim=1) == labels).double().mean())
    adapted = float((found == labels).double().mean())
    # The batch's own statistics undo a shift of all images; a norm of each image can't see it.
    assert adapted > 0.99 > 0.5 > plain if isinstance(norm, nn.BatchNorm1d) else plain < 0.5


SIZE = (24, 32)


def severities(settings, channels, size):
    run = Pretrained(None, PretrainConfig(tasks=settings), STATISTICS, channels, size, step=0)
    return pretext_severities(run)


TASKS = severities(TaskSettings(Masking(mask_patch_size=4), Sorting(4)), 3, SIZE)


@pytest.fixture
def pixels():
    """Smooth colours in [0.2, 0.8], so that small noise is not cut off."""
    noise = torch.rand(6, 3, *SIZE, generator=seeded(1)).numpy()
    smooth = gaussian_filter(noise, (0, 0, 2, 2))
    return torch.from_numpy(0.2 + 0.6 * (smooth - smooth.min()) / np.ptp(smooth)).float()


def corrupted(pixels, name, severity, seed=3):
    images = module.corrupt_images(STATISTICS.normalize(pixels), name, severity, STATISTICS, seed)
    return STATISTICS.denormalize(images)


def test_corruptions_grow_with_severity_in_every_image(pixels):
    images = STATISTICS.normalize(pixels)
    found = {}
    for case, task in TASKS.items():
        found.setdefault(case.split(",")[0], []).append(task(images, seeded()).corrupted)
    for name in module.corruption_names(3):
        found[name] = [STATISTICS.normalize(corrupted(pixels, name, s)) for s in module.SEVERITIES]
    for name, levels in found.items():
        errors = (torch.stack(levels) - images).square().mean(dim=(2, 3, 4))
        assert (errors > 0).all()
        assert (errors.mean(dim=1).diff() > 0).all()
        if name != "sorting":
            assert (errors.diff(dim=0) > (-1e-6 if name == "occlusion" else 0)).all()


def test_settings_are_kept_where_they_fit():
    settings = TaskSettings(Masking(mask_patch_size=8, fill="mean", hidden_share=0.5))
    tasks = severities(settings, 1, (28, 40))
    assert len(tasks) == 20  # no colours, no bands
    first = tasks["masking, severity 1"]
    assert (first.mask_patch_size, first.fill, first.hidden_share) == (8, "mean", 1.0)
    assert tasks["sorting, severity 1"].sorting_patch_size == 7


def test_noise_and_blur_and_grey_are_what_they_are_called(pixels):
    noise = corrupted(pixels, "noise", 1) - pixels
    assert float(noise.std()) == pytest.approx(0.04, rel=0.03)
    blurred = gaussian_filter(pixels.numpy(), (0, 0, 1.5, 1.5), mode="mirror", truncate=4)
    np.testing.assert_allclose(corrupted(pixels, "blur", 4).numpy(), blurred, atol=2e-3)
    expected = torch.einsum("nchw,c->nhw", pixels, torch.tensor([0.299, 0.587, 0.114]))
    assert torch.allclose(corrupted(pixels, "gray", 5), expected[:, None], atol=1e-3)
    assert "gray" not in module.corruption_names(1)
    tiny = torch.full((1, 1, 3, 3), 0.5)  # the reflected border can't be wider
    blurred = module.corrupt_images(tiny, "blur", 5, ChannelStatistics((0.5,), (1.0,)), 0)
    assert torch.allclose(blurred, tiny, atol=1e-6)


def test_occlusion_hides_one_rectangle_of_the_area_said(pixels):
    for severity, area in zip(module.SEVERITIES, (0.05, 0.1, 0.2, 0.3, 0.45), strict=True):
        mask = ((corrupted(pixels, "occlusion", severity) - pixels).abs() > 1e-4).any(dim=1)
        rows, columns = mask.any(dim=2), mask.any(dim=1)
        assert torch.equal(mask, rows[:, :, None] & columns[:, None, :])
        assert max((line.int().diff(dim=1) > 0).sum(dim=1).max() for line in (rows, columns)) <= 1
        assert float(mask.float().mean()) == pytest.approx(area, abs=0.02)
        assert len(rows.int().argmax(dim=1).unique()) > 1


def test_pixels_of_another_scale_are_refused():
    statistics = ChannelStatistics((300.0,), (9.0,))
    with pytest.raises(UserError, match="pixels lie between 300 and 300"):
        module.corrupt_images(torch.zeros(1, 1, 8, 8), "noise", 1, statistics, 0)
