"""Tables written into the page that shows them, and figures as files."""

import io
import json
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import matplotlib as mpl
from matplotlib.figure import Figure

from backfold.files import write_atomically
from step_cost import tables

# Places are TABLE-RUN in the page. A table is of a file and has these parts.
TABLES: dict[str, tuple[Any, ...]] = {
    "bars": ("cost", tables.facts_line, tables.bars_table),
    "cost": ("cost", tables.cost_tables),
    "kinds": ("cost", tables.kind_tables),
    "growth": ("cost-growth", tables.facts_line, tables.growth_tables),
}
RUNS = {  # "others": of a run with backbones that the main run lacks
    "cpu": "{}-cpu.json",
    "cuda": "{}-cuda.json",
    "others": "other-backbones/{}-cpu.json",
}
SETTINGS = {"svg.hashsalt": "backfold", "svg.fonttype": "none"}


def write_page(page: Path, results: Path) -> None:
    """Renew all tables of the page from the results that are there."""
    text, parts = page.read_text(), {}
    for table, run in re.findall(r"<!-- begin (\w+)-(\w+) -->", text):
        file, *makers = TABLES[table]
        path = results / RUNS[run].format(file)
        content = json.loads(path.read_text()) if path.exists() else None
        made = [make(content) for make in makers] if content else ["Not measured yet."]
        parts[f"{table}-{run}"] = "\n\n".join(made)
    write_atomically(page, fill(text, parts).encode())


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
