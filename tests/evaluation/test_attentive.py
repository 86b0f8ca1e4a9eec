"""The attentive probe: what it computes, what it can learn, and which of the grid it takes."""

from types import SimpleNamespace

import numpy as np
import pytest
import torch
from torch import nn
from toys import ArraySource

from backfold.data.statistics import ChannelStatistics
from backfold.errors import UserError
from backfold.evaluation import attentive as module
from backfold.evaluation.attentive import (
    AttentionPooling,
    AttentiveProbe,
    FeatureMaps,
    attentive,
)  # fmt: skip
from backfold.evaluation.images import Images, Parts
from backfold.evaluation.subject import Subject

CPU = torch.device("cpu")
PLAIN = ChannelStatistics((0.5,), (0.25,))


def marked(count, seed, label=None):
    """5 x 5 positions of 4 grey values. One, which a mark tells from the others, has the class."""
    random, every = np.random.default_rng(seed), np.arange(count)
    cells, place = random.integers(0, 256, (count, 25, 4)), random.integers(25, size=count)
    cells[:, :, 0] = 40
    cells[every, place] = 100
    cells[every, place, 0] = 250
    cells[every, place, 1 + every % 3] = 200
    squares = cells.reshape(count, 5, 5, 2, 2).transpose(0, 1, 3, 2, 4)
    labels = every % 3 if label is None else np.full(count, label)
    return ArraySource(squares.reshape(count, 1, 10, 10).astype(np.uint8), labels)


def evaluation(count=150, label=None, scale=1.0):
    """A backbone whose features are the values of its 2 x 2 patches."""
    backbone = nn.Sequential(nn.PixelUnshuffle(2), nn.Conv2d(4, 4, 1, bias=False)).eval()
    nn.init.eye_(backbone[1].weight.requires_grad_(False).flatten(1)).mul_(scale)
    subject = Subject("toy", {}, lambda _: backbone, 1, (10, 10), PLAIN)
    parts = Parts(
        Images(marked(count, 1, label), subject), Images(marked(90, 2), subject),
        torch.arange(count)[count // 5 :], torch.arange(count // 5),
    )  # fmt: skip
    settings = SimpleNamespace(seed=0, draws=2, label_counts=lambda: [None, 20])
    return SimpleNamespace(settings=settings, parts=parts, subject=subject, statistics=PLAIN,
                           device=CPU, backbones={"pretrained": backbone})  # fmt: skip


def probe_of(given):
    features = FeatureMaps(given, given.backbones["pretrained"])
    return AttentiveProbe(features, given.parts.train, given.settings.seed, CPU)


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
        values = torch.einsum("chd,hdf->chf", output, value_weight.view(2, 4, 8))
        model.head.weight.copy_(values.flatten(1))
        constant = attention.out_proj.weight @ value_bias + attention.out_proj.bias
        model.head.bias.copy_(classify.weight @ constant + classify.bias)
    torch.testing.assert_close(model(features), expected)


def test_the_class_at_a_random_position_is_found(monkeypatch):
    monkeypatch.setattr(module, "LEARNING_RATES", (1e-9, 1e-2))
    rows = attentive(evaluation())
    assert [row.case for row in rows] == ["all labels", "20 labels a class"]
    for row in rows:
        assert row.mean > 90
        assert row.note.startswith("learning rate 0.01, ")
    assert [row.count for row in rows] == [1, 2]


def test_each_of_the_grid_is_what_it_is_alone_and_the_callers_generators_stay():
    given, grid = evaluation(60), [(1e-2, 0.01), (1e9, 0.01), (1e-3, 10.0)]
    places, validation = given.parts.fit, given.parts.validation
    torch.manual_seed(3)
    losses = probe_of(given).train(places, grid).log_loss(given.parts.train, validation)
    after = torch.rand(3)
    torch.manual_seed(3)
    assert torch.equal(torch.rand(3), after)
    alone = [probe_of(given).train(places, [each]) for each in grid]
    for loss, single in zip(losses, alone, strict=True):
        torch.testing.assert_close(loss, single.log_loss(given.parts.train, validation)[0])
    logits = alone[0]._logits(given.parts.train, validation)[0]
    truth = given.parts.train.labels[validation]
    torch.testing.assert_close(losses[0], nn.functional.cross_entropy(logits, truth))
    assert not torch.allclose(losses[0], losses[2], rtol=1e-3)


def test_maps_are_the_same_kept_or_made_anew_and_their_scale_does_not_count(monkeypatch):
    given = evaluation(60)
    parts = [torch.tensor([3, 1]), torch.tensor([50])]
    features = FeatureMaps(given, given.backbones["pretrained"])
    kept = list(features.batches(given.parts.train, parts))
    monkeypatch.setattr(module, "KEPT_BYTES", 0)
    anew = list(features.batches(given.parts.train, parts))
    patches = marked(60, 1).pixels.reshape(60, 5, 2, 5, 2).transpose(0, 1, 3, 2, 4)
    values = torch.from_numpy(patches.reshape(60, 25, 4) / 255)
    std, mean = torch.std_mean(values, dim=(0, 1), correction=0)
    for wanted, first, second in zip(parts, kept, anew, strict=True):
        truth = ((values - mean) / std).float()[wanted]
        torch.testing.assert_close(second, truth, rtol=1e-4, atol=1e-5)
        torch.testing.assert_close(first, truth, rtol=1e-3, atol=1e-3)
    loud = evaluation(60, scale=1e6)
    maps = FeatureMaps(loud, loud.backbones["pretrained"]).batches(loud.parts.train, parts)
    torch.testing.assert_close(next(maps), anew[0])
    probe_of(given).train(given.parts.fit, [(1e-3, 0.01)])  # trains on maps made anew


def test_one_class_and_features_that_are_not_finite_are_refused():
    given = evaluation(30, label=1)
    with pytest.raises(UserError, match="needs two classes"):
        probe_of(given).train(given.parts.fit, [(1e-3, 0.01)])
    given = evaluation(30, scale=float("inf"))
    with pytest.raises(UserError, match="feature maps are not finite"):
        probe_of(given).train(given.parts.fit, [(1e-3, 0.01)])
