import copy
import math
import random
from dataclasses import replace

import numpy as np
import pytest
import timm
import torch
from torch import nn

from backfold.backbone import feature_map
from backfold.data.statistics import ChannelStatistics
from backfold.errors import UserError
from backfold.evaluation import finetuning
from backfold.evaluation.batch_augmentation import Mixing, crop_and_flip
from backfold.evaluation.classifier import (
    Classifier,
    backbone_maker,
    classify,
    parameter_groups,
)
from backfold.evaluation.finetuning import (
    DivergedError,
    FineTuning,
    accuracy,
    batch_indices,
    build_optimizer,
    fine_tune,
)
from backfold.evaluation.learning_rate_choice import choose_learning_rate
from backfold.training.config import PretrainConfig
from backfold.training.pretrained import Pretrained
from backfold.training.setup import build_energy

CPU = torch.device("cpu")
STATISTICS = ChannelStatistics((0.5, 0.5, 0.5), (0.25, 0.25, 0.25))
OFF = FineTuning(
    epochs=0,
    min_steps=4,
    batch_size=8,
    crop_scale=1.0,
    horizontal_flip=False,
    random_erasing=0,
    mixup=0,
    cutmix=0,
    label_smoothing=0,
    drop_path=0,
    ema_decay=0,
    layer_decay=1.0,
)
VIT = {"patch_size": 4, "depth": 3, "embed_dim": 16, "num_heads": 2}


def make_vit(drop_path):
    return timm.create_model(
        "vit_tiny_patch16_224", num_classes=0, img_size=8, drop_path_rate=drop_path, **VIT
    )


class Averaging(nn.Module):
    """A backbone of one convolution, quick to train."""

    def __init__(self):
        super().__init__()
        self.convolution = nn.Conv2d(3, 8, 3, padding=1)

    def forward(self, images):
        return self.convolution(images).relu()


def make_small(_drop_path):
    return Averaging()


def stripes(count, seed):
    """Bytes: horizontal (label 3) or vertical (label 5) stripes in noise, of random phase."""
    rng = np.random.default_rng(seed)
    labels = np.arange(count) % 2
    line = np.tile([0.3, -0.3], 4)
    images = []
    for label in labels:
        pattern = np.broadcast_to(np.roll(line, rng.integers(2)), (8, 8))
        pattern = pattern.T if label == 0 else pattern
        images.append(0.5 + pattern + 0.1 * rng.normal(size=(3, 8, 8)))
    pixels = np.clip(np.stack(images) * 255, 0, 255).astype(np.uint8)
    return torch.from_numpy(pixels), torch.from_numpy(3 + 2 * labels)


IMAGES, LABELS = stripes(32, 0)


def weights(module):
    return torch.cat([parameter.detach().flatten() for parameter in module.parameters()])


def test_separable_images_are_told_apart_after_a_few_steps():
    settings = FineTuning(
        epochs=0, min_steps=60, batch_size=32, base_lr=0.1, crop_scale=0.8, horizontal_flip=True
    ).from_scratch()
    classifier = fine_tune(make_small, IMAGES, LABELS, STATISTICS, settings, CPU)
    assert not classifier.training
    images, labels = stripes(100, 1)
    assert accuracy(classifier, images, labels, STATISTICS, CPU) > 0.95
    assert accuracy(classifier, images, 8 - labels, STATISTICS, CPU) < 0.05
    strangers = labels.clone()
    strangers[:50] = 77
    known = accuracy(classifier, images[50:], labels[50:], STATISTICS, CPU)
    assert accuracy(classifier, images, strangers, STATISTICS, CPU) == pytest.approx(known / 2)


