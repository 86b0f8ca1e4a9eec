"""What rows say about the data and the checkpoint that they were measured on."""

from dataclasses import replace
from pathlib import Path

import pytest

from backfold.evaluation.measures import MeasureRow
from backfold.evaluation.origin import data_name, with_origin
from backfold.evaluation.protocol import EvaluationRow


@pytest.mark.parametrize(
    ("data", "name"),
    [
        (None, "embedded sample"),
        ("/home/somebody/photos", "photos"),
        (Path("of/somebody/photos/cats/"), "cats"),
        ("/mnt/shards/{000..012}.tar", "{000..012}.tar"),
        ("somebody/cats", "somebody/cats"),  # on the hub: nothing lies here
        ("somebody/cats/small", "somebody/cats/small"),
    ],
)
def test_names_hold_no_path(data, name):
    assert data_name(data) == name


def test_folders_that_lie_here_are_named_without_their_parents(tmp_path, monkeypatch):
    (tmp_path / "somebody" / "cats").mkdir(parents=True)
    monkeypatch.chdir(tmp_path)
    assert data_name("somebody/cats") == "cats"
    monkeypatch.chdir("somebody/cats")
    assert data_name(".") == "cats"
    assert data_name("..") == "somebody"


def test_rows_differ_in_data_and_step_alone():
    accuracy = EvaluationRow("knn", "all", "pretrained", 70.0, 0.0)
    measure = MeasureRow("energy", "a", "b", "AUROC", 0.5, 0.1, 3)
    assert with_origin([accuracy], "/data/photos", 40) == [
        EvaluationRow("knn", "all", "pretrained", 70.0, 0.0, "photos", 40)
    ]
    assert with_origin([measure], None, 0) == [replace(measure, data="embedded sample", step=0)]
