import pytest
import torch
from sklearn.linear_model import LogisticRegression
from sklearn.neighbors import NearestNeighbors
from sklearn.pipeline import make_pipeline
from sklearn.preprocessing import StandardScaler
from torch.nn import functional as F

from backfold.data.open import open_source
from backfold.errors import UserError
from backfold.evaluation import probes
from backfold.evaluation.probes import REGULARISATION_GRID, knn_predictions, linear_probes


@pytest.fixture(scope="module")
def fashion():
    """Of 7 x 7 pixels, which scikit-learn takes a second for, not minutes."""
    found = []
    for source in (open_source(None, split, labelled=True) for split in ("train", "test")):
        images = torch.stack([source.read(index) for index in range(1_500)]).float() / 255
        found += [F.avg_pool2d(images, 4).flatten(1), torch.tensor(source.labels)[:1_500]]
    return found


def overlapping(count, classes=3, features=12):
    """Classes that overlap; the sixth feature does not vary."""
    random = torch.Generator().manual_seed(0)
    labels = torch.arange(count) % classes
    embeddings = 0.7 * torch.randn(classes, features, generator=random)[labels]
    embeddings += torch.randn(count, features, generator=random)
    embeddings[:, 5] = 0.1
    return embeddings, labels


@pytest.mark.parametrize("chunk", [2**14, 77, 7])
def test_neighbours_vote_as_found_by_scikit_learn(fashion, monkeypatch, chunk):
    monkeypatch.setattr(probes, "BANK_CHUNK", chunk)
    monkeypatch.setattr(probes, "QUERY_CHUNK", chunk)
    x, y, test = fashion[0], 3 * fashion[1] + 5, fashion[2][:100]
    search = NearestNeighbors(n_neighbors=20, metric="cosine").fit(x.double().numpy())
    distances, places = map(torch.from_numpy, search.kneighbors(test.double().numpy()))
    votes = F.one_hot(y[places]) * ((1 - distances) / 0.07).exp()[:, :, None]
    predicted = knn_predictions(x, y, test, device="cpu")
    assert torch.equal(predicted, votes.sum(dim=1).argmax(dim=1))
    few = x[:3].half(), torch.tensor([4, 9, 9])  # fewer images than neighbours: all vote
    assert knn_predictions(*few, few[0], device="cpu").tolist() == [4, 9, 9]


def test_every_penalty_agrees_with_scikit_learn(fashion):
    x, y, test, test_y = fashion
    regression = LogisticRegression(tol=1e-6, max_iter=20_000, warm_start=True)
    reference = make_pipeline(StandardScaler(), regression)
    path = linear_probes(x, y, device="cpu")
    for probe, regularisation in zip(path, REGULARISATION_GRID, strict=True):
        regression.C = regularisation
        expected = reference.fit(x.double().numpy(), y).score(test.double().numpy(), test_y)
        found = (probe.predict(test) == test_y).double().mean()
        assert float(found) == pytest.approx(expected, abs=0.002)


@pytest.mark.parametrize("count", [300, 8])  # 8 images have fewer dimensions than the features
def test_the_gradient_is_zero_at_the_optimum(count):
    x, y = overlapping(count)
    path = (0.01, 1.0)
    for probe, regularisation in zip(linear_probes(x, y, path, device="cpu"), path, strict=True):
        weights, bias = (part.double().requires_grad_() for part in (probe.weights, probe.bias))
        standardised = (x.double() - probe.mean) / probe.std
        loss = F.cross_entropy(standardised @ weights.T + bias, y)
        more = torch.cat([x, x + 1]), torch.cat([y, y + 9])  # classes that training did not see
        assert probe.log_loss(*more) == pytest.approx(loss.item(), rel=1e-5)
        (loss + weights.square().sum() / (2 * regularisation * len(x))).backward()
        allowed = 0.01 * weights.detach().norm() / (regularisation * len(x))
        assert torch.cat([weights.grad, bias.grad[:, None]], dim=1).norm() < allowed


def test_minibatches_reach_what_all_images_at_once_do(monkeypatch):
    """Where a batch holds fewer images of a class than features."""
    x, y = overlapping(13_000, classes=50, features=24)
    train, held_out = (x[:-1_000].half(), y[:-1_000]), (x[-1_000:], y[-1_000:])
    whole = list(linear_probes(*train, (1e-3, 10.0), device="cpu"))
    monkeypatch.setattr(probes, "FULL_BATCH_IMAGES", 0)
    monkeypatch.setattr(probes, "BATCH_SIZE", 64)
    parts = linear_probes(*train, (1e-3, 10.0), device="cpu")
    for probe, expected in zip(parts, whole, strict=True):
        loss = expected.log_loss(*held_out)
        assert probe.log_loss(*held_out) == pytest.approx(loss, abs=0.01)


def test_bad_input():
    x, y = torch.randn(4, 2), torch.tensor([0, 0, 1, 1])
    with pytest.raises(UserError, match="4 images are of 1; label images of another class"):
        next(linear_probes(x, torch.zeros(4), device="cpu"))
    broken = x.where(x != x[1, 0], torch.nan)
    for train, queries in ((broken, x), (x, broken)):
        with pytest.raises(UserError, match="1 of 4 embeddings are not finite"):
            knn_predictions(train, y, queries, device="cpu")
        with pytest.raises(UserError, match="1 of 4 embeddings are not finite"):
            next(linear_probes(train, y, device="cpu")).predict(queries)
