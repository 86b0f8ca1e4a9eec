"""Frozen vectors: which candidate is chosen, on which images, and what stands beside it."""

import numpy as np
import pytest
import torch
import toys
from sklearn.decomposition import PCA
from torch import nn
from torch.nn import functional as F
from toys import ArraySource

from backfold.evaluation import frozen
from backfold.evaluation.frozen import FrozenVectors, PixelVectors, knn, layers, linear
from backfold.evaluation.results import BEFORE, PRETRAINED

SIGHTED = {PRETRAINED: 100.0, BEFORE: 0.0}


def faint(count, seed):
    """Random grey images of 8 x 8 pixels; the class is in one faint pixel."""
    labels = np.arange(count) % 4
    pixels = np.random.default_rng(seed).integers(100, 156, (count, 1, 8, 8)).astype(np.uint8)
    pixels[:, 0, 4, 4] = 120 + 3 * labels
    return ArraySource(pixels, labels)


class Seeing(nn.Module):
    """Position 0 holds the class loudly; the others hold noise. Blind: all of it is noise."""

    def __init__(self, gain):
        super().__init__()
        self.gain = nn.Parameter(torch.tensor(float(gain)))

    def forward(self, images):
        value = (images * 0.25 + 0.5) * 255
        which = ((value[:, 0, 4, 4] - 120) / 3).round().long().clamp(0, 3)
        loud = F.one_hot(which, 4).float() * self.gain
        noise = images.flatten(1)[:, :12].unflatten(1, (3, 4))
        return torch.cat([loud[:, None], noise], dim=1)


def finely_drawn(count, seed):
    """Noise of 16 x 16; the class is in the mean of its squares, and as much in fine detail."""
    generator = np.random.default_rng(seed)
    labels = np.arange(count) % 2
    detail = np.where(np.indices((16, 16)).sum(axis=0) % 2, 0.04, -0.04) + 0.06
    pixels = generator.standard_normal((count, 16, 16)) + (2 * labels - 1)[:, None, None] * detail
    return ArraySource((128 + 20 * pixels).clip(0, 255).astype(np.uint8)[:, None], labels)


def evaluation(weights, labels=(None, 4), count=160, images=faint, embedding="auto", draws=3):
    states = {name: Seeing(gain).state_dict() for name, gain in weights.items()}
    parts = images(count, 0), images(80, 1)
    given = toys.evaluation(
        states, lambda _: Seeing(0.0), *parts, labels, embedding=embedding, draws=draws
    )
    given.frozen = FrozenVectors(given)
    return given


def cells(rows):
    return {(row.case, row.contender): row for row in rows}


@pytest.mark.parametrize("stored", [torch.float32, torch.float16])  # the latter on disk
@pytest.mark.parametrize("protocol", [knn, linear])
def test_who_sees_the_class_wins(protocol, stored, monkeypatch):
    if stored == torch.float16:
        monkeypatch.setattr(frozen, "IN_MEMORY_BYTES", 0)
    given = evaluation(SIGHTED)
    found = cells(protocol(given))
    assert given.frozen.test(PRETRAINED, "layer -1, max").dtype == stored
    for case, count in (("all labels", 1), ("4 labels a class", 3)):
        means = {name: found[case, name].mean for name in (*SIGHTED, "pixels")}
        assert means[PRETRAINED] > 95 > means["pixels"]
        assert means[BEFORE] < 60
        gap = found[case, "pretrained over before"].mean
        assert gap == pytest.approx(means[PRETRAINED] - means[BEFORE])
        assert found[case, PRETRAINED].count == count


def test_the_candidate_is_chosen_on_validation_images_alone():
    """Test labels that are turned round change the accuracy and no choice."""
    straight, turned = (evaluation(SIGHTED, draws=1) for _ in range(2))
    turned.parts.test._labels = 3 - turned.parts.test._labels
    rows = linear(turned)
    assert [row.note for row in rows] == [row.note for row in linear(straight)]
    assert cells(rows)["all labels", PRETRAINED].mean < 5


@pytest.mark.parametrize("protocol", [knn, linear])
def test_few_labels_are_all_that_a_choice_sees(protocol):
    """With one draw, other training labels change nothing."""
    given = evaluation(SIGHTED, labels=(4,), draws=1)
    straight = protocol(given)
    (drawn,) = given.parts.draws(4, 1, 0)
    turned = evaluation(SIGHTED, labels=(4,), draws=1)
    unseen = np.setdiff1d(given.parts.fit.numpy(), drawn.numpy())
    object.__setattr__(turned.parts, "draws", lambda *_: [drawn])
    labels = turned.parts.train.labels
    labels[unseen] = labels[unseen].flip(0)
    assert protocol(turned) == straight


def test_longer_vectors_are_chosen_where_labels_suffice(monkeypatch):
    """Few images favour the thumbnail's 64 numbers, many the 256 pixels."""
    monkeypatch.setattr(frozen, "CHOSEN_ON", 100)
    chosen = {}
    for count in (250, 5000):
        given = evaluation({}, labels=(None,), count=count, draws=1, images=finely_drawn)
        (row,) = (row for row in linear(given) if row.contender == "pixels")
        chosen[count] = row.note.split(";")[0]
    assert chosen == {250: "8 x 8 thumbnail", 5000: "raw pixels"}


def test_one_embedding_can_be_asked_for():
    given = evaluation(SIGHTED, (None,), embedding=frozen.EmbeddingChoice(-1, "max"))
    notes = {row.note.split(";")[0] for row in linear(given) if row.contender in SIGHTED}
    assert notes == {"layer -1, max"}


def test_layers_are_judged_on_validation_images():
    found = cells(layers(evaluation(SIGHTED)))
    assert found["linear, layer -1, max", PRETRAINED].mean > 95
    assert found["linear, layer -1, max", BEFORE].mean < 60
    assert {row.metric for row in found.values()} == {"validation accuracy (%)"}


def test_pixels_in_four_forms():
    generator = torch.Generator().manual_seed(0)
    loud = torch.randn(50, 6, generator=generator) @ torch.randn(6, 2400, generator=generator)
    images = (loud + 0.01 * torch.randn(50, 2400, generator=generator)).view(50, 3, 40, 20)
    found = PixelVectors(images, 6, seed=0)(images)
    small = F.interpolate(images, (32, 16), mode="bilinear", antialias=True)
    torch.testing.assert_close(found["raw pixels"], small.flatten(1))
    expected = torch.stack([image - image.mean(dim=(1, 2))[:, None, None] for image in small])
    torch.testing.assert_close(found["centred pixels"], expected.flatten(1))
    assert found["8 x 8 thumbnail"].shape == (50, 3 * 8 * 4)
    components = PCA(6, svd_solver="full").fit_transform(small.flatten(1).numpy())
    ours = found["6 principal components of the pixels"]
    # Up to signs: distances between images agree.
    torch.testing.assert_close(
        torch.cdist(ours, ours), torch.cdist(*[torch.from_numpy(components).float()] * 2),
        rtol=1e-2, atol=0.1,
    )  # fmt: skip
