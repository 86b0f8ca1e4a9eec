import base64
import io
import itertools
import json
import math
import re
from dataclasses import asdict, replace
from importlib import resources
from xml.etree import ElementTree

import pytest
from fake_run import (
    FACTS,
    all_rows,
    entry,
    health,
    page_of,
    parse,
    png,
    text,
    with_class,
    write_run,
)
from PIL import Image

from backfold.errors import UserError
from backfold.evaluation.evaluate import PROTOCOLS
from backfold.evaluation.results import Row, write_rows
from backfold.reporting.report import read_run, write_report

ROW = asdict(all_rows()[0])


@pytest.fixture(scope="module")
def whole(tmp_path_factory):
    """The HTML of a run with all its parts, and its folder; not to be changed."""
    folder = write_run(tmp_path_factory.mktemp("runs") / "a-run")
    return write_report(folder).read_text(encoding="utf-8"), folder


@pytest.fixture
def page(whole):
    return parse(whole[0])


@pytest.fixture
def folder(tmp_path):
    return write_run(tmp_path / "a-run")


@pytest.fixture
def bare(tmp_path):
    return write_run(tmp_path / "a-run", parts=False)


def sections(page) -> dict:
    return {
        text(part.find("h2")): part for part in page.iter("section") if part.find("h2") is not None
    }


def test_a_whole_run_has_every_section_and_lacks_nothing(page):
    shown = list(sections(page))
    titles = [p.title for name, p in PROTOCOLS.items() if name != "lowshot"]
    assert [title for title in shown if title in titles] == titles
    assert "What is missing" not in shown
    first = with_class(page, "headline")
    assert text(first[0]).startswith("Yes, but watch 1 of 8")
    assert text(first[1]).startswith("In part: pixels are not beaten in kNN, 10 labels a class")


def test_a_protocol_says_what_it_means_on_what_and_each_note_once(page):
    part = sections(page)[PROTOCOLS["knn"].title]
    words = text(part)
    assert PROTOCOLS["knn"].sentence in words
    assert "Measured on squares, step 1,200." in words
    assert words.count("test images may be among those pretrained on") == 1
    assert words.count("layer -2, max; C 0.01") == 1
    headings = [text(th) for th in part.find(".//thead").iter("th")]
    assert headings[:3] == ["case", "pretrained", "before"]
    cells = [text(td) for td in part.find(".//tbody/tr").iter("td")]
    assert cells[0].startswith("81.2")
    assert cells[3].startswith("+11.2")


def test_plots_pictures_and_folded_tables_are_where_their_protocol_is(page):
    found = sections(page)
    counts = {
        name: len(list(found[PROTOCOLS[name].title].iter("img")))
        for name in PROTOCOLS
        if PROTOCOLS[name].title in found
    }
    assert counts["layers"] == 2
    assert counts["energy"] == 2
    assert counts["restoration"] == 3
    assert (counts["adaptation"], counts["segmentation"], counts["knn"]) == (1, 1, 0)
    folded = {name for name in counts if found[PROTOCOLS[name].title].find("details") is not None}
    assert folded == {"layers", "restoration"}


def test_facts_and_settings_are_all_there(whole, page):
    words = text(with_class(page, "facts")[0])
    for value in ("vit_tiny", "5,526,528", "28, 30", "masking, denoising", FACTS["command"]):
        assert value in words
    assert page.find(".//pre").text == (whole[1] / "config.yaml").read_text()


def test_a_bare_folder_says_what_is_missing_and_how_to_make_it(tmp_path):
    folder = write_run(tmp_path / "a bare run", parts=False, facts={"steps": 900})
    page = page_of(folder)
    evaluate = f"backfold evaluate --checkpoint '{folder}'"
    gaps = dict(text(li).split(": ", 1) for li in sections(page)["What is missing"].iter("li"))
    assert gaps.pop("evaluation.json") == evaluate
    assert set(gaps) == {
        "300 steps of training", "metrics.csv", "health.json", "previews", "backbone.safetensors"
    }  # fmt: skip
    assert set(gaps.values()) == {FACTS["command"]}
    assert [text(p)[:9] for p in with_class(page, "headline")] == ["Not known"] * 2
    assert f"Evaluate it: {evaluate}" in text(with_class(page, "answers")[0])
    assert not list(page.iter("img"))


def test_the_latest_preview_of_each_task_and_a_broken_one_is_said(folder):
    path = folder / "previews" / "step-0001200-masking.png"
    assert list(read_run(folder).previews) == [path.name, "step-0000009-x.png"]
    path.write_bytes(path.read_bytes()[:-30])
    assert f"{path.name}, which can't be read" in text(sections(page_of(folder))["What is missing"])


