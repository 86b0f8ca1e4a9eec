"""What the energy knows: which images it finds implausible, beside simpler scores.

Every score is higher for a stranger image: the pretrained run's energy; on the same backbone, two
distances from training embeddings; bytes of the image as a PNG file; and the total variation. The
last two know nothing of the data, nor whether strange images are busier or plainer than usual: an
AUROC far below 0.5 separates as well as one far above, to who is told the sign.

The mean is that of all images, the spread that of bootstrap samples of them and their corruptions.
"""

import io
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from numpy.typing import NDArray
from scipy.stats import bootstrap, mannwhitneyu
from torch import Tensor
from torchmetrics.functional.image import total_variation
from torchvision.transforms.v2.functional import to_pil_image

from backfold.data.open import open_source
from backfold.data.source import NoTestSplit
from backfold.data.statistics import ChannelStatistics
from backfold.defects import Usual
from backfold.embedding import EmbeddingChoice, embed, embed_batches
from backfold.errors import UserError
from backfold.evaluation.images import Images
from backfold.evaluation.restoration import pretext_severities, seeded_batches
from backfold.evaluation.results import Row
from backfold.metrics import knn_distance
from backfold.pretext.corruption import PretextTask
from backfold.training.run import Pretrained

if TYPE_CHECKING:
    from backfold.evaluation.evaluate import Evaluation

PROTOCOL, METRIC = "energy", "AUROC"
RESAMPLES = 100
MOST_NEIGHBOURS = 5000  # training images among which they are looked for, where none are asked for
KNN, MAHALANOBIS = "kNN distance", "Mahalanobis distance"
ONE_CLASS = "one class against the rest"

Scores = dict[str, Tensor]


def energy(given: "Evaluation") -> list[Row]:
    """AUROCs of every score: test images against corrupted ones, other data and other classes.

    In `ONE_CLASS` all classes but one are strange, each class in turn; the spread is that over the
    classes, and distances are those from its training images. Nothing tells the energy (nor file
    size and variation) which class is the usual one: 0.5 is all that it can reach on average.
    """
    run, settings, parts = given.subject.run, given.settings, given.parts
    assert run is not None
    most = MOST_NEIGHBOURS if settings.train_images is None else None
    train, train_places = parts.train.load(most, settings.seed)
    test, test_places = parts.test.load(settings.test_images, settings.seed)
    scorer = _Scorer(given, run, train)
    usual, embeddings = scorer(test)
    rows = []
    for case, task in pretext_severities(run).items():
        strange, _ = scorer(test, task)
        rows += _rows(case, usual, strange, settings.seed, paired=True)
    for kind, data in (("near", settings.near), ("far", settings.far)):
        if data is not None:
            options = (False, given.subject.max_pixels, run.config.frames)
            try:
                source = open_source(data, "test", *options)
            except NoTestSplit:
                source = open_source(data, "train", *options)
            found = Images(source, given.subject, given.num_workers)
            images, _ = found.load(settings.test_images, settings.seed)
            strange, _ = scorer(images)
            case = f"test images against {Path(data).name} ({kind})"
            rows += _rows(case, usual, strange, settings.seed, paired=False)
    if parts.train.source.labels is not None and parts.test.source.labels is not None:
        of_test, of_train = parts.test.labels[test_places], parts.train.labels[train_places]
        banks = {label: scorer.bank[of_train == label] for label in of_test.unique().tolist()}
        rows += _one_class_rows(of_test, banks, usual, embeddings) if len(banks) > 1 else []
    return rows


