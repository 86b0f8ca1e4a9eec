"""The measuring and writing code of benchmarks/cost.py; what it measures is no test's business."""

import xml.etree.ElementTree as ET

import pytest
import torch

from cost import PAGE, parse, variants_of
from step_cost.bars import BARS, bars_table, judge
from step_cost.comparing import Case, measure
from step_cost.measuring import peak_memory, spread, time_interleaved
from step_cost.models import MODELS, Model, find
from step_cost.operations import count_operations
from step_cost.page import fill, write_page
from step_cost.plots import cost_plot, growth_plot
from step_cost.profiling import NORMS, PRODUCTS, REST, kind_of, time_by_kind
from step_cost.tables import cost_tables, growth_tables
from step_cost.variants import TITLES, Variant, possible
from step_cost.workload import Workload

CPU = torch.device("cpu")
TINY = Model(
    "tiny", "a tiny ViT", "vit_tiny_patch16_224", "vit", 16, 4, 2, 2,
    {"patch_size": 4, "embed_dim": 12, "depth": 2, "num_heads": 2},
)  # fmt: skip


class Clock:
    def __init__(self):
        self.now = 0.0

    def __call__(self):
        return self.now

    def spend(self, seconds):
        self.now += seconds


def test_spread_is_the_quartiles():
    found = spread([5.0, 1.0, 2.0, 4.0, 3.0])
    assert (found.lower, found.median, found.upper, found.count) == (2.0, 3.0, 4.0, 5)
    assert spread([7.0]).lower == spread([7.0]).upper == 7.0


def test_steps_run_in_turn_and_what_prepares_them_is_not_timed():
    clock, calls = Clock(), []

    def step(name, seconds):
        def run():
            calls.append(name)
            clock.spend(seconds)

        return run

    def prepare():
        calls.append("-")
        clock.spend(100.0)

    steps = {"a": step("a", 1.0), "b": step("b", 2.0)}
    seconds = time_interleaved(steps, 3, CPU, prepare, clock)
    assert seconds == {"a": [1.0] * 3, "b": [2.0] * 3}
    assert "".join(calls) == "-a-b" * 3


def test_after_the_deadline_no_round_but_the_first_starts():
    clock = Clock()
    steps = {"a": lambda: clock.spend(1.0), "b": lambda: clock.spend(1.0)}
    assert time_interleaved(steps, 9, CPU, clock=clock, deadline=3.0) == {"a": [1, 1], "b": [1, 1]}
    assert time_interleaved(steps, 9, CPU, clock=clock, deadline=0.0) == {"a": [1], "b": [1]}


def test_peak_memory_of_known_allocations_is_exact():
    def step():
        first = torch.empty(1 << 20)
        second = torch.empty(1 << 20)
        del first
        third = torch.empty(1 << 18)
        del second, third

    assert peak_memory(step, CPU) == 2 * 4 * (1 << 20)


def test_peak_memory_counts_from_what_was_there_before():
    there = torch.ones(1 << 16)
    assert peak_memory(there.neg, CPU) == 4 << 16
    assert peak_memory(there.neg_, CPU) == 0


@pytest.mark.slow
def test_peak_memory_sees_the_buffers_of_compiled_graphs():
    matrix = torch.randn(256, 256)
    compiled = torch.compile(lambda left, right: (left @ right).exp().sum())
    compiled(matrix, matrix)
    assert peak_memory(lambda: compiled(matrix, matrix), CPU) == matrix.nbytes + 4


def test_kinds_of_work():
    names = ["aten::addmm", "aten::convolution_backward", "ampere_bf16_s16816gemm_bf16_128x64"]
    assert {kind_of(name) for name in names} == {PRODUCTS}
    assert kind_of("aten::native_layer_norm_backward") == NORMS
    assert kind_of("triton_per_fused_addmm_native_layer_norm_3") == REST
    matrix = torch.randn(512, 512)
    shares = time_by_kind(lambda: matrix @ matrix, CPU)
    assert sum(shares.values()) == pytest.approx(1.0)
    assert max(shares, key=shares.get) == PRODUCTS


class FakeWorkload:
    batch = 4

    def __init__(self):
        self.cleared = 0
        self.weight = torch.randn(3, 3)

    def step(self, variant):
        if variant.method == "mae":
            raise RuntimeError("out of luck\nand more")
        return lambda: self.weight @ self.weight

    def clear_gradients(self):
        self.cleared += 1


def fake_cases(*methods):
    workload = FakeWorkload()
    return workload, {name: Case(workload, Variant(name), {"model": "m"}) for name in methods}


