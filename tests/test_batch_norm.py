"""Batch normalisation on fixed statistics: images stay apart, and refreshing keeps the function."""

import copy

import pytest
import torch
from torch import nn
from torch.nn import functional as F

from backfold.backbone import create_backbone, feature_map
from backfold.batch_norm import batch_norms, measure_batch_norm, refresh_batch_norm
from backfold.energy import EnergyModel
from backfold.metrics import psnr_db
from backfold.restoration import energy_gradient, restore, training_step

SIDE = 48


@pytest.fixture(autouse=True)
def _seed():
    torch.manual_seed(0)


def resnet():
    return EnergyModel("test_resnet", image_size=SIDE)


def drifted():
    """A ResNet whose weights have moved since its statistics were measured."""
    model = resnet()
    with torch.no_grad():
        for parameter in model.backbone.parameters():
            size = parameter.square().mean().sqrt() + 0.05
            parameter.add_(0.3 * size * torch.randn_like(parameter))
    return model


def two_layers():
    return nn.Sequential(
        nn.Conv2d(3, 6, 3), nn.BatchNorm2d(6), nn.ReLU(), nn.Conv2d(6, 4, 3), nn.BatchNorm2d(4)
    )


def inputs_of_batch_norms(backbone, images):
    """What reaches each batch norm in eval mode, (channels, values), in float64."""
    inputs = {}

    def note(norm, arguments):
        inputs[norm] = arguments[0].double().transpose(0, 1).flatten(1)

    hooks = [norm.register_forward_pre_hook(note) for norm in batch_norms(backbone)]
    with torch.no_grad():
        feature_map(backbone.eval(), images)
    for hook in hooks:
        hook.remove()
    return inputs


def distance_between_modes(backbone, images):
    """Relative distance between the features in train mode and those in eval mode."""
    with torch.no_grad():
        train = feature_map(copy.deepcopy(backbone).train(), images)
        evaluated = feature_map(backbone.eval(), images)
    return float((train - evaluated).norm() / evaluated.norm())


def test_batch_norms_stay_in_eval_mode_while_the_rest_trains():
    model = EnergyModel(nn.Sequential(*two_layers(), nn.Dropout(0.5)), image_size=16)
    for mode in (True, False, True):
        assert model.train(mode) is model
        norms = batch_norms(model.backbone)
        assert len(norms) == 2
        assert not any(norm.training for norm in norms)
        others = [m for m in model.modules() if m not in norms]
        assert {module.training for module in others} == {mode}


def test_only_norms_with_running_statistics_count():
    tracked, untracked = nn.BatchNorm2d(3), nn.BatchNorm2d(3, track_running_stats=False)
    assert batch_norms(nn.Sequential(tracked, untracked, nn.GroupNorm(1, 3))) == [tracked]


def test_images_of_a_batch_do_not_see_each_other_in_training():
    model, images = resnet().double(), torch.randn(4, 3, SIDE, SIDE, dtype=torch.float64)
    assert model.training
    energies, gradient = energy_gradient(model, images)
    for index in range(4):
        alone = energy_gradient(model, images[index : index + 1])
        torch.testing.assert_close(alone[0], energies[index : index + 1])
        torch.testing.assert_close(alone[1], gradient[index : index + 1])
    for norm in batch_norms(model.backbone):
        norm.train()
    _, tied = energy_gradient(model, images)
    _, tied_pair = energy_gradient(model, images[:2])
    assert float((tied[:2] - tied_pair).norm() / tied_pair.norm()) > 0.05


def test_a_training_step_leaves_the_running_statistics_alone():
    model, images = resnet(), torch.randn(2, 3, SIDE, SIDE)
    before = {key: value.clone() for key, value in model.named_buffers()}
    clean = torch.randn_like(images)
    training_step(model, images, clean, torch.ones(1, dtype=torch.bool))[0].backward()
    restore(model, images)
    assert before
    assert all(torch.equal(value, before[key]) for key, value in model.named_buffers())


def test_measured_statistics_are_those_of_the_images_alone():
    backbone, images = two_layers(), 2 * torch.randn(5, 3, 12, 12) + 1
    conv, norm, _, second_conv, second_norm = backbone
    measure_batch_norm(backbone, torch.randn(4, 3, 12, 12))  # is forgotten
    measure_batch_norm(backbone, images)
    with torch.no_grad():
        first = conv(images).transpose(0, 1).flatten(1)
        scaled = (conv(images) - first.mean(dim=1).view(1, -1, 1, 1)) / (
            first.var(dim=1, correction=0).view(1, -1, 1, 1) + norm.eps
        ).sqrt()
        second = second_conv(F.relu(scaled)).transpose(0, 1).flatten(1)
    for layer, values in ((norm, first), (second_norm, second)):
        torch.testing.assert_close(layer.running_mean, values.mean(dim=1))
        torch.testing.assert_close(layer.running_var, values.var(dim=1))
        assert layer.momentum == 0.1
        assert not layer.training


