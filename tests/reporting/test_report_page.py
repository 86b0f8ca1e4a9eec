import json
import math
import re
from html.parser import HTMLParser
from xml.etree.ElementTree import Element

import pytest
from test_report_reading import EVALUATION, FACTS, health, health_entry, write_run

from backfold.errors import UserError
from backfold.reporting.report import write_report

VOID = {"meta", "img", "br", "hr", "link", "input", "base"}


class TreeParser(HTMLParser):
    """The page as a tree; every end tag must match the last open one."""

    def __init__(self):
        super().__init__()
        self.root = Element("root")
        self.open = [self.root]

    def handle_starttag(self, tag, attrs):
        element = Element(tag, {name: value or "" for name, value in attrs})
        self.open[-1].append(element)
        if tag not in VOID:
            self.open.append(element)

    def handle_endtag(self, tag):
        assert self.open.pop().tag == tag

    def handle_data(self, data):
        parent = self.open[-1]
        if len(parent):
            parent[-1].tail = (parent[-1].tail or "") + data
        else:
            parent.text = (parent.text or "") + data


def parse(html: str) -> Element:
    parser = TreeParser()
    parser.feed(html)
    parser.close()
    assert parser.open == [parser.root]
    return parser.root


def text(element: Element) -> str:
    return " ".join("".join(element.itertext()).split())


def with_class(root: Element, name: str) -> list[Element]:
    return [element for element in root.iter() if name in element.get("class", "").split()]


def table(root: Element, caption: str) -> dict[str, dict[str, str]]:
    """Cells by the row's heading (several headings joined) and the column's heading."""
    (found,) = [t for t in root.iter("table") if text(t.find("caption")).startswith(caption)]
    headings = [text(th) for th in found.find("thead").iter("th")]
    rows = [[text(cell) for cell in tr] for tr in found.find("tbody").iter("tr")]
    return {row[0] + row[1]: dict(zip(headings, row, strict=True)) for row in rows}


def sentences(root: Element) -> list[str]:
    return [text(li) for answer in with_class(root, "answer") for li in answer.iter("li")]


@pytest.fixture
def folder(tmp_path):
    return write_run(tmp_path / "a-run")


@pytest.fixture
def bare(tmp_path):
    """A run without plots, which take time to draw."""
    return write_run(tmp_path / "a-run", parts=False)


@pytest.fixture(scope="module")
def whole(tmp_path_factory):
    """The HTML of a run with all its parts, and its folder; not to be changed."""
    folder = write_run(tmp_path_factory.mktemp("runs") / "a-run")
    return write_report(folder).read_text(encoding="utf-8"), folder


@pytest.fixture
def page(whole) -> Element:
    return parse(whole[0])


def page_of(folder) -> Element:
    return parse(write_report(folder).read_text(encoding="utf-8"))


def test_the_default_place_and_another(bare, tmp_path):
    assert write_report(bare) == bare / "report.html"
    other = tmp_path / "else" / "where.html"
    assert write_report(bare, other) == other
    assert other.read_bytes() == (bare / "report.html").read_bytes()
    assert [path.name for path in other.parent.iterdir()] == ["where.html"]


def test_a_place_that_cannot_be_written(bare, tmp_path):
    (tmp_path / "file").touch()
    for out in (tmp_path, tmp_path / "file" / "report.html"):
        with pytest.raises(UserError, match="can't write") as caught:
            write_report(bare, out)
        assert "\n" not in str(caught.value)


def test_a_broken_run_leaves_the_old_report(bare):
    before = write_report(bare).read_bytes()
    (bare / "health.json").write_text("{")
    with pytest.raises(UserError, match="broken JSON"):
        write_report(bare)
    assert (bare / "report.html").read_bytes() == before


def test_the_first_screen_answers_in_words(page):
    first = next(iter(page.find("html/body/main")))
    assert [text(h2) for h2 in first.iter("h2")] == ["Is the run healthy?", "Did pretraining pay?"]
    assert [text(p) for p in with_class(first, "headline")] == [
        "Yes, but watch 1 of 8 measures",
        "Yes: better than the untrained backbone in the only comparison",
    ]
    assert sentences(page) == [
        "Training finished: 1,200 steps.",
        "Restored images are 4.2 dB closer to the clean ones than the corrupted ones (masking).",
        "Restored images are 0.4 dB further from the clean ones than the corrupted ones "
        "(denoising).",
        "To watch: Restoration against doing nothing.",
        "Linear probe, all labels: 81.2 % pretrained, 76.0 % untrained: a gain of 5.2 points.",
    ]


