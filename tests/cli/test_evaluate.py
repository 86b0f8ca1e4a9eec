"""`backfold evaluate` on a tiny run: every protocol, what is printed, written and refused."""

import io

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from PIL import Image

import backfold
from backfold.cli.main import main
from backfold.evaluation.results import read_rows
from backfold.training.run_folder import RunFolder

# From Python 3.12 on, forking a process with threads warns; the evaluation's loaders fork workers.
pytestmark = pytest.mark.filterwarnings(
    "ignore:This process .* is multi-threaded:DeprecationWarning"
)
QUICK = [
    "--accelerator=cpu", "--labels=all,2", "--draws=2", "--test-images=6", "--num-workers=0",
    "--finetuning.epochs=0", "--finetuning.min-steps=2", "--finetuning.batch-size=8",
    "--finetuning.longer=1", "--rate-factors=[1.0]", "--num-steps=[1]",
]  # fmt: skip


@pytest.fixture(autouse=True)
def wide_terminal(monkeypatch):
    monkeypatch.setenv("COLUMNS", "300")


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


def evaluate(run_folder, protocols, *arguments):
    checkpoint = f"--checkpoint={run_folder}"
    return main(["evaluate", checkpoint, f"--protocols={protocols}", *QUICK, *map(str, arguments)])


def test_every_classifier_has_rows_of_every_contender(run_folder, data, capsys):
    protocols = ("knn", "linear", "attentive", "finetune")
    assert evaluate(run_folder, ",".join(protocols), f"--data={data}") == 0
    path = RunFolder(run_folder).evaluation
    rows = read_rows(path)
    frozen = {"pretrained", "before", "pixels"}
    expected = {
        "knn": frozen,
        "linear": frozen,
        "attentive": {"pretrained", "before"},
        "finetune": {"pretrained", "from scratch"},
    }
    for protocol in protocols:
        for case in ("all labels", "2 labels a class"):
            found = {r.contender for r in rows if (r.protocol, r.case) == (protocol, case)}
            others = expected[protocol] - {"pretrained"}
            assert found == expected[protocol] | {f"pretrained over {name}" for name in others}
    assert {(row.data, row.step) for row in rows} == {(data.name, 2)}
    assert all(0 <= row.mean <= 100 for row in rows if " over " not in row.contender)
    printed = capsys.readouterr().out
    assert str(path) in printed
    assert "Did pretraining pay?" in printed
    assert all(f"{row.mean:.1f}" in printed for row in rows if " over " not in row.contender)


def test_the_function_is_the_command(run_folder, data, tmp_path):
    assert evaluate(run_folder, "knn,layers", f"--data={data}", f"--out={tmp_path / 'a'}") == 0
    rows = backfold.evaluate(
        run_folder, data=data, protocols=["knn", "layers"], labels=["all", "2"], draws=2,
        num_workers=0, out=tmp_path / "b", accelerator="cpu",
    )  # fmt: skip
    assert read_rows(tmp_path / "a" / "evaluation.json") == rows
    assert read_rows(tmp_path / "b" / "evaluation.json") == rows


def test_a_run_that_learned_nothing_did_not_pay(tiny, run_folder, data, tmp_path, capsys):
    """Started from a trained backbone and hardly moved: its start has the merit."""
    still = tmp_path / "still"
    arguments = [*tiny, f"--data={tmp_path / 'images.parquet'}", f"--out={still}", "--max-steps=3"]
    start = [f"--init={run_folder / 'backbone.safetensors'}", "--optimizer.base-lr=1e-9"]
    assert main(["pretrain", *arguments, *start]) == 0
    assert evaluate(still, "knn,linear", f"--data={data}") == 0
    rows = read_rows(RunFolder(still).evaluation)
    assert {"pretrained", "before", "random", "pixels"} <= {row.contender for row in rows}
    assert "Did pretraining pay? No" in capsys.readouterr().out