def test_a_named_backbone_starts_on_measured_statistics():
    model = EnergyModel("test_resnet", image_size=SIDE)
    for values in inputs_of_batch_norms(model.backbone, torch.randn(32, 3, SIDE, SIDE)).items():
        norm, inputs = values
        deviation = inputs.std(dim=1)
        assert ((inputs.mean(dim=1) - norm.running_mean) / deviation).abs().max() < 1.0
        assert (deviation / norm.running_var.sqrt()).log().abs().max() < 1.0


@pytest.mark.parametrize("sizes", [(16,), (7, 5, 4)])
def test_refreshing_keeps_the_function_and_measures_the_statistics_anew(sizes):
    backbone = drifted().double().backbone.eval()
    images = 0.5 * torch.randn(16, 3, SIDE, SIDE, dtype=torch.float64) + 0.3
    inputs = inputs_of_batch_norms(backbone, images)
    fresh = torch.randn(3, 3, SIDE, SIDE, dtype=torch.float64)
    with torch.no_grad():
        before = feature_map(backbone, fresh)
        refresh_batch_norm(backbone, images.split(list(sizes)))
        after = feature_map(backbone, fresh)
    torch.testing.assert_close(after, before, rtol=1e-9, atol=1e-9)
    assert len(inputs) > 10
    for norm, values in inputs.items():
        mean = values.mean(dim=1)
        variance = (values - mean[:, None]).square().mean(dim=1)
        torch.testing.assert_close(norm.running_mean, mean, rtol=1e-8, atol=1e-8)
        torch.testing.assert_close(norm.running_var, variance, rtol=1e-8, atol=1e-8)


def test_refreshing_in_float32_keeps_the_function_and_brings_train_mode_near_it():
    backbone, images = drifted().backbone.eval(), torch.randn(16, 3, SIDE, SIDE)
    with torch.no_grad():
        before = feature_map(backbone, images)
    apart = distance_between_modes(backbone, images)
    refresh_batch_norm(backbone, images.split(8))
    with torch.no_grad():
        change = (feature_map(backbone, images) - before).norm() / before.norm()
    assert float(change) < 1e-5
    assert apart > 0.1
    assert distance_between_modes(backbone, images) < apart / 1000


def test_refreshing_leaves_restoration_as_it_was():
    model = drifted()
    clean = torch.randn(4, 3, SIDE, SIDE)
    corrupted = clean + 0.5 * torch.randn_like(clean)
    model.calibrate(clean, batch_norm=False)
    before = restore(model, corrupted, num_steps=2, step_size=0.3).restored
    refresh_batch_norm(model.backbone, [clean])
    after = restore(model, corrupted, num_steps=2, step_size=0.3).restored
    deviation = torch.full((3,), 0.25)
    change = psnr_db(after, clean, deviation) - psnr_db(before, clean, deviation)
    assert not torch.equal(before, corrupted)
    assert float(change.abs().max()) < 1e-3


def test_channels_that_do_not_vary_keep_what_they_have():
    backbone, images = two_layers().eval(), torch.randn(6, 3, 12, 12)
    conv, norm = backbone[0], backbone[1]
    with torch.no_grad():
        conv.weight[2] = 0.0
        for tensor in (norm.weight, norm.bias, norm.running_mean):
            tensor.add_(torch.rand(6))
    tensors = (norm.weight, norm.bias, norm.running_mean, norm.running_var)
    before = [tensor.detach().clone() for tensor in tensors]
    expected = backbone(images)
    refresh_batch_norm(backbone, [images])
    for tensor, old in zip(tensors, before, strict=True):
        assert (tensor != old).tolist() == [True, True, False, True, True, True]
    torch.testing.assert_close(backbone(images), expected, rtol=1e-5, atol=1e-5)


def test_norms_without_weights_keep_their_statistics():
    backbone = nn.Sequential(nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4, affine=False)).eval()
    images = torch.randn(4, 3, 8, 8)
    expected = backbone(images)
    refresh_batch_norm(backbone, [images])
    assert torch.equal(backbone(images), expected)


def test_without_batches_or_batch_norms_nothing_happens():
    backbone = drifted().backbone.eval()
    before = {key: value.clone() for key, value in backbone.state_dict().items()}
    refresh_batch_norm(backbone, [])
    assert all(torch.equal(value, before[key]) for key, value in backbone.state_dict().items())
    batches = iter([torch.zeros(1, 3, 32, 32)])
    vit = create_backbone("test_vit", (32, 32)).eval()
    refresh_batch_norm(vit, batches)
    measure_batch_norm(vit, torch.zeros(1, 3, 32, 32))
    assert len(list(batches)) == 1


def test_no_hooks_remain_even_after_a_failure():
    backbone = two_layers().eval()
    with pytest.raises(RuntimeError, match="channels"):
        refresh_batch_norm(backbone, [torch.zeros(2, 5, 12, 12)])
    refresh_batch_norm(backbone, [torch.randn(2, 3, 12, 12)])
    assert not any(module._forward_pre_hooks for module in backbone.modules())
