"""What can be read from frozen vectors: nearest neighbours and linear probes.

Every contender has candidates: a backbone its layers and poolings, pixels four forms of theirs. For
each protocol and number of labels the candidate is chosen on validation images, alike for all.
"""

import tempfile
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Protocol

import numpy as np
import torch
from torch import Tensor
from torch.nn import functional as F

from backfold.embedding import Embedder, EmbeddingChoice
from backfold.errors import UserError
from backfold.evaluation.images import Images, label_case
from backfold.evaluation.probes import REGULARISATION_GRID, fit_linear_path, knn_predictions
from backfold.evaluation.results import PIXELS, Row, accuracy_rows

if TYPE_CHECKING:
    from backfold.evaluation.evaluate import Evaluation

CHOSEN_ON = 2_000  # images that probes learn from while a candidate is chosen among all labels
MOST_CHOSEN_ON = 50_000  # of all draws together
MOST_VALIDATION = 4_000
COMPONENTS_ON = 2_000  # images that principal components are found on
IN_MEMORY_BYTES = 2**30
LARGEST_SIDE, THUMBNAIL = 32, 8
METRIC = "validation accuracy (%)"

Vectors = dict[str, Tensor]
Embed = Callable[[Tensor], Mapping[str, Tensor]]


class FrozenVectors:
    """Every contender's vectors, by candidate, of whichever images are asked for.

    Args:
        given: the backbones and the images.
    """

    def __init__(self, given: "Evaluation") -> None:
        self._given = given
        self._known: dict[tuple[str, str], tuple[Tensor, Tensor]] = {}
        self._test: dict[str, Vectors] | None = None
        self._choices: dict[tuple[str, str, str], _Choice] = {}
        self.contenders = self._contenders()

    def train(self, contender: str, candidate: str, places: Tensor) -> Tensor:
        """(places, features): the training images' vectors; see `prepare`."""
        known, vectors = self._known[contender, candidate]
        if torch.equal(places, known):  # no copy: they may lie on disk
            return vectors
        return vectors[torch.searchsorted(known, places)]

    def prepare(self, wanted: Iterable[tuple[str, str]], places: Tensor) -> None:
        """Embed these training images for (contender, candidate) pairs, as far as it is not done.

        Args:
            wanted: pairs; "" stands for all candidates.
            places: int64, rising.
        """
        pairs = {
            (name, candidate)
            for name, asked in wanted
            for candidate in (self.candidates(name) if asked == "" else [asked])
        }
        missing = {pair for pair in pairs if not self._covers(pair, places)}
        if not missing:
            return
        if len(places) <= MOST_CHOSEN_ON:  # all in one pass: the next protocol chooses another
            missing = {(name, each) for name, _ in missing for each in self.candidates(name)}
        found = self._embed(self._given.parts.train, missing, places)
        for name, candidate in missing:
            self._known[name, candidate] = (places, found[name][candidate])

    def test(self, contender: str, candidate: str) -> Tensor:
        """(test images, features)."""
        if self._test is None:
            everything = {(n, each) for n in self.contenders for each in self.candidates(n)}
            images = self._given.parts.test
            self._test = self._embed(images, everything, torch.arange(len(images)))
        return self._test[contender][candidate]

    def choice(
        self, choose: "_Choose", contender: str, count: int | float | None, draws: Sequence[Tensor]
    ) -> "_Choice":
        """What ``choose`` finds best for a contender with so many labels; it is found once."""
        key = (choose.__name__, contender, label_case(count))
        if key not in self._choices:
            self._choices[key] = choose(self._given, contender, draws)
        return self._choices[key]

    def candidates(self, contender: str) -> list[str]:
        """Names, such as "layer -2, max" or "centred pixels"."""
        asked = self._given.settings.embedding
        names = list(self._names[contender])
        if contender == PIXELS or asked == "auto":
            return names
        if str(asked) not in names:
            raise UserError(
                f"the backbone has no embedding {asked}; choose from {'; '.join(names)}, or auto"
            )
        return [str(asked)]

    def _covers(self, pair: tuple[str, str], places: Tensor) -> bool:
        return pair in self._known and bool(torch.isin(places, self._known[pair][0]).all())

    def _contenders(self) -> dict[str, Embed]:
        given = self._given
        first, _ = given.parts.train.load(COMPONENTS_ON, given.settings.seed)
        probe = self._normalised(first[:2])
        found: dict[str, Embed] = {}
        width = 1
        for name, backbone in given.backbones.items():
            embedder = Embedder(backbone, probe)
            width = max(width, embedder(probe)[EmbeddingChoice()].shape[1])
            found[name] = _by_name(embedder)
        batches = [self._normalised(part) for part in first.split(256)]
        found[PIXELS] = PixelVectors(batches, width, given.settings.seed)
        self._names = {name: list(embed(probe)) for name, embed in found.items()}
        return found

    def _normalised(self, images: Tensor) -> Tensor:
        return self._given.statistics.normalize(images.to(self._given.device, non_blocking=True))

    @torch.inference_mode()
    def _embed(
        self, images: Images, wanted: Iterable[tuple[str, str]], places: Tensor
    ) -> dict[str, Vectors]:
        """One pass over the images, however many backbones and candidates there are."""
        chosen: dict[str, list[str]] = {}
        for name, candidate in sorted(wanted):
            chosen.setdefault(name, []).append(candidate)
        parts = [part.tolist() for part in places.split(256)]
        stores: dict[tuple[str, str], Tensor] = {}
        start = 0
        for batch, _ in images.batches(parts):
            normalised = self._normalised(batch)
            for name, candidates in chosen.items():
                vectors = self.contenders[name](normalised)
                for candidate in candidates:
                    rows = vectors[candidate]
                    if (name, candidate) not in stores:
                        total = sum(vectors[each].shape[1] for each in candidates)
                        stores[name, candidate] = _new_store(len(places), rows.shape[1], total)
                    stores[name, candidate][start : start + len(rows)] = rows.to("cpu")
            start += len(batch)
        return {
            name: {candidate: stores[name, candidate] for candidate in candidates}
            for name, candidates in chosen.items()
        }


