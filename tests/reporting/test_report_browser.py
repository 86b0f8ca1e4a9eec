"""The report in headless Chromium; a probe in the page tells what the browser made of it."""

import json
import re
import shutil
import subprocess
from html import escape
from pathlib import Path

import pytest
from fake_run import parse, text, write_run

from backfold.reporting.report import write_report

CHROMIUM = shutil.which("chromium")
pytestmark = pytest.mark.skipif(CHROMIUM is None, reason="there is no chromium on the PATH")

DARK = "--blink-settings=preferredColorScheme=0"
FLAGS = (
    "--headless",
    "--no-sandbox",
    "--disable-gpu",
    "--disable-quic",
    "--no-first-run",
    "--disable-background-networking",
    "--disable-component-update",
    "--disable-sync",
    "--enable-logging=stderr",
    "--v=0",
    "--window-size=1400,900",
    "--dump-dom",
)
POLICY = re.compile(r"<meta http-equiv=[^>]*>")
PROBE = """<script>
const errors = [];
addEventListener("error", e => errors.push(e.message || e.target.tagName), true);
addEventListener("load", () => {
  const pictures = [...document.images].map(i => i.naturalWidth);
  const requests = performance.getEntriesByType("resource").map(e => e.name)
    .filter(name => !name.startsWith("data:"));
  document.body.dataset.probe = JSON.stringify({errors, pictures, requests});
});
</script>"""
# A port that no server has: the request is refused on this machine.
REQUEST = '<img src="http://127.0.0.1:9/picture.png">'
BROKEN_PICTURE = '<img src="data:image/png;base64,AAAA">'


@pytest.fixture(scope="module")
def report(tmp_path_factory) -> Path:
    return write_report(write_run(tmp_path_factory.mktemp("runs") / "a-run"))


def dump_dom(page: Path, profile: Path, *flags: str) -> tuple[str, list[str]]:
    """The page's HTML after it has loaded, and the lines on its console."""
    command = [CHROMIUM, *FLAGS, *flags, f"--user-data-dir={profile}", page.as_uri()]
    result = subprocess.run(command, capture_output=True, text=True, timeout=120, check=True)
    return result.stdout, [line for line in result.stderr.splitlines() if ":CONSOLE" in line]


def probe(html: str, folder: Path) -> dict:
    """What the browser found in a page, whose policy must not hide requests from the probe."""
    page = folder / "probed.html"
    page.write_text(POLICY.sub("", html).replace("<head>", f"<head>{PROBE}", 1), encoding="utf-8")
    dumped, _ = dump_dom(page, folder / "profile")
    return json.loads(parse(dumped).find("html/body").get("data-probe"))


def test_every_picture_loads_without_requests_or_errors(report, tmp_path):
    html = report.read_text(encoding="utf-8")
    assert len(POLICY.findall(html)) == 1
    found = probe(html, tmp_path)
    assert found["errors"] == []
    assert found["requests"] == []
    assert len(found["pictures"]) == html.count("<img ")
    assert min(found["pictures"]) > 0


def test_the_probe_reports_what_is_wrong(report, tmp_path):
    wrong = f"{BROKEN_PICTURE}{REQUEST}<script>undefined_function()</script></body>"
    html = report.read_text(encoding="utf-8").replace("</body>", wrong)
    found = probe(html, tmp_path)
    assert found["pictures"][-2:] == [0, 0]
    assert found["requests"] == ["http://127.0.0.1:9/picture.png"]
    assert sorted(found["errors"]) == [
        "IMG",
        "IMG",
        "Uncaught ReferenceError: undefined_function is not defined",
    ]


def test_the_console_stays_empty(report, tmp_path):
    html, console = dump_dom(report, tmp_path / "profile")
    assert text(parse(html).find("html/body/header/h1")) == "a-run"
    assert console == []


def test_the_policy_refuses_requests_and_says_so_on_the_console(report, tmp_path):
    page = tmp_path / "page.html"
    page.write_text(report.read_text(encoding="utf-8").replace("</body>", f"{REQUEST}</body>"))
    _, console = dump_dom(page, tmp_path / "profile")
    assert len(console) == 1
    assert "Content Security Policy" in console[0]


def framed(html: str, width: int, folder: Path, *flags: str) -> tuple[int, str]:
    """By how many pixels the page is wider than a window of this width, and its background.

    Chromium's own windows are 500 pixels wide at least; a frame may be narrower. Folded parts are
    opened.
    """
    page = folder / "frame.html"
    opened = html.replace("<details>", "<details open>")
    page.write_text(
        f'<iframe style="border:0;width:{width}px;height:800px" srcdoc="{escape(opened)}"></iframe>'
        """<script>
        addEventListener("load", () => {
          const inner = document.querySelector("iframe").contentDocument;
          const root = inner.documentElement, colour = getComputedStyle(inner.body).backgroundColor;
          document.body.dataset.found = [root.clientWidth, root.scrollWidth, colour].join(";");
        });
        </script>""",
        encoding="utf-8",
    )
    dumped, _ = dump_dom(page, folder / "profile", *flags)
    visible, needed, colour = re.search(r'data-found="(.*?)"', dumped)[1].split(";")
    assert width - 20 <= int(visible) <= width  # a scroll bar takes the rest
    return int(needed) - int(visible), colour


@pytest.mark.parametrize("width", [375, 1280])
def test_the_page_fits_the_window_in_light_and_dark(report, tmp_path, width):
    html = report.read_text(encoding="utf-8")
    light = framed(html, width, tmp_path)
    dark = framed(html, width, tmp_path, DARK)
    assert (light[0], dark[0]) == (0, 0)
    assert light[1] != dark[1]


def test_a_page_that_is_too_wide_is_noticed(report, tmp_path):
    wide = '<div style="width:1000px">wide</div></body>'
    html = report.read_text(encoding="utf-8").replace("</body>", wide)
    assert framed(html, 375, tmp_path)[0] > 500