def test_rows_of_other_protocols_and_labels_are_kept(run_folder, data):
    path = RunFolder(run_folder).evaluation
    assert evaluate(run_folder, "knn", f"--data={data}") == 0
    before = read_rows(path)
    assert evaluate(run_folder, "lowshot", f"--data={data}", "--train-images=100") == 0
    rows = read_rows(path)
    assert rows[: len(before)] == before
    assert {row.protocol for row in rows[len(before) :]} == {"linear", "finetune"}
    few = {row.case for row in rows[len(before) :]}
    assert {"1 label a class", "5 labels a class", "10 % of the labels"} <= few
    assert "25 labels a class" not in few
    assert evaluate(run_folder, "knn", f"--data={data}", "--seed=3", "--labels=2") == 0
    again = read_rows(path)
    assert [row for row in again if row.case == "all labels"] == [
        row for row in before if row.case == "all labels"
    ]
    assert len(again) == len(rows)


def test_a_broken_file_of_rows_is_replaced(run_folder, data, capsys):
    path = RunFolder(run_folder).evaluation
    path.write_text("{")
    assert evaluate(run_folder, "knn", f"--data={data}") == 0
    assert {row.protocol for row in read_rows(path)} == {"knn"}
    assert "is replaced" in capsys.readouterr().err


def test_backbones_that_are_not_ours(data, tmp_path, run_folder):
    """An exported folder, a timm name, and weights in a file."""
    exported = tmp_path / "exported"
    assert main(["export", f"--checkpoint={run_folder}", f"--out={exported}"]) == 0
    settings = {"data": data, "protocols": "knn", "labels": "all", "num_workers": 0}
    ours = backfold.evaluate(run_folder, **settings)
    theirs = backfold.evaluate(exported, **settings, out=tmp_path / "rows")
    assert [r.mean for r in theirs if r.contender == "pretrained"] == pytest.approx(
        [r.mean for r in ours if r.contender == "pretrained"]
    )
    assert {r.contender for r in theirs} >= {"pretrained", "random", "pixels"}
    assert (tmp_path / "rows" / "evaluation.json").exists()
    named = backfold.evaluate("test_vit", **settings, image_size=160, channels=1, train_images=40)
    assert {row.step for row in named} == {None}


def test_energy_is_measured_against_corruptions_and_other_data(run_folder, data, make_parquet):
    near = make_parquet("clothes.parquet", count=12, first=500)
    far = make_parquet("things/a.parquet", count=12, first=600, labelled=False).parent
    assert evaluate(run_folder, "energy", f"--data={data}", f"--near={near}", f"--far={far}") == 0
    rows = read_rows(RunFolder(run_folder).evaluation)
    cases = {row.case for row in rows}
    assert {f"{task}, severity {n}" for task in ("masking", "denoising") for n in (1, 5)} <= cases
    assert "one class against the rest" in cases
    assert sum("clothes" in case or "things" in case for case in cases) == 2
    assert {"energy", "kNN distance"} <= {row.contender for row in rows}


def test_restoration_and_energy_need_no_labels(run_folder, make_parquet, capsys):
    data = make_parquet("plain.parquet", labelled=False)
    assert evaluate(run_folder, "restoration,energy", f"--data={data}") == 0
    rows = [r for r in read_rows(RunFolder(run_folder).evaluation) if r.protocol == "restoration"]
    assert {row.count for row in rows} == {6}
    assert {(row.data, row.step) for row in rows} == {("plain.parquet", 2)}
    assert {"energy, 1 step", "identity", "bicubic"} <= {row.contender for row in rows}
    assert "masking, severity 3" in capsys.readouterr().out


def test_adaptation_compares_both_ways(run_folder, data):
    assert evaluate(run_folder, "adaptation", f"--data={data}") == 0
    rows = read_rows(RunFolder(run_folder).evaluation)
    cells = {(row.case, row.contender): row.mean for row in rows if row.metric == "accuracy (%)"}
    for case in {case for case, _ in cells}:
        change = cells[case, "restored first"] - cells[case, "as they are"]
        (given,) = [v for (c, n), v in cells.items() if c == case and n not in (
            "restored first", "as they are")]  # fmt: skip
        assert given == pytest.approx(change)
    assert {"clean", "noise, severity 5"} <= {case for case, _ in cells}