class _Scorer:
    """Gives images all scores; the bank has the embeddings that distances are measured to."""

    def __init__(self, given: "Evaluation", run: Pretrained, neighbours: Tensor) -> None:
        self._given, asked = given, given.settings.embedding
        self._energy = run.energy.to(given.device).eval()
        self._choice = asked if isinstance(asked, EmbeddingChoice) else EmbeddingChoice()
        batches = (batch for batch, _ in seeded_batches(given, neighbours))
        self.bank = embed_batches(self._energy.backbone, batches, self._choice, given.device)
        self._usual = Usual.of(self.bank)

    @torch.inference_mode()
    def __call__(self, images: Tensor, task: PretextTask | None = None) -> tuple[Scores, Tensor]:
        """Every score by its name, (images,) each, and the embeddings, (images, features)."""
        found = []
        for clean, generator in seeded_batches(self._given, images):
            batch = clean if task is None else task(clean, generator).corrupted
            embeddings = embed(self._energy.backbone, batch, self._choice)
            sizes = file_sizes(batch, self._given.statistics)
            variation = total_variation(batch, reduction="none")
            measured = (self._energy(batch).float(), embeddings.float(), sizes, variation)
            found.append([each.cpu() for each in measured])
        energies, embeddings, sizes, variations = map(torch.cat, zip(*found, strict=True))
        broken = int((~torch.isfinite(energies)).sum())
        if broken:
            raise UserError(
                f"the energies of {broken} of {len(energies)} images are not finite; train with a "
                "lower learning rate, or take an earlier checkpoint"
            )
        scores = {"energy": energies, **distances(self.bank, self._usual, embeddings)}
        return scores | {"file size": sizes, "total variation": variations}, embeddings


def _rows(case: str, usual: Scores, strange: Scores, seed: int, paired: bool) -> list[Row]:
    """A row a score; of pairs, a strange image is drawn together with its usual one."""
    rows = []
    options: Any = {"n_resamples": RESAMPLES, "paired": paired, "method": "percentile"}
    for name, scores in usual.items():
        both = scores.double().numpy(), strange[name].double().numpy()
        samples = bootstrap(both, auroc, random_state=np.random.default_rng(seed), **options)
        std = float(samples.standard_error)
        rows.append(Row(PROTOCOL, case, name, METRIC, float(auroc(*both)), std, RESAMPLES))
    return rows


def _one_class_rows(
    labels: Tensor, banks: dict[int, Tensor], usual: Scores, embeddings: Tensor
) -> list[Row]:
    """Of the test images; ``banks`` are the training images' embeddings of each class."""
    found: dict[str, list[float]] = {name: [] for name in usual}
    for label, bank in banks.items():
        if len(bank) == 0:
            raise UserError(
                f"class {label} of the test images has no training images; give some of each class"
            )
        inside = labels == label
        for name, values in {**usual, **distances(bank, Usual.of(bank), embeddings)}.items():
            found[name].append(float(auroc(values[inside].numpy(), values[~inside].numpy())))
    return [Row.of(PROTOCOL, ONE_CLASS, name, METRIC, values) for name, values in found.items()]


def distances(bank: Tensor, usual: Usual, embeddings: Tensor) -> Scores:
    """Both distances from the bank's embeddings, (images,) each."""
    return {KNN: knn_distance(bank, embeddings), MAHALANOBIS: usual.distance(embeddings)}


def auroc(usual: NDArray[Any], strange: NDArray[Any], axis: int = -1) -> NDArray[np.float64]:
    """How often, 0 to 1, a strange image's score is above a usual one's, ties counting half."""
    wins = mannwhitneyu(strange, usual, axis=axis, method="asymptotic").statistic
    return np.asarray(wins / (usual.shape[axis] * strange.shape[axis]))


def file_sizes(images: Tensor, statistics: ChannelStatistics) -> Tensor:
    """Bytes of each image as a PNG file, (images,); unless RGB, its channels lie below another."""
    images = statistics.denormalize(images).clamp(0.0, 1.0).mul(255.0).round().to(torch.uint8)
    sizes = []
    for pixels in images.cpu():
        buffer = io.BytesIO()
        to_pil_image(pixels if len(pixels) == 3 else pixels.flatten(0, 1)).save(buffer, "PNG")
        sizes.append(buffer.tell())
    return torch.tensor(sizes, dtype=torch.float32)
