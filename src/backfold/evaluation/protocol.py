"""The evaluation protocol: probes on frozen embeddings, with all labels and with few."""

import json
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from functools import partial
from pathlib import Path
from typing import Any, Literal

import numpy as np
import torch
from torch import Tensor

from backfold.errors import UserError
from backfold.evaluation.probes import linear_probe_accuracy
from backfold.metrics import knn_accuracy
from backfold.training.run_folder import write_json

ProtocolName = Literal["knn", "linear"]
BackboneName = Literal["pretrained", "untrained"]
Probe = Callable[[Tensor, Tensor, Tensor, Tensor], float]


@dataclass(frozen=True)
class EvaluationRow:
    """One probe's accuracy on the test images.

    Args:
        protocol: "knn" or "linear".
        labels: "all", or how many labelled training images each class had.
        backbone: "pretrained" or "untrained".
        accuracy_mean: in percent, over the draws of the labelled images.
        accuracy_std: in percent, the sample deviation over the draws; 0 for a single draw.
    """

    protocol: ProtocolName
    labels: int | Literal["all"]
    backbone: BackboneName
    accuracy_mean: float
    accuracy_std: float

    def to_dict(self) -> dict[str, str | int | float]:
        """The fields, as in ``evaluation.json``."""
        return asdict(self)


def evaluate_embeddings(
    train_embeddings: Tensor,
    train_labels: Tensor,
    test_embeddings: Tensor,
    test_labels: Tensor,
    protocols: Sequence[ProtocolName],
    backbone_name: BackboneName,
    labels_per_class: Sequence[int | None] = (None, 10),
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
        protocols: which probes.
        backbone_name: goes into the rows.
        labels_per_class: how many labelled training images of each class; None means all.
        draws: how often few labels are drawn.
        seed: of the draws and of the linear probe's folds.

    Raises:
        UserError: an unknown protocol, no draws or labels, or a class with too few images.
    """
    if draws < 1:
        raise UserError(f"draws is {draws}; give 1 or more")
    rows = []
    for protocol in protocols:
        probe = _probe(protocol, seed)
        for count in labels_per_class:
            subsets: list[Any] = (
                [slice(None)]
                if count is None
                else [draw_labelled(train_labels, count, seed, draw) for draw in range(draws)]
            )
            accuracies = [
                100 * probe(train_embeddings[i], train_labels[i], test_embeddings, test_labels)
                for i in subsets
            ]
            rows.append(
                _row(protocol, "all" if count is None else count, backbone_name, accuracies)
            )
    return rows


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
    generator = np.random.default_rng([seed, draw])
    drawn = [
        generator.choice(np.flatnonzero(array == label), per_class, replace=False)
        for label in classes
    ]
    return torch.from_numpy(np.concatenate(drawn)).to(labels.device)


def _probe(protocol: str, seed: int) -> Probe:
    if protocol == "knn":
        return knn_accuracy
    if protocol == "linear":
        return partial(linear_probe_accuracy, seed=seed)
    raise UserError(f"unknown protocol {protocol!r}; choose from knn, linear")


def _row(
    protocol: ProtocolName,
    labels: int | Literal["all"],
    backbone: BackboneName,
    accuracies: Sequence[float],
) -> EvaluationRow:
    std = float(np.std(accuracies, ddof=1)) if len(accuracies) > 1 else 0.0
    return EvaluationRow(protocol, labels, backbone, float(np.mean(accuracies)), std)


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