def test_measuring_goes_on_past_a_step_that_fails():
    workload, cases = fake_cases("forward", "mae", "simmim")
    results = measure(cases, 3, CPU, float("inf"))
    assert [row["method"] for row in results.rows] == ["forward", "simmim"]
    assert results.left_out == ["mae: RuntimeError: out of luck"]
    assert all(row["operations"] == 2 * 27 and row["peak_bytes"] == 36 for row in results.rows)
    assert all(row["seconds"]["count"] == 3 and row["model"] == "m" for row in results.rows)
    assert workload.cleared > 2 * 3


def test_measuring_says_what_there_was_no_time_for():
    results = measure(fake_cases("forward", "simmim")[1], 3, CPU, float("-inf"))
    assert results.rows == []
    assert results.left_out == ["no time left for forward; simmim"]


@pytest.mark.parametrize("method", TITLES)
def test_every_step_gives_all_its_parameters_gradients_that_can_be_cleared(method):
    if method in ("mae", "simmim"):
        pytest.importorskip("transformers")
    workload = Workload(TINY, 2, CPU)
    workload.step(Variant(method))()
    modules = {
        "ordinary": lambda: workload.classifier,
        "ordinary-plain": lambda: workload.plain_classifier,
        "mae": lambda: workload.mae, "simmim": lambda: workload.simmim,
        "exact": lambda: workload.energy, "sparse": lambda: workload.energy,
        "finite-difference": lambda: workload.fused,
    }  # fmt: skip
    if method in modules:
        parameters = dict(modules[method]().named_parameters())
        without = {name for name, value in parameters.items() if value.grad is None}
        # Fixed positions, and what restoration can't reach.
        assert without <= {"backbone.norm.bias", "vit.embeddings.position_embeddings",
                           "decoder.decoder_pos_embed"}  # fmt: skip
    workload.clear_gradients()
    modules = (module for module in vars(workload).values() if isinstance(module, torch.nn.Module))
    assert all(value.grad is None for module in modules for value in module.parameters())


def test_the_rivals_have_the_backbones_dimensions():
    pytest.importorskip("transformers")
    workload = Workload(TINY, 2, CPU)
    backbone = count_operations(workload.step(Variant("forward")))
    with torch.no_grad():
        encoder = count_operations(lambda: workload.simmim.vit(workload.images))
    assert encoder == backbone


def test_fused_attention_stays_where_only_one_derivative_is_taken():
    workload = Workload(TINY, 2, CPU)
    workload.step(Variant("exact"))()
    assert not workload.energy.backbone.blocks[0].attn.fused_attn
    assert workload.fused.backbone.blocks[0].attn.fused_attn
    assert workload.classifier.backbone.blocks[0].attn.fused_attn
    assert not workload.plain_classifier.backbone.blocks[0].attn.fused_attn


def test_variants_differ_and_fit_the_model():
    options = parse([])
    for model in MODELS:
        variants = variants_of(model, options)
        assert len({variant.name for variant in variants}) == len(variants)
        assert all(possible(model, variant) for variant in variants)
    methods = {variant.method for variant in variants_of(find("resnet50_224"), options)}
    assert methods == {"masking", "forward", "ordinary", "exact", "finite-difference"}


def test_quick_changes_the_defaults_and_options_beside_it_count():
    options = parse(["--quick", "--repeats", "2", "--modes", "eager"])
    assert (options.models, options.repeats) == (["vit_tiny_32"], 2)
    variants = variants_of(find("vit_tiny_32"), options)
    assert [variant.method for variant in variants] == options.variants


def row(method="ordinary", seconds=1.0, peak=2**20, operations=10**9, **facts):
    return {
        "model": "vit_tiny_32", "method": method, "title": TITLES[method], "compiled": False,
        "precision": "float32", "num_steps": 1, "batch": 1, "warnings": [], "peak_bytes": peak,
        "seconds": {"median": seconds, "lower": seconds, "upper": seconds, "count": 1},
        "images_per_second": 1 / seconds, "operations": operations,
        "time_by_kind": {PRODUCTS: 0.75, REST: 0.25}, **facts,
    }  # fmt: skip


def content(*rows, left_out=()):
    facts = {
        "date": "2026-01-01", "command": "python benchmarks/cost.py", "commit": "", "device": "cpu",
        "hardware": "a processor", "threads": 2, "load": 0.0, "versions": {"torch": "2"},
    }  # fmt: skip
    return {"facts": facts, "rows": list(rows), "left_out": list(left_out)}


def cells(table, start):
    line = next(line for line in table.splitlines() if line.startswith(f"| {start}"))
    return [cell.strip() for cell in line.strip("|").split("|")]


