import re
from xml.etree import ElementTree

import matplotlib as mpl
import pytest

from backfold.evaluation import adaptation, energy_tests
from backfold.evaluation.measures import MeasureRow
from backfold.evaluation.pictures import adaptation_picture, auroc_picture, psnr_picture
from backfold.evaluation.severities import SEVERITIES, severity_case


def rows_of(protocol, metric, names, contenders):
    return [
        MeasureRow(protocol, severity_case(name, level), contender, metric, 0.1 * level, 0.02, 9)
        for name in names
        for level in SEVERITIES
        for contender in contenders
    ]


AUROC = [
    *rows_of("energy", "AUROC", ["masking", "denoising"], ["energy", "file size"]),
    MeasureRow("energy", energy_tests.ONE_CLASS, "energy", "AUROC", 0.5, 0.1, 10),
    MeasureRow("energy", "test images against textures", "energy", "AUROC", 0.9, 0.0, 9),
]
PSNR = rows_of("restoration", "PSNR (dB)", ["sorting"], ["energy, 1 step", "identity"])
ACCURACY = [
    *rows_of(
        "adaptation",
        adaptation.ACCURACY,
        ["noise", "blur", "gray"],
        [adaptation.UNCHANGED, adaptation.RESTORED],
    ),
    *(
        MeasureRow("adaptation", adaptation.CLEAN, who, adaptation.ACCURACY, 90, 1, 9)
        for who in (adaptation.UNCHANGED, adaptation.RESTORED)
    ),
]
CASES = [
    (auroc_picture, AUROC, 3),
    (psnr_picture, PSNR, 1),
    (adaptation_picture, ACCURACY, 3),
]


def panels(svg):
    ElementTree.fromstring(svg)
    return len(re.findall(r'id="axes_\d+"', svg))


@pytest.mark.parametrize(("draw", "rows", "count"), CASES)
def test_a_panel_for_each_task(draw, rows, count):
    before = dict(mpl.rcParams)
    svg = draw(rows)
    assert panels(svg) == count
    assert draw(rows) == svg
    assert dict(mpl.rcParams) == before


@pytest.mark.parametrize(("draw", "rows", "count"), CASES)
def test_rows_of_other_protocols_change_nothing(draw, rows, count):
    others = [row for _, more, _ in CASES for row in more if row.protocol != rows[0].protocol]
    assert panels(draw(others + rows)) == count
    assert draw(others + rows) == draw(rows)


def test_numbers_show():
    higher = [MeasureRow(**{**vars(row), "mean": row.mean + 1}) for row in PSNR]
    assert psnr_picture(higher) != psnr_picture(PSNR)


@pytest.mark.parametrize("draw", [auroc_picture, psnr_picture, adaptation_picture])
def test_no_rows(draw):
    with pytest.raises(ValueError, match="nothing to draw"):
        draw([MeasureRow("segmentation", "frozen, linear", "pretrained", "mIoU (%)", 40, 1, 3)])
