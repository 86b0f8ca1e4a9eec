"""Fine-tuning: augmentation, the optimizer, the loop, the choice of a recipe, and its starts."""

import math
from dataclasses import replace
from types import SimpleNamespace

import numpy as np
import pytest
import timm
import torch
from timm.optim import param_groups_layer_decay
from torch import nn
from torch.nn import functional as F
from torch.nn.utils import parameters_to_vector
from toys import ArraySource

from backfold.data.statistics import ChannelStatistics
from backfold.errors import UserError
from backfold.evaluation import finetune as module
from backfold.evaluation.evaluate import EvaluateSettings
from backfold.evaluation.finetune import DivergedError, FineTuning, fine_tune, finetune, predict
from backfold.evaluation.images import Images, Parts, batch_indices
from backfold.evaluation.results import BEFORE, PRETRAINED, RANDOM, SCRATCH
from backfold.evaluation.subject import Subject

PLAIN, PLACES = ChannelStatistics((0.5,), (0.25,)), torch.arange(32)
OFF = FineTuning(
    epochs=0, min_steps=4, longer=1, batch_size=8, crop_scale=1.0, horizontal_flip=False,
    random_erasing=0, mixup=0, label_smoothing=0, drop_path=0, ema_decay=0, layer_decay=1.0,
)  # fmt: skip
NAME = "vit_tiny_patch16_224"
VIT = {"patch_size": 4, "depth": 2, "embed_dim": 16, "num_heads": 2, "img_size": 8}


def stripes(count, seed):
    """In noise and of random phase: horizontal ones have label 3, vertical ones label 5."""
    draw, line = np.random.default_rng(seed), np.tile([0.3, -0.3], 4)
    pixels = np.stack([np.tile(np.roll(line, draw.integers(2)), (8, 1)) for _ in range(count)])
    pixels[::2] = pixels[::2].transpose(0, 2, 1)
    pixels += 0.5 + 0.1 * draw.normal(size=pixels.shape)
    pixels = (pixels.clip(0, 1) * 255).astype(np.uint8)[:, None]
    return ArraySource(pixels, 3 + 2 * (np.arange(count) % 2))


def small(_=0.0):
    """A backbone of one convolution, quick to train."""
    return nn.Sequential(nn.Conv2d(1, 8, 3, padding=1), nn.ReLU())


def vit(drop_path=0.0):
    return timm.create_model(NAME, num_classes=0, in_chans=1, drop_path_rate=drop_path, **VIT)


def evaluation(settings=OFF, weights=None, make=small, started_random=True, **options):
    torch.manual_seed(7)
    weights = weights or {name: make().state_dict() for name in (PRETRAINED, BEFORE)}
    subject = Subject("toy", weights, make, 1, (8, 8), PLAIN, started_random)
    fit, validation = torch.arange(60)[20:], torch.arange(60)[:20]
    parts = Parts(*(Images(stripes(n, n), subject) for n in (60, 50)), fit, validation)
    given = {"rate_factors": (1.0,), "labels": "all", "finetuning": settings, **options}
    return SimpleNamespace(settings=EvaluateSettings(**given), parts=parts, subject=subject,
                           statistics=PLAIN, device=torch.device("cpu"))  # fmt: skip


def accuracy(given, contender, recipe, learned, images, tested):
    """In percent, by hand."""
    classifier = fine_tune(given, contender, learned, recipe)
    right = predict(given, classifier, images, tested) == images.labels[tested]
    return 100 * float(right.double().mean())


def test_crops_flips_and_noise_meet_a_share_of_the_images():
    torch.manual_seed(0)
    images = torch.randn(400, 3, 6, 10)
    changes = {"horizontal_flip": True}, {"random_erasing": 0.25}, {"crop_scale": 0.3}
    flipped, erased, cropped = (
        module.augment(images.clone(), PLACES, 3, replace(OFF, **change))[0] for change in changes
    )
    pairs = ((flipped, images), (flipped, images.flip(3)), (erased, images), (cropped, images))
    same, mirrored, whole, kept = (((a - b).abs() < 1e-4).flatten(1).all(1).sum() for a, b in pairs)
    assert 150 < same == 400 - mirrored < 250 < 260 < whole < 340
    assert kept < 40


