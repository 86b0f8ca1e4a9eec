"""Probes: how well a simple classifier on frozen embeddings tells the classes apart.

Both run on any device and take embeddings in half precision from a memory-mapped file: what is in
float32 at one time is a chunk of them.
"""

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn import functional as F

from backfold.errors import UserError
from backfold.metrics import KNN_TEMPERATURE

REGULARISATION_GRID = (1e-4, 1e-3, 1e-2, 1e-1, 1.0, 10.0)
CHUNK_ELEMENTS = 2**24  # 64 MiB in float32: above what a product needs to be fast
BANK_CHUNK = 2**14
# Here some 200 passes over all images cost what 1500 minibatches do, whatever the other sizes.
FULL_BATCH_IMAGES = 2**14
# Of the weights' norm. The penalty is strongly convex: a fit ends this close to its optimum.
RELATIVE_ERROR = 0.005
MAX_ITERATIONS = 600  # only penalties far too weak take more; their accuracy is then off by 0.2%
MEMORY = 10
SMALLEST_STEP = 1e-6
BATCH_SIZE, MIN_EPOCHS, MIN_STEPS = 2048, 3, 1500
LEAST_PROGRESS = 10  # Newton's steps, of which the falling learning rate leaves a half
LEARNING_RATE, MOMENTUM = 0.1, 0.9  # together one of Newton's steps: 0.1 / (1 - 0.9)

Device = torch.device | str


def knn_predictions(
    train: Tensor,
    train_labels: Tensor,
    test: Tensor,
    *,
    k: int = 20,
    device: Device,
    bank_chunk: int = BANK_CHUNK,
    query_chunk: int = CHUNK_ELEMENTS // BANK_CHUNK,
) -> Tensor:
    """Labels that the k nearest training images vote for, int64 ``(test images,)``, on the CPU.

    The rule is `backfold.metrics.knn_accuracy`'s: cosine similarity, weights exp(similarity /
    0.07). The neighbours are exact.

    Args:
        train: (training images, features), of any floating type, on the CPU.
        train_labels: (training images,), whole numbers.
        test: (test images, features).
        k: neighbours that vote; all training images where there are fewer.
        device: where similarities are computed.
        bank_chunk: training images in one product.
        query_chunk: test images in one product.

    Raises:
        UserError: embeddings that are not finite.
    """
    k = min(k, len(train))
    classes, votes_for = torch.unique(train_labels.cpu(), return_inverse=True)
    votes_for = votes_for.to(device)
    values = torch.full((len(test), k), -torch.inf, device=device)
    indices = torch.zeros((len(test), k), dtype=torch.int64, device=device)
    for start in range(0, len(train), bank_chunk):
        bank = _unit(train[start : start + bank_chunk], device).T
        for first in range(0, len(test), query_chunk):
            rows = slice(first, first + query_chunk)
            similarities = _unit(test[rows], device) @ bank
            near, places = similarities.topk(min(k, bank.shape[1]), dim=1)
            near = torch.cat([values[rows], near], dim=1)
            places = torch.cat([indices[rows], places + start], dim=1)
            values[rows], kept = near.topk(k, dim=1)
            indices[rows] = places.gather(1, kept)
    predicted = []
    for near, places in zip(values.split(query_chunk), indices.split(query_chunk), strict=True):
        votes = near.new_zeros(len(near), len(classes))
        votes.scatter_add_(1, votes_for[places], (near / KNN_TEMPERATURE).exp())
        predicted.append(votes.argmax(dim=1).cpu())
    labels: Tensor = classes[torch.cat(predicted)].long()
    return labels


def _unit(embeddings: Tensor, device: Device) -> Tensor:
    rows = embeddings.to(device).float()
    _check_finite(rows)
    return F.normalize(rows, dim=1)


def _check_finite(rows: Tensor) -> None:
    bad = int((~torch.isfinite(rows)).any(dim=1).sum())
    if bad:
        raise UserError(
            f"{bad} of {len(rows)} embeddings are not finite; "
            "the backbone diverged: pretrain it with a lower base_lr"
        )


