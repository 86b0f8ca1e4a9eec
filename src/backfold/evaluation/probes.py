"""Probes: how well a simple classifier on frozen embeddings tells the classes apart.

Both run on any device and take embeddings in half precision from a memory-mapped file: what is in
float32 at one time is a chunk of them.
"""

import math
from collections.abc import Callable, Iterator, Sequence
from typing import NamedTuple

import torch
from sklearn.preprocessing import StandardScaler
from torch import Tensor
from torch.nn import functional as F

from backfold.errors import UserError
from backfold.metrics import KNN_TEMPERATURE

REGULARISATION_GRID = (1e-4, 1e-3, 1e-2, 1e-1, 1.0)
CHUNK_ELEMENTS = 2**24  # 64 MiB in float32: above what a product needs to be fast
BANK_CHUNK, QUERY_CHUNK = 2**14, 2**10
NEIGHBOURS = 20
# Here some 200 passes over all images cost what 1500 minibatches do, whatever the other sizes.
FULL_BATCH_IMAGES = 2**14
MAX_ITERATIONS = 300  # only penalties far too weak take more; their accuracy is then off by 0.2%
MEMORY = 10
SMALLEST_STEP = 1e-6
BATCH_SIZE, MIN_EPOCHS, MIN_STEPS = 2048, 3, 1500
LEAST_PROGRESS = 10  # Newton's steps, of which the falling learning rate leaves a half
LEARNING_RATE, MOMENTUM = 0.1, 0.9  # together one of Newton's steps: 0.1 / (1 - 0.9)

Device = torch.device | str
Rows = Callable[[Tensor | slice], tuple[Tensor, Tensor]]  # (images, features + 1), (images,)


def knn_predictions(train: Tensor, train_labels: Tensor, test: Tensor, *, device: Device) -> Tensor:
    """Labels that the 20 nearest training images vote for, int64 ``(test images,)``, on the CPU.

    The rule is `backfold.metrics.knn_accuracy`'s: cosine similarity, weights exp(similarity /
    0.07). The neighbours are exact; of fewer training images all vote. Embeddings, (images,
    features), are of any floating type; those that are not finite raise a `UserError`.
    """
    k = min(NEIGHBOURS, len(train))
    classes, votes_for = torch.unique(train_labels.cpu(), return_inverse=True)
    votes_for = votes_for.to(device)
    values = torch.full((len(test), k), -torch.inf, device=device)
    indices = torch.zeros((len(test), k), dtype=torch.int64, device=device)
    for start in range(0, len(train), BANK_CHUNK):
        bank = F.normalize(_finite(train[start : start + BANK_CHUNK], device), dim=1)
        for first in range(0, len(test), QUERY_CHUNK):
            rows = slice(first, first + QUERY_CHUNK)
            similarities = F.normalize(_finite(test[rows], device), dim=1) @ bank.T
            near, places = similarities.topk(min(k, len(bank)), dim=1)
            values[rows], kept = torch.cat([values[rows], near], dim=1).topk(k, dim=1)
            indices[rows] = torch.cat([indices[rows], places + start], dim=1).gather(1, kept)
    votes = values.new_zeros(len(test), len(classes))
    votes.scatter_add_(1, votes_for[indices], (values / KNN_TEMPERATURE).exp())
    predicted: Tensor = classes[votes.argmax(dim=1).cpu()]
    return predicted


def _finite(embeddings: Tensor, device: Device) -> Tensor:
    rows = embeddings.to(device).float()
    bad = int((~torch.isfinite(rows)).any(dim=1).sum())
    if bad:
        raise UserError(
            f"{bad} of {len(rows)} embeddings are not finite; "
            "the backbone diverged: pretrain it with a lower base_lr"
        )
    return rows


class LinearProbe(NamedTuple):
    """A multinomial logistic regression."""

    weights: Tensor  # (classes, features), of standardised features
    bias: Tensor  # (classes,)
    mean: Tensor  # (features,), of the training images
    std: Tensor  # (features,); 1 where a feature does not vary
    classes: Tensor  # int64 (classes,), the labels, rising, on the CPU; all else is on the device

    def predict(self, embeddings: Tensor) -> Tensor:
        """Labels, int64 ``(images,)``, on the CPU."""
        return self.classes[self._logits(embeddings).argmax(dim=1).cpu()]

    def log_loss(self, embeddings: Tensor, labels: Tensor) -> float:
        """Mean of -log(probability of the label), without classes that training did not see."""
        known = torch.isin(labels.cpu(), self.classes)
        places = torch.searchsorted(self.classes, labels.cpu()[known].long())
        logits = self._logits(embeddings)
        return float(F.cross_entropy(logits[known.to(logits.device)], places.to(logits.device)))

    def _logits(self, embeddings: Tensor) -> Tensor:
        chunks = (_finite(embeddings[r], self.mean.device) for r in _chunks(*embeddings.shape))
        scaled = ((rows - self.mean) / self.std for rows in chunks)
        return torch.cat([rows @ self.weights.T + self.bias for rows in scaled])


