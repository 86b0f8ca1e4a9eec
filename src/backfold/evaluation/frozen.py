"""What can be read from frozen vectors: nearest neighbours and linear probes.

Every contender has candidates: a backbone its layers and poolings, pixels four forms of theirs. For
each protocol and number of labels the candidate is chosen on validation images, alike for all.
"""

import tempfile
from collections.abc import Mapping, Sequence
from functools import partial
from typing import TYPE_CHECKING

import numpy as np
import torch
from torch import Tensor
from torch.nn import functional as F

from backfold.embedding import Embedder, EmbeddingChoice
from backfold.errors import UserError
from backfold.evaluation import images as data
from backfold.evaluation.probes import REGULARISATION_GRID, knn_predictions, linear_probes
from backfold.evaluation.results import PIXELS, Row

if TYPE_CHECKING:
    from backfold.evaluation.evaluate import Evaluation

CHOSEN_ON = 2_000  # images that candidates learn from; the best of each length then from all
MOST_CHOSEN_ON = 50_000  # of all draws together
MOST_VALIDATION = 4_000
TOLERANCE = 0.02  # of a probe's weights, as far as it is for a choice alone
COMPONENTS_ON = 2_000  # images that principal components are found on
IN_MEMORY_BYTES = 2**30
LARGEST_SIDE, THUMBNAIL = 32, 8
METRIC = "validation accuracy (%)"

Pair = tuple[str, str]  # contender, candidate
Candidates = Mapping[str, Sequence[str]]  # by contender, such as "layer -2, max", "centred pixels"
# Candidate, regularisation (0: none), and every candidate's accuracy on validation images, 0 to 1.
Choice = tuple[str, float, dict[str, float]]


class FrozenVectors:
    """Every contender's vectors, by candidate, of whichever images are asked for."""

    def __init__(self, given: "Evaluation") -> None:
        self._given = given
        self._known: dict[Pair, tuple[Tensor, Tensor]] = {}  # places and vectors
        self._test: dict[Pair, Tensor] = {}
        self.choices: dict[tuple[str, str, str], Choice] = {}  # by `_choose`, for other protocols
        self._embedders: dict[str, Embedder | PixelVectors] = {}
        first, _ = given.parts.train.load(COMPONENTS_ON, given.settings.seed)
        first, width = given.statistics.normalize(first.to(given.device)), 1
        for name, backbone in given.backbones.items():
            self._embedders[name] = embedder = Embedder(backbone, first[:2])
            width = max(width, embedder(first[:2])[EmbeddingChoice()].shape[1])
        self._embedders[PIXELS] = PixelVectors(first, width, given.settings.seed)
        self.candidates = {each: list(self._vectors(each, first[:2])) for each in self._embedders}
        if (asked := given.settings.embedding) != "auto":
            for name in given.backbones:
                if str(asked) not in (found := self.candidates[name]):
                    raise UserError(
                        f"the backbone has no embedding {asked}; choose from {'; '.join(found)}, "
                        "or auto"
                    )
                self.candidates[name] = [str(asked)]

    def train(self, contender: str, candidate: str, places: Tensor) -> Tensor:
        """(places, features): the training images' vectors; see `prepare`."""
        known, vectors = self._known[contender, candidate]
        if torch.equal(places, known):  # no copy: they may lie on disk
            return vectors
        return vectors[torch.searchsorted(known, places)]

    def prepare(self, wanted: Candidates, parts: Sequence[Tensor]) -> None:
        """Embed the training images at these places, as far as it is not done."""
        places, missing = torch.cat(list(parts)).unique(), dict[str, Sequence[str]]()
        nothing = (places[:0], places[:0])
        for name, candidates in wanted.items():
            known = {each: self._known.get((name, each), nothing)[0] for each in candidates}
            lacking = [each for each in known if not torch.isin(places, known[each]).all()]
            if lacking:  # of few images all in one pass: the next protocol chooses another
                few = len(places) <= MOST_CHOSEN_ON
                missing[name] = self.candidates[name] if few else lacking
        found = self._embed(self._given.parts.train, missing, places) if missing else {}
        self._known |= {pair: (places, vectors) for pair, vectors in found.items()}

    def test(self, contender: str, candidate: str) -> Tensor:
        """(test images, features)."""
        if not self._test:
            images = self._given.parts.test
            self._test = self._embed(images, self.candidates, torch.arange(len(images)))
        return self._test[contender, candidate]

    def _vectors(self, contender: str, images: Tensor) -> dict[str, Tensor]:
        """(batch, features) by candidate, of normalised images."""
        return {str(choice): rows for choice, rows in self._embedders[contender](images).items()}

    @torch.inference_mode()
    def _embed(self, images: data.Images, wanted: Candidates, places: Tensor) -> dict[Pair, Tensor]:
        """One pass over the images, however many backbones and candidates there are."""
        stores: dict[Pair, Tensor] = {}
        start = 0
        for batch, _ in data.normalised(self._given, images, places):
            for name, candidates in wanted.items():
                vectors = self._vectors(name, batch)
                total = sum(vectors[each].shape[1] for each in candidates)
                for candidate in candidates:
                    rows, pair = vectors[candidate], (name, candidate)
                    if pair not in stores:
                        stores[pair] = _new_store(len(places), rows.shape[1], total)
                    stores[pair][start : start + len(rows)] = rows.to("cpu")
            start += len(batch)
        return stores


