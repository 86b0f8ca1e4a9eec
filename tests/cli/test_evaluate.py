"""The protocols of `backfold evaluate`, each on a tiny run: what they print, write and refuse."""

import io
import json

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from PIL import Image

from backfold.cli.main import main
from backfold.evaluation.measures import read_measures
from backfold.evaluation.protocol import EvaluationRow, read_rows
from backfold.evaluation.settings import EvaluateSettings
from backfold.evaluation.suite import merge_rows
from backfold.training.run_folder import RunFolder

# From Python 3.12 on, forking a process with threads warns; the evaluation's loaders fork workers.
pytestmark = pytest.mark.filterwarnings(
    "ignore:This process .* is multi-threaded:DeprecationWarning"
)
QUICK = [
    "--accelerator=cpu", "--labels-per-class=2", "--draws=2", "--test-images=6",
    "--finetuning.epochs=0", "--finetuning.min-steps=2", "--finetuning.batch-size=8",
    "--rate-factors=[1.0]", "--num-steps=[1]",
]  # fmt: skip


@pytest.fixture(autouse=True)
def wide_terminal(monkeypatch):
    monkeypatch.setenv("COLUMNS", "250")


@pytest.fixture
def data(make_parquet):
    """120 labelled images to train on, 40 to test on."""
    folder = make_parquet("labelled/train.parquet", count=120, first=100).parent
    make_parquet("labelled/test.parquet", count=40, first=300)
    return folder


@pytest.fixture
def masked(tmp_path):
    """Grey squares of 14 pixels, light ones of class 5, dark ones of class 2, and void."""
    random = np.random.default_rng(0)
    columns = {"image": [], "mask": []}
    for _ in range(6):
        squares = random.integers(0, 2, (2, 3)).repeat(14, 0).repeat(14, 1)
        ids = np.where(squares, 5, 2).astype(np.uint8)
        ids[:3] = 9
        for name, array in (("image", (squares * 180 + 20).astype(np.uint8)), ("mask", ids)):
            buffer = io.BytesIO()
            Image.fromarray(array).save(buffer, "PNG")
            columns[name].append(buffer.getvalue())
    (tmp_path / "masked").mkdir()
    for part in ("train", "test"):
        pq.write_table(pa.table(columns), tmp_path / "masked" / f"{part}.parquet")
    return tmp_path / "masked"


def evaluate(run_folder, protocol, *arguments):
    checkpoint = f"--checkpoint={run_folder}"
    return main(["evaluate", checkpoint, f"--protocol={protocol}", *QUICK, *map(str, arguments)])


def test_every_classifier_has_rows_of_both_backbones(run_folder, data, capsys):
    protocols = "knn,linear,attentive,finetune"
    assert evaluate(run_folder, protocols, f"--data={data}") == 0
    path = RunFolder(run_folder).evaluation
    rows = read_rows(path)
    assert {(row.protocol, row.labels, row.backbone) for row in rows} == {
        (protocol, labels, backbone)
        for protocol in protocols.split(",")
        for labels in ("all", 2)
        for backbone in ("untrained", "pretrained")
    }
    assert {(row.data, row.step) for row in rows} == {(data.name, 2)}
    printed = capsys.readouterr().out
    assert printed.splitlines()[-1] == f"rows: {path}"
    assert all(f"{row.accuracy_mean:.1f}" in printed for row in rows)


def test_rows_of_other_protocols_are_kept(run_folder, data, capsys):
    path = RunFolder(run_folder).evaluation
    assert evaluate(run_folder, "knn", f"--data={data}") == 0
    before = read_rows(path)
    assert evaluate(run_folder, "lowshot", f"--data={data}", "--train-images=100") == 0
    rows = read_rows(path)
    assert rows[: len(before)] == before
    few = {1, 5, "1 %", "10 %"}
    assert {(row.protocol, row.labels) for row in rows[len(before) :]} == {
        (protocol, labels) for protocol in ("linear", "finetune") for labels in few
    }
    log = capsys.readouterr().err
    assert "labels a class are left out, as the smallest class has" in " ".join(log.split())
    assert evaluate(run_folder, "knn", f"--data={data}", "--seed=3") == 0
    again = read_rows(path)
    assert again[: len(rows) - len(before)] == rows[len(before) :]
    assert len(again) == len(rows)


def test_new_rows_replace_those_of_the_same_protocol_and_labels():
    def row(protocol, labels, accuracy):
        return EvaluationRow(protocol, labels, "pretrained", accuracy, 0.0)

    old = [row("knn", "all", 1), row("knn", 5, 2), row("linear", 5, 3)]
    new = [row("knn", 5, 4), row("linear", "all", 5)]
    assert merge_rows(old, new) == [old[0], old[2], *new]


def test_a_broken_file_of_rows_is_replaced(run_folder, data, capsys):
    path = RunFolder(run_folder).evaluation
    path.write_text("{")
    assert evaluate(run_folder, "knn", f"--data={data}") == 0
    assert {row.protocol for row in read_rows(path)} == {"knn"}
    assert "is replaced" in capsys.readouterr().err


def test_energy_is_measured_against_corruptions_and_other_data(run_folder, data, make_parquet):
    near = make_parquet("clothes.parquet", count=12, first=500)
    far = make_parquet("things/a.parquet", count=12, first=600, labelled=False).parent
    assert evaluate(run_folder, "energy", f"--data={data}", f"--near={near}", f"--far={far}") == 0
    rows = read_measures(RunFolder(run_folder).measures / "energy.json")
    cases = {row.case for row in rows}
    assert {f"{task}, severity {n}" for task in ("masking", "denoising") for n in (1, 5)} <= cases
    assert {
        "test images against clothes.parquet (near)",
        "test images against things (far)",
        "one class against the rest",
    } <= cases
    assert {"energy", "kNN distance"} <= {row.contender for row in rows}
    picture = (RunFolder(run_folder).measures / "energy.svg").read_text()
    assert "<svg" in picture


