"""Writing results to files, and their tables into the page that reads them."""

import json
import re
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from backfold.training.run_folder import write_atomically, write_json
from step_cost.bars import bars_table
from step_cost.plots import cost_plot, growth_plot
from step_cost.tables import cost_tables, facts_line, growth_tables, kind_tables

DEVICES = ("cpu", "cuda")
NOT_MEASURED = "Not measured yet."


def write_cost(folder: Path, content: dict[str, Any]) -> Path:
    """cost-DEVICE.json, .md and .svg; returns the path of the first."""
    path = folder / f"cost-{content['facts']['device']}.json"
    text = "\n\n".join([
        "# Cost of a training step", facts_line(content), bars_table(content),
        cost_tables(content),
    ])  # fmt: skip
    return _write(path, content, text, cost_plot)


def write_growth(folder: Path, content: dict[str, Any]) -> Path:
    """cost-growth-DEVICE.json, .md and .svg; returns the path of the first."""
    path = folder / f"cost-growth-{content['facts']['device']}.json"
    text = "\n\n".join(["# How cost grows", facts_line(content), growth_tables(content)])
    return _write(path, content, text, growth_plot)


def _write(
    path: Path, content: dict[str, Any], text: str, plot: Callable[[dict[str, Any]], bytes]
) -> Path:
    write_json(path, content)
    write_atomically(path.with_suffix(".md"), (text + "\n").encode())
    if content["rows"]:
        write_atomically(path.with_suffix(".svg"), plot(content))
    return path


def fill(text: str, parts: Mapping[str, str]) -> str:
    """Put each part between its markers, ``<!-- begin NAME -->`` and ``<!-- end NAME -->``.

    Raises:
        ValueError: a part has no markers in the text.
    """
    for name, part in parts.items():
        pattern = rf"(<!-- begin {name} -->\n).*?(<!-- end {name} -->)"
        text, count = re.subn(
            pattern, lambda match, part=part: f"{match[1]}\n{part}\n\n{match[2]}", text,
            flags=re.DOTALL,
        )  # fmt: skip
        if count != 1:
            raise ValueError(f"the page has {count} places marked {name!r}; it needs one")
    return text


OTHER_BACKBONES = "other-backbones"  # folder of a run with backbones that the main run lacks


def write_page(page: Path, results: Path) -> None:
    """Renew all tables of the page from the results that are there."""
    parts = {}
    for device in DEVICES:
        cost = _read(results / f"cost-{device}.json")
        grown = _read(results / f"cost-growth-{device}.json")
        parts |= {
            f"bars-{device}": _with_facts(cost, bars_table),
            f"cost-{device}": cost_tables(cost) if cost else NOT_MEASURED,
            f"kinds-{device}": kind_tables(cost) if cost else NOT_MEASURED,
            f"growth-{device}": _with_facts(grown, growth_tables),
        }
    other = _read(results / OTHER_BACKBONES / "cost-cpu.json")
    parts |= {
        "bars-others": _with_facts(other, bars_table),
        "cost-others": cost_tables(other) if other else NOT_MEASURED,
    }
    write_atomically(page, fill(page.read_text(), parts).encode())


def _read(path: Path) -> dict[str, Any] | None:
    return json.loads(path.read_text()) if path.exists() else None


def _with_facts(content: dict[str, Any] | None, table: Callable[[dict[str, Any]], str]) -> str:
    return f"{facts_line(content)}\n\n{table(content)}" if content else NOT_MEASURED
