"""Batch normalisation on fixed statistics: images stay apart, and refreshing keeps the function."""

import copy

import torch
from torch import nn

from backfold.backbone import feature_map
from backfold.batch_norm import batch_norms, measure_batch_norm, refresh_batch_norm
from backfold.energy import EnergyModel

SIDE = 48


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


def test_batch_norms_stay_in_eval_mode_while_the_rest_trains():
    untracked = nn.BatchNorm2d(4, track_running_stats=False)
    model = EnergyModel(nn.Sequential(*two_layers(), nn.Dropout(0.5), untracked), image_size=16)
    for mode in (True, False, True):
        assert model.train(mode) is model
        norms = batch_norms(model.backbone)
        assert len(norms) == 2
        assert not any(norm.training for norm in norms)
        others = [m for m in model.modules() if m not in norms]
        assert {module.training for module in others} == {mode}


def test_measured_statistics_are_those_of_the_images_alone():
    backbone, images = two_layers(), 2 * torch.randn(5, 3, 12, 12) + 1
    expected = copy.deepcopy(backbone)
    for norm in batch_norms(expected):
        norm.momentum = 1.0
    expected(images)
    measure_batch_norm(backbone, torch.randn(4, 3, 12, 12))  # is forgotten
    measure_batch_norm(backbone, images)
    for found, other in zip(batch_norms(backbone), batch_norms(expected), strict=True):
        torch.testing.assert_close(found.running_mean, other.running_mean)
        torch.testing.assert_close(found.running_var, other.running_var)
        assert (found.momentum, found.training) == (0.1, False)


def test_refreshing_keeps_the_function_and_measures_the_statistics_anew():
    backbone = EnergyModel("test_resnet", image_size=SIDE).double().backbone.eval()
    with torch.no_grad():  # as if it had learned since its statistics were measured
        for parameter in backbone.parameters():
            size = parameter.square().mean().sqrt() + 0.05
            parameter.add_(0.3 * size * torch.randn_like(parameter))
    images = 0.5 * torch.randn(16, 3, SIDE, SIDE, dtype=torch.float64) + 0.3
    inputs = inputs_of_batch_norms(backbone, images)
    fresh = torch.randn(3, 3, SIDE, SIDE, dtype=torch.float64)
    with torch.no_grad():
        before = feature_map(backbone, fresh)
        refresh_batch_norm(backbone, images.split([7, 5, 4]))
        after = feature_map(backbone, fresh)
    torch.testing.assert_close(after, before, rtol=1e-9, atol=1e-9)
    assert len(inputs) > 10
    for norm, values in inputs.items():
        mean = values.mean(dim=1)
        variance = (values - mean[:, None]).square().mean(dim=1)
        torch.testing.assert_close(norm.running_mean, mean, rtol=1e-8, atol=1e-8)
        torch.testing.assert_close(norm.running_var, variance, rtol=1e-8, atol=1e-8)


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
