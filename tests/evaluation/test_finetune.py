"""Fine-tuning: the optimizer, the loop, the choice of a recipe, and what it starts from."""

import math
import random
from dataclasses import asdict, replace
from types import SimpleNamespace

import numpy as np
import pytest
import timm
import torch
from timm.optim import param_groups_layer_decay
from torch import nn
from torch.nn import functional as F
from toys import ArraySource

from backfold.data.statistics import ChannelStatistics
from backfold.errors import UserError
from backfold.evaluation import finetune as module
from backfold.evaluation.finetune import DivergedError, FineTuning, fine_tune, finetune, predict
from backfold.evaluation.images import Images, Parts
from backfold.evaluation.results import BEFORE, PRETRAINED, RANDOM, SCRATCH
from backfold.evaluation.subject import Subject

CPU = torch.device("cpu")
PLAIN = ChannelStatistics((0.5,), (0.25,))
OFF = FineTuning(
    epochs=0, min_steps=4, longer=1, batch_size=8, crop_scale=1.0, horizontal_flip=False,
    random_erasing=0, mixup=0, label_smoothing=0, drop_path=0, ema_decay=0, layer_decay=1.0,
)  # fmt: skip
VIT = {"patch_size": 7, "depth": 2, "embed_dim": 16, "num_heads": 2}


