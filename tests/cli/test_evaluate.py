"""`backfold evaluate` on a tiny run: every protocol, what is printed, written and refused."""

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from PIL import Image

import backfold
from backfold.cli.main import main
from backfold.evaluation import attentive
from backfold.evaluation.results import read_rows
from backfold.pictures import png_bytes

QUICK = [
    "--accelerator=cpu", "--labels=all,2", "--draws=1", "--test-images=6", "--num-workers=0",
    "--finetuning.epochs=0", "--finetuning.min-steps=2", "--finetuning.batch-size=8",
    "--finetuning.longer=1", "--rate-factors=[1.0]", "--num-steps=[1]",
]  # fmt: skip


@pytest.fixture
def data(make_parquet):
    """120 labelled images to train on, 40 to test on."""
    folder = make_parquet("labelled/train.parquet", count=120, first=100).parent
    make_parquet("labelled/test.parquet", count=40, first=300)
    return folder


@pytest.fixture
def masked(tmp_path):
    """Grey squares of 14 pixels, light ones of class 5, dark ones of class 2, and void."""
    squares = np.random.default_rng(0).integers(0, 2, (6, 2, 3)).repeat(14, 1).repeat(14, 2)
    ids = np.where(squares, 5, 2)
    ids[:, :3] = 9
    columns = {
        name: [png_bytes(Image.fromarray(array.astype(np.uint8))) for array in arrays]
        for name, arrays in (("image", squares * 180 + 20), ("mask", ids))
    }
    (tmp_path / "masked").mkdir()
    for part in ("train", "test"):
        pq.write_table(pa.table(columns), tmp_path / "masked" / f"{part}.parquet")
    return tmp_path / "masked"


def evaluate(run_folder, protocols, *arguments):
    """The rows of the run's file after the command."""
    command = ["evaluate", f"--checkpoint={run_folder}", f"--protocols={protocols}", *QUICK]
    assert main([*command, *map(str, arguments)]) == 0
    return read_rows(run_folder / "evaluation.json")


def contenders(rows, protocol, case=None):
    """Without differences."""
    found = {row.contender for row in rows if row.protocol == protocol and case in (None, row.case)}
    return {name for name in found if " over " not in name}


def test_every_classifier_has_rows_of_every_contender(run_folder, data, capsys, monkeypatch):
    monkeypatch.setattr(attentive, "MIN_STEPS", 4)
    monkeypatch.setattr(attentive, "EPOCHS", 1)
    expected = {
        "knn": {"pretrained", "before", "pixels"},
        "linear": {"pretrained", "before", "pixels"},
        "attentive": {"pretrained", "before"},
        "finetune": {"pretrained", "from scratch"},
    }
    rows = evaluate(run_folder, ",".join(expected), f"--data={data}")
    for protocol, names in expected.items():
        over = {f"pretrained over {name}" for name in names - {"pretrained"}}
        for case in ("all labels", "2 labels a class"):
            found = {r.contender for r in rows if (r.protocol, r.case) == (protocol, case)}
            assert found == names | over
    assert {(row.data, row.step) for row in rows} == {(data.name, 2)}
    printed = capsys.readouterr().out
    assert f"rows: {run_folder / 'evaluation.json'}" in printed
    assert "Did pretraining pay?" in printed
    for row in rows:
        if " over " not in row.contender:
            assert 0 <= row.mean <= 100
            assert f"{row.mean:.1f}" in printed


def test_a_run_that_learned_nothing_did_not_pay(tiny, finished, data, tmp_path, capsys):
    """Started from a trained backbone and hardly moved: its start has the merit."""
    still = tmp_path / "still"
    images = finished.with_name("images.parquet")
    arguments = [*tiny, f"--data={images}", f"--out={still}", "--max-steps=3"]
    start = [f"--init={finished / 'backbone.safetensors'}", "--optimizer.base-lr=1e-9"]
    assert main(["pretrain", *arguments, *start]) == 0
    rows = evaluate(still, "knn", f"--data={data}")
    assert contenders(rows, "knn") == {"pretrained", "before", "random", "pixels"}
    assert "Did pretraining pay? No" in capsys.readouterr().out


def test_rows_of_other_protocols_and_labels_are_kept_and_a_broken_file_replaced(
    run_folder, data, capsys, tmp_path
):
    (run_folder / "evaluation.json").write_text("{")
    before = evaluate(run_folder, "knn", f"--data={data}")
    assert "is replaced" in capsys.readouterr().err
    same = {"data": data, "protocols": ["knn"], "labels": ["all", "2"], "draws": 1}
    few = {"test_images": 6, "num_workers": 0, "accelerator": "cpu"}
    assert backfold.evaluate(run_folder, **same, out=tmp_path / "b", **few) == before
    rows = evaluate(run_folder, "lowshot", f"--data={data}", "--train-images=100")
    assert rows[: len(before)] == before
    assert {row.protocol for row in rows[len(before) :]} == {"linear", "finetune"}
    cases = {row.case for row in rows[len(before) :]}
    assert {"1 label a class", "5 labels a class", "10 % of the labels"} <= cases
    assert "25 labels a class" not in cases
    again = evaluate(run_folder, "knn", f"--data={data}", "--seed=3", "--labels=2")
    assert len(again) == len(rows)
    assert {row for row in before if row.case == "all labels"} <= {*again}


