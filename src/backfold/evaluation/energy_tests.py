"""What the energy knows: which images it finds implausible, beside simpler scores.

Every score is higher for a stranger image:

- energy: of the pretrained run;
- kNN distance: mean distance to the nearest training embeddings, on the same backbone;
- file size: bytes of the image as a PNG file;
- total variation: roughness, the sum of absolute differences of neighbouring pixels.

The last two know nothing of the data, nor whether strange images are busier or plainer than usual:
an AUROC far below 0.5 separates as well as one far above, to who is told the sign.

The mean is that of all images, the spread that of bootstrap samples of them. Each image's
corruption is drawn once and goes with the image, so chance in corruption is a part of the spread.
"""

import io
from collections.abc import Mapping
from dataclasses import dataclass

import numpy as np
import torch
from numpy.typing import NDArray
from PIL import Image
from scipy.stats import bootstrap, rankdata
from sklearn.neighbors import NearestNeighbors
from torch import Tensor
from torch.nn import functional as F
from torchmetrics.functional.image import total_variation

from backfold.data.statistics import ChannelStatistics
from backfold.embedding import EmbeddingChoice, embed_batches
from backfold.errors import UserError
from backfold.evaluation.measures import MeasureRow
from backfold.evaluation.severities import SEVERITIES, pretext_severities, severity_case
from backfold.restoration import EnergyFn, eval_mode
from backfold.training.pretrained import Pretrained

PROTOCOL, METRIC = "energy", "AUROC"
RESAMPLES = 100
NEIGHBOURS = 10
OTHER_DATA = "test images against "
ONE_CLASS = "one class against the rest"

Scores = dict[str, Tensor]
Values = NDArray[np.float32] | NDArray[np.float64]


@dataclass(frozen=True)
class EnergyTestImages:
    """Images that the energy is tried on: all normalised, (images, channels, height, width).

    Args:
        test: images of the training data's kind that the run has not seen.
        others: images of other data sets by their names, near ones or far ones.
        train: images that the run was trained on, or some of them: the neighbours of the kNN
            distance.
        test_labels: int64, (test images,).
        train_labels: int64, (train images,). Without labels on either side, one class against the
            rest is left out.
    """

    test: Tensor
    others: Mapping[str, Tensor]
    train: Tensor
    test_labels: Tensor | None = None
    train_labels: Tensor | None = None


class Scorer:
    """Gives images all scores.

    Args:
        run: its energy is on ``device``.
        train: (images, channels, height, width), normalised: the neighbours.
        choice: layer and pooling of the embedding.
        batch_size: images at once.
        device: where the energy is.
    """

    def __init__(
        self,
        run: Pretrained,
        train: Tensor,
        choice: EmbeddingChoice,
        batch_size: int,
        device: torch.device | str,
    ) -> None:
        self._run, self._choice = run, choice
        self._batch_size, self._device = batch_size, device
        self.bank = self.embed(train)

    def embed(self, images: Tensor) -> Tensor:
        """Embeddings, (images, features)."""
        batches = images.split(self._batch_size)
        return embed_batches(self._run.energy.backbone, batches, self._choice, self._device)

    def __call__(self, images: Tensor) -> Scores:
        """Every score by its name, (images,) each.

        Raises:
            UserError: energies that are not finite.
        """
        return {
            "energy": energies(self._run.energy, images, self._batch_size, self._device),
            "kNN distance": knn_distance(self.bank, self.embed(images)),
            "file size": file_sizes(images, self._run.statistics),
            "total variation": total_variation(images, reduction="none"),
        }


def energy_rows(
    run: Pretrained,
    images: EnergyTestImages,
    *,
    choice: EmbeddingChoice | None = None,
    seed: int = 0,
    resamples: int = RESAMPLES,
    batch_size: int = 256,
    device: torch.device | str = "cpu",
) -> list[MeasureRow]:
    """AUROCs of every score: test images against corrupted ones, other data and other classes.

    Cases are "denoising, severity 3" (see `pretext_severities`), "test images against NAME", and
    `ONE_CLASS`. In the last, the images of one test class are the usual ones and all other classes
    are strange, each class in turn; the spread is that over the classes. The kNN distance is then
    that to training images of the class. Nothing tells the energy (nor file size and variation)
    which class is the usual one, so around 0.5 is all that it can reach on average.

    Args:
        run: its energy must be on ``device``.
        images: what to tell apart.
        choice: the embedding of the kNN distance; None takes the last layer's average.
        seed: of the corruptions and the bootstrap samples.
        resamples: bootstrap samples, 2 or more.
        batch_size: images at once.
        device: where to compute.

    Raises:
        UserError: energies that are not finite, a class without training images, or what embedding
            raises.
    """
    scorer = Scorer(run, images.train, choice or EmbeddingChoice(), batch_size, device)
    usual = scorer(images.test)
    rows = []
    severities = pretext_severities(run.config.tasks, run.channels, run.image_size)
    for name, tasks in severities.items():
        for severity, task in zip(SEVERITIES, tasks, strict=True):
            corrupted = task(images.test, torch.Generator().manual_seed(seed)).corrupted
            draws = _Draws(resamples, seed, paired=True)
            rows += _rows(severity_case(name, severity), usual, scorer(corrupted), draws)
    for name, others in images.others.items():
        draws = _Draws(resamples, seed, paired=False)
        rows += _rows(f"{OTHER_DATA}{name}", usual, scorer(others), draws)
    return rows + _one_class_rows(images, usual, scorer)