def _new_store(count: int, width: int, total_width: int) -> Tensor:
    """Rows in memory, or in half precision on disk where all candidates together are large."""
    if 4 * count * total_width <= IN_MEMORY_BYTES:
        return torch.empty(count, width)
    with tempfile.TemporaryFile() as file:  # the map keeps it open
        return torch.from_numpy(np.memmap(file, np.float16, "w+", shape=(count, width)))


class PixelVectors:
    """The image itself as a vector: what any backbone must beat.

    Raw, without each image's own mean colour, as a thumbnail of 8 x 8, and its principal
    components, found on normalised images, as many as the backbone's vectors have features. Larger
    images are first brought to 32 pixels.
    """

    def __init__(self, images: Tensor, width: int, seed: int) -> None:
        rows = _at_most(images, LARGEST_SIDE).flatten(1)
        width = min(width, *rows.shape)
        self._mean = rows.mean(dim=0)
        with data.seeded(seed, torch.device("cpu")):
            _, _, components = torch.pca_lowrank(rows.cpu(), width)
        self._components = components.to(rows)
        self._name = f"{width} principal components of the pixels"

    def __call__(self, images: Tensor) -> dict[str, Tensor]:
        """(batch, features) by the form's name, of normalised images."""
        small = _at_most(images, LARGEST_SIDE)
        return {
            "raw pixels": small.flatten(1),
            "centred pixels": (small - small.mean(dim=(2, 3), keepdim=True)).flatten(1),
            "8 x 8 thumbnail": _at_most(small, THUMBNAIL).flatten(1),
            self._name: (small.flatten(1) - self._mean) @ self._components,
        }


def _at_most(images: Tensor, side: int) -> Tensor:
    longest = max(images.shape[-2:])
    if longest <= side:
        return images
    size = [max(1, round(length * side / longest)) for length in images.shape[-2:]]
    return F.interpolate(images, size, mode="bilinear", antialias=True)


def layers(given: "Evaluation") -> list[Row]:
    """Linear probes of every candidate, on the validation images."""
    case, fit = data.label_case(None), [given.parts.fit]
    return [
        Row.of("layers", f"linear, {candidate}", name, METRIC, [100 * score])
        for name in given.frozen.candidates
        for candidate, score in _choose(given, "linear", name, case, fit)[2].items()
    ]