def test_backbones_that_are_not_ours(data, tmp_path, run_folder):
    """An exported folder, and a timm name."""
    exported = tmp_path / "exported"
    assert main(["export", f"--checkpoint={run_folder}", f"--out={exported}"]) == 0
    settings = {"data": data, "protocols": "knn", "labels": "all", "num_workers": 0}
    ours = backfold.evaluate(run_folder, **settings)
    theirs = backfold.evaluate(exported, **settings, out=tmp_path / "rows")
    means = [{row.contender: row.mean for row in rows}["pretrained"] for rows in (ours, theirs)]
    assert means[0] == pytest.approx(means[1])
    assert contenders(theirs, "knn") == {"pretrained", "random", "pixels"}
    assert read_rows(tmp_path / "rows" / "evaluation.json") == theirs
    named = backfold.evaluate("test_vit", **settings, image_size=160, channels=1, train_images=40)
    assert {row.step for row in named} == {None}


def test_restoration_and_energy_need_no_labels(run_folder, make_parquet, capsys):
    plain = make_parquet("plain.parquet", labelled=False)
    near = make_parquet("clothes.parquet", count=12, first=500)
    far = make_parquet("things/a.parquet", count=12, first=600, labelled=False).parent
    others = (f"--data={plain}", f"--near={near}", f"--far={far}")
    rows = evaluate(run_folder, "restoration,energy", *others)
    assert {(row.data, row.step) for row in rows} == {("plain.parquet", 2)}
    assert {row.count for row in rows if row.protocol == "restoration"} == {6}
    assert {"energy, 1 step", "identity", "bicubic"} <= contenders(rows, "restoration")
    assert "masking, severity 3" in capsys.readouterr().out
    cases = {row.case for row in rows if row.protocol == "energy"}
    assert {f"{task}, severity {n}" for task in ("masking", "denoising") for n in (1, 5)} <= cases
    assert sum("clothes" in case or "things" in case for case in cases) == 2
    assert {"energy", "kNN distance"} <= contenders(rows, "energy")


def test_labels_add_an_adaptation_and_a_class_against_the_rest(run_folder, data):
    rows = evaluate(run_folder, "adaptation,energy", f"--data={data}")
    cases = {"clean", "noise, severity 5", "one class against the rest"}
    assert cases <= {row.case for row in rows}
    assert {"restored first", "as they are"} <= contenders(rows, "adaptation")


def test_segmentation_beside_a_classifier_on_other_data(run_folder, data, masked, tmp_path):
    out = tmp_path / "elsewhere"
    settings = {"epochs": 2, "finetune-epochs": 1, "seeds": 2, "batch-size": 4, "void": 9}
    options = [f"--segmentation.{name}={value}" for name, value in settings.items()]
    places = [f"--data={data}", f"--segmentation.data={masked}", f"--out={out}"]
    command = ["evaluate", f"--checkpoint={run_folder}", "--protocols=segmentation,knn", *QUICK]
    assert main([*command, *options, *places]) == 0
    rows = read_rows(out / "evaluation.json")
    assert contenders(rows, "segmentation") >= {"pretrained", "before", "pixels"}
    kinds = {(row.protocol, row.data) for row in rows}
    assert kinds == {("segmentation", masked.name), ("knn", data.name)}
    with Image.open(out / "evaluation" / "segmentation.png") as picture:
        assert picture.width > picture.height
    assert not (run_folder / "evaluation.json").exists()


def test_what_a_protocol_cannot_use_is_refused_before_anything_is_written(
    run_folder, data, make_parquet, make_folder, refused, snapshot, masked
):
    before = snapshot(run_folder)
    start = ["evaluate", f"--checkpoint={run_folder}", *QUICK]
    plain = make_parquet("plain.parquet", labelled=False)

    def refuse(protocols, *parts, more=()):
        refused([*start, f"--protocols={protocols}", *more], *parts)

    given = f"--data={data}"
    refuse("knn,segmentation", "no `mask`", more=[given])
    refuse("segmentation", "holds no parquet files with masks", more=[f"--data={make_folder()}"])
    refuse("restoration,adaptation", "has no labels; give a folder", more=[f"--data={plain}"])
    refuse("knn,energy", "nowhere does not exist", more=[given, "--near=nowhere"])
    refuse("knn,segmentaton", "unknown protocol 'segmentaton'; choose from knn, linear")
    refuse("finetune", "batch_size is 1", more=["--finetuning.batch-size=1"])
    refuse("segmentation", "29x29, and the backbone's stride is 7; give multiples",
           more=[f"--data={masked}", "--segmentation.image-size=29"])  # fmt: skip
    refuse("energy", "test_images is 1; give 2 or more", more=["--test-images=1"])
    refuse("finetune", "rate_factors is", "above 0", more=["--rate-factors=[0.0]"])
    refuse("knn", "draws is 0; give 1 or more", more=["--draws=0"])
    refuse("knn", "labels is '130%'", more=["--labels=130%"])
    refuse("knn", "has no embedding layer -7", more=["--embedding.layer=-7", given])
    refuse("knn", "fewer than the 50 labels a class", more=["--labels=50", given])
    refuse("knn", "can't use accelerator 'abacus'", more=["--accelerator=abacus"])
    assert snapshot(run_folder) == before
    refused(["evaluate", "--checkpoint=no_such_thing"], "no_such_thing is no run's folder")
    refused(["evaluate", "--checkpoint=test_vit", "--protocols=energy"], "a backbone alone")


def test_settings_that_nothing_uses_are_named(run_folder, data, capsys):
    unused = ["--near=anything", "--finetuning.epochs=3", "--image-size=28"]
    evaluate(run_folder, "knn", f"--data={data}", *unused)
    log = " ".join(capsys.readouterr().err.split())
    assert "near has no effect on knn" in log
    assert "finetuning has no effect on knn" in log
    assert "image_size has no effect on a run" in log
    assert "labels has no effect" not in log
