import json
import math
import re
import shutil
import subprocess
from dataclasses import replace
from html import escape
from xml.etree import ElementTree

import pytest
from fake_run import FACTS, all_rows, entry, health, page_of, text, with_class, write_run

from backfold.errors import UserError
from backfold.evaluation.evaluate import PROTOCOLS
from backfold.evaluation.results import ABOUT, Row, write_rows
from backfold.reporting.report import write_report

FRAME = """<iframe style="border:0;width:{}px;height:800px" srcdoc="{}"></iframe><script>
addEventListener("load", () => {{
  const page = document.querySelector("iframe").contentDocument, root = page.documentElement;
  const colour = getComputedStyle(page.body).backgroundColor;
  const widths = [...page.images].map(picture => picture.naturalWidth);
  const excess = root.scrollWidth - root.clientWidth;
  document.body.dataset.found = [excess, Math.min(...widths) > 0, colour].join(";");
}});
</script>"""


@pytest.fixture(scope="module")
def whole(tmp_path_factory):
    """A run with all its parts; not to be changed."""
    return write_run(tmp_path_factory.mktemp("runs") / "a-run")


@pytest.fixture(scope="module")
def html(whole):
    return write_report(whole).read_text(encoding="utf-8")


def sections(page) -> dict:
    parts = ((part.find("h2"), part) for part in page.iter("section"))
    return {text(heading): part for heading, part in parts if heading is not None}


def test_every_protocol_has_its_words():
    assert list(ABOUT) == list(PROTOCOLS)


def test_a_whole_run_has_every_section_with_its_words_pictures_and_notes(whole, html):
    page = ElementTree.fromstring(html)
    found = sections(page)
    titles = [protocol.title for name, protocol in ABOUT.items() if name != "lowshot"]
    assert [title for title in found if title in titles] == titles
    assert "What is missing" not in found
    health, paid = map(text, with_class(page, "headline"))
    assert health.startswith("Yes, but watch 1 of 8")
    assert paid.startswith("In part: pixels are not beaten in knn, 10 labels a class")
    assert [len(list(found[t].iter("img"))) for t in titles] == [0, 0, 2, 0, 0, 1, 2, 3, 1]
    facts = text(with_class(page, "facts")[0])
    assert all(word in facts for word in ("5,526,528", "28, 30", FACTS["command"], "torch 2.11.0"))
    assert page.find(".//pre").text == (whole / "config.yaml").read_text()
    words = text(found[titles[0]])
    assert ABOUT["knn"].sentence in words
    assert "Measured on squares, step 1,200." in words
    assert words.count("test images may be among those pretrained on") == 1
    assert words.count("layer -2, max; C 0.01") == 1
    assert text(found[titles[0]].find(".//tbody/tr")).startswith("all labels81.2 ± 1.2")


def test_each_data_set_has_a_section_of_its_own(tmp_path):
    folder = write_run(tmp_path / "run", parts=False)
    rows = [Row("knn", "all labels", "pixels", "accuracy (%)", 50.0, 1.0, 1, each) for each in "ab"]
    write_rows(folder / "evaluation.json", rows)
    shown = [text(part) for part in page_of(folder).iter("section")]
    shown = [words for words in shown if words.startswith(ABOUT["knn"].title)]
    assert [words.count("Measured on a.") for words in shown] == [1, 0]
    assert [words.count("Measured on b.") for words in shown] == [0, 1]


def test_a_bare_folder_says_what_is_missing_and_how_to_make_it(tmp_path):
    folder = write_run(tmp_path / "a bare run", parts=False, facts={"steps": 900})
    page = page_of(folder)
    evaluate = f"backfold evaluate --checkpoint '{folder}'"
    gaps = dict(text(li).split(": ", 1) for li in sections(page)["What is missing"].iter("li"))
    assert gaps.pop("evaluation.json") == evaluate
    names = ["300 steps of training", "metrics.csv", "health.json", "previews"]
    assert gaps == dict.fromkeys([*names, "backbone.safetensors"], FACTS["command"])
    assert text(with_class(page, "answers")[0]).count("Not known") == 2


def test_values_that_are_not_finite_missing_repeated_or_half_written(tmp_path):
    folder = write_run(tmp_path / "a-run")
    broken = entry(auroc=math.nan, rank_me=None, knn=None)
    broken["tasks"] = {"masking": {"psnr_corrupted_db": 12.0, "psnr_restored_db": math.nan}}
    energies = {"masking": {"clean": [math.nan, 1.0], "corrupted": [], "restored": [None]}}
    content = {"history": [entry(600, knn=33.0), entry(1200), broken], "energies": energies}
    (folder / "health.json").write_text(json.dumps(content))
    # A resumed run repeats a step, and the last line is still being written.
    (folder / "metrics.csv").write_text("step,loss,lr\n10,5,1\n20,4,2\n20,nan,\n40,0.1")
    rows = [replace(row, mean=math.nan, std=0.0) for row in all_rows()]
    write_rows(folder / "evaluation.json", [*rows, replace(rows[0], case="x", mean=1e308)])
    preview = folder / "previews" / "step-1200-masking.png"
    preview.write_bytes(preview.read_bytes()[:-30])
    words = text(page_of(folder).find("body"))
    assert re.search(r"\b(nan|inf|None)\b", words) is None
    assert "last: 33 % at step 600" in words
    assert "last: 5 at step 10; missing or not finite: 1" in words
    assert f"{preview.name}, which can't be read" in words