def test_classifier_norms_the_average_of_the_feature_map():
    torch.manual_seed(0)
    classifier = Classifier(make_vit(0.0), torch.tensor([2, 5, 9]), (3, 8, 8)).eval()
    images = torch.randn(4, 3, 8, 8)
    pooled = feature_map(classifier.backbone, images).mean(dim=1)
    centred = pooled - pooled.mean(dim=1, keepdim=True)
    normed = centred / (centred.square().mean(dim=1, keepdim=True) + 1e-5).sqrt()
    expected = normed @ classifier.head.weight.T
    torch.testing.assert_close(classifier(images), expected, rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize("name", ["vit", "convnext", "resnet"])
def test_learning_rates_fall_by_the_decay_from_layer_to_layer(name):
    options = {"depths": (1, 1, 2, 1), "dims": (8, 8, 8, 8)} if name == "convnext" else {}
    backbone = {
        "vit": lambda: make_vit(0.0),
        "convnext": lambda: timm.create_model("convnext_atto", num_classes=0, **options),
        "resnet": lambda: timm.create_model("resnet10t", num_classes=0),
    }[name]()
    size = 8 if name == "vit" else 32
    classifier = Classifier(backbone, torch.arange(3), (3, size, size))
    settings = replace(OFF, base_lr=0.4, batch_size=64, layer_decay=0.5, warmup_share=0.0)
    optimizer, schedule = build_optimizer(classifier, settings, steps=10)
    schedule.step_update(0)
    rate = {
        id(parameter): group["lr"]
        for group in optimizer.param_groups
        for parameter in group["params"]
    }
    of = {key: rate[id(parameter)] for key, parameter in classifier.named_parameters()}
    assert len(of) == len(rate)
    full = 0.4 * 64 / 256
    assert of["head.weight"] == of["head.bias"] == of["norm.weight"] == pytest.approx(full)
    if name == "vit":
        # embedding, three blocks (the norm goes with the last), head
        assert of["backbone.norm.weight"] == pytest.approx(full * 0.5)
        for block in range(3):
            expected = full * 0.5 ** (3 - block)
            assert of[f"backbone.blocks.{block}.attn.qkv.weight"] == pytest.approx(expected)
        for key in ("cls_token", "pos_embed", "patch_embed.proj.weight"):
            assert of[f"backbone.{key}"] == pytest.approx(full * 0.5**4)
    else:
        order = {
            "convnext": ["stem.0.weight", "stages.0.blocks.0.mlp.fc1.weight",
                         "stages.2.blocks.0.mlp.fc1.weight", "stages.2.blocks.1.mlp.fc1.weight",
                         "stages.3.blocks.0.mlp.fc1.weight"],
            "resnet": ["conv1.0.weight", "layer1.0.conv1.weight", "layer2.0.conv1.weight",
                       "layer4.0.conv1.weight"],
        }[name]  # fmt: skip
        rates = [of[f"backbone.{key}"] for key in order]
        assert all(low < high for low, high in zip(rates, [*rates[1:], full], strict=True))
        assert rates[-1] == pytest.approx(full * 0.5)
        if name == "convnext":  # timm's own norm in the head, which feature maps leave out
            assert of["backbone.head.norm.weight"] == pytest.approx(full)
        assert all(math.log2(full / r) == pytest.approx(round(math.log2(full / r))) for r in rates)


def test_schedule_warms_up_linearly_and_ends_near_zero():
    classifier = Classifier(make_vit(0.0), torch.arange(3), (3, 8, 8))
    settings = replace(OFF, base_lr=1.0, batch_size=256, warmup_share=0.2, layer_decay=0.5)
    optimizer, schedule = build_optimizer(classifier, settings, steps=50)
    for step in (0, 5, 10, 30, 49):
        schedule.step_update(step)
        cosine = 0.5 * (1 + math.cos(math.pi * (step - 10) / 40))
        expected = 1e-3 + step / 10 * (1 - 1e-3) if step < 10 else cosine
        for group in optimizer.param_groups:
            assert group["lr"] == pytest.approx(expected * group["lr_scale"], rel=1e-6)


def test_norms_biases_and_exempt_parameters_do_not_decay():
    classifier = Classifier(make_vit(0.0), torch.arange(3), (3, 8, 8))
    names = {id(parameter): name for name, parameter in classifier.named_parameters()}
    decays = {
        names[id(parameter)]: group["weight_decay"]
        for group in parameter_groups(classifier, 0.3, 0.9)
        for parameter in group["params"]
    }
    for name, parameter in classifier.named_parameters():
        exempt = parameter.ndim == 1 or name in ("backbone.pos_embed", "backbone.cls_token")
        assert decays[name] == (0.0 if exempt else 0.3)


def test_layer_decay_without_layers_warns_and_is_off(caplog):
    classifier = Classifier(Averaging(), torch.arange(2), (3, 8, 8))
    assert not any("lr_scale" in group for group in parameter_groups(classifier, 0.1, 0.5))
    assert "layer_decay 0.5 has no effect: Averaging" in caplog.text
    caplog.clear()
    parameter_groups(classifier, 0.1, 1.0)
    assert not caplog.text


def test_same_seed_same_weights_and_the_callers_generators_stay():
    settings = FineTuning(epochs=0, min_steps=5, batch_size=8, mixup=0.8, cutmix=1.0, drop_path=0.3)

    def tuned(seed):
        seeded = replace(settings, seed=seed)
        return weights(fine_tune(make_vit, IMAGES, LABELS, STATISTICS, seeded, CPU))

    random.seed(1)
    np.random.seed(1)  # noqa: NPY002 - the generator that timm's mixup draws from
    torch.manual_seed(1)
    first = tuned(0)
    drawn = random.random(), np.random.rand(), torch.rand(()).item()  # noqa: NPY002
    random.seed(1)
    np.random.seed(1)  # noqa: NPY002
    torch.manual_seed(1)
    assert drawn == (random.random(), np.random.rand(), torch.rand(()).item())  # noqa: NPY002
    assert torch.equal(tuned(0), first)
    assert not torch.equal(tuned(1), first)


@pytest.mark.parametrize(
    "change",
    [
        {"crop_scale": 0.5},
        {"horizontal_flip": True},
        {"random_erasing": 0.5},
        {"mixup": 0.8},
        {"cutmix": 1.0},
        {"label_smoothing": 0.1},
        {"drop_path": 0.5},
        {"ema_decay": 0.9},
        {"layer_decay": 0.5},
        {"weight_decay": 0.5},
        {"warmup_share": 0.5},
        {"precision": "bf16-mixed"},
    ],
    ids=lambda change: next(iter(change)),
)
def test_each_setting_changes_the_result(change):
    plain = fine_tune(make_vit, IMAGES, LABELS, STATISTICS, OFF, CPU)
    other = fine_tune(make_vit, IMAGES, LABELS, STATISTICS, replace(OFF, **change), CPU)
    assert not torch.equal(weights(plain), weights(other))


def test_without_regularisers_it_is_plain_adamw():
    """Against a loop written out, on the same batches: nothing is on that was switched off."""
    settings = replace(OFF, base_lr=0.05, warmup_share=0.0, weight_decay=0.1)
    result = fine_tune(make_small, IMAGES, LABELS, STATISTICS, settings, CPU)

    torch.manual_seed(0)
    model = Classifier(make_small(0.0), torch.tensor([3, 5]), (3, 8, 8))
    order = batch_indices(len(IMAGES), settings, 4)
    decayed = [p for p in model.parameters() if p.ndim > 1]
    others = [p for p in model.parameters() if p.ndim == 1]
    optimizer = torch.optim.AdamW(
        [{"params": decayed, "weight_decay": 0.1}, {"params": others, "weight_decay": 0.0}]
    )
    pixels = (IMAGES.float() / 255 - 0.5) / 0.25
    for step, indices in enumerate(order):
        for group in optimizer.param_groups:
            group["lr"] = 0.05 * 8 / 256 * 0.5 * (1 + math.cos(math.pi * step / 4))
        optimizer.zero_grad()
        logits = model(pixels[indices])
        nn.functional.cross_entropy(logits, (LABELS[indices] == 5).long()).backward()
        optimizer.step()
    torch.testing.assert_close(weights(result), weights(model), rtol=1e-4, atol=1e-6)


def test_moving_average_is_the_average_of_the_steps(monkeypatch):
    seen = []
    step = finetuning._Loop.step

    def recording(loop, *arguments):
        loss = step(loop, *arguments)
        seen.append(weights(loop.classifier).double())
        return loss

    monkeypatch.setattr(finetuning._Loop, "step", recording)
    settings = replace(OFF, min_steps=12, ema_decay=0.7, base_lr=0.1)
    result = fine_tune(make_small, IMAGES, LABELS, STATISTICS, settings, CPU)
    average = seen[0]
    for number, current in enumerate(seen[1:], start=1):
        decay = min(0.7, 1 - (1 + number) ** (-2 / 3))
        average = decay * average + (1 - decay) * current
    torch.testing.assert_close(weights(result).double(), average, rtol=1e-5, atol=1e-6)
    assert not torch.allclose(average, seen[-1], atol=1e-4)


def test_pretrained_and_fresh_get_the_same_number_of_steps(monkeypatch):
    counts = []
    step = finetuning._Loop.step
    monkeypatch.setattr(
        finetuning._Loop, "step", lambda loop, *a: (counts.append(a[2]), step(loop, *a))[1]
    )
    pretrained = Averaging().state_dict()

    def make_pretrained(_drop_path):
        backbone = Averaging()
        backbone.load_state_dict(pretrained)
        return backbone

    settings = replace(OFF, epochs=2.5, min_steps=0)
    for make, own in ((make_pretrained, settings), (make_small, settings.from_scratch())):
        counts.clear()
        fine_tune(make, IMAGES, LABELS, STATISTICS, own, CPU)
        assert counts == list(range(10))  # 2.5 epochs of 32 images in batches of 8
    changed = {
        name
        for name in settings.__dataclass_fields__
        if getattr(FineTuning(), name) != getattr(FineTuning().from_scratch(), name)
    }
    assert changed == {"layer_decay"}


@pytest.mark.parametrize(
    ("epochs", "min_steps", "images", "steps"),
    [(10, 0, 100, 125), (10, 200, 100, 200), (0.1, 0, 5, 1), (0, 0, 1, 1), (3, 0, 9, 4)],
)
def test_number_of_steps(epochs, min_steps, images, steps):
    settings = replace(OFF, epochs=epochs, min_steps=min_steps)
    assert settings.num_steps(images) == steps


def test_every_image_comes_once_before_any_comes_again():
    torch.manual_seed(0)
    order = batch_indices(7, OFF, 6)
    assert order.shape == (6, 8)
    passes = order.flatten()[:42].view(6, 7)
    assert (passes.sort(dim=1).values == torch.arange(7)).all()
    assert not torch.equal(passes[0], passes[1])


def test_the_chosen_learning_rate_is_the_one_that_learns():
    settings = replace(OFF, min_steps=30, base_lr=0.1)
    chosen = choose_learning_rate(
        make_small, IMAGES, LABELS, STATISTICS, settings, CPU, factors=(1e-6, 1.0, 1e12)
    )
    assert chosen == settings
    kept = choose_learning_rate(
        make_small, IMAGES[:2], LABELS[:2], STATISTICS, settings, CPU, factors=(1e-6, 1e12)
    )
    assert kept == settings  # one label a class: nothing can be held out


def test_divergence_is_said():
    class Exploding(Averaging):
        def forward(self, images):
            return super().forward(images) * torch.inf

    with pytest.raises(DivergedError, match=r"last loss is nan; lower base_lr \(0\.004\)"):
        fine_tune(lambda _: Exploding(), IMAGES, LABELS, STATISTICS, OFF, CPU)
    with pytest.raises(DivergedError, match=r"at every base_lr from 0\.0012 to 0\.012"):
        choose_learning_rate(lambda _: Exploding(), IMAGES, LABELS, STATISTICS, OFF, CPU)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"drop_path": 1.0}, "drop_path is 1; give"),
        ({"crop_scale": 0.0}, "crop_scale is 0"),
        ({"random_erasing": -0.1}, "random_erasing is -0.1"),
        ({"mixup": -1.0}, "mixup is -1"),
        ({"base_lr": 0.0}, "base_lr is 0"),
        ({"layer_decay": 1.5}, "layer_decay 1.5"),
        ({"batch_size": 7, "mixup": 0.5}, "batch_size is 7"),
        ({"precision": "half"}, "precision is 'half'"),
    ],
)
def test_bad_settings_are_refused(change, message):
    with pytest.raises(UserError, match=message):
        replace(OFF, **change)


