"""The architecture page's layers, held against the imports."""

import ast
import re
from itertools import pairwise
from pathlib import Path

ROOT = Path(__file__).parent.parent
SOURCE = ROOT / "src" / "backfold"


def module_of(path):
    parts = path.relative_to(SOURCE).with_suffix("").parts
    return ".".join(parts[:-1] if parts[-1] == "__init__" else parts)


MODULES = {module_of(path): path for path in SOURCE.rglob("*.py")}


def imported(path):
    """The modules of ours that a module imports when it is itself imported."""
    for node in ast.parse(path.read_text()).body:
        if isinstance(node, ast.ImportFrom) and (node.module or "").startswith("backfold"):
            base = node.module.removeprefix("backfold").removeprefix(".")
            for name in node.names:
                full = f"{base}.{name.name}".removeprefix(".")
                yield full if full in MODULES else base


def layers():
    """The page's table: for each row the modules and packages that it names."""
    page = (ROOT / "docs" / "architecture.md").read_text()
    table = page.split("| layer | what it knows |")[1].split("\n\n")[0]
    rows = [row.split("|")[1] for row in table.splitlines()[2:]]
    return [set(re.findall(r"`([\w.]+)`", row)) for row in rows]


def test_layers_import_only_those_above():
    rank = {name: number for number, names in enumerate(layers()) for name in names}
    units = {module.split(".")[0] for module in MODULES} - {""}
    assert set(rank) == units
    wrong = [
        f"{module} imports {other}"
        for module, path in MODULES.items()
        for other in imported(path)
        if module and other and rank[module.split(".")[0]] < rank[other.split(".")[0]]
    ]
    assert wrong == []


def test_the_core_knows_nothing_of_the_house():
    for name in ("restoration", "energy"):
        known = {other.split(".")[0] for other in imported(MODULES[name])}
        assert not known & {"data", "training", "evaluation", "cli", "reporting", "inference"}


def test_no_module_imports_itself_by_others():
    """And the longest chain is no longer than the page says."""
    depth = {}

    def chain(module, above=()):
        assert module not in above, (*above, module)
        if module not in depth:
            longest = [chain(other, (*above, module)) for other in imported(MODULES[module])]
            depth[module] = [module, *max(longest, key=len, default=[])]
        return depth[module]

    longest = max((chain(module) for module in MODULES), key=len)
    assert all(second in set(imported(MODULES[first])) for first, second in pairwise(longest))
    page = (ROOT / "docs" / "architecture.md").read_text()
    (promised,) = re.findall(r"longest chain of imports is (\d+) modules", page)
    assert len(longest) <= int(promised), longest