def test_tables_divide_by_the_ordinary_step_of_the_same_precision_and_mode():
    table = cost_tables(
        content(
            row(),
            row("ordinary", 5.0, compiled=True),
            row("exact", 2.1, 3 * 2**20, 2 * 10**9),
            row("exact", 6.0, compiled=True, warnings=["can't be compiled"]),
            row("exact", 6.0, precision="bf16"),
            left_out=["MAE: no time left"],
        )
    )
    assert cells(table, "Backfold, dense | float32 | eager")[3:] == [
        "2100 (2100 to 2100)", "0.5", "2.10", "3", "3.00", "2.00", "2.00",
    ]  # fmt: skip
    compiled = cells(table, "Backfold, dense | float32 | compiled (fell back to eager)")
    assert compiled[5] == "1.20"
    assert cells(table, "Backfold, dense | bf16")[5] == ""
    assert "- MAE: no time left" in table


def test_bars_mark_what_lies_above_them():
    rows = [row(), row("ordinary-plain"), row("exact", 2.5, operations=2.05 * 10**9)]
    verdicts = {verdict.bar.text: verdict.ratios for verdict in judge(rows, "cpu")}
    assert verdicts["operations, dense over ordinary, 64 tokens"] == {"vit_tiny_32": 2.05}
    assert verdicts["operations, dense over ordinary, 196 tokens"] == {}
    assert verdicts["time, dense eager over ordinary eager"] == {"vit_tiny_32": 2.5}
    assert not any("bf16" in text for text in verdicts)
    table = bars_table(content(*rows))
    assert "2.500 **above**" in cells(table, "time, dense eager")[2]
    assert cells(table, "operations, dense over ordinary, 64")[2].endswith(": 2.050")
    assert cells(table, "time, sparse compiled")[2] == "not measured"


def test_the_gpus_bars_are_judged_there_alone():
    texts = {verdict.bar.text for verdict in judge([], "cuda")}
    assert texts == {bar.text for bar in BARS if "cuda" in bar.devices}
    assert any("bf16" in text for text in texts)


def test_the_ordinary_step_knows_no_k():
    shared = {"factor": "num_steps", "tokens": 64, "depth": 4}
    rows = [
        row("ordinary", 1.0, value=1, **shared),
        row("exact", 2.0, value=1, **shared),
        row("exact", 8.0, value=4, num_steps=4, title="Backfold, dense, K = 4", **shared),
    ]
    table = growth_tables(content(*rows))
    assert cells(table, "4 | Backfold, dense |")[4:] == ["4.00", "1.00", "1.00", "8.00", "1.00"]


def growth_rows():
    return [
        row(method, factor * ratio, factor * ratio * 2**20, factor * 10**9 * ratio,
            factor="batch", value=4 * factor, tokens=64, depth=4)
        for factor in (1, 2, 4)
        for method, ratio in (("ordinary", 1), ("exact", 2))
    ]  # fmt: skip


def test_growth_is_relative_to_the_first_point_of_the_same_step():
    table = growth_tables(content(*growth_rows()))
    assert cells(table, "16 | Backfold, dense")[4:] == ["4.00", "4.00", "4.00", "2.00", "2.00"]
    assert cells(table, "4 | ordinary")[4:] == ["1.00", "1.00", "1.00", "1.00", "1.00"]
    assert "tokens 64, depth 4" in table


@pytest.mark.parametrize(
    ("plot", "rows", "texts"),
    [
        (cost_plot, [row(), row("exact", 2.25)], {"Backfold, dense, float32, eager", "2.25"}),
        (growth_plot, growth_rows(), {"batch", "Backfold, dense, eager"}),
    ],
)
def test_plots_are_svg_with_their_labels(plot, rows, texts):
    root = ET.fromstring(plot(content(*rows)))
    assert root.tag.endswith("svg")
    found = {"".join(node.itertext()).strip() for node in root.iter() if node.tag.endswith("text")}
    assert texts <= found


def test_parts_of_a_page_are_renewed_between_their_markers():
    page = "before\n<!-- begin a -->\nold\n<!-- end a -->\nafter\n"
    filled = fill(page, {"a": r"| \1 |"})
    assert filled == "before\n<!-- begin a -->\n\n| \\1 |\n\n<!-- end a -->\nafter\n"
    assert fill(filled, {"a": r"| \1 |"}) == filled
    with pytest.raises(ValueError, match="'b'"):
        fill(page, {"b": ""})


def test_the_docs_page_has_a_place_for_every_table(tmp_path):
    page = tmp_path / "cost.md"
    page.write_text(PAGE.read_text())
    write_page(page, tmp_path)
    assert page.read_text().count("Not measured yet.") == 10