def test_images_without_labels_are_refused():
    with pytest.raises(UserError, match="32 images and 31 labels"):
        fine_tune(make_small, IMAGES, LABELS[:-1], STATISTICS, OFF, CPU)


def test_classifying_leaves_the_mode_and_does_not_depend_on_the_batch():
    torch.manual_seed(0)
    backbone = nn.Sequential(nn.Conv2d(3, 4, 2), nn.BatchNorm2d(4), nn.Dropout(0.5))
    classifier = Classifier(backbone, torch.tensor([3, 5]), (3, 8, 8)).train()
    whole = classify(classifier, IMAGES, STATISTICS, CPU)
    parts = classify(classifier, IMAGES, STATISTICS, CPU, batch_size=5)
    torch.testing.assert_close(whole, parts)
    assert classifier.training
    assert backbone[1].num_batches_tracked == 0


def ramp(count=400, size=16):
    """Each pixel holds its own column and row, both from -1 to 1 at the image's ends."""
    line = (torch.arange(size) + 0.5) / size * 2 - 1
    columns, rows = line.expand(size, size), line[:, None].expand(size, size)
    return torch.stack([columns, rows]).expand(count, 2, size, size).clone()


def test_crops_are_parts_of_the_asked_area_and_aspect():
    torch.manual_seed(0)
    cropped = crop_and_flip(ramp(), 0.25, horizontal_flip=False)
    # Columns of a part are a straight line: its slope is the part's width as a share.
    width = (cropped[:, 0, 8, 9] - cropped[:, 0, 8, 6]) / (3 * 2 / 16)
    height = (cropped[:, 1, 9, 8] - cropped[:, 1, 6, 8]) / (3 * 2 / 16)
    area, ratio = width * height, width / height
    assert width.max() <= 1 + 1e-5
    assert height.max() <= 1 + 1e-5
    assert area.min() > 0.24
    assert 0.45 < area.median() < 0.75
    assert area.max() > 0.9
    assert 0.75 - 1e-3 < ratio.min() < 0.8
    assert 1.25 < ratio.max() < 4 / 3 + 1e-3
    centre = cropped[:, 0, :, 7:9].mean(dim=(1, 2))
    reach = 1 - width
    assert (centre.abs() <= reach + 1e-4).all()
    assert (centre.abs() > 0.8 * reach).any()
    assert abs(float(centre.mean())) < 0.05


