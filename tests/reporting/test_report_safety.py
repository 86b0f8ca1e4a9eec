import base64
import io
import itertools
import json
import re
from importlib import resources
from xml.etree import ElementTree
from xml.etree.ElementTree import Element

import pytest
from PIL import Image
from test_report_page import page_of, parse, sentences, table, text
from test_report_reading import EVALUATION, FACTS, health_entry, png, write_run

from backfold.reporting.report import write_report


@pytest.fixture(scope="module")
def html(tmp_path_factory) -> str:
    folder = write_run(tmp_path_factory.mktemp("runs") / "a-run")
    return write_report(folder).read_text(encoding="utf-8")


@pytest.fixture
def page(html) -> Element:
    return parse(html)


def test_every_picture_is_inside_and_has_words(page):
    images = list(page.iter("img"))
    captions = [text(caption) for caption in page.iter("figcaption")]
    assert len(images) == 2 + 2 + 5 + 7  # previews, histograms, held-out and training curves
    assert len(captions) == len(images)
    for image in images:
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
    assert images[0].get("src").endswith(base64.b64encode(png(120)).decode())
    assert (images[0].get("width"), images[0].get("height")) == ("12", "8")
    assert captions[:2] == ["masking step 1,200", "denoising step 1,200"]


def test_nothing_comes_from_outside(page, html):
    assert re.search(r"https?://|@import|url\(", html) is None
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
    labelled = [e.get("aria-labelledby") for e in page.iter() if "aria-labelledby" in e.attrib]
    assert set(labelled) <= set(ids)
    assert page.find("html").get("lang") == "en"


def test_texts_from_the_run_cannot_become_markup(tmp_path):
    evil = '<script>alert("1")</script><img src=x onerror=alert(1)>&amp;'
    facts = {name: evil for name, value in FACTS.items() if isinstance(value, str)}
    facts |= {"tasks": [evil], "versions": {evil: evil}}
    folder = write_run(tmp_path / "<script>alert(2)<b>'\"", facts=facts)
    (folder / "config.yaml").write_text(f"a: |\n  {evil}\n")
    entry = health_entry()
    (folder / "health.json").write_text(
        json.dumps(
            {
                "history": [entry | {"tasks": {evil: entry["tasks"]["masking"]}}],
                "energies": {evil: {"clean": [1.0], "corrupted": [2.0], "restored": [3.0]}},
            }
        )
    )
    evaluation = EVALUATION[0] | {"protocol": evil, "data": evil}
    (folder / "evaluation.json").write_text(json.dumps([evaluation]))
    (folder / "previews" / "step-0000001-<b>\"'.png").write_bytes(png(1))
    page = page_of(folder)
    assert not {"script", "b"} & {element.tag for element in page.iter()}
    assert all(image.get("src").startswith("data:") for image in page.iter("img"))
    assert text(page.find("html/body/header/h1")) == folder.name
    assert any("under <b>\"' at step 1" in image.get("alt") for image in page.iter("img"))
    assert any(evil in sentence for sentence in sentences(page))
    assert evil in page.find(".//pre").text
    assert any(evil in image.get("alt") for image in page.iter("img"))
    assert evil in table(page, "Test accuracy")[evil + "all"]["protocol"]


@pytest.mark.parametrize("scheme", [0, 1])
def test_colours_contrast_enough_in_light_and_dark(scheme):
    style = (resources.files("backfold.reporting") / "style.css.jinja").read_text()
    colours = dict(re.findall(r"--([a-z]+): (#[0-9a-f]{6})", style.split("@media")[scheme]))
    assert len(colours) == 9
    for ink in ("text", "quiet", "good", "watch", "bad", "unknown"):
        for ground in ("page", "card"):
            assert contrast(colours[ink], colours[ground]) >= 4.5, (ink, ground)


def contrast(first: str, second: str) -> float:
    """WCAG's contrast ratio."""
    brighter, darker = sorted(map(luminance, (first, second)), reverse=True)
    return (brighter + 0.05) / (darker + 0.05)


def luminance(colour: str) -> float:
    channels = [int(colour[i : i + 2], 16) / 255 for i in (1, 3, 5)]
    linear = [c / 12.92 if c <= 0.04045 else ((c + 0.055) / 1.055) ** 2.4 for c in channels]
    return sum(w * c for w, c in zip((0.2126, 0.7152, 0.0722), linear, strict=True))


def test_contrast_of_the_extremes():
    assert contrast("#ffffff", "#000000") == pytest.approx(21)
    assert contrast("#777777", "#777777") == pytest.approx(1)
