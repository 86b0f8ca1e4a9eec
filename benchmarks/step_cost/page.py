"""Bars written into the page that shows them, and figures as files."""

import io
import json
import re
from collections.abc import Mapping
from pathlib import Path

import matplotlib as mpl
from matplotlib.figure import Figure

from backfold.files import write_atomically
from step_cost.tables import bars_table, facts_line

RUNS = {  # "others": of a run with backbones that the main run lacks
    "cpu": "cost-cpu.json",
    "cuda": "cost-cuda.json",
    "others": "other-backbones/cost-cpu.json",
}
SETTINGS = {"svg.hashsalt": "backfold", "svg.fonttype": "none"}


def write_page(page: Path, results: Path) -> None:
    """Renew the page's bars from the results that are there."""
    parts = {}
    for run, file in RUNS.items():
        parts[f"bars-{run}"] = "Not measured yet."
        if (results / file).exists():
            content = json.loads((results / file).read_text())
            parts[f"bars-{run}"] = f"{facts_line(content)}\n\n{bars_table(content)}"
    write_atomically(page, fill(page.read_text(), parts).encode())


def fill(text: str, parts: Mapping[str, str]) -> str:
    """Put each part between its markers, ``<!-- begin NAME -->`` and ``<!-- end NAME -->``.

    Raises:
        ValueError: a part has no markers in the text.
    """
    for name, part in parts.items():
        pattern = re.compile(rf"(?s)(<!-- begin {name} -->\n).*?(<!-- end {name} -->)")
        text, count = pattern.subn(lambda at, part=part: f"{at[1]}\n{part}\n\n{at[2]}", text)
        if count != 1:
            raise ValueError(f"the page has {count} places marked {name!r}; it needs one")
    return text


def svg(figure: Figure) -> bytes:
    """The figure's file, the same whenever it is drawn."""
    buffer = io.BytesIO()
    with mpl.rc_context(SETTINGS):
        figure.savefig(buffer, format="svg", metadata={"Date": None})
    return buffer.getvalue()