def test_the_health_panel(page):
    panel = with_class(page, "panel")[0]
    shown = {
        text(item.find("h3")): (
            text(with_class(item, "value")[0]),
            text(with_class(item, "state")[0]),
        )
        for item in panel
    }
    assert shown == {
        "Restoration against doing nothing": ("+1.9 dB on average", "! watch"),
        "Restoration against the mean fill": ("+6.4 dB on average", "✓ good"),
        "Energy tells corrupted from clean (AUROC)": ("0.913", "✓ good"),
        "Effective rank of the embeddings (RankMe)": ("48.0 of 192 (25.0 %)", "✓ good"),
        "Training loss": ("0.6 to 0.2", "✓ good"),
        "Gradient norm": ("1 at the end", "✓ good"),
        "Waiting for images": ("2.0 % (median)", "✓ good"),
        "kNN accuracy on held-out images": ("70.0 % to 74.0 %", "✓ good"),
    }
    assert all("Good: " in text(item) for item in panel)


def test_the_tables_show_the_sources_numbers(folder):
    entry = health_entry()
    entry["tasks"]["denoising"] |= {
        "patches_placed_right_corrupted": 0.5,
        "patches_placed_right_restored": 0.756,
        "chroma_error_corrupted": 0.4321,
        "chroma_error_restored": 0.1234,
    }
    (folder / "health.json").write_text(json.dumps(health() | {"history": [entry]}))
    draws = [
        {
            "protocol": "knn",
            "labels": 10,
            "backbone": name,
            "accuracy_mean": mean,
            "accuracy_std": s,
        }
        for name, mean, s in (("pretrained", 50.04, 1.26), ("untrained", 52.0, 2.0))
    ]
    (folder / "evaluation.json").write_text(json.dumps(EVALUATION + draws))
    page = page_of(folder)
    tasks = table(page, "Pretext tasks on held-out images, step 1,200.")
    assert list(tasks.values()) == [
        {
            "task": "masking",
            "gain (dB)": "+4.20",
            "PSNR corrupted (dB)": "12.00",
            "PSNR restored (dB)": "16.20",
            "PSNR mean fill (dB)": "11.50",
            "energy gap": "4.25",
            "AUROC": "0.913",
            "patches placed right": "not measured",
            "error of the colours": "not measured",
        },
        {
            "task": "denoising",
            "gain (dB)": "-0.40",
            "PSNR corrupted (dB)": "20.00",
            "PSNR restored (dB)": "19.60",
            "PSNR mean fill (dB)": "11.50",
            "energy gap": "4.25",
            "AUROC": "0.913",
            "patches placed right": "50.0 % to 75.6 %",
            "error of the colours": "0.432 to 0.123",
        },
    ]
    names = ("protocol", "labels a class", "untrained", "pretrained", "difference", "reading")
    assert [tuple(row.values()) for row in table(page, "Test accuracy").values()] == [
        ("Linear probe", "all", "76.0", "81.2", "+5.2", "clearly better"),
        ("kNN", "10", "52.0 ± 2.0", "50.0 ± 1.3", "-2.0", "no clear difference"),
    ]
    assert all(tuple(row) == names for row in table(page, "Test accuracy").values())


def test_columns_that_no_task_has_are_left_out(page):
    (row, _) = table(page, "Pretext tasks").values()
    assert "patches placed right" not in row
    assert "error of the colours" not in row