@pytest.mark.parametrize(("name", "options"), [
    (NAME, VIT), ("convnext_atto", {"depths": (1,) * 4, "dims": (8,) * 4}),
])  # fmt: skip
def test_layers_decay_and_schedule_are_those_of_timms_own_classifier(name, options):
    own, backbone = (timm.create_model(name, num_classes=classes, in_chans=1, **options)
                     for classes in (3, 0))  # fmt: skip
    names = {id(parameter): f"backbone.{key}" for key, parameter in own.named_parameters()}
    exempt = getattr(own, "no_weight_decay", set)()
    truth = {names[id(parameter)]: (group["lr_scale"], group["weight_decay"])
             for group in param_groups_layer_decay(own, 0.3, exempt, layer_decay=0.5)
             for parameter in group["params"]}  # fmt: skip
    truth |= dict.fromkeys(("head.bias", "norm.weight", "norm.bias"), (1.0, 0.0))
    truth["head.weight"], side = (1.0, 0.3), options.get("img_size", 32)
    classifier = module.Classifier(backbone, torch.arange(3), (1, side, side))
    settings = replace(OFF, base_lr=32.0, warmup_share=0.2, weight_decay=0.3, layer_decay=0.5)
    optimizer, schedule = module.build_optimizer(classifier, settings, steps=50)
    groups = {id(p): group for group in optimizer.param_groups for p in group["params"]}
    for step, expected in ((0, 1e-3), (5, 0.5005), (10, 1.0), (30, 0.5), (40, 0.5 - 0.125**0.5)):
        schedule.step_update(step)
        for key, parameter in classifier.named_parameters():
            group, (scale, decay) = groups[id(parameter)], truth[key]
            assert (group["lr"], group["weight_decay"]) == (pytest.approx(expected * scale), decay)


@pytest.mark.parametrize("on", [{}, {"ema_decay": 0.7, "label_smoothing": 0.2}])
def test_it_is_adamw_and_a_moving_average(on):
    """Against a loop written out, on the same batches: nothing is on that was switched off."""
    settings = replace(OFF, min_steps=9, base_lr=0.5, warmup_share=0.0, weight_decay=0.1, **on)
    given, averaged, smoothed = evaluation(), 0.0, settings.label_smoothing
    result = fine_tune(given, PRETRAINED, PLACES, settings)
    torch.manual_seed(0)
    backbone, classes = given.subject.backbone(PRETRAINED), torch.tensor([3, 5])
    model = module.Classifier(backbone, classes, (1, 8, 8))
    optimizer = torch.optim.AdamW(
        [{"params": [p for p in model.parameters() if (p.ndim > 1) == decays],
          "weight_decay": 0.1 * decays} for decays in (True, False)]
    )  # fmt: skip
    pixels = (given.parts.train.load()[0].float() / 255 - 0.5) / 0.25
    for step, indices in enumerate(batch_indices(32, 8, 9)):
        for group in optimizer.param_groups:
            group["lr"] = 0.5 / 64 * (1 + math.cos(math.pi * step / 9))
        optimizer.zero_grad()
        F.cross_entropy(model(pixels[indices]), indices % 2, label_smoothing=smoothed).backward()
        optimizer.step()
        decay = min(settings.ema_decay, 1 - (1 + step) ** (-2 / 3))
        averaged = decay * averaged + (1 - decay) * parameters_to_vector(model.parameters())
    found = parameters_to_vector(result.parameters())
    torch.testing.assert_close(found, averaged, rtol=1e-4, atol=1e-5)


def test_only_the_settings_decide_the_bits_and_each_of_them_does():
    on = FineTuning(epochs=0, min_steps=3, batch_size=8, cutmix=1.0)
    given, before = evaluation(make=vit), torch.get_rng_state()
    changes = (
        {}, {"crop_scale": 0.9}, {"horizontal_flip": False}, {"random_erasing": 0.5}, {"mixup": 0},
        {"cutmix": 0}, {"drop_path": 0.5}, {"layer_decay": 0.5}, {"weight_decay": 0.5}, {"seed": 1},
        {"warmup_share": 0.5}, {"precision": "bf16-mixed"}, {"epochs": 2.0}, {"longer": 1},
    )  # fmt: skip
    tuned = [fine_tune(given, PRETRAINED, PLACES, replace(on, **change)) for change in changes]
    first, *found = [parameters_to_vector(each.parameters()) for each in tuned]
    assert torch.equal(torch.get_rng_state(), before)
    assert [other.equal(first) for other in found] == [False] * 12 + [True]
    whole = batch_indices(7, 8, 9).flatten()[:70].view(-1, 7)
    assert (whole.sort(dim=1).values == torch.arange(7)).all()  # once before any comes again


