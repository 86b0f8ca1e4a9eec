"""The sections of the protocols that measure something else than accuracies."""

import base64
import json
import math
from dataclasses import asdict, replace

import pytest
from test_report_browser import CHROMIUM, overflow, probe
from test_report_page import page_of, parse, table, text, with_class
from test_report_reading import png, write_run

from backfold.errors import UserError
from backfold.evaluation.measures import MeasureRow, write_measures
from backfold.evaluation.pictures import auroc_picture
from backfold.evaluation.severities import SEVERITIES, severity_case
from backfold.reporting.measure_tables import case_tables, measure_tables
from backfold.reporting.report import write_report

SEGMENTATION = [
    MeasureRow("segmentation", "without the image", "most frequent class", "mIoU (%)", 4.04, 0, 1),
    MeasureRow.of("segmentation", "decoder, frozen", "untrained", "mIoU (%)", [20.0, 22.0]),
    MeasureRow.of("segmentation", "decoder, frozen", "pretrained", "mIoU (%)", [30.0, 36.0]),
]
RESTORATION = [
    MeasureRow("restoration", "masking, severity 1", "energy, 1 step", "PSNR (dB)", 21.456, 2.0, 9),
    MeasureRow("restoration", "masking, severity 1", "identity", "PSNR (dB)", math.inf, 0.0, 9),
    MeasureRow("restoration", "masking, severity 2", "identity", "PSNR (dB)", 9.0, 1.0, 9),
    MeasureRow("restoration", "masking, severity 1", "identity", "SSIM", 0.98765, 0.01, 9),
]
SCORES = ("energy", "kNN distance", "file size", "total variation", "another")
ENERGY = [
    MeasureRow(
        "energy",
        severity_case(task, level),
        score,
        "AUROC",
        0.5 + 0.02 * level * number,
        0.01,
        100,
    )
    for task in ("masking", "denoising", "superresolution")
    for level in SEVERITIES
    for number, score in enumerate(SCORES)
]


@pytest.fixture
def folder(tmp_path):
    folder = write_run(tmp_path / "a-run", parts=False)
    (folder / "measures").mkdir()
    return folder


def write(folder, rows, picture=None, suffix="png"):
    protocol = rows[0].protocol
    write_measures(folder / "measures" / f"{protocol}.json", rows)
    if picture is not None:
        (folder / "measures" / f"{protocol}.{suffix}").write_bytes(picture)


def headings(page):
    return [text(h2) for h2 in page.iter("h2")]


def test_a_run_without_measures_has_no_such_sections(folder):
    assert not with_class(page_of(folder), "explanation")


def test_a_table_has_a_row_a_case_and_a_column_a_contender(folder):
    write(folder, SEGMENTATION)
    page = page_of(folder)
    names = ("most frequent class", "untrained", "pretrained")
    assert table(page, "Segmentation: mIoU (%)") == {
        "without the image4.0": {
            "case": "without the image", **dict(zip(names, ("4.0", "-", "-"), strict=True)),
        },
        "decoder, frozen-": {
            "case": "decoder, frozen",
            **dict(zip(names, ("-", "21.0 ± 1.4", "33.0 ± 4.2"), strict=True)),
        },
    }  # fmt: skip


def test_of_severities_a_table_has_a_row_a_contender_and_a_column_a_severity(folder):
    write(folder, RESTORATION)
    page = page_of(folder)
    psnr = list(table(page, "Restoration, masking: PSNR (dB)").values())
    assert psnr[0] == {
        "contender": "energy, 1 step",
        "severity 1": "21.46 ± 2.00",
        "severity 2": "-",
    }
    assert psnr[1]["severity 1"].startswith("not finite")
    assert psnr[1]["severity 2"] == "9.00 ± 1.00"
    (ssim,) = table(page, "Restoration, masking: SSIM").values()
    assert ssim == {"contender": "identity", "severity 1": "0.988 ± 0.010"}


def test_cases_side_by_side():
    psnr, ssim = case_tables(RESTORATION)
    assert psnr.headings == ("case", "energy, 1 step", "identity")
    assert psnr.rows[1] == ("masking, severity 2", "-", "9.00 ± 1.00")
    assert ssim.rows == (("masking, severity 1", "0.988 ± 0.010"),)


