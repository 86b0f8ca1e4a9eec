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
from backfold.evaluation.probes import REGULARISATION_GRID, fit_linear_path, knn_predictions


@pytest.fixture(scope="module")
def fashion():
    """Of 7 x 7 pixels, which scikit-learn takes a second for, not minutes."""
    found = []
    for source in (open_source(None, split, labelled=True) for split in ("train", "test")):
        images = torch.stack([source.read(index) for index in range(1_500)]).float() / 255
        found += [F.avg_pool2d(images, 4).flatten(1), torch.as_tensor(source.labels)[:1_500]]
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
    predicted = fit_linear_path(x, y, device="cpu").predict(test)
    for found, regularisation in zip(predicted, REGULARISATION_GRID, strict=True):
        regression.C = regularisation
        expected = reference.fit(x.double().numpy(), y).score(test.double().numpy(), test_y)
        assert float((found == test_y).double().mean()) == pytest.approx(expected, abs=0.002)


@pytest.mark.parametrize("count", [300, 8])  # 8 images have fewer dimensions than the features
def test_the_gradient_is_zero_at_the_optimum(count):
    x, y = overlapping(count)
    path = fit_linear_path(x, y, (0.01, 1.0), device="cpu")
    for index, regularisation in enumerate((0.01, 1.0)):
        weights, bias = (p[index].double().requires_grad_() for p in (path.weights, path.bias))
        standardised = (x.double() - path.mean) / path.std
        loss = F.cross_entropy(standardised @ weights.T + bias, y)
        more = torch.cat([x, x + 1]), torch.cat([y, y + 9])  # classes that training did not see
        assert path.log_loss(*more)[index] == pytest.approx(loss.item(), rel=1e-5)
        (loss + weights.square().sum() / (2 * regularisation * len(x))).backward()
        allowed = 0.01 * weights.detach().norm() / (regularisation * len(x))
        assert torch.cat([weights.grad, bias.grad[:, None]], dim=1).norm() < allowed


def test_minibatches_reach_what_all_images_at_once_do(monkeypatch):
    """Where a batch holds fewer images of a class than features."""
    x, y = overlapping(13_000, classes=50, features=24)
    train, held_out = (x[:-1_000].half(), y[:-1_000]), (x[-1_000:], y[-1_000:])
    whole = fit_linear_path(*train, (1e-3, 10.0), device="cpu")
    monkeypatch.setattr(probes, "FULL_BATCH_IMAGES", 0)
    monkeypatch.setattr(probes, "BATCH_SIZE", 64)
    parts = fit_linear_path(*train, (1e-3, 10.0), device="cpu")
    losses = [path.log_loss(*held_out) for path in (parts, whole)]
    torch.testing.assert_close(*losses, atol=0.01, rtol=0)


def test_bad_input():
    x, y = torch.randn(4, 2), torch.tensor([0, 0, 1, 1])
    with pytest.raises(UserError, match="4 images are of 1; label images of another class"):
        fit_linear_path(x, torch.zeros(4), device="cpu")
    broken = x.where(x != x[1, 0], torch.nan)
    for train, queries in ((broken, x), (x, broken)):
        with pytest.raises(UserError, match="1 of 4 embeddings are not finite"):
            knn_predictions(train, y, queries, device="cpu")
        with pytest.raises(UserError, match="1 of 4 embeddings are not finite"):
            fit_linear_path(train, y, device="cpu").predict(queries)