@pytest.mark.parametrize(
    ("name", "content"),
    [
        ("run.json", None),
        ("run.json", "{"),
        ("config.yaml", "\xff\xfe"),
        ("run.json", "[" * 100_000),
        ("run.json", '{"steps": "many"}'),
        ("health.json", '{"history": [{"step": 1, "tasks": {"masking": {"auroc": []}}}]}'),
        ("health.json", '{"energies": {"masking": {"clean": 1}}}'),
        ("evaluation.json", '[{"a\\nb": 1}]'),
        ("metrics.csv", "step,loss\n1,2\n2,low\n"),
    ],
)
def test_a_broken_file_is_one_line_with_its_name(tmp_path, name, content):
    folder = write_run(tmp_path / "a-run")
    (folder / name).unlink()
    if content is not None:
        (folder / name).write_text(content, encoding="latin-1")
    (folder / "report.html").write_text("old")
    with pytest.raises(UserError, match=name) as caught:
        write_report(folder)
    assert "\n" not in str(caught.value)
    assert (folder / "report.html").read_text() == "old"


def test_texts_from_the_run_cannot_become_markup(tmp_path):
    evil = '<script>alert("1")</script><img src=x onerror=alert(1)>&amp;$'
    facts = {name: evil for name, value in FACTS.items() if isinstance(value, str)}
    folder = write_run(tmp_path / "<script>alert(2)<b>'\"", facts=facts | {evil: {evil: [evil]}})
    (folder / "config.yaml").write_text(f"a: |\n  {evil}\n")
    content = health(entry(tasks={evil: entry()["tasks"]["masking"] | {evil: 1.0}}))
    content["energies"] = {evil: content["energies"]["masking"]}
    (folder / "health.json").write_text(json.dumps(content))
    rows = [
        Row(protocol, case, name, metric, 1.0, 0.0, 1, evil, 1, evil)
        for protocol in (evil, "knn", "layers")
        for case in (evil, f"{evil}, severity 1", f"{evil}, layer -1, {evil}")
        for name in (evil, "pretrained", "pretrained over before")
        for metric in (evil, "accuracy (%)")
    ]
    write_rows(folder / "evaluation.json", rows)
    preview = folder / "previews" / "step-1200-masking.png"
    preview.rename(preview.with_name("step-1-<b>\"'.png"))
    page = page_of(folder)
    assert not {"script", "b"} & {element.tag for element in page.iter()}
    assert text(page.find("body/header/h1")) == folder.name
    for place in ("answers", "facts", "notes", "scroll", "plots"):
        assert evil in " ".join(map(text, with_class(page, place))), place
    assert evil in page.find(".//pre").text
    assert evil in sections(page)


def test_the_same_run_gives_the_same_bytes_which_ask_for_nothing_outside(whole, html, tmp_path):
    assert write_report(whole, tmp_path / "else" / "where.html").read_text("utf-8") == html
    assert re.search(r"https?://|@import|url\(|<script|<link|<iframe", html) is None
    assert "content=\"default-src 'none'; img-src data:; style-src 'unsafe-inline'\"" in html


@pytest.mark.skipif(not shutil.which("chromium"), reason="there is no chromium on the PATH")
def test_in_a_browser_every_picture_loads_and_the_page_fits_in_light_and_dark(html, tmp_path):
    html, page, colours = html.replace("<details>", "<details open>"), tmp_path / "f.html", {}
    for width in (375, 1280):  # Chromium's own windows are 500 pixels wide at least
        page.write_text(FRAME.format(width, escape(html)), encoding="utf-8")
        for scheme in (0, 1):
            flags = [f"--blink-settings=preferredColorScheme={scheme}", "--window-size=1400,900"]
            flags += ["--headless", "--no-sandbox", "--disable-gpu", "--dump-dom"]
            command = ["chromium", *flags, f"--user-data-dir={tmp_path / 'profile'}", page.as_uri()]
            done = subprocess.run(command, capture_output=True, text=True, timeout=120, check=True)
            *found, colours[scheme] = re.search(r'found="(.*?)"', done.stdout)[1].split(";")
            assert found == ["0", "true"]
    assert colours[0] != colours[1]