def _rows(protocol: str, given: "Evaluation") -> list[Row]:
    """Accuracies with all labels and with few."""
    frozen, labels = given.frozen, given.parts.train.labels

    def learn(name: str, case: str, draws: data.Places, learned: data.Places) -> data.Learned:
        chosen = {each: _choose(given, protocol, each, case, draws) for each in frozen.candidates}
        # Of all contenders in one pass.
        frozen.prepare({each: [choice[0]] for each, choice in chosen.items()}, learned)
        candidate, regularisation, _ = chosen[name]
        queries, predicted = frozen.test(name, candidate), []
        for places in learned:
            vectors, truth = frozen.train(name, candidate, places), labels[places]
            if protocol == "knn":
                predicted.append(knn_predictions(vectors, truth, queries, device=given.device))
            else:
                (probe,) = linear_probes(vectors, truth, (regularisation,), device=given.device)
                predicted.append(probe.predict(queries))
        return candidate + (f"; C {regularisation:g}" if regularisation else ""), predicted

    return data.rows_by_labels(given, protocol, frozen.candidates, learn)


knn, linear = partial(_rows, "knn"), partial(_rows, "linear")


def _choose(
    given: "Evaluation", protocol: str, name: str, case: str, draws: Sequence[Tensor]
) -> Choice:
    """The candidate and regularisation that are best on validation images; it is found once.

    Candidates learn from the draws, or from a part of the first: never from more labels than the
    probe itself will have.
    """
    frozen, seed, key = given.frozen, given.settings.seed, (protocol, name, case)
    if key in frozen.choices:
        return frozen.choices[key]
    sets = list(draws)
    validation = data.some(given.parts.validation, MOST_VALIDATION, seed)
    if len(draws) == 1 or sum(map(len, draws)) > MOST_CHOSEN_ON:
        sets = [data.some(draws[0], CHOSEN_ON, seed)]
    frozen.prepare(frozen.candidates, [*sets, validation])
    validated = partial(_validated, given, protocol, name, validation)
    found = {each: validated(each, sets) for each in frozen.candidates[name]}
    scores = {candidate: score for candidate, (score, _) in found.items()}
    if protocol == "linear" and len(sets[0]) < len(draws[0]):
        # Longer vectors need more images: the best of each length again, with all of these.
        rising = sorted(scores, key=scores.__getitem__)
        longest = {frozen.train(name, each, validation).shape[1]: each for each in rising}
        finalists = list(longest.values())
        frozen.prepare({name: finalists}, [draws[0], validation])
        found = {each: validated(each, draws[:1]) for each in finalists}
    best = max(found, key=lambda candidate: found[candidate][0])
    frozen.choices[key] = (best, found[best][1], scores)
    return frozen.choices[key]


def _validated(
    given: "Evaluation",
    protocol: str,
    name: str,
    validation: Tensor,
    candidate: str,
    sets: Sequence[Tensor],
) -> tuple[float, float]:
    """Accuracy, 0 to 1, over these sets of places to learn from, and the best regularisation.

    From the strongest penalty on, for each set until a weaker one does worse.
    """
    vectors, labels = partial(given.frozen.train, name, candidate), given.parts.train.labels
    held, truth = vectors(validation), labels[validation]
    path = REGULARISATION_GRID if protocol == "linear" else (0.0,)
    losses, right = np.full((len(sets), len(path)), np.inf), np.zeros((len(sets), len(path)))
    for row, places in enumerate(sets):
        learned = vectors(places), labels[places]
        if protocol == "knn":
            predicted = knn_predictions(*learned, held, device=given.device)
            losses[row], right[row] = 0, (predicted == truth).double().mean()
            continue
        probes = linear_probes(*learned, path, device=given.device, tolerance=TOLERANCE)
        for column, probe in enumerate(probes):
            losses[row, column] = probe.log_loss(held, truth)
            right[row, column] = (probe.predict(held) == truth).double().mean()
            # NaN, too, where no validation image is of a class that was learned.
            if column and not losses[row, column] < losses[row, column - 1]:
                break
    best = int(losses.mean(axis=0).argmin())
    return float(right[:, best].mean()), path[best]
