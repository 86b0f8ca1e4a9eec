from rich.console import Console

from backfold.evaluation import EvaluationRow, render_table


def printed_cells(rows):
    console = Console(width=120)
    with console.capture() as capture:
        console.print(render_table(rows))
    lines = [line for line in capture.get().splitlines() if line.startswith("│")]
    return [[cell.strip() for cell in line.strip("│").split("│")] for line in lines]


def test_one_line_for_each_protocol_and_number_of_labels():
    table = render_table(
        [
            EvaluationRow("knn", "all", "pretrained", 71.26, 0.0),
            EvaluationRow("knn", 10, "pretrained", 50.0, 2.04),
            EvaluationRow("linear", "all", "pretrained", 80.0, 0.0),
            EvaluationRow("knn", "all", "untrained", 60.0, 0.0),
            EvaluationRow("knn", 10, "untrained", 52.5, 1.5),
        ]
    )
    headings = [column.header for column in table.columns]
    assert headings == ["protocol", "labels a class", "untrained", "pretrained", "difference"]
    assert [list(column.cells) for column in table.columns] == [
        ["knn", "knn", "linear"],
        ["all", "10", "all"],
        ["60.0", "52.5 ± 1.5", "-"],
        ["71.3", "50.0 ± 2.0", "80.0"],
        ["+11.3", "-2.5", "-"],
    ]


def test_the_table_prints():
    rows = [EvaluationRow("linear", 10, "pretrained", 80.04, 0.26)]
    assert printed_cells(rows) == [["linear", "10", "-", "80.0 ± 0.3", "-"]]