def test_restoration_and_energy_need_no_labels(run_folder, make_parquet, capsys):
    data = make_parquet("plain.parquet", labelled=False)
    assert evaluate(run_folder, "restoration,energy", f"--data={data}") == 0
    folder = RunFolder(run_folder).measures
    assert {path.name for path in folder.iterdir()} == {
        "restoration.json", "restoration.svg", "energy.json", "energy.svg",
    }  # fmt: skip
    rows = read_measures(folder / "restoration.json")
    assert {row.count for row in rows} == {6}
    assert {(row.data, row.step) for row in rows} == {("plain.parquet", 2)}
    assert {"energy, 1 step", "identity", "bicubic"} <= {row.contender for row in rows}
    printed = capsys.readouterr().out
    assert f"measures: {folder / 'restoration.json'}" in printed
    assert f"picture: {folder / 'energy.svg'}" in printed
    assert "masking, severity 3" in printed


def test_adaptation_compares_both_ways(run_folder, data):
    assert evaluate(run_folder, "adaptation", f"--data={data}") == 0
    rows = read_measures(RunFolder(run_folder).measures / "adaptation.json")
    cells = {(row.case, row.contender): row.mean for row in rows if row.metric == "accuracy (%)"}
    for case in {case for case, _ in cells}:
        change = cells[case, "restored first"] - cells[case, "as they are"]
        assert cells[case, "difference"] == pytest.approx(change)
    assert {"clean", "mean, severity 3 and above", "noise, severity 5"} <= {
        case for case, _ in cells
    }
    assert (RunFolder(run_folder).measures / "adaptation.svg").is_file()


def test_segmentation_beside_a_classifier_on_other_data(run_folder, data, masked, capsys, tmp_path):
    out = tmp_path / "elsewhere"
    settings = {"epochs": 2, "finetune-epochs": 1, "seeds": 2, "batch-size": 4, "void": 9}
    assert evaluate(
        run_folder, "segmentation,knn", f"--data={data}", f"--segmentation.data={masked}",
        *(f"--segmentation.{name}={value}" for name, value in settings.items()), f"--out={out}",
    ) == 0  # fmt: skip
    rows = read_measures(out / "measures" / "segmentation.json")
    assert len(rows) == 1 + 4 * 2
    assert {row.count for row in rows[1:]} == {2}
    assert {(row.data, row.step) for row in rows} == {(masked.name, 2)}
    classified = read_rows(out / "evaluation.json")
    assert {(row.protocol, row.data) for row in classified} == {("knn", data.name)}
    with Image.open(out / "measures" / "segmentation.png") as picture:
        assert picture.width > picture.height
    assert not RunFolder(run_folder).measures.exists()
    assert "28 x 42 pixels, 2 classes" in " ".join(capsys.readouterr().err.split())


def test_what_a_protocol_cannot_use_is_refused_before_anything_is_written(
    run_folder, data, make_parquet, make_folder, refused, snapshot, masked
):
    before = snapshot(run_folder)
    start = ["evaluate", f"--checkpoint={run_folder}", *QUICK]
    plain = make_parquet("plain.parquet", labelled=False)

    def refuse(protocol, *parts, more=()):
        refused([*start, f"--protocol={protocol}", *more], *parts)

    refuse("knn,segmentation", "no `mask`; segmentation takes parquet files with columns `image`",
           more=[f"--data={data}"])  # fmt: skip
    refuse("segmentation", "holds no parquet files with masks", more=[f"--data={make_folder()}"])
    refuse("restoration,adaptation", "has no labels; give a folder", more=[f"--data={plain}"])
    refuse("energy", "nowhere does not exist", more=[f"--data={data}", "--near=nowhere"])
    refuse("knn,segmentaton", "unknown protocol 'segmentaton'; choose from knn, linear, attentive")
    refuse("finetune", "fine-tuning: batch_size is 7; give an even number",
           more=["--finetuning.batch-size=7"])  # fmt: skip
    refuse("segmentation", "segmentation's seeds is 0; give 1", more=["--segmentation.seeds=0"])
    refuse("segmentation", "multiples of it",
           more=[f"--data={masked}", "--segmentation.image-size=29"])  # fmt: skip
    refuse("energy", "test_images is 1; give 2 or more", more=["--test-images=1"])
    refuse("finetune", "rate_factors is", "above 0", more=["--rate-factors=[0.0]"])
    assert snapshot(run_folder) == before


def test_settings_that_nothing_uses_are_named(run_folder, data, capsys):
    assert evaluate(run_folder, "knn", f"--data={data}", "--near=anything") == 0
    log = " ".join(capsys.readouterr().err.split())
    assert "near has no effect on knn" in log
    assert "finetuning has no effect on knn" in log
    assert "labels_per_class has no effect" not in log
    assert "seed has no effect" not in log
    assert EvaluateSettings().without_effect(["restoration"]) == []


def test_overwriting_a_run_takes_its_measures_away(tiny, run_folder, tmp_path):
    measures = RunFolder(run_folder).measures
    measures.mkdir()
    (measures / "energy.json").write_text(json.dumps([]))
    arguments = [f"--data={tmp_path / 'images.parquet'}", f"--out={run_folder}", *tiny]
    assert main(["pretrain", *arguments, "--overwrite"]) == 0
    assert not measures.exists()