def test_divergence_bad_settings_and_options_without_effect_are_said(caplog):
    weights = {PRETRAINED: {key: value + math.inf for key, value in small().state_dict().items()}}
    given = evaluation(weights=weights, rate_factors=(0.3, 3.0))
    with pytest.raises(DivergedError, match=r"at every base_lr from 0\.0012 to 0\.012"):
        module.best_recipe(given, PRETRAINED, given.parts.fit)
    with pytest.raises(UserError, match="0 images to learn from"):
        fine_tune(given, PRETRAINED, PLACES[:0], OFF)
    bad = {"drop_path": 1.0, "crop_scale": 0.0, "mixup": -1.0, "longer": 0, "precision": "half"}
    for name, value in bad.items():
        with pytest.raises(UserError, match=rf"{name} is .*; give"):
            replace(OFF, **{name: value})
    fine_tune(evaluation(), PRETRAINED, PLACES, replace(OFF, layer_decay=0.5))
    assert "layer_decay 0.5 has no effect: Sequential" in caplog.text


@pytest.mark.parametrize(("factors", "longer_wins"), [((1e-9, 1.0, 1e30), True), ((9.0,), False)])
def test_the_recipe_with_the_best_validation_accuracy_is_taken(factors, longer_wins):
    slow = replace(OFF, min_steps=7, base_lr=0.03, longer=3, seed=2)
    given = evaluation(slow, rate_factors=factors)
    tested = (given.parts.fit, given.parts.train, given.parts.validation)
    tried = [replace(slow, base_lr=0.03 * factor, min_steps=steps)
             for factor in factors[:2] for steps in (7, 21)]  # fmt: skip
    scores = {recipe: accuracy(given, BEFORE, recipe, *tested) for recipe in tried}
    best = max(tried[::2], key=scores.get)
    longer = replace(best, min_steps=21)
    assert (scores[longer] > scores[best]) == longer_wins
    assert module.best_recipe(given, BEFORE, tested[0]) == (longer if longer_wins else best)


def test_rows_are_what_each_draw_gives_and_contenders_differ_in_layer_decay_alone():
    settings = replace(OFF, min_steps=6, base_lr=0.02, layer_decay=0.75)  # accuracies differ
    weights = {name: small().state_dict() for name in (PRETRAINED, BEFORE, RANDOM)}
    given = evaluation(settings, weights, started_random=False, labels="all,3", draws=3)
    recipes = [module.best_recipe(given, name, given.parts.fit) for name in weights]
    assert recipes == [settings, settings, replace(settings, layer_decay=1.0)]
    rows, few = {(row.case, row.contender): row for row in finetune(given)}, "3 labels a class"
    for case, draws in (("all labels", [torch.arange(60)]), (few, given.parts.draws(3, 3, 0))):
        for name, contender in zip((PRETRAINED, BEFORE, SCRATCH), weights, strict=True):
            found = [accuracy(given, contender, replace(settings, seed=draw), places,
                              given.parts.test, torch.arange(50))
                     for draw, places in enumerate(draws)]  # fmt: skip
            row = rows[case, name]
            assert (row.mean, row.count) == (pytest.approx(np.mean(found)), len(found))
            assert row.note == "base_lr 0.02, 6 steps"
    assert rows[few, SCRATCH].std > 1


def test_images_and_labels_are_mixed_by_the_same_weight():
    images, labels = torch.randn(5, 3, 8, 8), torch.tensor([0, 1, 2, 1, 2])
    mixed, targets = module.augment(images.clone(), labels, 3, replace(OFF, mixup=1.0))
    weight, one_hot = targets[0, 0], F.one_hot(labels, 3).float()
    torch.testing.assert_close(mixed, weight * images + (1 - weight) * images.roll(1, 0))
    torch.testing.assert_close(targets, weight * one_hot + (1 - weight) * one_hot.roll(1, 0))