def _by_name(embedder: Embedder) -> Embed:
    return lambda images: {str(choice): rows for choice, rows in embedder(images).items()}


def _new_store(count: int, width: int, total_width: int) -> Tensor:
    """Rows in memory, or in half precision on disk where all candidates together are large."""
    if 4 * count * total_width <= IN_MEMORY_BYTES:
        return torch.empty(count, width)
    with tempfile.TemporaryFile() as file:  # the map keeps it open
        return torch.from_numpy(np.memmap(file, np.float16, "w+", shape=(count, width)))


class PixelVectors:
    """The image itself as a vector: what any backbone must beat.

    Raw, without each image's own mean colour, as a thumbnail of 8 x 8, and its principal
    components, as many as the backbone's vectors have features. Larger images are first brought
    to 32 pixels.

    Args:
        batches: normalised images that the components are found on.
        width: components at most.
        seed: of the search for them.
    """

    def __init__(self, batches: Sequence[Tensor], width: int, seed: int) -> None:
        rows = torch.cat([self._small(batch).flatten(1) for batch in batches])
        width = min(width, *rows.shape)
        self._mean = rows.mean(dim=0)
        with torch.random.fork_rng(devices=[]):
            torch.default_generator.manual_seed(seed)
            _, _, components = torch.pca_lowrank(rows.cpu(), width)
        self._components = components.to(rows)
        self._name = f"{width} principal components of the pixels"

    def __call__(self, images: Tensor) -> dict[str, Tensor]:
        """(batch, features) by the form's name, of normalised images."""
        small = self._small(images)
        thumbnail = _at_most(small, THUMBNAIL)
        centred = small - small.mean(dim=(2, 3), keepdim=True)
        return {
            "raw pixels": small.flatten(1),
            "centred pixels": centred.flatten(1),
            "8 x 8 thumbnail": thumbnail.flatten(1),
            self._name: (small.flatten(1) - self._mean) @ self._components,
        }

    @staticmethod
    def _small(images: Tensor) -> Tensor:
        return _at_most(images, LARGEST_SIDE)


def _at_most(images: Tensor, side: int) -> Tensor:
    longest = max(images.shape[-2:])
    if longest <= side:
        return images
    size = [max(1, round(length * side / longest)) for length in images.shape[-2:]]
    return F.interpolate(images, size, mode="bilinear", antialias=True)


@dataclass(frozen=True)
class _Choice:
    candidate: str
    regularisation: float = 0.0
    scores: dict[str, float] = field(default_factory=dict)

    @property
    def note(self) -> str:
        return self.candidate + (f"; C {self.regularisation:g}" if self.regularisation else "")


class _Choose(Protocol):
    __name__: str

    def __call__(self, given: "Evaluation", name: str, draws: Sequence[Tensor]) -> _Choice: ...


def knn(given: "Evaluation") -> list[Row]:
    """Nearest neighbours, with all labels and with few."""
    return _rows(given, "knn", _choose_knn, _knn)


def linear(given: "Evaluation") -> list[Row]:
    """Linear probes, with all labels and with few."""
    return _rows(given, "linear", _choose_linear, _linear)


def layers(given: "Evaluation") -> list[Row]:
    """Linear probes of every candidate, on the validation images."""
    fit = [given.parts.fit]
    return [
        Row.of("layers", f"linear, {candidate}", name, METRIC, [100 * score])
        for name in given.frozen.contenders
        for candidate, score in given.frozen.choice(_choose_linear, name, None, fit).scores.items()
    ]


_Predict = Callable[["Evaluation", str, _Choice, Tensor], Tensor]


