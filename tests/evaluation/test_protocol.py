import json

import numpy as np
import pytest
import torch

from backfold.errors import UserError
from backfold.evaluation import EvaluationRow, evaluate_embeddings, read_rows, write_rows
from backfold.evaluation.measures import MeasureRow, read_measures
from backfold.evaluation.probes import linear_probe_accuracy
from backfold.evaluation.protocol import draw_labelled
from backfold.metrics import knn_accuracy

ROWS = [
    EvaluationRow("knn", "all", "pretrained", 71.25, 0.0),
    EvaluationRow("linear", 10, "untrained", 40.5, 1.75, "photos", 300),
]


def clusters(num_images, seed):
    rng = np.random.default_rng(seed)
    centres = np.random.default_rng(99).normal(size=(4, 6))
    labels = np.arange(num_images) % 4
    embeddings = centres[labels] + 1.2 * rng.normal(size=(num_images, 6))
    return torch.from_numpy(embeddings).float(), torch.from_numpy(labels)


DATA = (*clusters(120, 1), *clusters(80, 2))


def test_rows_are_the_probes_accuracies_in_percent():
    rows = evaluate_embeddings(
        *DATA, ["knn", "linear"], "pretrained", labels_per_class=(None, 10), draws=3, seed=4
    )
    assert [(row.protocol, row.labels, row.backbone) for row in rows] == [
        ("knn", "all", "pretrained"),
        ("knn", 10, "pretrained"),
        ("linear", "all", "pretrained"),
        ("linear", 10, "pretrained"),
    ]
    assert rows[0].accuracy_mean == pytest.approx(100 * knn_accuracy(*DATA))
    assert rows[2].accuracy_mean == pytest.approx(100 * linear_probe_accuracy(*DATA, seed=4))
    assert rows[0].accuracy_std == rows[2].accuracy_std == 0.0
    draws = [draw_labelled(DATA[1], 10, seed=4, draw=draw) for draw in range(3)]
    few = [100 * knn_accuracy(DATA[0][i], DATA[1][i], *DATA[2:]) for i in draws]
    assert len(set(few)) > 1
    assert rows[1].accuracy_mean == pytest.approx(sum(few) / 3)
    deviation = (sum((value - sum(few) / 3) ** 2 for value in few) / 2) ** 0.5
    assert rows[1].accuracy_std == pytest.approx(deviation)


def test_draws_hold_distinct_images_of_every_class():
    labels = torch.tensor([5] * 12 + [0] * 30 + [9] * 15)
    first, again, second = (draw_labelled(labels, 12, seed=0, draw=draw) for draw in (0, 0, 1))
    assert len(first.unique()) == 36
    assert labels[first].bincount(minlength=10).tolist() == [12, 0, 0, 0, 0, 12, 0, 0, 0, 12]
    assert torch.equal(first, again)
    assert set(first.tolist()) != set(second.tolist())
    assert set(first.tolist()) != set(draw_labelled(labels, 12, seed=1, draw=0).tolist())


def test_both_backbones_are_judged_on_the_same_draws():
    pretrained, untrained = (
        evaluate_embeddings(*DATA, ["knn"], name, labels_per_class=(2,), draws=3)
        for name in ("pretrained", "untrained")
    )
    assert pretrained[0].accuracy_std > 0
    assert pretrained[0].accuracy_mean == untrained[0].accuracy_mean
    assert pretrained[0].accuracy_std == untrained[0].accuracy_std


def test_one_draw_has_no_deviation():
    (row,) = evaluate_embeddings(*DATA, ["knn"], "untrained", labels_per_class=(5,), draws=1)
    assert row.accuracy_std == 0.0


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"labels_per_class": (31,)}, "class 0 has 30 training images, fewer than the 31"),
        ({"labels_per_class": (0,)}, "labels per class is 0"),
        ({"draws": 0}, "draws is 0"),
        ({"protocols": ["attentive"]}, "unknown protocol 'attentive'"),
    ],
)
def test_bad_requests(options, message):
    with pytest.raises(UserError, match=message):
        evaluate_embeddings(
            *DATA, **{"protocols": ["knn"], "backbone_name": "untrained", **options}
        )


def test_file_is_a_list_of_rows_and_comes_back(tmp_path):
    path = tmp_path / "run" / "evaluation.json"
    write_rows(path, ROWS)
    assert json.loads(path.read_text()) == [
        {
            "protocol": "knn",
            "labels": "all",
            "backbone": "pretrained",
            "accuracy_mean": 71.25,
            "accuracy_std": 0.0,
            "data": None,
            "step": None,
        },
        {
            "protocol": "linear",
            "labels": 10,
            "backbone": "untrained",
            "accuracy_mean": 40.5,
            "accuracy_std": 1.75,
            "data": "photos",
            "step": 300,
        },
    ]
    assert read_rows(path) == ROWS


def test_rows_of_older_files_have_no_data_and_no_step(tmp_path):
    old = {"protocol": "knn", "labels": "all", "backbone": "pretrained", "accuracy_mean": 71.25}
    path = tmp_path / "evaluation.json"
    path.write_text(json.dumps([{**old, "accuracy_std": 0.0}]))
    assert read_rows(path) == [EvaluationRow("knn", "all", "pretrained", 71.25, 0.0, None, None)]
    measure = {"protocol": "energy", "case": "a", "contender": "b", "metric": "AUROC"}
    path.write_text(json.dumps([{**measure, "mean": 0.5, "std": 0.1, "count": 3}]))
    expected = MeasureRow("energy", "a", "b", "AUROC", 0.5, 0.1, 3, data=None, step=None)
    assert read_measures(path) == [expected]


def test_a_write_that_can_not_be_serialised_leaves_the_old_file(tmp_path):
    path = tmp_path / "evaluation.json"
    write_rows(path, ROWS)
    with pytest.raises(TypeError):
        write_rows(path, [EvaluationRow("knn", "all", "pretrained", torch.tensor(1.0), 0.0)])
    assert read_rows(path) == ROWS


def test_a_failed_write_leaves_no_rubbish(tmp_path):
    directory_in_the_way = tmp_path / "evaluation.json"
    directory_in_the_way.mkdir()
    with pytest.raises(UserError, match="Is a directory; free space"):
        write_rows(directory_in_the_way, ROWS)
    assert list(tmp_path.iterdir()) == [directory_in_the_way]


@pytest.mark.parametrize("content", ["", "3", '[{"protocol": "knn"}]', '["knn"]'])
def test_files_that_are_no_rows(tmp_path, content):
    path = tmp_path / "evaluation.json"
    path.write_text(content)
    with pytest.raises(UserError, match="no list of evaluation rows"):
        read_rows(path)


def test_missing_file(tmp_path):
    with pytest.raises(UserError, match="evaluate the run first"):
        read_rows(tmp_path / "evaluation.json")
