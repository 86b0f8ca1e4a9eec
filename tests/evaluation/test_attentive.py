import numpy as np
import pytest
import torch
from torch import nn
from torch.nn import functional as F

from backfold.data.statistics import ChannelStatistics
from backfold.errors import UserError
from backfold.evaluation.attentive import (
    AttentionPooling,
    AttentiveProbe,
    attentive_probe_accuracy,
    feature_maps,
)
from backfold.evaluation.probes import linear_probe_accuracy

QUICK = AttentiveProbe(num_heads=4, epochs=5, min_steps=150, learning_rates=(1e-2,))
CPU = torch.device("cpu")


def one_telling_position(num_images, seed, num_positions=25):
    """The class is in one position, which a mark tells from the others; those are loud noise."""
    rng = np.random.default_rng(seed)
    labels = np.arange(num_images) % 3
    features = 3 * rng.normal(size=(num_images, num_positions, 8))
    features[:, :, 0] = 0.0
    place = rng.integers(num_positions, size=num_images)
    features[np.arange(num_images), place] = 0.3 * rng.normal(size=(num_images, 8))
    features[np.arange(num_images), place, 0] = 4.0
    features[np.arange(num_images), place, 1 + labels] += 3.0
    return torch.from_numpy(features).float(), torch.from_numpy(labels)


def test_finds_the_position_that_tells_the_class_where_the_average_does_not():
    train, test = one_telling_position(300, 1), one_telling_position(150, 2)
    averaged = linear_probe_accuracy(train[0].mean(1), train[1], test[0].mean(1), test[1])
    assert averaged < 0.65
    assert attentive_probe_accuracy(*train, *test, probe=QUICK) > 0.95


def test_class_names_and_the_scale_of_the_features_do_not_count():
    (train, labels), (test, test_labels) = one_telling_position(120, 1), one_telling_position(60, 2)
    accuracy = attentive_probe_accuracy(train, labels, test, test_labels, probe=QUICK)
    names = torch.tensor([40, 7, 19])
    # Powers of two and a shift by nothing: standardised, the features are the same bits.
    scale = 2.0 ** torch.arange(-4, 4)
    again = attentive_probe_accuracy(
        train * scale, names[labels], test * scale, names[test_labels], probe=QUICK
    )
    # Names are sorted, which permutes the classes: the head starts at zero, so nothing else does.
    assert again == pytest.approx(accuracy, abs=0.02)


def test_is_multi_head_attention_with_a_learned_query_and_a_linear_classifier():
    torch.manual_seed(0)
    attention = nn.MultiheadAttention(8, 2, batch_first=True)
    query, classify = torch.randn(1, 1, 8), nn.Linear(8, 3)
    features = torch.randn(5, 6, 8)
    pooled, _ = attention(query.expand(5, -1, -1), features, features)
    expected = classify(pooled[:, 0])

    query_weight, key_weight, value_weight = attention.in_proj_weight.chunk(3)
    query_bias, _, value_bias = attention.in_proj_bias.chunk(3)
    projected = (query_weight @ query[0, 0] + query_bias).view(2, 4)
    model = AttentionPooling(8, 3, num_heads=2)
    with torch.no_grad():
        model.queries.copy_(torch.einsum("hd,hdf->hf", projected, key_weight.view(2, 4, 8)) / 2)
        output = (classify.weight @ attention.out_proj.weight).view(3, 2, 4)
        model.head.weight.copy_(
            torch.einsum("chd,hdf->chf", output, value_weight.view(2, 4, 8)).flatten(1)
        )
        constant = attention.out_proj.weight @ value_bias + attention.out_proj.bias
        model.head.bias.copy_(classify.weight @ constant + classify.bias)
    torch.testing.assert_close(model(features), expected)


def test_held_out_images_choose_the_learning_rate():
    train, test = one_telling_position(150, 1), one_telling_position(90, 2)
    one = AttentiveProbe(4, 5, 150, 256, (1e-2,), (0.01,))
    both = AttentiveProbe(4, 5, 150, 256, (1e-9, 1e-2), (0.01,))
    hopeless = AttentiveProbe(4, 5, 150, 256, (1e-9,), (0.01,))
    good = attentive_probe_accuracy(*train, *test, probe=one)
    assert attentive_probe_accuracy(*train, *test, probe=both) == good
    assert attentive_probe_accuracy(*train, *test, probe=hopeless) < good - 0.2


def test_the_seed_decides_and_the_callers_generators_stay():
    train, test = one_telling_position(60, 1), one_telling_position(300, 2)
    probe = AttentiveProbe(2, 2, 20, 16, (1e-3,), (0.01,))
    torch.manual_seed(3)
    first = attentive_probe_accuracy(*train, *test, seed=5, probe=probe)
    after = torch.rand(3)
    assert attentive_probe_accuracy(*train, *test, seed=5, probe=probe) == first
    torch.manual_seed(3)
    assert torch.equal(torch.rand(3), after)
    others = {attentive_probe_accuracy(*train, *test, seed=s, probe=probe) for s in range(3)}
    assert len(others) > 1


@pytest.mark.parametrize(
    ("labels", "message"),
    [
        ([0, 0, 0, 0], "1 classes"),
        ([0, 0, 0, 1], "the smallest with 1"),
    ],
)
def test_too_few_labels_are_refused(labels, message):
    features, labels = torch.randn(4, 3, 2), torch.tensor(labels)
    with pytest.raises(UserError, match=message):
        attentive_probe_accuracy(features, labels, features, labels)


def test_features_that_are_not_finite_are_refused():
    features, labels = torch.randn(4, 3, 2), torch.tensor([0, 0, 1, 1])
    broken = features.clone()
    broken[1, 2, 0] = torch.nan
    for pair in ((broken, features), (features, broken)):
        with pytest.raises(UserError, match="1 of 4 feature maps are not finite"):
            attentive_probe_accuracy(pair[0], labels, pair[1], labels, probe=QUICK)


def test_feature_maps_are_the_frozen_backbones_in_batches():
    torch.manual_seed(0)
    backbone = nn.Sequential(nn.Conv2d(3, 4, 2, 2), nn.BatchNorm2d(4), nn.Dropout(0.5)).train()
    images = torch.randint(0, 256, (5, 3, 6, 8), dtype=torch.uint8)
    statistics = ChannelStatistics((0.5, 0.4, 0.3), (0.2, 0.25, 0.3))
    maps = feature_maps(backbone, images, statistics, CPU, batch_size=2)
    assert backbone.training
    assert backbone[1].num_batches_tracked == 0
    assert not maps.is_inference()
    pixels = images.double() / 255
    mean, std = (torch.tensor(v).double().view(3, 1, 1) for v in (statistics.mean, statistics.std))
    convolved = F.conv2d(
        (pixels - mean) / std, backbone[0].weight.double(), backbone[0].bias.double(), stride=2
    )
    expected = (convolved / (1 + 1e-5) ** 0.5).flatten(2).transpose(1, 2)
    torch.testing.assert_close(maps.double(), expected, rtol=1e-4, atol=1e-5)
    whole = feature_maps(
        backbone, images, statistics, CPU, extract=lambda module, x: module(x).flatten(2)
    )
    torch.testing.assert_close(whole, maps.transpose(1, 2))
    with pytest.raises(UserError, match="no images"):
        feature_maps(backbone, images[:0], statistics, CPU)