@dataclass(frozen=True)
class LinearPath:
    """Multinomial logistic regressions on the same images, one for each regularisation.

    Attributes:
        weights: (paths, classes, features), of standardised features.
        bias: (paths, classes).
        mean: (features,), of the training images.
        std: (features,); 1 where a feature does not vary.
        classes: int64 (classes,), the labels, rising, on the CPU; all else is on the device.
        regularisations: scikit-learn's ``C`` of each path.
    """

    weights: Tensor
    bias: Tensor
    mean: Tensor
    std: Tensor
    classes: Tensor
    regularisations: tuple[float, ...]

    def predict(self, embeddings: Tensor) -> Tensor:
        """Labels, int64 ``(paths, images)``, on the CPU."""
        found = [logits.argmax(dim=1).cpu() for _, logits in self._logits(embeddings)]
        return self.classes[torch.cat(found, dim=1)]

    def log_loss(self, embeddings: Tensor, labels: Tensor) -> Tensor:
        """Mean of -log(probability of the label), ``(paths,)``, on the CPU.

        Images of classes that training did not see are left out.

        Args:
            embeddings: (images, features).
            labels: (images,), whole numbers.
        """
        asked = labels.cpu().long()
        known = torch.isin(asked, self.classes)
        places = torch.searchsorted(self.classes, asked) * known
        total = torch.zeros(len(self.regularisations), dtype=torch.float64)
        for rows, logits in self._logits(embeddings):
            of_label = logits.gather(1, _as_index(places[rows], logits))[:, 0]
            losses = (logits.logsumexp(dim=1) - of_label).cpu().double()
            total += losses[:, known[rows]].sum(dim=1)
        return total / known.sum()

    def _logits(self, embeddings: Tensor) -> Iterator[tuple[slice, Tensor]]:
        """(paths, classes, images) of a chunk of images at a time."""
        paths, classes, features = self.weights.shape
        for rows in _chunks(len(embeddings), max(features, paths * classes)):
            x = embeddings[rows].to(self.mean.device).float()
            _check_finite(x)
            x = (x - self.mean) / self.std
            product = self.weights.flatten(0, 1) @ x.T
            yield rows, product.unflatten(0, (paths, classes)) + self.bias[:, :, None]


def fit_linear_path(
    embeddings: Tensor,
    labels: Tensor,
    regularisations: Sequence[float] = REGULARISATION_GRID,
    *,
    device: Device,
    seed: int = 0,
    full_batch_images: int = FULL_BATCH_IMAGES,
    batch_size: int = BATCH_SIZE,
) -> LinearPath:
    """Fit multinomial logistic regressions, all regularisations at once.

    Features are standardised to these images. A fit minimises the mean cross-entropy + ||W||^2 /
    (2 C images); the bias is free. Small problems are solved by L-BFGS on all images, until the
    weights are within 0.5% of the optimum or after 600 steps; large ones by a few epochs of
    minibatches, which leaves the weakest penalties short of their optimum.

    Args:
        embeddings: (images, features), of any floating type, on the CPU.
        labels: (images,), whole numbers.
        regularisations: scikit-learn's ``C``; larger ones regularise less.
        device: where to compute.
        seed: of the minibatches' order.
        full_batch_images: more images than these are taken in minibatches.
        batch_size: of the minibatches.

    Raises:
        UserError: embeddings that are not finite, or fewer than two classes.
    """
    classes, targets = torch.unique(labels.cpu(), return_inverse=True)
    if len(classes) < 2:
        raise UserError(
            f"the linear probe needs two classes, and {len(labels)} images are of "
            f"{len(classes)}; label images of another class"
        )
    mean, std = _moments(embeddings, device)
    data = _Standardised(embeddings, targets, mean, std)
    decay = torch.tensor([1 / (c * len(labels)) for c in regularisations], device=mean.device)
    counts = torch.bincount(targets)
    if len(embeddings) <= full_batch_images:
        weights = _fit_full_batch(data, counts, decay)
    else:
        weights = _fit_minibatches(data, counts, decay, batch_size, seed)
    return LinearPath(
        weights[..., :-1], weights[..., -1], mean, std, classes.long(), tuple(regularisations)
    )


def _moments(embeddings: Tensor, device: Device) -> tuple[Tensor, Tensor]:
    """Mean and deviation of each feature, (features,); the deviation 1 where it does not vary."""
    mean = torch.zeros(embeddings.shape[1], dtype=torch.float64)
    squares = mean.clone()
    lowest = highest = embeddings[0].to(device).float()
    for rows in _chunks(*embeddings.shape):
        x = embeddings[rows].to(device).float()
        _check_finite(x)
        found = torch.var_mean(x, dim=0, correction=0)
        variance, chunk_mean = (each.cpu().double() for each in found)
        share = len(x) / rows.stop
        shift = chunk_mean - mean
        mean += share * shift
        squares += len(x) * (variance + (1 - share) * shift**2)
        lowest, highest = lowest.minimum(x.amin(dim=0)), highest.maximum(x.amax(dim=0))
    std = (squares / len(embeddings)).sqrt().float().to(device)
    varies = (lowest < highest) & (std > 0)
    return mean.float().to(device), torch.where(varies, std, 1.0)


@dataclass(frozen=True)
class _Standardised:
    """Images as rows of standardised features and a one, which stands for the bias."""

    embeddings: Tensor
    targets: Tensor
    mean: Tensor
    std: Tensor

    def rows(self, places: Tensor | slice) -> tuple[Tensor, Tensor]:
        """(images, features + 1), and their targets, int64 (images,), both on the device."""
        x = self.embeddings[places].to(self.mean.device).float()
        x = torch.cat([(x - self.mean) / self.std, x.new_ones(len(x), 1)], dim=1)
        return x, self.targets[places].to(x.device)