def test_each_protocol_says_what_its_numbers_mean(folder):
    write(folder, ENERGY)
    write(folder, SEGMENTATION)
    page = page_of(folder)
    shown = [
        title for title in headings(page) if title in ("Segmentation", "What the energy knows")
    ]
    assert shown == ["Segmentation", "What the energy knows"]
    explained = [text(paragraph) for paragraph in with_class(page, "explanation")]
    assert "mIoU" in explained[0]
    assert "0.5 is chance" in explained[1]
    assert all("±" in sentence for sentence in explained)


def test_the_data_and_the_step_are_said_where_they_are_known(folder):
    write(folder, [replace(row, data="squares", step=1500) for row in SEGMENTATION])
    write(folder, ENERGY)
    segmentation, energy = (text(part) for part in with_class(page_of(folder), "explanation"))
    assert segmentation.endswith("Measured on squares, step 1,500.")
    assert "Measured on" not in energy


def test_pictures_lie_in_the_page(folder):
    picture = auroc_picture(ENERGY).encode()
    write(folder, ENERGY, picture, "svg")
    write(folder, SEGMENTATION, png(90))
    shown = with_class(page_of(folder), "measured")
    kinds = [image.get("src").partition(";base64,") for image in shown]
    assert [kind for kind, _, _ in kinds] == ["data:image/png", "data:image/svg+xml"]
    assert [base64.b64decode(content) for _, _, content in kinds] == [png(90), picture]
    assert all(image.get("alt") for image in shown)


def test_long_tables_are_folded_and_short_ones_are_not(folder):
    write(folder, ENERGY)
    write(folder, SEGMENTATION)
    folded = [
        text(caption)
        for details in page_of(folder).iter("details")
        for caption in details.iter("caption")
    ]
    assert [caption.partition(":")[0] for caption in folded] == [
        f"What the energy knows, {task}" for task in ("masking", "denoising", "superresolution")
    ]


def test_names_are_shown_as_they_are(folder):
    evil = "<b>&case</b>"
    write(folder, [MeasureRow("energy", evil, evil, "AUROC", 0.5, 0.0, 1)])
    (row,) = table(page_of(folder), "What the energy knows").values()
    assert row == {"case": evil, evil: "0.500"}


def test_rows_of_no_repetition_have_no_spread():
    (found,) = measure_tables([MeasureRow("energy", "a", "b", "AUROC", 0.51234, 0.3, 1)])
    assert found.rows == (("a", "0.512"),)


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ("{", "is no list of measures"),
        (json.dumps([{"protocol": "energy"}]), "is no list of measures"),
        (json.dumps([asdict(ENERGY[0]) | {"mean": "high"}]), "mean"),
        (json.dumps([asdict(ENERGY[0]) | {"case": 3}]), "case"),
    ],
)
def test_broken_measures_are_named(folder, content, message):
    (folder / "measures" / "energy.json").write_text(content)
    with pytest.raises(UserError, match=message) as caught:
        write_report(folder)
    assert "\n" not in str(caught.value)
    assert "energy.json" in str(caught.value)


def test_shares_of_labels_are_shown(folder):
    rows = [
        {
            "protocol": "finetune", "labels": "1 %", "backbone": backbone,
            "accuracy_mean": accuracy, "accuracy_std": 1.0,
        }
        for backbone, accuracy in (("untrained", 40.0), ("pretrained", 50.0))
    ]  # fmt: skip
    (folder / "evaluation.json").write_text(json.dumps(rows))
    page = page_of(folder)
    (row,) = table(page, "Test accuracy").values()
    assert (row["protocol"], row["labels a class"]) == ("Fine-tuning", "1 %")
    assert row["pretrained"] == "50.0 ± 1.0"
    sentence = "Fine-tuning, 1 % of the labels: 50.0 % pretrained, 40.0 % untrained: a gain of"
    assert sentence in text(page)


@pytest.mark.skipif(CHROMIUM is None, reason="there is no chromium on the PATH")
def test_the_browser_shows_pictures_and_the_page_fits(folder, tmp_path):
    write(folder, ENERGY, auroc_picture(ENERGY).encode(), "svg")
    write(folder, SEGMENTATION, png(90))
    html = write_report(folder).read_text(encoding="utf-8")
    found = probe(html, tmp_path)
    assert found["errors"] == []
    assert found["requests"] == []
    assert len(found["pictures"]) == html.count("<img ") >= 2
    assert min(found["pictures"]) > 0
    assert overflow(html, 390, tmp_path) == 0
    assert parse(html) is not None
