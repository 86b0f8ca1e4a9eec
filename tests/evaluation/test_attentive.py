"""The attentive probe: what it computes, what it can learn, and which of the grid it takes."""

import numpy as np
import pytest
import torch
import toys
from torch import nn

from backfold.errors import UserError
from backfold.evaluation import attentive as module
from backfold.evaluation.attentive import AttentionPooling, Probes, attentive


def marked(count, seed, classes=3):
    """5 x 5 positions of 4 grey values. One, which a mark tells from the others, has the class."""
    random, every = np.random.default_rng(seed), np.arange(count)
    cells, place = random.integers(0, 256, (count, 25, 4)), random.integers(25, size=count)
    cells[:, :, 0] = 40
    cells[every, place] = (250, 100, 100, 100)
    cells[every, place, 1 + every % classes] = 200
    squares = cells.reshape(count, 5, 5, 2, 2).transpose(0, 1, 3, 2, 4)
    return toys.ArraySource(squares.reshape(count, 1, 10, 10).astype(np.uint8), every % classes)


def evaluation(count=150, classes=3, scale=1.0):
    """A backbone whose features are the values of its 2 x 2 patches."""
    backbone = nn.Sequential(nn.PixelUnshuffle(2), nn.Conv2d(4, 4, 1, bias=False)).eval()
    nn.init.eye_(backbone[1].weight.requires_grad_(False).flatten(1)).mul_(scale)
    parts, states = (marked(count, 1, classes), marked(90, 2)), {"only": backbone.state_dict()}
    return toys.evaluation(states, lambda _: backbone, *parts, labels=(None, 20), draws=2)


def test_is_multi_head_attention_with_a_learned_query_and_a_linear_classifier():
    torch.manual_seed(0)
    attention = nn.MultiheadAttention(8, 2, bias=False, batch_first=True)
    query, classify, features = torch.randn(1, 1, 8), nn.Linear(8, 3), torch.randn(5, 6, 8)
    pooled, _ = attention(query.expand(5, -1, -1), features, features)

    to_query, to_key, to_value = (each.view(2, 4, 8) for each in attention.in_proj_weight.chunk(3))
    model = AttentionPooling(8, 3, num_heads=2)
    with torch.no_grad():
        output = (classify.weight @ attention.out_proj.weight).view(3, 2, 4)
        model.queries.copy_(torch.einsum("hdf,f,hdg->hg", to_query, query[0, 0], to_key) / 2)
        model.head.weight.copy_(torch.einsum("chd,hdf->chf", output, to_value).flatten(1))
        model.head.bias.copy_(classify.bias)
    torch.testing.assert_close(model(features), classify(pooled[:, 0]))


def test_the_class_at_a_random_position_is_found(monkeypatch):
    monkeypatch.setattr(module, "LEARNING_RATES", (1e-9, 1e-2))
    rows = attentive(evaluation())
    assert [(row.case, row.count) for row in rows] == [("all labels", 1), ("20 labels a class", 2)]
    for row in rows:
        assert row.mean > 90
        assert row.note.startswith("learning rate 0.01, ")


def test_maps_are_the_same_kept_or_made_anew_and_their_scale_does_not_count(monkeypatch):
    given, loud = evaluation(60), evaluation(60, scale=1e6)
    parts = [torch.tensor([3, 1]), torch.tensor([50])]
    kept = list(Probes(given, given.backbones["only"]).features(given.parts.train, parts))
    monkeypatch.setattr(module, "KEPT_BYTES", 0)
    anew = list(Probes(loud, loud.backbones["only"]).features(loud.parts.train, parts))
    patches = torch.from_numpy(marked(60, 1).pixels / 255)
    values = nn.functional.pixel_unshuffle(patches, 2).flatten(2).transpose(1, 2)
    std, mean = torch.std_mean(values, dim=(0, 1), correction=0)
    truth = ((values - mean) / std).float()[torch.cat(parts)]
    torch.testing.assert_close(torch.cat(anew), truth, rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(torch.cat(kept), truth, rtol=1e-3, atol=1e-3)


def test_what_cannot_be_probed_is_refused():
    with pytest.raises(UserError, match="needs two classes"):
        attentive(evaluation(30, classes=1))
    with pytest.raises(UserError, match="feature maps are not finite"):
        attentive(evaluation(30, scale=float("inf")))
