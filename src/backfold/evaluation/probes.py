"""Probes: how well a simple classifier on frozen embeddings tells the classes apart."""

import numpy as np
from numpy.typing import NDArray
from sklearn.linear_model import LogisticRegression
from sklearn.metrics import log_loss
from sklearn.model_selection import StratifiedKFold
from sklearn.preprocessing import StandardScaler
from threadpoolctl import threadpool_limits
from torch import Tensor

from backfold.errors import UserError

REGULARISATION_GRID = (1e-4, 1e-3, 1e-2, 1e-1, 1.0, 10.0)
NUM_FOLDS = 5
MANY_IMAGES_PER_CLASS = 100
TOLERANCE = 1e-4
MAX_ITERATIONS = 10_000
SMALL_PROBLEM = 10**8

Floats = NDArray[np.float64]
Labels = NDArray[np.int64]


def linear_probe_accuracy(
    train_embeddings: Tensor,
    train_labels: Tensor,
    test_embeddings: Tensor,
    test_labels: Tensor,
    seed: int = 0,
) -> float:
    """Test accuracy, from 0 to 1, of multinomial logistic regression.

    Features are standardised to the training part. The L2 penalty (scikit-learn's ``C``, from 1e-4
    to 10) is the one with the lowest log loss on held-out fifths of the training part: one fifth
    where every class has 100 images or more, else all five in turn (fewer folds where a class has
    fewer than 5 images). The probe is then fitted to all of the training part. A fit ends when no
    entry of the gradient of its objective, the mean loss plus the penalty / images, exceeds 1e-4.

    Args:
        train_embeddings: (training images, features).
        train_labels: (training images,), whole numbers.
        test_embeddings: (test images, features).
        test_labels: (test images,), whole numbers.
        seed: of the folds.

    Raises:
        UserError: embeddings that are not finite, a single class, or a class with a single image.
    """
    train_x, test_x = _to_array(train_embeddings), _to_array(test_embeddings)
    train_y, test_y = train_labels.cpu().numpy(), test_labels.cpu().numpy()
    classes, counts = np.unique(train_y, return_counts=True)
    if len(classes) < 2 or counts.min() < 2:
        raise UserError(
            f"the linear probe needs two classes and two images of each; class "
            f"{classes[counts.argmin()]} of {len(classes)} has {counts.min()}; label more images"
        )
    scaler = StandardScaler().fit(train_x)
    train_x, test_x = scaler.transform(train_x), scaler.transform(test_x)
    # BLAS threads cost more than they give on small matrices: 10 times, on a busy machine.
    limit = 1 if train_x.size * len(classes) < SMALL_PROBLEM else None
    with threadpool_limits(limits=limit, user_api="blas"):
        model = _new_model(select_regularisation(train_x, train_y, seed))
        return float(model.fit(train_x, train_y).score(test_x, test_y))


def select_regularisation(embeddings: Floats, labels: Labels, seed: int = 0) -> float:
    """The value of `REGULARISATION_GRID` with the lowest log loss on held-out images.

    With 10 labels a class, held-out accuracy is too coarse to choose by: it cost up to 2 points.

    Args:
        embeddings: (images, features), standardised.
        labels: (images,), two images of each class at least.
        seed: of the folds.
    """
    smallest_class = np.unique(labels, return_counts=True)[1].min()
    folds = StratifiedKFold(min(NUM_FOLDS, smallest_class), shuffle=True, random_state=seed)
    splits = list(folds.split(embeddings, labels))
    if smallest_class >= MANY_IMAGES_PER_CLASS:
        splits = splits[:1]
    losses = np.mean(
        [_loss_path(embeddings, labels, fit, held_out) for fit, held_out in splits], axis=0
    )
    return REGULARISATION_GRID[int(losses.argmin())]


def _loss_path(embeddings: Floats, labels: Labels, fit: Labels, held_out: Labels) -> list[float]:
    """Held-out log loss for each value of the grid; each fit starts from the one before."""
    model = _new_model(REGULARISATION_GRID[0])
    losses = []
    for regularisation in REGULARISATION_GRID:
        model.set_params(C=regularisation).fit(embeddings[fit], labels[fit])
        probabilities = model.predict_proba(embeddings[held_out])
        losses.append(float(log_loss(labels[held_out], probabilities, labels=model.classes_)))
    return losses


def _new_model(regularisation: float) -> LogisticRegression:
    return LogisticRegression(
        C=regularisation, tol=TOLERANCE, max_iter=MAX_ITERATIONS, warm_start=True
    )


def _to_array(embeddings: Tensor) -> Floats:
    array: Floats = embeddings.detach().cpu().double().numpy()
    finite = np.isfinite(array).all(axis=1)
    if not finite.all():
        raise UserError(
            f"{(~finite).sum()} of {len(array)} embeddings are not finite; "
            "the backbone diverged: pretrain it with a lower base_lr"
        )
    return array
