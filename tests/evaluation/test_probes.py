import numpy as np
import pytest
import torch
from sklearn.datasets import load_digits
from sklearn.linear_model import LogisticRegression
from sklearn.model_selection import GridSearchCV, StratifiedKFold
from sklearn.pipeline import make_pipeline
from sklearn.preprocessing import StandardScaler
from threadpoolctl import threadpool_limits

from backfold.errors import UserError
from backfold.evaluation.probes import (
    REGULARISATION_GRID,
    linear_probe_accuracy,
    select_regularisation,
)


@pytest.fixture(autouse=True)
def _one_thread():
    # The references' small matrices are many times slower with BLAS threads on a busy machine.
    with threadpool_limits(limits=1, user_api="blas"):
        yield


@pytest.fixture(scope="module")
def digits():
    features, labels = load_digits(return_X_y=True)
    order = np.random.default_rng(0).permutation(len(labels))
    return features[order], labels[order]


@pytest.fixture
def fine_grid(monkeypatch):
    """Close enough values that other folds would choose another, and fits that resolve them."""
    grid = tuple(np.logspace(-2, 1, 16))
    monkeypatch.setattr("backfold.evaluation.probes.REGULARISATION_GRID", grid)
    monkeypatch.setattr("backfold.evaluation.probes.TOLERANCE", 1e-6)
    return grid


def grid_search(train_x, train_y, grid, folds):
    """scikit-learn's own, in which every fit starts afresh."""
    search = GridSearchCV(
        LogisticRegression(max_iter=20_000, tol=1e-6),
        {"C": grid},
        cv=folds,
        scoring="neg_log_loss",
        refit=False,
    )
    return search.fit(train_x, train_y).best_params_["C"]


def few_per_class(labels, count):
    return np.concatenate([np.flatnonzero(labels == label)[:count] for label in np.unique(labels)])


def test_many_labels_choose_on_one_held_out_fifth(digits, fine_grid):
    features, labels = digits
    train_x, train_y = StandardScaler().fit_transform(features[:1300]), labels[:1300]
    folds = list(StratifiedKFold(5, shuffle=True, random_state=3).split(train_x, train_y))
    best = grid_search(train_x, train_y, fine_grid, folds[:1])
    assert select_regularisation(train_x, train_y, seed=3) == best


@pytest.mark.parametrize("count", [10, 3])
def test_few_labels_choose_on_all_folds(digits, fine_grid, count):
    features, labels = digits
    few = few_per_class(labels, count)
    train_x, train_y = StandardScaler().fit_transform(features[few]), labels[few]
    folds = StratifiedKFold(min(count, 5), shuffle=True, random_state=3)
    best = grid_search(train_x, train_y, fine_grid, folds)
    assert select_regularisation(train_x, train_y, seed=3) == best


@pytest.mark.parametrize("regularisation", REGULARISATION_GRID)
def test_the_probe_is_fitted_with_the_chosen_regularisation(digits, monkeypatch, regularisation):
    features, labels = digits
    data = features[:100], labels[:100], features[1300:], labels[1300:]
    monkeypatch.setattr("backfold.evaluation.probes.REGULARISATION_GRID", (regularisation,))
    model = make_pipeline(
        StandardScaler(), LogisticRegression(C=regularisation, max_iter=20_000, tol=1e-6)
    ).fit(*data[:2])
    actual = linear_probe_accuracy(*map(torch.from_numpy, data))
    assert actual == pytest.approx(model.score(*data[2:]), abs=2.1 / 497)  # two test images


def test_features_of_any_scale_and_constant_ones_do_not_matter(digits):
    features, labels = digits
    few = few_per_class(labels, 20)
    scales = np.logspace(-6, 6, features.shape[1])
    plain = [features[few], labels[few], features[1300:], labels[1300:]]
    scaled = [plain[0] * scales + 3 * scales, labels[few], plain[2] * scales + 3 * scales, plain[3]]
    first = linear_probe_accuracy(*map(torch.from_numpy, plain))
    second = linear_probe_accuracy(*map(torch.from_numpy, scaled))
    assert first == pytest.approx(second, abs=2.1 / 497)
    assert (features[few].std(axis=0) == 0).any()


def test_labels_need_not_count_from_zero(digits):
    features, labels = digits
    pair = np.isin(labels, (3, 8))
    data = features[pair], 100 * labels[pair]
    accuracy = linear_probe_accuracy(
        *map(torch.from_numpy, (data[0][:200], data[1][:200], data[0][200:], data[1][200:]))
    )
    assert accuracy > 0.9


def test_shuffled_labels_are_at_chance(digits):
    features, labels = digits
    shuffled = np.random.default_rng(1).permutation(labels[:600])
    accuracy = linear_probe_accuracy(
        *map(torch.from_numpy, (features[:600], shuffled, features[1000:], labels[1000:]))
    )
    assert accuracy < 0.25


def test_two_images_a_class_are_enough():
    train, labels = torch.tensor([[0.0], [0.1], [1.0], [1.1]]), torch.tensor([0, 0, 1, 1])
    test = torch.tensor([[-0.2], [1.3]])
    assert linear_probe_accuracy(train, labels, test, torch.tensor([0, 1])) == 1.0


@pytest.mark.parametrize("labels", [[0, 0, 0, 1], [2, 2, 2, 2]])
def test_too_few_images_or_classes(labels):
    with pytest.raises(UserError, match="needs two classes and two images of each"):
        linear_probe_accuracy(
            torch.randn(4, 2), torch.tensor(labels), torch.randn(2, 2), torch.tensor([0, 1])
        )


def test_embeddings_that_are_not_finite():
    train = torch.randn(4, 2)
    train[1, 0] = torch.nan
    labels = torch.tensor([0, 0, 1, 1])
    with pytest.raises(UserError, match="1 of 4 embeddings are not finite"):
        linear_probe_accuracy(train, labels, torch.randn(4, 2), labels)