def _objective(
    x: Tensor, targets: Tensor, penalty: Tensor, weights: Tensor
) -> tuple[Tensor, Tensor]:
    """Mean loss + penalty of each path, (paths,), and its gradient.

    Args:
        x: (images, features + 1).
        targets: (images,).
        penalty: (paths, 1, features + 1), 0 for the bias.
        weights: (paths, classes, features + 1).
    """
    # Images come last: softmax over a short last axis takes ten times as long.
    logits = (weights.flatten(0, 1) @ x.T).unflatten(0, weights.shape[:2])
    log_probabilities = logits.log_softmax(dim=1)
    index = _as_index(targets, logits)
    loss = -log_probabilities.gather(1, index).mean(dim=(1, 2))
    residual = log_probabilities.exp_()
    residual.scatter_add_(1, index, residual.new_full((), -1.0).expand(index.shape))
    gradient = (residual.flatten(0, 1) @ x / len(x)).unflatten(0, weights.shape[:2])
    pull = penalty * weights
    return loss + _dot(pull, weights) / 2, gradient + pull


def _as_index(targets: Tensor, logits: Tensor) -> Tensor:
    """(paths, 1, images), int64, for ``gather`` along the classes."""
    return targets.to(logits.device).expand(len(logits), 1, -1)


def _dot(first: Tensor, second: Tensor) -> Tensor:
    """(paths,): of (paths, classes, features)."""
    return (first * second).sum(dim=(1, 2))


def _principal(covariance: Tensor) -> tuple[Tensor, Tensor]:
    """The eigenvectors, in columns, and eigenvalues of a covariance, on its device."""
    # On the CPU, in double precision: not every device has an eigensolver.
    spread, axes = torch.linalg.eigh(covariance.cpu().double())
    largest = float(spread[-1]) or 1.0
    spread = spread.clamp(min=1e-7 * largest)
    return axes.float().to(covariance.device), spread.float().to(covariance.device)


def _curvature(spread: Tensor, counts: Tensor, penalty: Tensor) -> Tensor:
    """The Hessian's diagonal (paths, classes, features + 1) at weights of 0, along principal axes.

    There a class's probability is taken for its share of the images.

    Args:
        spread: (features,), the covariance's eigenvalues.
        counts: (classes,), images.
        penalty: (paths, 1, features + 1).
    """
    share = (counts / counts.sum()).to(spread)
    return (share * (1 - share))[:, None] * F.pad(spread, (0, 1), value=1.0) + penalty


def _penalty(decay: Tensor, width: int) -> Tensor:
    """(paths, 1, width + 1): the penalty's factor, 0 for the bias, which comes last."""
    return F.pad(decay[:, None, None].expand(-1, 1, width), (0, 1))


def _fit_full_batch(data: _Standardised, counts: Tensor, decay: Tensor) -> Tensor:
    """Weights, (paths, classes, features + 1)."""
    x, targets = data.rows(slice(None))
    x, ones = x[:, :-1], x[:, -1:]
    basis = None
    if len(x) < x.shape[1]:
        # The optimum lies in the span of the images, which is smaller than the features' space.
        basis, coordinates = (part.to(x) for part in torch.linalg.qr(x.T.cpu()))
        x = coordinates.T
    axes, spread = _principal(x.T @ x / len(x))
    penalty = _penalty(decay, len(spread))
    x = torch.cat([x @ axes, ones], dim=1)
    weights = _minimise(x, targets, penalty, _curvature(spread, counts, penalty))
    return _rotated_back(weights, axes if basis is None else basis @ axes)


def _rotated_back(weights: Tensor, axes: Tensor) -> Tensor:
    return torch.cat([weights[..., :-1] @ axes.T, weights[..., -1:]], dim=2)


def _minimise(x: Tensor, targets: Tensor, penalty: Tensor, curvature: Tensor) -> Tensor:
    """L-BFGS of all paths at once, each with its own step; those that end are left out.

    Args:
        x: (images, features + 1).
        targets: (images,).
        penalty: (paths, 1, features + 1).
        curvature: (paths, classes, features + 1), the Hessian's approximate diagonal.

    Returns:
        Weights (paths, classes, features + 1).
    """
    found = torch.zeros_like(curvature)
    weights, active = found.clone(), torch.arange(len(found), device=x.device)
    loss, gradient = _objective(x, targets, penalty, weights)
    history = _History(curvature, [])
    for _ in range(MAX_ITERATIONS):
        pull = penalty * weights
        going = _dot(gradient, gradient) > RELATIVE_ERROR**2 * _dot(pull, pull)
        if not going.all():
            found[active] = weights
            active, weights, penalty = active[going], weights[going], penalty[going]
            loss, gradient, history = loss[going], gradient[going], history[going]
            if len(active) == 0:
                break
        direction = -history.solve(gradient)
        slope, step = _dot(gradient, direction), torch.ones_like(loss)
        while True:
            moved = weights + step[:, None, None] * direction
            new_loss, new_gradient = _objective(x, targets, penalty, moved)
            # Below the last term the change of the loss is lost in float32's rounding.
            enough = new_loss <= loss + 1e-4 * step * slope + 1e-6 * loss
            if enough.all() or step.min() < SMALLEST_STEP:
                break
            step = torch.where(enough, step, step / 2)
        history.add(moved - weights, new_gradient - gradient)
        weights, loss, gradient = moved, new_loss, new_gradient
    else:
        found[active] = weights
    return found