def linear_probes(
    embeddings: Tensor,
    labels: Tensor,
    regularisations: Sequence[float] = REGULARISATION_GRID,
    *,
    device: Device,
    tolerance: float = 0.005,
) -> Iterator[LinearProbe]:
    """Fit a multinomial logistic regression for each regularisation, as they are asked for.

    Features are standardised to these images. A fit minimises the mean cross-entropy + ||W||^2 /
    (2 C images); the bias is free. Small problems are solved one after another, each from where the
    one before ended (so give C rising), by L-BFGS on all images, until the weights are as close to
    the optimum as the tolerance, a share of their norm, or after 300 steps; large ones at once by a
    few epochs of minibatches, which leaves the weakest penalties short of their optimum. Embeddings
    that are not finite, or fewer than two classes, raise a `UserError`.
    """
    classes, targets = torch.unique(labels.cpu(), return_inverse=True)
    count = len(labels)
    if len(classes) < 2:
        raise UserError(
            f"the linear probe needs two classes, and {count} images are of "
            f"{len(classes)}; label images of another class"
        )
    scaler = StandardScaler()
    for rows in _chunks(*embeddings.shape):
        scaler.partial_fit(_finite(embeddings[rows], "cpu").numpy())
    mean, std = (torch.tensor(part).float().to(device) for part in (scaler.mean_, scaler.scale_))

    def standardised(places: Tensor | slice) -> Tensor:
        return (embeddings[places].to(device).float() - mean) / std

    axes, spread = (part.to(device) for part in _principal_axes(standardised, *embeddings.shape))

    def turned(places: Tensor | slice) -> tuple[Tensor, Tensor]:
        """Along the axes, and a one, which stands for the bias."""
        return F.pad(standardised(places) @ axes, (0, 1), value=1.0), targets[places]

    decay = 1 / (count * torch.tensor(regularisations, device=mean.device))
    # Shaped as the weights: (regularisations, classes, axes and the bias).
    penalty = F.pad(decay[:, None, None].expand(-1, 1, len(spread)), (0, 1))
    share = (torch.bincount(targets) / count).to(spread)
    # At weights of 0, where a class's probability is taken for its share of the images.
    curvature = (share * (1 - share))[:, None] * F.pad(spread, (0, 1), value=1.0) + penalty
    if count <= FULL_BATCH_IMAGES:
        fits = _minimise(*turned(slice(None)), penalty, curvature, tolerance)
    else:
        fits = iter(_descend(turned, count, share, penalty, curvature))
    for weights in fits:
        yield LinearProbe(weights[:, :-1] @ axes.T, weights[:, -1], mean, std, classes.long())


def _principal_axes(
    standardised: Callable[[slice], Tensor], count: int, width: int
) -> tuple[Tensor, Tensor]:
    """Eigenvectors of the covariance, (features, axes), and its eigenvalues, (axes,)."""
    if count < width:
        # The optimum lies in the span of the images, which is smaller than the features' space.
        basis, coordinates = torch.linalg.qr(standardised(slice(None)).T.cpu())
        covariance = coordinates @ coordinates.T / count
    else:
        parts = map(standardised, _chunks(count, width))
        basis, covariance = None, sum((x.T @ x / count for x in parts), torch.zeros(()))
    spread, vectors = torch.linalg.eigh(covariance.cpu())  # not every device has an eigensolver
    axes = vectors if basis is None else basis @ vectors
    return axes, spread.clamp(min=1e-7 * (float(spread[-1]) or 1.0))


def _objective(
    x: Tensor, targets: Tensor, penalty: Tensor, weights: Tensor
) -> tuple[Tensor, Tensor]:
    """What is minimised, (paths,), and its gradient, shaped as the weights; see `_minimise`."""
    # Images come last: softmax over a short last axis takes ten times as long.
    logits = (weights.flatten(0, 1) @ x.T).unflatten(0, weights.shape[:2])
    off = logits.log_softmax(dim=1)
    target = targets.to(x.device).expand(len(weights), 1, -1)
    loss = -off.gather(1, target).mean(dim=(1, 2)) + _dot(penalty * weights, weights) / 2
    off = off.exp_().scatter_add_(1, target, off.new_full((), -1.0).expand(target.shape))
    return loss, (off.flatten(0, 1) @ x).view_as(weights) / len(x) + penalty * weights


