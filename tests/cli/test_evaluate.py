"""`backfold evaluate` on a tiny run: every protocol, what is printed, written and refused."""

import io

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from PIL import Image

import backfold
from backfold.cli.main import main
from backfold.evaluation import attentive
from backfold.evaluation.results import read_rows
from backfold.training.run import RunFolder

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
    random = np.random.default_rng(0)
    columns = {"image": [], "mask": []}
    for _ in range(6):
        squares = random.integers(0, 2, (2, 3)).repeat(14, 0).repeat(14, 1)
        ids = np.where(squares, 5, 2)
        ids[:3] = 9
        for name, array in (("image", squares * 180 + 20), ("mask", ids)):
            Image.fromarray(array.astype(np.uint8)).save(buffer := io.BytesIO(), "PNG")
            columns[name].append(buffer.getvalue())
    (tmp_path / "masked").mkdir()
    for part in ("train", "test"):
        pq.write_table(pa.table(columns), tmp_path / "masked" / f"{part}.parquet")
    return tmp_path / "masked"


FEW = {"test_images": 6, "num_workers": 0, "accelerator": "cpu"}


def evaluate(run_folder, protocols, *arguments):
    checkpoint = f"--checkpoint={run_folder}"
    return main(["evaluate", checkpoint, f"--protocols={protocols}", *QUICK, *map(str, arguments)])


def test_every_classifier_has_rows_of_every_contender(run_folder, data, capsys, monkeypatch):
    monkeypatch.setattr(attentive, "MIN_STEPS", 4)
    monkeypatch.setattr(attentive, "EPOCHS", 1)
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


def test_a_run_that_learned_nothing_did_not_pay(tiny, finished, data, tmp_path, capsys):
    """Started from a trained backbone and hardly moved: its start has the merit."""
    still = tmp_path / "still"
    images = finished.with_name("images.parquet")
    arguments = [*tiny, f"--data={images}", f"--out={still}", "--max-steps=3"]
    start = [f"--init={finished / 'backbone.safetensors'}", "--optimizer.base-lr=1e-9"]
    assert main(["pretrain", *arguments, *start]) == 0
    assert evaluate(still, "knn", f"--data={data}") == 0
    rows = read_rows(RunFolder(still).evaluation)
    assert {"pretrained", "before", "random", "pixels"} <= {row.contender for row in rows}
    assert "Did pretraining pay? No" in capsys.readouterr().out


def test_rows_of_other_protocols_and_labels_are_kept_and_a_broken_file_replaced(
    run_folder, data, capsys, tmp_path
):
    path = RunFolder(run_folder).evaluation
    path.write_text("{")
    assert evaluate(run_folder, "knn", f"--data={data}") == 0
    assert "is replaced" in capsys.readouterr().err
    before = read_rows(path)
    same = {"data": data, "protocols": ["knn"], "labels": ["all", "2"], "draws": 1}
    assert backfold.evaluate(run_folder, **same, out=tmp_path / "b", **FEW) == before
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


def test_restoration_and_energy_need_no_labels(run_folder, make_parquet, capsys):
    plain = make_parquet("plain.parquet", labelled=False)
    near = make_parquet("clothes.parquet", count=12, first=500)
    far = make_parquet("things/a.parquet", count=12, first=600, labelled=False).parent
    others = (f"--near={near}", f"--far={far}")
    assert evaluate(run_folder, "restoration,energy", f"--data={plain}", *others) == 0
    rows = read_rows(RunFolder(run_folder).evaluation)
    assert {(row.data, row.step) for row in rows} == {("plain.parquet", 2)}
    restored = [row for row in rows if row.protocol == "restoration"]
    assert {row.count for row in restored} == {6}
    assert {"energy, 1 step", "identity", "bicubic"} <= {row.contender for row in restored}
    assert "masking, severity 3" in capsys.readouterr().out
    energy = [row for row in rows if row.protocol == "energy"]
    cases = {row.case for row in energy}
    assert {f"{task}, severity {n}" for task in ("masking", "denoising") for n in (1, 5)} <= cases
    assert sum("clothes" in case or "things" in case for case in cases) == 2
    assert {"energy", "kNN distance"} <= {row.contender for row in energy}


def test_labels_add_an_adaptation_and_a_class_against_the_rest(run_folder, data):
    assert evaluate(run_folder, "adaptation,energy", f"--data={data}") == 0
    rows = read_rows(RunFolder(run_folder).evaluation)
    cases = {"clean", "noise, severity 5", "one class against the rest"}
    assert cases <= {row.case for row in rows}
    assert {"restored first", "as they are"} <= {row.contender for row in rows}


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

    given = f"--data={data}"
    refuse("knn,segmentation", "no `mask`", more=[given])
    refuse("segmentation", "holds no parquet files with masks", more=[f"--data={make_folder()}"])
    refuse("restoration,adaptation", "has no labels; give a folder", more=[f"--data={plain}"])
    refuse("knn,energy", "nowhere does not exist", more=[given, "--near=nowhere"])
    refuse("knn,segmentaton", "unknown protocol 'segmentaton'; choose from knn, linear")
    refuse("finetune", "batch_size is 1", more=["--finetuning.batch-size=1"])
    refuse("segmentation", "multiples of it",
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