def test_values_that_are_not_finite_or_missing_are_said_in_words(folder):
    broken = entry(auroc=math.nan, rank_me=None, knn=None)
    broken["tasks"] = {"masking": {"psnr_corrupted_db": 12.0, "psnr_restored_db": math.nan}}
    energies = {"masking": {"clean": [math.nan, 1.0], "corrupted": [], "restored": [None]}}
    (folder / "health.json").write_text(json.dumps({"history": [broken], "energies": energies}))
    (folder / "metrics.csv").write_text("step,loss,gradient_norm\n1,0.5,nan\n2,,inf\n")
    rows = [replace(row, mean=math.nan, std=0.0) for row in all_rows()]
    write_rows(folder / "evaluation.json", [*rows, replace(rows[0], case="x", mean=1e308)])
    words = text(page_of(folder).find("html/body"))
    assert re.search(r"\b(nan|inf|None)\b", words) is None
    assert "not finite" in words


def test_of_repeated_steps_the_last_counts_and_half_a_line_does_not(folder):
    (folder / "metrics.csv").write_text("step,loss\n10,5\n20,4\n30,3\n20,8\n30,7\n40,0.1")
    looks = [entry(600, knn=1.0), entry(0), entry(600, knn=2.0)]
    (folder / "health.json").write_text(json.dumps(health(*looks)))
    run = read_run(folder)
    assert run.metrics["loss"].tolist() == [5, 8, 7]
    assert [look.measures["knn"] for look in run.health.looks] == [70.0, 2.0]
    for empty in ("", "step,loss\n"):
        (folder / "metrics.csv").write_text(empty)
        assert read_run(folder).metrics == {}


@pytest.mark.parametrize("name", ["config.yaml", "run.json"])
def test_a_folder_without_them_is_no_run(folder, name):
    (folder / name).unlink()
    with pytest.raises(UserError, match=f"is no run's folder: it has no {name}; give") as caught:
        write_report(folder)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    ("name", "content"),
    [
        ("run.json", "{"),
        ("run.json", "[1, 2]"),
        ("run.json", b"\xff\xfe\x00"),
        ("run.json", "[" * 100_000),
        ("run.json", '{"steps": "many"}'),
        ("run.json", '{"total_steps": true}'),
        ("run.json", '{"seconds": 1%s}' % ("0" * 400)),
        ("run.json", '{"tasks": "masking"}'),
        ("run.json", '{"tasks": [1]}'),
        ("run.json", '{"command": 3}'),
        ("config.yaml", "a: [1,\n  b: }"),
        ("config.yaml", "- a"),
        ("health.json", '{"history": [{'),
        ("health.json", '{"history": 3}'),
        ("health.json", '{"history": [3]}'),
        ("health.json", '{"history": [{"tasks": {}}]}'),
        ("health.json", '{"history": [{"step": "1"}]}'),
        ("health.json", '{"history": [{"step": 1, "auroc": "high"}]}'),
        ("health.json", '{"history": [{"step": 1, "tasks": {"masking": 1}}]}'),
        ("health.json", '{"history": [{"step": 1, "tasks": {"masking": {"auroc": []}}}]}'),
        ("health.json", '{"energies": {"masking": {"clean": 1}}}'),
        ("health.json", '{"energies": {"masking": {"clean": ["1"]}}}'),
        ("evaluation.json", "[{"),
        ("evaluation.json", "3"),
        ("evaluation.json", "[3]"),
        ("evaluation.json", '[{"protocol": "knn"}]'),
        ("evaluation.json", '[{"a\\nb": 1}]'),
        ("evaluation.json", json.dumps([ROW | {"mean": "x"}])),
        ("evaluation.json", json.dumps([ROW | {"case": 3}])),
        ("evaluation.json", json.dumps([ROW | {"data": 3}])),
        ("evaluation.json", json.dumps([ROW | {"step": "3"}])),
        ("evaluation.json", json.dumps([ROW | {"note": None}])),
        ("metrics.csv", "epoch,loss\n1,2\n"),
        ("metrics.csv", "step,loss\n1,2\n2,low\n"),
        ("metrics.csv", "step,loss\nnan,2\n"),
    ],
)  # fmt: skip
def test_a_broken_file_is_one_line_with_its_name(folder, name, content):
    (folder / name).write_bytes(content if isinstance(content, bytes) else content.encode())
    (folder / "report.html").write_text("old")
    with pytest.raises(UserError) as caught:
        write_report(folder)
    assert str(folder / name) in str(caught.value)
    assert "\n" not in str(caught.value)
    assert len(str(caught.value)) < 600
    assert (folder / "report.html").read_text() == "old"


def test_the_default_place_and_others(bare, tmp_path):
    assert write_report(bare) == bare / "report.html"
    other = tmp_path / "else" / "where.html"
    assert write_report(bare, other) == other
    assert other.read_bytes() == (bare / "report.html").read_bytes()
    with pytest.raises(UserError, match="can't write"):
        write_report(bare, tmp_path)


