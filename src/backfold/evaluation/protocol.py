"""The evaluation protocol: probes on frozen embeddings, with all labels and with few."""

import json
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass
from functools import partial
from pathlib import Path
from typing import Literal

import numpy as np
import torch
from torch import Tensor

from backfold.errors import UserError
from backfold.evaluation.probes import linear_probe_accuracy
from backfold.metrics import knn_accuracy
from backfold.training.run_folder import write_json

ProtocolName = Literal["knn", "linear", "attentive", "finetune"]
BackboneName = Literal["pretrained", "untrained"]
Probe = Callable[[Tensor, Tensor, Tensor, Tensor], float]


@dataclass(frozen=True)
class EvaluationRow:
    """One probe's accuracy on the test images.

    Args:
        protocol: "knn", "linear" or "attentive" on a frozen backbone, or "finetune".
        labels: "all", how many labelled training images each class had, or which share of each
            class's was labelled, such as "1 %".
        backbone: "pretrained" or "untrained"; fine-tuning the latter is training from scratch.
        accuracy_mean: in percent, over the draws of the labelled images.
        accuracy_std: in percent, the sample deviation over the draws; 0 for a single draw.
        data: name of the images (see `data_name`); None where it was not recorded.
        step: of the run's checkpoint; None where it was not recorded.
    """

    protocol: ProtocolName
    labels: int | str
    backbone: BackboneName
    accuracy_mean: float
    accuracy_std: float
    data: str | None = None
    step: int | None = None

    def to_dict(self) -> dict[str, str | int | float | None]:
        """The fields, as in ``evaluation.json``."""
        return asdict(self)


def evaluate_embeddings(
    train_embeddings: Tensor,
    train_labels: Tensor,
    test_embeddings: Tensor,
    test_labels: Tensor,
    protocols: Sequence[ProtocolName],
    backbone_name: BackboneName,
    labels_per_class: Sequence[int | float | None] = (None, 10),
    draws: int = 5,
    seed: int = 0,
) -> list[EvaluationRow]:
    """One row for each protocol and number of labels.

    The labelled images of a draw depend on the labels, the draw and the seed alone: every protocol
    and backbone is judged on the same ones.

    Args:
        train_embeddings: (training images, features).
        train_labels: (training images,), whole numbers.
        test_embeddings: (test images, features).
        test_labels: (test images,), whole numbers.
        protocols: which probes: "knn", "linear".
        backbone_name: goes into the rows.
        labels_per_class: how many labelled training images of each class, or which share of them
            (see `labelled_subsets`); None means all.
        draws: how often few labels are drawn.
        seed: of the draws and of the linear probe's folds.

    Raises:
        UserError: an unknown protocol, no draws or labels, or a class with too few images.
    """
    rows = []
    for protocol in protocols:
        probe = _probe(protocol, seed)
        for count in labels_per_class:
            accuracies = [
                probe(train_embeddings[i], train_labels[i], test_embeddings, test_labels)
                for i in labelled_subsets(train_labels, count, draws, seed)
            ]
            rows.append(accuracy_row(protocol, count, backbone_name, accuracies))
    return rows


def labelled_subsets(
    labels: Tensor, count: int | float | None, draws: int, seed: int
) -> list[Tensor]:
    """Indices of the labelled images of each draw; they depend on the arguments alone.

    Args:
        labels: (images,), whole numbers.
        count: labels a class; or a share of every class's, above 0 and below 1; None gives all
            images, once.
        draws: how often.
        seed: of all draws.

    Raises:
        UserError: no draws or labels, or a class with too few images.
    """
    if draws < 1:
        raise UserError(f"draws is {draws}; give 1 or more")
    if count is None:
        return [torch.arange(len(labels), device=labels.device)]
    if isinstance(count, float):
        return [draw_share(labels, count, seed, draw) for draw in range(draws)]
    return [draw_labelled(labels, count, seed, draw) for draw in range(draws)]