@dataclass(frozen=True)
class _Draws:
    """How bootstrap samples are drawn; of pairs, a strange image comes with its usual one."""

    count: int
    seed: int
    paired: bool


def _rows(case: str, usual: Scores, strange: Scores, draws: _Draws) -> list[MeasureRow]:
    rows = []
    for name, scores in usual.items():
        both = scores.numpy(), strange[name].numpy()
        samples = bootstrap(
            both,
            auroc,
            n_resamples=draws.count,
            paired=draws.paired,
            vectorized=True,
            method="percentile",
            random_state=np.random.default_rng(draws.seed),
        )
        std = float(samples.standard_error)
        rows.append(MeasureRow(PROTOCOL, case, name, METRIC, float(auroc(*both)), std, draws.count))
    return rows


def auroc(usual: Values, strange: Values, axis: int = -1) -> Values:
    """How often a strange image's score is above a usual one's, ties counting half.

    Args:
        usual: finite, the usual images along ``axis``.
        strange: as ``usual``; the two may differ in number.
        axis: of the images.

    Returns:
        From 0 to 1, without that axis.
    """
    count, strange_count = usual.shape[axis], strange.shape[axis]
    ranks = rankdata(np.concatenate([usual, strange], axis=axis), axis=axis)
    places = np.take(ranks, np.arange(count, count + strange_count), axis=axis).sum(axis=axis)
    above: Values = (places - strange_count * (strange_count + 1) / 2) / (count * strange_count)
    return above


def _one_class_rows(images: EnergyTestImages, usual: Scores, scorer: Scorer) -> list[MeasureRow]:
    if images.test_labels is None or images.train_labels is None:
        return []
    embeddings = scorer.embed(images.test)
    found: dict[str, list[float]] = {name: [] for name in usual}
    for label in images.test_labels.unique().tolist():
        known = images.train_labels == label
        if not known.any():
            raise UserError(
                f"class {label} of the test images has no training images; give some of each class"
            )
        scores = {**usual, "kNN distance": knn_distance(scorer.bank[known], embeddings)}
        inside = images.test_labels == label
        for name, values in scores.items():
            if not inside.all():
                found[name].append(float(auroc(values[inside].numpy(), values[~inside].numpy())))
    return [
        MeasureRow.of(PROTOCOL, ONE_CLASS, name, METRIC, values)
        for name, values in found.items()
        if values
    ]


def energies(
    energy: EnergyFn, images: Tensor, batch_size: int, device: torch.device | str
) -> Tensor:
    """Energies in eval mode, float32 on the CPU, (images,).

    Raises:
        UserError: one that is not finite.
    """
    with eval_mode(energy), torch.inference_mode():
        batches = [energy(batch.to(device)).float().cpu() for batch in images.split(batch_size)]
    found = torch.cat(batches)
    broken = int((~torch.isfinite(found)).sum())
    if broken:
        raise UserError(
            f"the energies of {broken} of {len(found)} images are not finite; train with a lower "
            "learning rate, or take an earlier checkpoint"
        )
    return found


def knn_distance(bank: Tensor, queries: Tensor, k: int = NEIGHBOURS) -> Tensor:
    """Mean distance of each query to its k nearest neighbours, (queries,), from 0 to 2.

    Args:
        bank: (bank, features), scaled to unit length here, as are the queries.
        queries: (queries, features).
        k: neighbours; the whole bank where it has fewer.
    """
    search = NearestNeighbors(n_neighbors=min(k, len(bank)), algorithm="brute")
    search.fit(F.normalize(bank.float(), dim=1).numpy())
    distances, _ = search.kneighbors(F.normalize(queries.float(), dim=1).numpy())
    return torch.from_numpy(distances.mean(axis=1))


def file_sizes(images: Tensor, statistics: ChannelStatistics) -> Tensor:
    """Bytes of each normalised image as an 8-bit PNG file, (images,), float32.

    Pixels outside [0, 1] are cut off. Of other than 1 or 3 channels, the channels are stacked to
    one tall grey image.
    """
    pixels = statistics.denormalize(images).clamp(0.0, 1.0).mul(255.0).round().to(torch.uint8)
    return torch.tensor([_png_size(image) for image in pixels.cpu()], dtype=torch.float32)


def _png_size(image: Tensor) -> int:
    is_colour = len(image) == 3
    array = image.permute(1, 2, 0).numpy() if is_colour else image.flatten(0, 1).numpy()
    buffer = io.BytesIO()
    Image.fromarray(array).save(buffer, format="PNG")
    return buffer.getbuffer().nbytes