def test_flips_mirror_about_half_of_the_images_exactly():
    torch.manual_seed(0)
    images = torch.randn(400, 3, 6, 10)
    flipped = crop_and_flip(images, 1.0, horizontal_flip=True)
    same = (flipped - images).abs().amax(dim=(1, 2, 3)) < 1e-4
    mirrored = (flipped - images.flip(3)).abs().amax(dim=(1, 2, 3)) < 1e-4
    assert (same ^ mirrored).all()
    assert 150 < same.sum() < 250
    assert crop_and_flip(images, 1.0, horizontal_flip=False) is images


def mixed(images, labels, **on):
    settings = {"random_erasing": 0.0, "mixup": 0.0, "cutmix": 0.0, "label_smoothing": 0.0, **on}
    mixing = Mixing(3, **settings, device=CPU)
    new, targets = mixing(images.clone(), labels)
    return mixing, new, targets


def test_mixup_blends_an_image_and_its_label_with_the_same_weight():
    np.random.seed(0)  # noqa: NPY002
    images, labels = torch.randn(6, 3, 4, 4), torch.tensor([0, 1, 2, 1, 0, 2])
    _, new, targets = mixed(images, labels, mixup=1.0)
    weight = float(targets[0, 0])
    assert 0 < weight < 1
    torch.testing.assert_close(new, weight * images + (1 - weight) * images.flip(0))
    one_hot = nn.functional.one_hot(labels, 3).float()
    torch.testing.assert_close(targets, weight * one_hot + (1 - weight) * one_hot.flip(0))