def draw_labelled(labels: Tensor, per_class: int, seed: int, draw: int) -> Tensor:
    """Indices of ``per_class`` images of every class, drawn without replacement.

    Args:
        labels: (images,), whole numbers.
        per_class: 1 or more.
        seed: of all draws.
        draw: which draw, from 0.

    Raises:
        UserError: ``per_class`` below 1, or a class with fewer images.
    """
    if per_class < 1:
        raise UserError(f"labels per class is {per_class}; give 1 or more, or None for all")
    array = labels.cpu().numpy()
    classes, counts = np.unique(array, return_counts=True)
    if counts.min() < per_class:
        raise UserError(
            f"class {classes[counts.argmin()]} has {counts.min()} training images, fewer than the "
            f"{per_class} labels a class; ask for {counts.min()} or fewer, or add images"
        )
    return _draw(labels, dict.fromkeys(classes.tolist(), per_class), seed, draw)


def draw_share(labels: Tensor, share: float, seed: int, draw: int) -> Tensor:
    """Indices of a share of every class's images, drawn without replacement.

    A class gets its share rounded half up to whole images, and one image at least.

    Args:
        labels: (images,), whole numbers.
        share: above 0 and below 1.
        seed: of all draws.
        draw: which draw, from 0.

    Raises:
        UserError: a share outside its range.
    """
    if not 0.0 < share < 1.0:
        raise UserError(
            f"the share of labels is {share:g}; give a number above 0 and below 1, or None for all"
        )
    classes, counts = np.unique(labels.cpu().numpy(), return_counts=True)
    sizes = np.maximum(1, np.floor(share * counts + 0.5)).astype(int)
    return _draw(labels, dict(zip(classes.tolist(), sizes.tolist(), strict=True)), seed, draw)


def _draw(labels: Tensor, sizes: Mapping[int, int], seed: int, draw: int) -> Tensor:
    array, generator = labels.cpu().numpy(), np.random.default_rng([seed, draw])
    drawn = [
        generator.choice(np.flatnonzero(array == label), size, replace=False)
        for label, size in sizes.items()
    ]
    return torch.from_numpy(np.concatenate(drawn)).to(labels.device)


def _probe(protocol: str, seed: int) -> Probe:
    if protocol == "knn":
        return knn_accuracy
    if protocol == "linear":
        return partial(linear_probe_accuracy, seed=seed)
    raise UserError(f"unknown protocol {protocol!r}; choose from knn, linear")


def accuracy_row(
    protocol: ProtocolName,
    count: int | float | None,
    backbone: BackboneName,
    accuracies: Sequence[float],
) -> EvaluationRow:
    """A row of the draws' accuracies.

    Args:
        protocol: goes into the row.
        count: of labels, as for `labelled_subsets`.
        backbone: goes into the row.
        accuracies: from 0 to 1, one a draw.
    """
    percent = [100 * value for value in accuracies]
    std = float(np.std(percent, ddof=1)) if len(percent) > 1 else 0.0
    return EvaluationRow(protocol, label_text(count), backbone, float(np.mean(percent)), std)


def label_text(count: int | float | None) -> int | str:
    """How many labels there were, as rows say it: "all", a number a class, or "1 %"."""
    if count is None:
        return "all"
    return f"{100 * count:g} %" if isinstance(count, float) else count


def write_rows(path: Path, rows: Sequence[EvaluationRow]) -> None:
    """Write the rows as a JSON list; a reader never sees half a file.

    Raises:
        UserError: the disk is full or the folder can't be written.
    """
    write_json(path, [row.to_dict() for row in rows])


def read_rows(path: Path) -> list[EvaluationRow]:
    """The rows that `write_rows` wrote.

    Raises:
        UserError: no such file, or one that is not a list of rows.
    """
    try:
        return [EvaluationRow(**row) for row in json.loads(path.read_text())]
    except FileNotFoundError as error:
        raise UserError(f"there is no {path}; evaluate the run first") from error
    except (ValueError, TypeError) as error:
        raise UserError(f"{path} is no list of evaluation rows: {error}; evaluate again") from error