def _rows(given: "Evaluation", protocol: str, choose: _Choose, predict: _Predict) -> list[Row]:
    frozen, parts = given.frozen, given.parts
    cases = {}
    counts, settings = given.settings.label_counts(), given.settings
    for count, draws in parts.each(counts, settings.draws, settings.seed):
        chosen = {name: frozen.choice(choose, name, count, draws) for name in frozen.contenders}
        learned = [torch.arange(len(parts.train))] if count is None else draws
        cases[label_case(count)] = (chosen, learned)
    rows: list[Row] = []
    for case, (chosen, learned) in cases.items():
        pairs = [(name, choice.candidate) for name, choice in chosen.items()]
        frozen.prepare(pairs, _union(learned))
        for name, candidate in pairs:
            frozen.test(name, candidate)
        truth = parts.test.labels
        correct = {
            name: [predict(given, name, choice, places) == truth for places in learned]
            for name, choice in chosen.items()
        }
        notes = {name: choice.note for name, choice in chosen.items()}
        rows += accuracy_rows(protocol, case, correct, notes)
    return rows


def _for_choice(given: "Evaluation", draws: Sequence[Tensor]) -> tuple[list[Tensor], Tensor]:
    """What candidates learn from and are compared on: the draws, or a part of the first.

    Never more labels than the probe itself will have.
    """
    seed, sets = given.settings.seed, list(draws)
    validation = _some(given.parts.validation, MOST_VALIDATION, seed)
    if len(draws) == 1 or sum(map(len, draws)) > MOST_CHOSEN_ON:
        sets = [_some(draws[0], CHOSEN_ON, seed)]
    everything = [(name, "") for name in given.frozen.contenders]
    given.frozen.prepare(everything, _union([*sets, validation]))
    return sets, validation


def _some(places: Tensor, most: int, seed: int) -> Tensor:
    if len(places) <= most:
        return places
    drawn = np.random.default_rng(seed).choice(len(places), most, replace=False)
    return places[torch.from_numpy(np.sort(drawn))]


def _union(parts: Sequence[Tensor]) -> Tensor:
    together: Tensor = torch.cat(list(parts)).unique()
    return together


def _choose_knn(given: "Evaluation", name: str, draws: Sequence[Tensor]) -> _Choice:
    sets, validation = _for_choice(given, draws)
    labels, scores = given.parts.train.labels, {}
    for candidate in given.frozen.candidates(name):
        queries = given.frozen.train(name, candidate, validation)
        found = [
            knn_predictions(
                given.frozen.train(name, candidate, places),
                labels[places],
                queries,
                device=given.device,
            )
            == labels[validation]
            for places in sets
        ]
        scores[candidate] = float(torch.stack(found).double().mean())
    return _Choice(max(scores, key=scores.__getitem__), scores=scores)


def _knn(given: "Evaluation", name: str, choice: _Choice, places: Tensor) -> Tensor:
    vectors = given.frozen.train(name, choice.candidate, places)
    queries = given.frozen.test(name, choice.candidate)
    labels = given.parts.train.labels[places]
    return knn_predictions(vectors, labels, queries, device=given.device)


def _choose_linear(given: "Evaluation", name: str, draws: Sequence[Tensor]) -> _Choice:
    sets, validation = _for_choice(given, draws)
    labels = given.parts.train.labels
    scores: dict[str, float] = {}
    best: dict[str, float] = {}
    for candidate in given.frozen.candidates(name):
        held = given.frozen.train(name, candidate, validation)
        losses, right = [], []
        for places in sets:
            vectors = given.frozen.train(name, candidate, places)
            path = fit_linear_path(
                vectors, labels[places], REGULARISATION_GRID, device=given.device
            )
            losses.append(path.log_loss(held, labels[validation]))
            right.append((path.predict(held) == labels[validation]).double().mean(dim=1))
        index = int(torch.stack(losses).mean(dim=0).argmin())
        best[candidate] = REGULARISATION_GRID[index]
        scores[candidate] = float(torch.stack(right).mean(dim=0)[index])
    candidate = max(scores, key=scores.__getitem__)
    if len(sets[0]) < len(draws[0]):
        best[candidate] = _regularisation(given, name, candidate, draws[0], validation)
    return _Choice(candidate, best[candidate], scores)


def _regularisation(
    given: "Evaluation", name: str, candidate: str, places: Tensor, validation: Tensor
) -> float:
    """The best for all of these images; the candidate was chosen on fewer."""
    labels = given.parts.train.labels
    given.frozen.prepare([(name, candidate)], _union([places, validation]))
    vectors = given.frozen.train(name, candidate, places)
    path = fit_linear_path(vectors, labels[places], REGULARISATION_GRID, device=given.device)
    held = given.frozen.train(name, candidate, validation)
    return REGULARISATION_GRID[int(path.log_loss(held, labels[validation]).argmin())]


def _linear(given: "Evaluation", name: str, choice: _Choice, places: Tensor) -> Tensor:
    vectors = given.frozen.train(name, choice.candidate, places)
    labels = given.parts.train.labels[places]
    path = fit_linear_path(vectors, labels, (choice.regularisation,), device=given.device)
    return path.predict(given.frozen.test(name, choice.candidate))[0]