def test_cutmix_weighs_labels_by_area():
    np.random.seed(2)  # noqa: NPY002
    images, labels = torch.randn(6, 3, 8, 8), torch.tensor([0, 1, 2, 1, 0, 2])
    _, new, targets = mixed(images, labels, cutmix=1.0)
    own = (new == images).all(dim=1)
    other = (new == images.flip(0)).all(dim=1)
    assert (own ^ other).all()
    assert 0 < own[0].sum() < 64
    assert float(targets[0, 0]) == pytest.approx(float(own[0].float().mean()))


def test_erasing_puts_noise_into_a_rectangle_of_some_images():
    random.seed(0)
    torch.manual_seed(0)
    images, labels = torch.zeros(200, 3, 8, 8), torch.zeros(200, dtype=torch.long)
    _, new, targets = mixed(images, labels, random_erasing=0.25)
    erased = (new != 0).any(dim=1)
    touched = erased.flatten(1).any(dim=1)
    assert 30 < touched.sum() < 70
    for image in erased[touched]:
        rows, columns = image.any(dim=1), image.any(dim=0)
        assert torch.equal(image, rows[:, None] & columns[None])
    assert torch.equal(targets, labels)


@pytest.mark.parametrize("mixup", [0.0, 1e-9])
def test_label_smoothing_is_in_the_loss_with_and_without_mixing(mixup):
    np.random.seed(0)  # noqa: NPY002
    labels, logits = torch.tensor([0, 1, 2, 2]), torch.randn(4, 3)
    # With so small a parameter the drawn weight is 0 or 1; both partners' labels are then whole.
    mixing, _, targets = mixed(torch.zeros(4, 3, 2, 2), labels, mixup=mixup, label_smoothing=0.3)
    if mixup:
        labels = targets.argmax(dim=1)
    expected = nn.functional.cross_entropy(logits, labels, label_smoothing=0.3)
    torch.testing.assert_close(mixing.loss(logits, targets), expected)