@dataclass(frozen=True)
class _History:
    """The last steps, from which L-BFGS corrects the curvature.

    Attributes:
        curvature: (paths, classes, features + 1), the first approximation.
        steps: (step, change of the gradient, 1 / their product), the latest last.
    """

    curvature: Tensor
    steps: list[tuple[Tensor, Tensor, Tensor]]

    def add(self, step: Tensor, change: Tensor) -> None:
        product = _dot(step, change)
        self.steps.append((step, change, torch.where(product > 0, 1 / product, 0.0)))
        del self.steps[:-MEMORY]

    def solve(self, gradient: Tensor) -> Tensor:
        """(paths, classes, features + 1): the gradient by the inverse of the curvature."""
        result, factors = gradient, []
        for step, change, inverse in reversed(self.steps):
            factors.append((inverse * _dot(step, result))[:, None, None])
            result = result - factors[-1] * change
        result = result / self.curvature
        if self.steps:
            _, change, inverse = self.steps[-1]
            scale = inverse * _dot(change, change / self.curvature)
            result = result / torch.where(scale > 0, scale, 1.0)[:, None, None]
        for step, change, inverse in self.steps:
            factor = factors.pop() - (inverse * _dot(change, result))[:, None, None]
            result = result + factor * step
        return result

    def __getitem__(self, paths: Tensor) -> "_History":
        kept = [
            (step[paths], change[paths], inverse[paths]) for step, change, inverse in self.steps
        ]
        return _History(self.curvature[paths], kept)


def _fit_minibatches(
    data: _Standardised, counts: Tensor, decay: Tensor, batch_size: int, seed: int
) -> Tensor:
    """Weights (paths, classes, features + 1), by Nesterov's method on Newton's scale."""
    count, width = data.embeddings.shape
    covariance = torch.zeros(width, width, device=decay.device)
    for rows in _chunks(count, width):
        x = data.rows(rows)[0][:, :-1]
        covariance += x.T @ x / count
    axes, spread = _principal(covariance)
    penalty = _penalty(decay, width)
    curvature = _curvature(spread, counts, penalty)
    turn = torch.block_diag(axes, axes.new_ones(1, 1))
    weights, velocity = torch.zeros_like(curvature), torch.zeros_like(curvature)
    weights[..., -1] = (counts / count).log().to(weights)
    order = torch.Generator().manual_seed(seed)
    batches = math.ceil(count / batch_size)
    epochs = max(MIN_EPOCHS, math.ceil(MIN_STEPS / batches))
    share = _step_share(counts / batches, width, epochs * batches)
    scale = share.to(curvature) / curvature
    for step in range(epochs * batches):
        if step % batches == 0:
            parts = torch.randperm(count, generator=order).tensor_split(batches)
        x, targets = data.rows(parts[step % batches].sort().values)
        _, gradient = _objective(x @ turn, targets, penalty, weights + MOMENTUM * velocity)
        rate = LEARNING_RATE * (1 + math.cos(math.pi * step / (epochs * batches))) / 2
        velocity.mul_(MOMENTUM).sub_(gradient.mul_(scale), alpha=rate)
        weights += velocity
    return _rotated_back(weights, axes)


def _step_share(of_class: Tensor, width: int, steps: int) -> Tensor:
    """Of Newton's step, (classes, 1): what the images that a batch holds of a class can bear.

    Where they are fewer than the features, a full step is mostly noise, and weights that it has
    driven far from the optimum find no way back. Rare classes still go as far as all steps need.

    Args:
        of_class: (classes,), images in a batch.
        width: features.
        steps: in all.
    """
    return (of_class / width).clamp(min=min(1.0, LEAST_PROGRESS / steps), max=1.0)[:, None]


def _chunks(count: int, width: int) -> Iterator[slice]:
    """Slices of rows, as many at a time as fit with ``width`` numbers each."""
    rows = max(1, CHUNK_ELEMENTS // width)
    return (slice(start, min(start + rows, count)) for start in range(0, count, rows))