def test_what_was_run(page, whole):
    rows = [div for facts in with_class(page, "facts") for div in facts]
    assert {text(row.find("dt")): text(row.find("dd")) for row in rows} == {
        "backbone": FACTS["backbone"],
        "parameters": "5,526,528",
        "pretext tasks": "masking, denoising",
        "data": FACTS["data"],
        "training images": "57,000",
        "held-out images": "512",
        "image size": "28 x 30 pixels, channels: 1",
        "mean of the channels": "0.286",
        "deviation of the channels": "0.353",
        "steps": "1,200 of 1,200",
        "epochs": "5.4",
        "time in training": "1 h 29 min",
        "started": FACTS["started"],
        "device": "cpu",
        "hardware": "a machine",
        "precision": "32-true",
        "versions": "backfold 0.1.0, torch 2.11.0",
        "command": FACTS["command"],
        "also in the folder": "backbone.safetensors, checkpoints",
    }
    assert page.find(".//pre").text == (whole[1] / "config.yaml").read_text()


def missing(page: Element) -> list[str]:
    found = [s for s in page.iter("section") if s.get("aria-labelledby") == "missing"]
    return [text(item) for section in found for item in section.iter("li")]


def test_a_bare_folder_says_what_is_missing_and_how_to_make_it(tmp_path):
    folder = write_run(tmp_path / "a bare run", parts=False)
    page = page_of(folder)
    trained = f"training writes it ({FACTS['command']})"
    evaluate = f"backfold evaluate --checkpoint '{folder}'"
    assert missing(page) == [
        f"metrics.csv: {trained}",
        f"health.json: {trained}",
        f"previews: {trained}",
        f"backbone.safetensors: {trained}",
        f"evaluation.json: evaluation writes it ({evaluate})",
    ]
    assert list(page.iter("img")) == []
    assert list(page.iter("table")) == []
    assert [text(p) for p in with_class(page, "headline")] == [
        "Not known: nothing was measured",
        "Not known: the run was not evaluated",
    ]
    assert f"Evaluate it: {evaluate}" in sentences(page)


def test_nothing_is_missing_from_a_whole_run(page):
    assert missing(page) == []


def test_a_history_without_energies(bare):
    (bare / "health.json").write_text(json.dumps({"history": []}))
    assert not any("energies" in gap for gap in missing(page_of(bare)))
    (bare / "health.json").write_text(json.dumps({"history": [{"step": 1}]}))
    assert any(gap.startswith("energies in health.json: ") for gap in missing(page_of(bare)))


def test_a_broken_preview_is_said(bare):
    (bare / "previews").mkdir()
    (bare / "previews" / "step-0001200-masking.png").write_bytes(b"no picture")
    assert "previews" not in [gap.split(":")[0] for gap in missing(page_of(bare))]
    assert [gap for gap in missing(page_of(bare)) if gap.startswith("previews/")] == [
        "previews/step-0001200-masking.png, which can't be read: "
        f"training writes it ({FACTS['command']})"
    ]


def test_values_that_are_not_finite_or_missing_are_said_in_words(folder):
    entry = health_entry(auroc=math.nan, rank_me=None, knn=None)
    entry["tasks"] = {"masking": {"psnr_corrupted_db": 12.0, "psnr_restored_db": math.nan}}
    energies = {"masking": {"clean": [math.nan, 1.0], "corrupted": [], "restored": [None]}}
    (folder / "health.json").write_text(json.dumps({"history": [entry], "energies": energies}))
    (folder / "metrics.csv").write_text("step,loss,gradient_norm\n1,0.5,nan\n2,nan,inf\n")
    unmeasured = EVALUATION[0] | {"accuracy_mean": None, "accuracy_std": None}
    (folder / "evaluation.json").write_text(
        json.dumps([unmeasured, EVALUATION[1] | {"accuracy_mean": math.nan}])
    )
    page = page_of(folder)
    words = text(page.find("html/body"))
    assert re.search(r"\b(nan|inf|None)\b", words) is None
    (row,) = table(page, "Pretext tasks").values()
    assert row["PSNR restored (dB)"] == "not finite"
    assert "PSNR mean fill (dB)" not in row
    (row,) = table(page, "Test accuracy").values()
    assert (row["untrained"], row["pretrained"]) == ("not measured", "not finite")
    assert with_class(page, "headline")[0].text.startswith("No: ")
    assert "2 energies are not finite" in words


def test_the_same_run_gives_the_same_bytes(whole):
    html, folder = whole
    assert write_report(folder).read_text(encoding="utf-8") == html