def small_run(backbone, options, size):
    config = PretrainConfig(backbone=backbone, backbone_options=options, image_size=str(size))
    energy = build_energy(config, 3).eval()
    return Pretrained(energy, config, STATISTICS, 3, (size, size), 0)


@pytest.mark.parametrize(
    ("name", "options"),
    [
        ("vit_tiny_patch16_224", VIT),
        ("convnext_atto", {"depths": (1, 1, 1, 1), "dims": (8, 8, 8, 8)}),
        ("resnet10t", {}),
    ],
)
def test_a_runs_backbone_is_built_anew_with_equal_features(name, options):
    run = small_run(name, options, 32)
    make = backbone_maker(run, run.energy.backbone.state_dict())
    backbone = make(0.0)
    assert backbone.training
    assert not {type(module).__module__ for module in backbone.modules()} & {
        "backfold.activation",
        "backfold.convolution",
    }
    images = torch.randn(3, 3, 32, 32)
    expected = feature_map(run.energy.backbone, images)
    torch.testing.assert_close(feature_map(backbone.eval(), images), expected, atol=1e-5, rtol=1e-4)
    assert all(getattr(module, "fused_attn", True) for module in backbone.modules())
    before = copy.deepcopy(run.energy.backbone.state_dict())
    fine_tune(make, IMAGES.repeat(1, 1, 4, 4), LABELS, STATISTICS, OFF, CPU)
    after = run.energy.backbone.state_dict()
    assert all(torch.equal(before[key], after[key]) for key in before)


def test_fresh_weights_depend_on_the_seed_and_drop_path_reaches_the_blocks():
    make = backbone_maker(small_run("vit_tiny_patch16_224", VIT, 8), None)
    built = []
    for seed in (0, 0, 1):
        torch.manual_seed(seed)
        built.append(weights(make(0.3)))
    assert torch.equal(built[0], built[1])
    assert not torch.equal(built[0], built[2])
    rates = [getattr(block.drop_path1, "drop_prob", 0.0) for block in make(0.3).blocks]
    assert rates == pytest.approx([0.0, 0.15, 0.3])


def test_drop_path_that_a_model_does_not_take_warns(caplog):
    make = backbone_maker(small_run("vgg11", {}, 32), None)
    make(0.0)
    assert not caplog.text
    make(0.2)
    assert "drop_path 0.2 has no effect on 'vgg11'" in caplog.text


def test_weights_of_another_model_are_refused():
    run = small_run("vit_tiny_patch16_224", VIT, 8)
    with pytest.raises(UserError, match="the weights do not fit timm's 'vit_tiny"):
        backbone_maker(run, Averaging().state_dict())(0.0)
