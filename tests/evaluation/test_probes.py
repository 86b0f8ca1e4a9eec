import pytest
import torch
from sklearn.linear_model import LogisticRegression
from sklearn.neighbors import NearestNeighbors
from sklearn.preprocessing import StandardScaler
from torch.nn import functional as F

from backfold.data.source import open_source
from backfold.errors import UserError
from backfold.evaluation.probes import REGULARISATION_GRID, fit_linear_path, knn_predictions
from backfold.metrics import knn_accuracy


@pytest.fixture(autouse=True)
def _one_thread():
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


def pixels(split, count):
    """Of 14 x 14 pixels, which scikit-learn takes seconds for, not minutes."""
    source = open_source(None, split, labelled=True)
    images = torch.stack([source.read(index) for index in range(count)]).float() / 255
    return F.avg_pool2d(images, 2).flatten(1), torch.as_tensor(source.labels)[:count]


@pytest.fixture(scope="module")
def fashion():
    return *pixels("train", 1_000), *pixels("test", 2_000)


def overlapping(count, classes=3, features=12):
    """Classes that overlap; the sixth feature does not vary."""
    random = torch.Generator().manual_seed(0)
    labels = torch.arange(count) % classes
    embeddings = 0.7 * torch.randn(classes, features, generator=random)[labels]
    embeddings += torch.randn(count, features, generator=random)
    embeddings[:, 5] = 0.1
    return embeddings, labels


@pytest.mark.parametrize("chunks", [{}, {"bank_chunk": 301, "query_chunk": 77}, {"bank_chunk": 7}])
def test_neighbours_vote_as_found_by_scikit_learn(fashion, chunks):
    x, y, test, test_y = fashion[0], 3 * fashion[1] + 5, fashion[2][:300], 3 * fashion[3][:300] + 5
    search = NearestNeighbors(n_neighbors=20, metric="cosine").fit(x.double().numpy())
    distances, places = map(torch.from_numpy, search.kneighbors(test.double().numpy()))
    votes = F.one_hot(y[places]) * ((1 - distances) / 0.07).exp()[:, :, None]
    predicted = knn_predictions(x, y, test, device="cpu", **chunks)
    assert predicted.dtype == torch.int64
    assert torch.equal(predicted, votes.sum(dim=1).argmax(dim=1))
    accuracy = float((predicted == test_y).double().mean())
    assert accuracy == pytest.approx(knn_accuracy(x, y, test, test_y))


def test_fewer_images_than_neighbours_all_vote():
    train = torch.tensor([[1.0, 0.0], [0.9, 0.1], [0.0, 1.0]]).half()
    found = knn_predictions(train, torch.tensor([4, 4, 9]), train, k=20, device="cpu", bank_chunk=2)
    assert found.tolist() == [4, 4, 9]


@pytest.mark.parametrize("centred", [False, True], ids=["raw", "centred"])
def test_every_penalty_agrees_with_scikit_learn(fashion, centred):
    x, y, test, test_y = fashion
    if centred:
        x, test = (each - each.mean(dim=1, keepdim=True) for each in (x, test))
    scaler = StandardScaler().fit(x.double().numpy())
    given = [scaler.transform(each.double().numpy()) for each in (x, test)]
    reference = LogisticRegression(tol=1e-6, max_iter=20_000, warm_start=True)
    predicted = fit_linear_path(x, y, REGULARISATION_GRID, device="cpu").predict(test)
    for found, regularisation in zip(predicted, REGULARISATION_GRID, strict=True):
        reference.set_params(C=regularisation).fit(given[0], y.numpy())
        expected = torch.from_numpy(reference.predict(given[1]))
        right = [int((labels == test_y).sum()) for labels in (found, expected)]
        assert abs(right[0] - right[1]) <= 0.002 * len(test)


