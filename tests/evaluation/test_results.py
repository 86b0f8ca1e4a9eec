"""Rows, their file, and the tables that pivot them."""

import itertools
import json
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch

from backfold.errors import UserError
from backfold.evaluation import results
from backfold.evaluation.results import Row, accuracy_rows, data_name, read_rows, write_rows

ROWS = [
    Row("knn", "all labels", "pretrained", "accuracy (%)", 71.25, 0.0, 1),
    Row("energy", "a", "b", "AUROC", 0.5, 0.1, 3, "photos", 300, "chosen"),
]


def test_differences_are_paired_draw_by_draw():
    right = torch.rand(3, 5, 50, generator=torch.Generator().manual_seed(0)) < 0.6
    names = ("pretrained", "before", "pixels")
    correct = {name: list(draws) for name, draws in zip(names, right, strict=True)}
    rows = {r.contender: r for r in accuracy_rows("knn", "case", correct, {"before": "a note"})}
    assert list(rows) == [*names, "pretrained over before", "pretrained over pixels"]
    accuracies = 100 * right.double().mean(dim=2).numpy()
    expected = [*accuracies, *(accuracies[0] - accuracies[1:])]
    for row, values in zip(rows.values(), expected, strict=True):
        assert (row.mean, row.std) == pytest.approx((values.mean(), values.std(ddof=1)))
        assert (row.count, row.note) == (5, "a note" if row.contender == "before" else "")


def test_one_draws_spread_is_the_standard_error_over_the_images():
    both, ours, theirs, neither = 30, 12, 5, 53
    first = torch.tensor([1] * both + [1] * ours + [0] * theirs + [0] * neither).bool()
    second = torch.tensor([1] * both + [0] * ours + [1] * theirs + [0] * neither).bool()
    rows = accuracy_rows("knn", "case", {"a": [first], "b": [second]})
    # Of n images, k right: the deviation of a Bernoulli variable over sqrt(n), unbiased.
    binomial = [100 * (k / 100 * (1 - k / 100) / 99) ** 0.5 for k in (both + ours, both + theirs)]
    # McNemar: only images that one of them has right tell them apart.
    paired = 100 * ((ours + theirs - (ours - theirs) ** 2 / 100) / 99 / 100) ** 0.5
    assert [row.mean for row in rows] == pytest.approx([42, 35, 7])
    assert [row.std for row in rows] == pytest.approx([*binomial, paired])
    assert {row.count for row in rows} == {1}
    assert accuracy_rows("knn", "case", {"a": [first[:1]]})[0].std == 0


GOOD = {"protocol": "p", "case": "a", "contender": "b", "metric": "c", "mean": 1.0, "std": 0.0}


@pytest.mark.parametrize(
    "content",
    ["", "3", '["knn"]', "[null]", "\xff", json.dumps([GOOD])]
    + [json.dumps([{**GOOD, "count": 1, **bad}]) for bad in (
        {"mean": "1"}, {"count": None}, {"data": 3}, {"step": "1"}, {"accuracy": 3})],
)  # fmt: skip
def test_files_come_back_or_are_named(tmp_path, content):
    path = tmp_path / "evaluation.json"
    with pytest.raises(UserError, match=r"there is no .*evaluation\.json; evaluate"):
        read_rows(path)
    write_rows(path, ROWS)
    assert read_rows(path) == ROWS
    path.write_bytes(content.encode("latin-1"))
    with pytest.raises(UserError, match=r"evaluation\.json is no list of evaluation rows"):
        read_rows(path)


def test_new_rows_replace_those_of_the_same_protocol_case_and_data(tmp_path):
    path = tmp_path / "evaluation.json"
    grid = [Row(p, c, n, "m", 0.0, 0.0, 1) for p, c, n in itertools.product("pq", "cd", "xy")]
    new, other = [replace(grid[0], mean=1.0)], [replace(grid[0], data="elsewhere")]
    for given in (grid, other, new, new):
        results.add_rows(path, given)
    assert read_rows(path) == [*grid[2:], *other, *new]


def cells(rows, severity=None):
    """By caption, row and column heading, the text of a cell."""
    return {
        (table.caption.removesuffix(", mean ± spread"), row[0], column): text
        for table in results.tables_of(rows, severity)
        for row in table.rows
        for column, text in zip(table.headings[1:], row[1:], strict=True)
    }


def test_each_number_stands_in_its_cell():
    draw = iter(np.random.default_rng(0).permutation(1000) / 10)
    cases = ("all labels", "blur, severity 1", "blur, severity 4", "noise, severity 4")
    rows, whole, alone = [], {}, {}
    for metric, name, case in itertools.product(("accuracy (%)", "PSNR (dB)"), "ab", cases):
        rows.append(Row("p", case, name, metric, next(draw), 0.0, 1))
        corruption, _, column = case.partition(", ")
        key = (f"{corruption}: {metric}", name, column) if column else (metric, case, name)
        whole[key] = rows[-1].mean
        if "severity 1" not in case:
            alone[metric, case, name] = rows[-1].mean
    assert {key: float(text) for key, text in cells(rows).items()} == whole
    assert {key: float(text) for key, text in cells(rows, severity=4).items()} == alone
    assert cells(rows[1:], severity=4)["accuracy (%)", "all labels", "a"] == "-"


def test_names_of_data_hold_no_path(tmp_path, monkeypatch):
    assert data_name(None) == "embedded sample"
    assert data_name("/home/somebody/photos") == data_name(Path("of/some/body/photos/")) == "photos"
    assert data_name("/mnt/shards/{000..012}.tar") == "{000..012}.tar"
    assert data_name("somebody/cats/small") == "somebody/cats/small"  # on the hub
    (tmp_path / "somebody" / "cats").mkdir(parents=True)
    monkeypatch.chdir(tmp_path)
    assert data_name("somebody/cats") == "cats"
    monkeypatch.chdir("somebody/cats")
    assert (data_name("."), data_name("..")) == ("cats", "somebody")