def test_every_picture_is_inside_and_has_words(page):
    for image in page.iter("img"):
        kind, data = image.get("src").split(",")
        content = base64.b64decode(data, validate=True)
        if kind == "data:image/png;base64":
            Image.open(io.BytesIO(content)).load()
        else:
            assert kind == "data:image/svg+xml;base64"
            svg = ElementTree.fromstring(content)
            links = [v for e in svg.iter() for k, v in e.attrib.items() if k.endswith("href")]
            assert all(link.startswith("#") for link in links)
        assert len(image.get("alt")) > 20


def test_nothing_comes_from_outside(page, whole):
    assert re.search(r"https?://|@import|url\(", whole[0]) is None
    assert not {"script", "link", "iframe", "object", "embed", "base"} & {
        e.tag for e in page.iter()
    }
    for element in page.iter():
        for name in ("src", "href", "srcset", "data", "action", "poster"):
            assert element.get(name, "data:").startswith("data:")
        assert not any(name.startswith("on") for name in element.attrib)
    (policy,) = [m.get("content") for m in page.iter("meta") if "http-equiv" in m.attrib]
    assert policy == "default-src 'none'; img-src data:; style-src 'unsafe-inline'"


def test_headings_follow_each_other_and_references_exist(page):
    levels = [int(element.tag[1]) for element in page.iter() if re.fullmatch(r"h\d", element.tag)]
    assert levels[0] == 1
    assert levels.count(1) == 1
    assert all(after - before <= 1 for before, after in itertools.pairwise(levels))
    ids = [element.get("id") for element in page.iter() if "id" in element.attrib]
    assert len(ids) == len(set(ids))
    assert {e.get("aria-labelledby", ids[0]) for e in page.iter()} <= set(ids)


def test_texts_from_the_run_cannot_become_markup(tmp_path):
    evil = '<script>alert("1")</script><img src=x onerror=alert(1)>&amp;$'
    facts = {name: evil for name, value in FACTS.items() if isinstance(value, str)}
    facts |= {"tasks": [evil], "versions": {evil: evil}, evil: evil}
    folder = write_run(tmp_path / "<script>alert(2)<b>'\"", facts=facts)
    (folder / "config.yaml").write_text(f"a: |\n  {evil}\n")
    kinds = {"clean": [1.0], "corrupted": [2.0], "restored": [3.0]}
    tasks = {evil: {**entry()["tasks"]["masking"], evil: 1.0}}
    content = {"history": [entry(tasks=tasks)], "energies": {evil: kinds}}
    (folder / "health.json").write_text(json.dumps(content))
    rows = [
        Row(protocol, case, name, evil, 1.0, 0.0, 1, evil, 1, evil)
        for protocol in (evil, "knn", "layers")
        for case in (evil, f"{evil}, severity 1", f"{evil}, layer -1, {evil}")
        for name in (evil, "pretrained", "before")
    ]
    rows += [replace(row, metric="accuracy (%)") for row in rows]
    write_rows(folder / "evaluation.json", rows)
    (folder / "previews" / "step-0000001-<b>\"'.png").write_bytes(png(1))
    page = page_of(folder)
    assert not {"script", "b"} & {element.tag for element in page.iter()}
    assert all(image.get("src").startswith("data:") for image in page.iter("img"))
    assert text(page.find("html/body/header/h1")) == folder.name
    for place in ("answers", "facts", "notes", "scroll", "plots"):
        assert any(evil in text(element) for element in with_class(page, place)), place
    assert evil in page.find(".//pre").text
    assert any(evil in image.get("alt") for image in page.iter("img"))
    assert evil in sections(page)


@pytest.mark.parametrize("scheme", [0, 1])
def test_colours_contrast_enough_in_light_and_dark(scheme):
    style = (resources.files("backfold.reporting") / "style.css.jinja").read_text()
    colours = dict(re.findall(r"--([a-z]+): (#[0-9a-f]{6})", style.split("@media")[scheme]))
    assert len(colours) == 9
    for ink in ("text", "quiet", "good", "watch", "bad", "unknown"):
        for ground in ("page", "card"):
            first, second = luminance(colours[ink]), luminance(colours[ground])
            ratio = (max(first, second) + 0.05) / (min(first, second) + 0.05)
            assert ratio >= 4.5, (ink, ground)  # WCAG


def luminance(colour: str) -> float:
    channels = [int(colour[i : i + 2], 16) / 255 for i in (1, 3, 5)]
    linear = [c / 12.92 if c <= 0.04045 else ((c + 0.055) / 1.055) ** 2.4 for c in channels]
    return sum(w * c for w, c in zip((0.2126, 0.7152, 0.0722), linear, strict=True))


def test_the_same_run_gives_the_same_bytes(whole):
    assert write_report(whole[1]).read_text(encoding="utf-8") == whole[0]
