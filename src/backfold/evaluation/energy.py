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
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
import torch
from numpy.typing import NDArray
from PIL import Image
from scipy.stats import bootstrap, rankdata
from sklearn.neighbors import NearestNeighbors
from torch import Tensor
from torch.nn import functional as F
from torchmetrics.functional.image import total_variation

from backfold.data.source import ImageSource, NoTestSplit, open_source
from backfold.data.statistics import ChannelStatistics
from backfold.embedding import EmbeddingChoice, embed
from backfold.errors import UserError
from backfold.evaluation.images import Images
from backfold.evaluation.results import Row, severity_case
from backfold.evaluation.severities import SEVERITIES, pretext_severities, seeded_batches
from backfold.restoration import eval_mode
from backfold.training.pretrained import Pretrained

if TYPE_CHECKING:
    from backfold.evaluation.evaluate import Evaluation

PROTOCOL, METRIC = "energy", "AUROC"
ENERGY, KNN = "energy", "kNN distance"
RESAMPLES, BATCH_SIZE = 100, 256
NEIGHBOURS = 10
MOST_NEIGHBOURS = 5000  # training images among which they are looked for, where none are asked for
OTHER_DATA = "test images against "
ONE_CLASS = "one class against the rest"

Scores = dict[str, Tensor]
Values = NDArray[np.float32] | NDArray[np.float64]


def energy(given: "Evaluation") -> list[Row]:
    """AUROCs of every score: test images against corrupted ones, other data and other classes.

    Cases are "denoising, severity 3" (see `pretext_severities`), "test images against NAME", and
    `ONE_CLASS`. In the last, the images of one test class are the usual ones and all other classes
    are strange, each class in turn; the spread is that over the classes. The kNN distance is then
    that to training images of the class. Nothing tells the energy (nor file size and variation)
    which class is the usual one, so around 0.5 is all that it can reach on average.

    Raises:
        UserError: energies that are not finite, a class without training images, other data that
            can't be read, or an embedding that the backbone does not have.
    """
    run, settings, parts = given.subject.run, given.settings, given.parts
    assert run is not None
    run.energy.to(given.device).eval()
    most = MOST_NEIGHBOURS if settings.train_images is None else None
    train, train_places = parts.train.load(most, settings.seed)
    test, test_places = parts.test.load(settings.test_images, settings.seed)
    scorer = _Scorer(given, run, train)
    usual = scorer(scorer.normalised(test))
    rows = []
    tasks = pretext_severities(run.config.tasks, run.channels, run.image_size)
    for name, levels in tasks.items():
        for severity, task in zip(SEVERITIES, levels, strict=True):
            corrupted = (
                task(batch, generator).corrupted
                for batch, generator in seeded_batches(scorer.normalised(test), settings.seed)
            )
            case = severity_case(name, severity)
            rows += _rows(case, usual, scorer(corrupted), settings.seed, paired=True)
    for name, source in _others(given):
        other = Images(source, given.subject, given.num_workers)
        images, _ = other.load(settings.test_images, settings.seed)
        strange = scorer(scorer.normalised(images))
        rows += _rows(f"{OTHER_DATA}{name}", usual, strange, settings.seed, paired=False)
    if parts.train.source.labels is not None and parts.test.source.labels is not None:
        labels = parts.test.labels[test_places], parts.train.labels[train_places]
        rows += _one_class_rows(*labels, usual, scorer)
    return rows


def _others(given: "Evaluation") -> Iterator[tuple[str, ImageSource]]:
    for kind, data in (("near", given.settings.near), ("far", given.settings.far)):
        if data is None:
            continue
        pixels = given.subject.max_pixels
        try:
            source = open_source(data, "test", max_pixels=pixels)
        except NoTestSplit:
            source = open_source(data, "train", max_pixels=pixels)
        yield f"{Path(data).name} ({kind})", source


class _Scorer:
    """Gives images all scores; keeps the embeddings of the neighbours, and of the usual images."""

    def __init__(self, given: "Evaluation", run: Pretrained, neighbours: Tensor) -> None:
        self._run, self._device = run, given.device
        asked = given.settings.embedding
        self._choice = asked if isinstance(asked, EmbeddingChoice) else EmbeddingChoice()
        with eval_mode(run.energy), torch.inference_mode():
            self.bank = torch.cat([self._embed(batch) for batch in self.normalised(neighbours)])
        self.usual: Tensor | None = None

    def normalised(self, images: Tensor) -> Iterator[Tensor]:
        """Batches on the device, of images as they were loaded."""
        for batch in images.split(BATCH_SIZE):
            yield self._run.statistics.normalize(batch.to(self._device, non_blocking=True))

    def _embed(self, batch: Tensor) -> Tensor:
        return embed(self._run.energy.backbone, batch, self._choice).float().cpu()

    def __call__(self, batches: Iterable[Tensor]) -> Scores:
        """Every score by its name, (images,) each."""
        found: list[tuple[Tensor, ...]] = []
        with eval_mode(self._run.energy), torch.inference_mode():
            for batch in batches:
                scores = (
                    self._run.energy(batch).float().cpu(),
                    self._embed(batch),
                    file_sizes(batch, self._run.statistics),
                    total_variation(batch, reduction="none").cpu(),
                )
                found.append(scores)
        energies, embeddings, sizes, variations = (
            torch.cat(part) for part in zip(*found, strict=True)
        )
        broken = int((~torch.isfinite(energies)).sum())
        if broken:
            raise UserError(
                f"the energies of {broken} of {len(energies)} images are not finite; train with a "
                "lower learning rate, or take an earlier checkpoint"
            )
        if self.usual is None:
            self.usual = embeddings
        return {
            ENERGY: energies,
            KNN: knn_distance(self.bank, embeddings),
            "file size": sizes,
            "total variation": variations,
        }


def _rows(
    case: str, usual: Scores, strange: Scores, seed: int, paired: bool, resamples: int = RESAMPLES
) -> list[Row]:
    """A row a score; of pairs, a strange image is drawn together with its usual one."""
    rows = []
    for name, scores in usual.items():
        both = scores.numpy(), strange[name].numpy()
        samples = bootstrap(
            both,
            auroc,
            n_resamples=resamples,
            paired=paired,
            vectorized=True,
            method="percentile",
            random_state=np.random.default_rng(seed),
        )
        std = float(samples.standard_error)
        rows.append(Row(PROTOCOL, case, name, METRIC, float(auroc(*both)), std, resamples))
    return rows


def _one_class_rows(
    test_labels: Tensor, train_labels: Tensor, usual: Scores, scorer: _Scorer
) -> list[Row]:
    found: dict[str, list[float]] = {name: [] for name in usual}
    assert scorer.usual is not None
    for label in test_labels.unique().tolist():
        known, inside = train_labels == label, test_labels == label
        if not known.any():
            raise UserError(
                f"class {label} of the test images has no training images; give some of each class"
            )
        if inside.all():
            return []
        scores = {**usual, KNN: knn_distance(scorer.bank[known], scorer.usual)}
        for name, values in scores.items():
            found[name].append(float(auroc(values[inside].numpy(), values[~inside].numpy())))
    return [Row.of(PROTOCOL, ONE_CLASS, name, METRIC, values) for name, values in found.items()]


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
