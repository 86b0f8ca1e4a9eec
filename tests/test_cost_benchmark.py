"""The measuring and writing code of benchmarks/cost.py; what it measures is no test's business."""

import pytest
import torch

from cost import PAGE
from step_cost.measuring import peak_memory, spread, time_interleaved
from step_cost.page import fill, write_page
from step_cost.tables import bars_table, cost_tables
from step_cost.workload import TITLES, Model, Variant, Workload

CPU = torch.device("cpu")
TINY = Model(
    "a tiny ViT", "vit_tiny_patch16_224", "vit", 16, 4, 2, 2,
    {"patch_size": 4, "embed_dim": 12, "depth": 2, "num_heads": 2},
)  # fmt: skip


def test_steps_run_in_turn_and_what_prepares_them_is_not_timed():
    now, calls = [0.0], []

    def spend(name, seconds):
        calls.append(name)
        now[0] += seconds

    steps = {"a": lambda: spend("a", 1.0), "b": lambda: spend("b", 2.0)}
    arguments = steps, 3, lambda: spend("-", 100.0), lambda: now[0]
    assert time_interleaved(*arguments) == {"a": [1.0] * 3, "b": [2.0] * 3}
    assert "".join(calls).replace("-", "") == "aabb" * 3  # each once to warm up, then timed
    assert "".join(calls).count("-a") == "".join(calls).count("-b") == 6
    # After the deadline no round but the first starts.
    assert time_interleaved(*arguments, deadline=0.0) == {"a": [1.0], "b": [2.0]}
    found = spread([5.0, 1.0, 2.0, 4.0, 3.0])
    assert found == {"lower": 2.0, "median": 3.0, "upper": 4.0, "count": 5}


def test_peak_memory_of_known_allocations_is_exact():
    def step():
        first = torch.empty(1 << 20)
        second = torch.empty(1 << 20)
        del first
        third = torch.empty(1 << 18)
        del second, third

    assert peak_memory(step, CPU) == 2 * 4 * (1 << 20)
    there = torch.ones(1 << 16)
    assert peak_memory(there.neg, CPU) == 4 << 16
    assert peak_memory(there.neg_, CPU) == 0


@pytest.mark.parametrize("method", TITLES)
def test_every_step_gives_its_parameters_gradients_that_can_be_cleared(method):
    if method in ("mae", "simmim"):
        pytest.importorskip("transformers")
    workload = Workload(TINY, 2, CPU)
    workload.step(Variant(method))()
    modules = workload.modules.values()
    trained = [m for m in modules if any(p.grad is not None for p in m.parameters())]
    assert len(trained) == (method not in ("forward", "masking"))
    # Fixed positions, and what restoration can't reach.
    fixed = "norm.bias", "position_embeddings", "decoder_pos_embed"
    for module in trained:
        without = [name for name, value in module.named_parameters() if value.grad is None]
        assert all(name.endswith(fixed) for name in without), without
    workload.clear_gradients()
    assert all(value.grad is None for module in modules for value in module.parameters())


def row(method="ordinary", seconds=1.0, **facts):
    return {
        "model": "vit_tiny_32", "method": method, "title": TITLES[method], "compiled": False,
        "precision": "float32", "num_steps": 1, "batch": 1, "warnings": [], "peak_bytes": 2**20,
        "seconds": {"median": seconds, "lower": seconds, "upper": seconds, "count": 1},
        "images_per_second": 1 / seconds, "operations": 10**9, **facts,
    }  # fmt: skip


def cells(table, start):
    line = next(line for line in table.splitlines() if line.startswith(f"| {start}"))
    return [cell.strip() for cell in line.strip("|").split("|")]


def test_tables_divide_by_the_ordinary_step_of_the_same_precision_and_mode():
    rows = [
        row(),
        row("ordinary-plain"),
        row("ordinary", 5.0, compiled=True),
        row("exact", 2.5, operations=2.05 * 10**9),
        row("exact", 6.0, compiled=True, warnings=["can't be compiled"]),
        row("exact", 6.0, precision="bf16"),
    ]
    measured = {"facts": {"device": "cpu"}, "rows": rows, "left_out": ["MAE: no time left"]}
    table = cost_tables(measured)
    assert cells(table, "Backfold, dense | float32 | eager")[5] == "2.50"
    compiled = cells(table, "Backfold, dense | float32 | compiled (fell back to eager)")
    assert compiled[5] == "1.20"
    assert cells(table, "Backfold, dense | bf16")[5] == ""
    assert "- MAE: no time left" in table
    bars = bars_table(measured)
    assert "2.500 **above**" in cells(bars, "time, dense eager")[2]
    assert cells(bars, "operations, dense over ordinary, 64")[2].endswith(": 2.050")
    assert cells(bars, "time, sparse compiled")[2] == "not measured"


def test_the_docs_page_has_a_place_for_every_table(tmp_path):
    page = tmp_path / "cost.md"
    page.write_text(PAGE.read_text())
    write_page(page, tmp_path)
    assert page.read_text().count("Not measured yet.") == 3
    with pytest.raises(ValueError, match="'b'"):
        fill(page.read_text(), {"b": ""})