def stripes(count, seed, side=8):
    """In noise and of random phase: horizontal ones have label 3, vertical ones label 5."""
    draw, line = np.random.default_rng(seed), np.tile([0.3, -0.3], side // 2)
    pixels = np.stack([np.tile(np.roll(line, draw.integers(2)), (side, 1)) for _ in range(count)])
    pixels[::2] = pixels[::2].transpose(0, 2, 1)
    pixels += 0.5 + 0.1 * draw.normal(size=pixels.shape)
    pixels = (pixels.clip(0, 1) * 255).astype(np.uint8)[:, None]
    return ArraySource(pixels, 3 + 2 * (np.arange(count) % 2))


class Small(nn.Module):
    """A backbone of one convolution, quick to train."""

    def __init__(self):
        super().__init__()
        self.convolution = nn.Conv2d(1, 8, 3, padding=1)

    def forward(self, images):
        return self.convolution(images).relu()


class Seeing(nn.Module):
    """Pixels, and one feature that tells the class if the weights have it so."""

    def __init__(self, gain=0.0):
        super().__init__()
        self.scale = nn.Parameter(torch.ones(4))
        self.register_buffer("gain", torch.tensor(gain))

    def forward(self, images):
        across = (images[..., 1:] - images[..., :-1]).abs().mean(dim=(1, 2, 3))
        down = (images[..., 1:, :] - images[..., :-1, :]).abs().mean(dim=(1, 2, 3))
        told = self.gain * (across - down)
        return torch.cat([told[:, None], self.scale * images[:, 0, 0, :4]], dim=1)


def images_of(count, seed=0, side=8):
    return Images(stripes(count, seed, side), Subject("toy", {}, Small, 1, (side, side), PLAIN))


def evaluation(settings=OFF, weights=None, make=Small, labels=(None,), draws=1, factors=(1.0,),
               started_random=True):  # fmt: skip
    torch.manual_seed(7)
    weights = weights or {PRETRAINED: make().state_dict(), BEFORE: make().state_dict()}
    subject = Subject("toy", weights, lambda _: make(), 1, (8, 8), PLAIN, started_random)
    fit, validation = torch.arange(60)[20:], torch.arange(60)[:20]
    parts = Parts(*(Images(stripes(n, n), subject) for n in (60, 50)), fit, validation)
    given = SimpleNamespace(finetuning=settings, rate_factors=factors, seed=0, draws=draws,
                            label_counts=lambda: list(labels))  # fmt: skip
    return SimpleNamespace(
        settings=given, parts=parts, subject=subject, statistics=PLAIN, device=CPU)  # fmt: skip


def tune(backbone, images, settings, places=None):
    places = torch.arange(len(images)) if places is None else places
    return fine_tune(backbone, images, places, settings, PLAIN, CPU)


def small(seed=0):
    torch.manual_seed(seed)
    return Small()


def vit(drop_path=0.0):
    torch.manual_seed(0)
    return timm.create_model("vit_tiny_patch16_224", num_classes=0, in_chans=1, img_size=28,
                             drop_path_rate=drop_path, **VIT)  # fmt: skip


def weights_of(module):
    return torch.cat([parameter.detach().flatten() for parameter in module.parameters()])


@pytest.mark.parametrize(("name", "options"), [
    ("vit_tiny_patch16_224", {**VIT, "img_size": 64, "patch_size": 16}),
    ("convnext_atto", {"depths": (1, 1, 2, 1), "dims": (8, 8, 8, 8)}),
    ("resnet10t", {}),
])  # fmt: skip
def test_layers_and_decay_are_those_of_timms_own_classifier(name, options):
    own = timm.create_model(name, num_classes=3, in_chans=1, **options)
    exempt = getattr(own, "no_weight_decay", set)()
    expected = param_groups_layer_decay(own, 0.3, exempt, layer_decay=0.5)
    keys = {id(parameter): key for key, parameter in own.named_parameters()}
    truth = {f"backbone.{keys[id(p)]}": (group["lr_scale"], group["weight_decay"])
             for group in expected for p in group["params"]}  # fmt: skip
    backbone = timm.create_model(name, num_classes=0, in_chans=1, **options)
    classifier = module.Classifier(backbone, torch.arange(3), (1, 64, 64))
    names = {id(parameter): key for key, parameter in classifier.named_parameters()}
    found = {names[id(p)]: (group["lr_scale"], group["weight_decay"])
             for group in module.parameter_groups(classifier, 0.3, 0.5)
             for p in group["params"]}  # fmt: skip
    assert found.keys() == set(names.values())
    for key, pair in found.items():
        if key.startswith("backbone."):
            assert pair == truth[key]
    assert found["head.weight"] == (1.0, 0.3)
    assert found["head.bias"] == found["norm.weight"] == (1.0, 0.0)
    assert len({scale for scale, _ in found.values()}) > 2


def test_layer_decay_without_layers_warns_and_is_off(caplog):
    classifier = module.Classifier(Small(), torch.arange(2), (1, 8, 8))
    assert not any("lr_scale" in group for group in module.parameter_groups(classifier, 0.1, 0.5))
    assert "layer_decay 0.5 has no effect: Small" in caplog.text


def test_schedule_warms_up_linearly_and_ends_near_zero():
    settings = replace(OFF, base_lr=2.0, batch_size=128, warmup_share=0.2, layer_decay=0.5)
    classifier = module.Classifier(vit(), torch.arange(3), (1, 28, 28))
    optimizer, schedule = module.build_optimizer(classifier, settings, steps=50)
    for step in (0, 5, 10, 30, 49):
        schedule.step_update(step)
        cosine = 0.5 * (1 + math.cos(math.pi * (step - 10) / 40))
        expected = 1e-3 + step / 10 * (1 - 1e-3) if step < 10 else cosine
        for group in optimizer.param_groups:
            assert group["lr"] == pytest.approx(expected * group["lr_scale"], rel=1e-6)


@pytest.mark.parametrize("count", [3, 7, 30])
def test_every_image_comes_once_before_any_comes_again(count):
    torch.manual_seed(0)
    order = module.batch_indices(count, OFF, 9)
    assert order.shape == (9, 8)
    whole = order.flatten()[: 72 // count * count].view(-1, count)
    assert (whole.sort(dim=1).values == torch.arange(count)).all()
    assert not torch.equal(whole[0], whole[1])
    assert len(order.flatten()[len(whole.flatten()) :].unique()) == 72 % count


def test_number_of_steps():
    for epochs, least, images, steps, longer in (
        (10, 0, 100, 125, 375), (10, 200, 100, 200, 600), (0.1, 0, 5, 1, 1), (3, 0, 9, 4, 11),
    ):  # fmt: skip
        settings = replace(OFF, epochs=epochs, min_steps=least)
        assert (settings.num_steps(images), settings.times(3).num_steps(images)) == (steps, longer)


@pytest.mark.parametrize("ema_decay", [0.0, 0.7])
def test_without_regularisers_it_is_adamw_and_a_moving_average(ema_decay):
    """Against a loop written out, on the same batches: nothing is on that was switched off."""
    settings = replace(OFF, min_steps=9, base_lr=0.5, warmup_share=0.0, weight_decay=0.1,
                       ema_decay=ema_decay)  # fmt: skip
    images = images_of(32)
    result = tune(small(), images, settings)

    model = small()
    torch.manual_seed(0)
    model = module.Classifier(model, torch.tensor([3, 5]), (1, 8, 8))
    order = module.batch_indices(32, settings, 9)
    optimizer = torch.optim.AdamW(
        [{"params": [p for p in model.parameters() if (p.ndim > 1) == decays],
          "weight_decay": 0.1 * decays} for decays in (True, False)]
    )  # fmt: skip
    pixels, averaged = (images.load()[0].float() / 255 - 0.5) / 0.25, None
    for step, indices in enumerate(order):
        for group in optimizer.param_groups:
            group["lr"] = 0.5 * 8 / 256 * 0.5 * (1 + math.cos(math.pi * step / 9))
        optimizer.zero_grad()
        truth = (images.labels[indices] == 5).long()
        F.cross_entropy(model(pixels[indices]), truth).backward()
        optimizer.step()
        decay = min(ema_decay, 1 - (1 + step) ** (-2 / 3)) if step else 0.0
        averaged = weights_of(model) if averaged is None else (
            decay * averaged + (1 - decay) * weights_of(model))  # fmt: skip
    torch.testing.assert_close(weights_of(result), averaged, rtol=1e-4, atol=1e-5)
    assert not result.training


def test_the_same_bits_twice_and_the_callers_generators_stay():
    settings = FineTuning(epochs=0, min_steps=3, batch_size=8, mixup=0.8, cutmix=1.0)
    images, drawn, tuned = images_of(16, side=28), [], []
    for seed in (0, 0, 1):
        backbone = vit(0.3)
        random.seed(1)
        np.random.seed(1)  # noqa: NPY002 - the generator that timm's mixup draws from
        torch.manual_seed(1)
        tuned.append(weights_of(tune(backbone, images, replace(settings, seed=seed))))
        drawn.append((random.random(), np.random.rand(), torch.rand(()).item()))  # noqa: NPY002
    assert torch.equal(tuned[0], tuned[1])
    assert not torch.equal(tuned[0], tuned[2])
    random.seed(1)
    np.random.seed(1)  # noqa: NPY002
    torch.manual_seed(1)
    assert {*drawn} == {(random.random(), np.random.rand(), torch.rand(()).item())}  # noqa: NPY002


def test_each_setting_changes_the_result():
    images = images_of(16, side=28)
    plain = weights_of(tune(vit(), images, OFF))
    for change in (
        {"crop_scale": 0.5}, {"horizontal_flip": True}, {"random_erasing": 0.5}, {"mixup": 0.8},
        {"cutmix": 1.0}, {"label_smoothing": 0.1}, {"drop_path": 0.5}, {"ema_decay": 0.9},
        {"layer_decay": 0.5}, {"weight_decay": 0.5}, {"warmup_share": 0.5},
        {"precision": "bf16-mixed"},
    ):  # fmt: skip
        other = tune(vit(change.get("drop_path", 0.0)), images, replace(OFF, **change))
        assert not torch.equal(plain, weights_of(other)), change


def test_separable_images_are_told_apart():
    settings = replace(OFF, min_steps=60, base_lr=0.5, horizontal_flip=True, ema_decay=0.9)
    classifier, test = tune(small(), images_of(32), settings), images_of(100, 1)
    places = torch.randperm(100, generator=torch.Generator().manual_seed(0))[:70]
    predicted = predict(classifier.train(), test, places, PLAIN, CPU)
    assert (predicted == test.labels[places]).double().mean() > 0.95
    assert classifier.training


def test_divergence_and_no_images_are_said():
    exploding = small()
    exploding.convolution.weight.data.fill_(torch.inf)
    with pytest.raises(DivergedError, match=r"last loss is nan; lower base_lr \(0\.004\)"):
        tune(exploding, images_of(8), OFF)
    given = evaluation(weights={PRETRAINED: exploding.state_dict()}, factors=(0.3, 3.0))
    with pytest.raises(DivergedError, match=r"at every base_lr from 0\.0012 to 0\.012"):
        module.best_recipe(given, PRETRAINED, given.parts.fit)
    with pytest.raises(UserError, match="0 images to learn from"):
        tune(small(), images_of(8), OFF, torch.arange(0))


def validated(given, contender, recipe):
    """The accuracy on the validation images, by hand."""
    backbone, parts = given.subject.backbone(contender), given.parts
    classifier = fine_tune(backbone, parts.train, parts.fit, recipe, PLAIN, CPU)
    predicted = predict(classifier, parts.train, parts.validation, PLAIN, CPU)
    return float((predicted == parts.train.labels[parts.validation]).double().mean())


@pytest.mark.parametrize(("factors", "longer_wins"), [((1e-9, 1.0, 1e30), True), ((9.0,), False)])
def test_the_recipe_with_the_best_validation_accuracy_is_taken(factors, longer_wins):
    slow = replace(OFF, min_steps=7, base_lr=0.03, longer=3)
    given = evaluation(slow, factors=factors)
    with pytest.raises(DivergedError):
        validated(given, BEFORE, replace(slow, base_lr=0.03 * 1e30))
    once = [replace(slow, base_lr=0.03 * factor) for factor in factors if factor < 1e9]
    scores = [validated(given, BEFORE, recipe) for recipe in once]
    best = once[int(np.argmax(scores))]
    longer = replace(best, min_steps=21)
    assert (validated(given, BEFORE, longer) > max(scores) + 0.2) == longer_wins
    assert module.best_recipe(given, BEFORE, given.parts.fit) == (longer if longer_wins else best)
    assert best.base_lr == pytest.approx(0.03 if longer_wins else 0.27)


def test_contenders_have_the_same_recipe_but_layer_decay():
    states = {name: small().state_dict() for name in (PRETRAINED, BEFORE, RANDOM)}
    settings = FineTuning(epochs=0, min_steps=2, longer=1)
    given = evaluation(settings, states, started_random=False, draws=2, labels=(2,))
    recipes = {name: asdict(module.best_recipe(given, name, given.parts.fit)) for name in states}
    assert recipes[PRETRAINED] == recipes[BEFORE] == asdict(settings)
    assert recipes[RANDOM] == {**asdict(settings), "layer_decay": 1.0}
    rows = finetune(given)
    assert [row.contender for row in rows[:3]] == [PRETRAINED, BEFORE, SCRATCH]


def test_rows_are_what_each_draw_gives():
    settings = replace(OFF, min_steps=6, base_lr=0.02)  # so few that accuracies differ
    given = evaluation(settings, labels=(None, 3), draws=3)
    rows = {(row.case, row.contender): row for row in finetune(given)}
    every, test = [torch.arange(60)], given.parts.test
    for case, draws in (("all labels", every), ("3 labels a class", given.parts.draws(3, 3, 0))):
        for name, contender in ((PRETRAINED, PRETRAINED), (SCRATCH, BEFORE)):
            found = []
            for draw, places in enumerate(draws):
                backbone, seeded = given.subject.backbone(contender), replace(settings, seed=draw)
                tuned = tune(backbone, given.parts.train, seeded, places)
                right = predict(tuned, test, torch.arange(50), PLAIN, CPU) == test.labels
                found.append(100 * float(right.double().mean()))
            row = rows[case, name]
            assert (row.mean, row.count) == (pytest.approx(np.mean(found)), len(found))
            assert row.note == "base_lr 0.02, 6 steps"
    assert rows["all labels", SCRATCH].mean < 95
    assert rows["3 labels a class", SCRATCH].std > 1


def test_swapped_weights_swap_the_rows():
    """A backbone that sees the class and one that does not: rows must tell them apart."""
    seeing, blind = Seeing(1.0).state_dict(), Seeing(0.0).state_dict()
    settings = replace(OFF, min_steps=20, longer=3, base_lr=1.0)

    def means(pretrained, before):
        weights = {PRETRAINED: pretrained, BEFORE: before}
        rows = finetune(evaluation(settings, weights, Seeing))
        return {row.contender: row.mean for row in rows}

    over = f"{PRETRAINED} over {SCRATCH}"
    right, bent = means(seeing, blind), means(blind, seeing)
    assert right[PRETRAINED] > 95
    assert right[SCRATCH] < 70
    assert (bent[PRETRAINED], bent[SCRATCH]) == (right[SCRATCH], right[PRETRAINED])
    assert -bent[over] == right[over] > 25
    same = means(seeing, seeing)  # from scratch with pretrained weights
    assert same == {PRETRAINED: right[PRETRAINED], SCRATCH: right[PRETRAINED], over: 0}


def test_bad_settings_are_refused():
    for change in (
        {"drop_path": 1.0}, {"crop_scale": 0.0}, {"random_erasing": -0.1}, {"mixup": -1.0},
        {"longer": 0}, {"base_lr": 0.0}, {"layer_decay": 1.5}, {"precision": "half"},
        {"batch_size": 7, "mixup": 0.5},
    ):  # fmt: skip
        with pytest.raises(UserError, match=rf"{next(iter(change))}.*; (give|choose)"):
            replace(OFF, **change)