def _dot(first: Tensor, second: Tensor) -> Tensor:
    """(paths,): of (paths, classes, features)."""
    return (first * second).sum(dim=(1, 2))


def _minimise(
    x: Tensor, targets: Tensor, penalties: Tensor, curvatures: Tensor, tolerance: float
) -> Iterator[Tensor]:
    """L-BFGS for one penalty after another: weights, (classes, features + 1).

    ``x``: (images, features + 1). Penalties: (paths, 1, features + 1), 0 for the bias. Curvatures:
    the Hessian's approximate diagonals, (paths, classes, features + 1).
    """
    weights = torch.zeros_like(curvatures[:1])
    for path in range(len(penalties)):
        penalty, curvature = penalties[path : path + 1], curvatures[path : path + 1]
        loss, gradient = _objective(x, targets, penalty, weights)
        # Step, change of the gradient, 1 / their product: the latest last.
        history: list[tuple[Tensor, Tensor, Tensor]] = []
        for _ in range(MAX_ITERATIONS):
            # The penalty is strongly convex: the gradient bounds the distance.
            if gradient.norm() <= tolerance * (penalty * weights).norm():
                break
            direction = -_solved(gradient, history, curvature)
            slope, step = _dot(gradient, direction), 1.0
            while True:
                moved = weights + step * direction
                new_loss, new_gradient = _objective(x, targets, penalty, moved)
                # Below the last term the change of the loss is lost in float32's rounding.
                enough = new_loss <= loss + 1e-4 * step * slope + 1e-6 * loss
                if enough or step < SMALLEST_STEP:
                    break
                step /= 2
            product = _dot(moved - weights, new_gradient - gradient)
            inverse = torch.where(product > 0, 1 / product, 0.0)
            history = [*history, (moved - weights, new_gradient - gradient, inverse)][-MEMORY:]
            weights, loss, gradient = moved, new_loss, new_gradient
        yield weights[0]


def _solved(
    gradient: Tensor, history: list[tuple[Tensor, Tensor, Tensor]], curvature: Tensor
) -> Tensor:
    """The gradient by the inverse of the curvature that the last steps correct, shaped as it."""
    result, factors = gradient, []
    for step, change, inverse in reversed(history):
        factors.append(inverse * _dot(step, result))
        result = result - factors[-1] * change
    result = result / curvature
    if history:
        _, change, inverse = history[-1]
        scale = inverse * _dot(change, change / curvature)
        result = result / torch.where(scale > 0, scale, 1.0)
    for step, change, inverse in history:
        result = result + (factors.pop() - inverse * _dot(change, result)) * step
    return result


def _descend(rows: Rows, count: int, share: Tensor, penalty: Tensor, curvature: Tensor) -> Tensor:
    """All paths, as `_minimise`'s, by Nesterov's method on Newton's scale."""
    batches = math.ceil(count / BATCH_SIZE)
    steps = batches * max(MIN_EPOCHS, math.ceil(MIN_STEPS / batches))
    # Where a batch holds fewer images of a class than features, a full step is mostly noise, and
    # weights driven far from the optimum find no way back. Rare classes go as far as they need.
    per_feature = share * count / batches / (curvature.shape[2] - 1)
    scale = per_feature.clamp(min(1.0, LEAST_PROGRESS / steps), 1.0)[:, None] / curvature
    weights, velocity = torch.zeros_like(curvature), torch.zeros_like(curvature)
    weights[..., -1] = share.log()
    order = torch.Generator().manual_seed(0)
    for step in range(steps):
        if step % batches == 0:
            parts = torch.randperm(count, generator=order).tensor_split(batches)
        x, targets = rows(parts[step % batches].sort().values)
        _, gradient = _objective(x, targets, penalty, weights + MOMENTUM * velocity)
        rate = LEARNING_RATE * (1 + math.cos(math.pi * step / steps)) / 2
        velocity.mul_(MOMENTUM).sub_(gradient.mul_(scale), alpha=rate)
        weights += velocity
    return weights


def _chunks(count: int, width: int) -> Iterator[slice]:
    """Slices of rows, as many at a time as fit with ``width`` numbers each."""
    rows = max(1, CHUNK_ELEMENTS // width)
    return (slice(start, min(start + rows, count)) for start in range(0, count, rows))