def test_segmentation_beside_a_classifier_on_other_data(run_folder, data, masked, tmp_path):
    out = tmp_path / "elsewhere"
    settings = {"epochs": 2, "finetune-epochs": 1, "seeds": 2, "batch-size": 4, "void": 9}
    assert evaluate(
        run_folder, "segmentation,knn", f"--data={data}", f"--segmentation.data={masked}",
        *(f"--segmentation.{name}={value}" for name, value in settings.items()), f"--out={out}",
    ) == 0  # fmt: skip
    rows = read_rows(out / "evaluation.json")
    segmented = [row for row in rows if row.protocol == "segmentation"]
    assert {"pretrained", "before", "pixels"} <= {row.contender for row in segmented}
    assert {row.data for row in segmented} == {masked.name}
    assert {row.data for row in rows if row.protocol == "knn"} == {data.name}
    with Image.open(out / "evaluation" / "segmentation.png") as picture:
        assert picture.width > picture.height
    assert not RunFolder(run_folder).evaluation.exists()


def test_what_a_protocol_cannot_use_is_refused_before_anything_is_written(
    run_folder, data, make_parquet, make_folder, refused, snapshot, masked
):
    before = snapshot(run_folder)
    start = ["evaluate", f"--checkpoint={run_folder}", *QUICK]
    plain = make_parquet("plain.parquet", labelled=False)

    def refuse(protocols, *parts, more=()):
        refused([*start, f"--protocols={protocols}", *more], *parts)

    refuse("knn,segmentation", "no `mask`", more=[f"--data={data}"])
    refuse("segmentation", "holds no parquet files with masks", more=[f"--data={make_folder()}"])
    refuse("restoration,adaptation", "has no labels; give a folder", more=[f"--data={plain}"])
    refuse("knn,energy", "nowhere does not exist", more=[f"--data={data}", "--near=nowhere"])
    refuse("knn,segmentaton", "unknown protocol 'segmentaton'; choose from knn, linear")
    refuse("finetune", "batch_size is 1", more=["--finetuning.batch-size=1"])
    refuse("segmentation", "seeds is 0", more=["--segmentation.seeds=0"])
    refuse("segmentation", "multiples of it",
           more=[f"--data={masked}", "--segmentation.image-size=29"])  # fmt: skip
    refuse("energy", "test_images is 1; give 2 or more", more=["--test-images=1"])
    refuse("finetune", "rate_factors is", "above 0", more=["--rate-factors=[0.0]"])
    refuse("knn", "labels is '0'", more=["--labels=0"])
    refuse("knn", "labels is '130%'", more=["--labels=130%"])
    refuse("knn", "has no embedding layer -7", more=["--embedding.layer=-7", f"--data={data}"])
    refuse("knn", "fewer than the 50 labels a class", more=["--labels=50", f"--data={data}"])
    assert snapshot(run_folder) == before
    refused(["evaluate", "--checkpoint=no_such_thing"], "no_such_thing is no run's folder")
    refused(["evaluate", "--checkpoint=test_vit", "--protocols=energy"], "a backbone alone")


def test_settings_that_nothing_uses_are_named(run_folder, data, capsys):
    assert evaluate(run_folder, "knn", f"--data={data}", "--near=anything") == 0
    log = " ".join(capsys.readouterr().err.split())
    assert "near has no effect on knn" in log
    assert "finetuning has no effect on knn" in log
    assert "labels has no effect" not in log
    assert "seed has no effect" not in log


def test_overwriting_a_run_takes_its_rows_and_its_start_away(tiny, run_folder, tmp_path):
    folder = RunFolder(run_folder)
    folder.evaluation.write_text("[]")
    start = folder.initial.read_bytes()
    arguments = [f"--data={tmp_path / 'images.parquet'}", f"--out={run_folder}", *tiny]
    assert main(["pretrain", *arguments, "--overwrite", "--seed=5"]) == 0
    assert not folder.evaluation.exists()
    assert folder.initial.read_bytes() != start