def test_the_gradient_is_zero_at_the_optimum():
    x, y = overlapping(300)
    path = fit_linear_path(x, y, (0.01, 1.0), device="cpu")
    for index, regularisation in enumerate(path.regularisations):
        weights = path.weights[index].double().requires_grad_()
        bias = path.bias[index].double().requires_grad_()
        standardised = (x.double() - path.mean) / path.std
        loss = F.cross_entropy(standardised @ weights.T + bias, y)
        assert path.log_loss(x, y)[index] == pytest.approx(loss.item(), rel=1e-5)
        (loss + weights.square().sum() / (2 * regularisation * len(x))).backward()
        allowed = 0.01 * weights.detach().norm() / (regularisation * len(x))
        assert torch.cat([weights.grad, bias.grad[:, None]], dim=1).norm() < allowed


def test_minibatches_reach_what_all_images_at_once_do():
    x, y = overlapping(5_000)  # three batches
    grid = (1e-4, 1e-2, 10.0)
    whole = fit_linear_path(x, y, grid, device="cpu")
    parts = fit_linear_path(x.half(), y, grid, device="cpu", full_batch_images=0)
    torch.testing.assert_close(parts.weights, whole.weights, atol=0.01, rtol=0)
    torch.testing.assert_close(parts.log_loss(x, y), whole.log_loss(x, y), atol=1e-3, rtol=0)
    assert (parts.predict(x) == whole.predict(x)).double().mean() > 0.99


def test_minibatches_of_fewer_images_of_a_class_than_features():
    x, y = overlapping(13_000, classes=50, features=24)
    train, held_out = (x[:12_000], y[:12_000]), (x[12_000:], y[12_000:])
    grid = (1e-3, 1e-1, 10.0)
    whole = fit_linear_path(*train, grid, device="cpu")
    parts = fit_linear_path(*train, grid, device="cpu", full_batch_images=0, batch_size=64)
    losses = [path.log_loss(*held_out) for path in (parts, whole)]
    torch.testing.assert_close(*losses, atol=0.01, rtol=0)


def test_names_of_classes_and_scales_of_features_do_not_matter():
    x, y = overlapping(300)
    names, scales = torch.tensor([70, -3, 1_000_000]), torch.logspace(-3, 3, 12)
    other_x, other_y = scales * (x + 2), names[y]
    plain = fit_linear_path(x, y, (0.1,), device="cpu")
    other = fit_linear_path(other_x, other_y, (0.1,), device="cpu")
    assert plain.std[5] == other.std[5] == 1
    assert (names[plain.predict(x)] == other.predict(other_x)).double().mean() > 0.99
    loss = other.log_loss(other_x, other_y)
    torch.testing.assert_close(loss, plain.log_loss(x, y), rtol=1e-3, atol=0)


def test_one_image_of_a_class_is_enough():
    path = fit_linear_path(
        torch.tensor([[0.0], [1.0], [1.1]]), torch.tensor([2, 7, 7]), (1.0,), device="cpu"
    )
    assert path.predict(torch.tensor([[-0.2], [1.3]])).tolist() == [[2, 7]]
    seen = path.log_loss(torch.tensor([[1.0]]), torch.tensor([7]))
    assert torch.equal(path.log_loss(torch.tensor([[1.0], [5.0]]), torch.tensor([7, 4])), seen)


def test_bad_input():
    x, y = torch.randn(4, 2), torch.tensor([0, 0, 1, 1])
    with pytest.raises(UserError, match="4 images are of 1; label images of another class"):
        fit_linear_path(x, torch.zeros(4), device="cpu")
    broken = x.clone()
    broken[1, 0] = torch.nan
    for work in (
        lambda: fit_linear_path(broken, y, device="cpu"),
        lambda: fit_linear_path(x, y, device="cpu").predict(broken),
        lambda: knn_predictions(broken, y, x, device="cpu"),
        lambda: knn_predictions(x, y, broken, device="cpu"),
    ):
        with pytest.raises(UserError, match="1 of 4 embeddings are not finite"):
            work()
