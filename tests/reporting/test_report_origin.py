"""The table of accuracies says what was measured on which data, at which step."""

from itertools import product

from backfold.evaluation import EvaluationRow
from backfold.reporting.tables import evaluation_table

BACKBONES = ("untrained", "pretrained")


def rows(*origins):
    """Of both backbones, a number of labels for each origin."""
    return [
        EvaluationRow("knn", labels, backbone, 70.0, 0.0, *origin)
        for (labels, origin), backbone in product(enumerate(origins, 1), BACKBONES)
    ]


def test_rows_of_one_origin_are_described_in_the_caption():
    table = evaluation_table(rows(("photos", 1500), ("photos", 1500)))
    assert table.caption.endswith("draws of the labels. Measured on photos, step 1,500.")
    assert table.headings[-1] == "reading"


def test_rows_that_differ_have_a_column():
    table = evaluation_table(rows(("photos", 1500), ("photos", 3000), ("prints", 3000), ()))
    assert "Measured on" not in table.caption
    assert table.headings[-2:] == ("reading", "measured on")
    assert [row[-1] for row in table.rows] == [
        "photos, step 1,500", "photos, step 3,000", "prints, step 3,000", "-",
    ]  # fmt: skip
    assert {len(row) for row in table.rows} == {len(table.headings)}


def test_backbones_that_differ_are_both_told():
    untrained, pretrained = rows(("photos", 1500))[0], rows(("prints", 10))[1]
    table = evaluation_table([untrained, pretrained])
    assert table.caption.endswith("Measured on photos, step 1,500; prints, step 10.")


def test_rows_of_older_files_are_shown_as_they_were():
    table = evaluation_table(rows((), ()))
    assert table.caption.endswith("draws of the labels.")
    assert table.headings[-1] == "reading"
