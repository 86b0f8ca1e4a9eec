import io
import json
import math
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from backfold.errors import UserError
from backfold.evaluation import EvaluationRow
from backfold.reporting.reading import read_run

FACTS = {
    "command": "backfold pretrain --backbone vit_tiny",
    "started": "2025-03-02T09:14:07+00:00",
    "seconds": 5333.2,
    "versions": {"backfold": "0.1.0", "torch": "2.11.0"},
    "hardware": "a machine",
    "device": "cpu",
    "precision": "32-true",
    "backbone": "vit_tiny",
    "parameters": 5526528,
    "image_size": [28, 30],
    "channels": 1,
    "mean": [0.286],
    "std": [0.353],
    "data": "some images",
    "training_images": 57000,
    "held_out_images": 512,
    "tasks": ["masking", "denoising"],
    "steps": 1200,
    "total_steps": 1200,
    "epochs": 5.4,
}
METRICS = """\
step,epoch,seconds,images_per_second,data_wait,lr,loss,gradient_norm,psnr_gain_db,energy_gap
400,1.8,10,250,0.01,0.001,0.6,2,1.5,3
800,3.6,20,260,0.02,0.0005,0.4,1.5,2.5,4
1200,5.4,30,270,0.03,0,0.2,1,3.5,5
"""
EVALUATION = [
    {
        "protocol": "linear",
        "labels": "all",
        "backbone": backbone,
        "accuracy_mean": accuracy,
        "accuracy_std": 0.0,
    }
    for backbone, accuracy in (("untrained", 76.0), ("pretrained", 81.2))
]


def health_entry(step: int = 1200, **changes) -> dict:
    masking = {"psnr_corrupted_db": 12.0, "psnr_restored_db": 16.2, "psnr_mean_fill_db": 11.5}
    denoising = {"psnr_corrupted_db": 20.0, "psnr_restored_db": 19.6, "psnr_mean_fill_db": 11.5}
    energies = {"energy_gap": 4.25, "auroc": 0.913}
    return {
        "step": step,
        "epoch": step / 222,
        "psnr_gain_db": 1.9,
        "energy_gap": 4.25,
        "auroc": 0.913,
        "rank_me": 48.0,
        "embedding_size": 192,
        "knn": 70.0 + step / 300,
        "tasks": {"masking": masking | energies, "denoising": denoising | energies},
    } | changes


def health() -> dict:
    random = np.random.default_rng(0)
    means = {"clean": -3.0, "corrupted": 2.0, "restored": -1.0}
    return {
        "history": [health_entry(0), health_entry(600), health_entry()],
        "energies": {
            task: {name: random.normal(mean, 1, 50).tolist() for name, mean in means.items()}
            for task in FACTS["tasks"]
        },
    }


def png(colour: int, size: tuple[int, int] = (12, 8)) -> bytes:
    buffer = io.BytesIO()
    Image.new("L", size, colour).save(buffer, "PNG")
    return buffer.getvalue()


def write_run(folder: Path, *, parts: bool = True, facts: dict | None = None) -> Path:
    """A run's folder as training leaves it; without its parts, only what must be there."""
    folder.mkdir(parents=True)
    (folder / "config.yaml").write_text("backbone: vit_tiny\ntasks:\n  masking:\n    ratio: 0.6\n")
    (folder / "run.json").write_text(json.dumps(FACTS | (facts or {})))
    if parts:
        (folder / "metrics.csv").write_text(METRICS)
        (folder / "health.json").write_text(json.dumps(health()))
        (folder / "evaluation.json").write_text(json.dumps(EVALUATION))
        (folder / "previews").mkdir()
        for name, colour in (
            ("step-0000600-masking.png", 60),
            ("step-0001200-masking.png", 120),
            ("step-0001200-denoising.png", 90),
        ):
            (folder / "previews" / name).write_bytes(png(colour))
        (folder / "backbone.safetensors").touch()
        (folder / "checkpoints").mkdir()
    return folder


@pytest.fixture
def run_folder(tmp_path) -> Path:
    return write_run(tmp_path / "a-run")


def test_all_parts_are_read(run_folder):
    run = read_run(run_folder)
    assert run.name == "a-run"
    assert run.settings == (run_folder / "config.yaml").read_text()
    assert run.facts.parameters == 5526528
    assert run.facts.image_size == (28, 30)
    assert run.facts.versions == FACTS["versions"]
    np.testing.assert_array_equal(run.metrics["loss"], [0.6, 0.4, 0.2])
    assert [entry.step for entry in run.history] == [0, 600, 1200]
    assert run.latest.tasks["masking"].gain_db == pytest.approx(4.2)
    assert run.latest.tasks["denoising"].gain_over_mean_fill_db == pytest.approx(8.1)
    assert run.latest.tasks["masking"].chroma_error_restored is None
    assert run.energies["masking"].clean == tuple(health()["energies"]["masking"]["clean"])
    assert run.evaluation == tuple(EvaluationRow(**row) for row in EVALUATION)
    assert run.other_files == ("backbone.safetensors", "checkpoints")


def test_the_latest_preview_of_each_task_in_the_order_of_the_tasks(run_folder):
    (run_folder / "previews" / "step-10000000-denoising.png").write_bytes(png(33, (5, 7)))
    (run_folder / "previews" / "else.png").write_bytes(b"no preview")
    run = read_run(run_folder)
    found = [
        (preview.task, preview.step, preview.width, preview.height) for preview in run.previews
    ]
    assert found == [("masking", 1200, 12, 8), ("denoising", 10000000, 5, 7)]
    assert run.broken_previews == ()


def test_a_broken_preview_is_named_and_left_out(run_folder):
    path = run_folder / "previews" / "step-0001200-masking.png"
    path.write_bytes(path.read_bytes()[:-30])
    run = read_run(run_folder)
    assert [preview.task for preview in run.previews] == ["denoising"]
    assert run.broken_previews == (path.name,)


def test_only_the_settings_and_the_facts_must_be_there(tmp_path):
    run = read_run(write_run(tmp_path / "bare", parts=False))
    assert run.latest is None
    found = (run.metrics, run.history, run.energies, run.previews, run.evaluation, run.other_files)
    assert not any(found)


@pytest.mark.parametrize("name", ["config.yaml", "run.json"])
def test_a_folder_without_them_is_no_run(run_folder, name):
    (run_folder / name).unlink()
    with pytest.raises(UserError, match=f"is no run's folder: it has no {name}; give") as caught:
        read_run(run_folder)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    ("name", "content", "complaint"),
    [
        ("run.json", "{", "broken JSON"),
        ("run.json", "[1, 2]", r"holds \[1, 2\], not names with values"),
        ("run.json", '{"steps": "many"}', "'steps' .* is 'many', not a number"),
        ("run.json", '{"steps": true}', "'steps' .* is True, not a number"),
        ("run.json", '{"tasks": "masking"}', "'tasks' .* not a list"),
        ("run.json", '{"tasks": [1]}', "'tasks' .* not a list of texts"),
        ("run.json", '{"mean": ["a"]}', "'mean' .* not a list of numbers"),
        ("run.json", '{"command": 3}', "'command' .* is 3, not a text"),
        ("config.yaml", "a: [1,\n  b: }", "broken YAML"),
        ("config.yaml", "- a", "not names with values"),
        ("health.json", '{"history": [{', "broken JSON"),
        ("health.json", '{"history": [3]}', "holds 3, not names with values"),
        ("health.json", '{"history": [{"tasks": {"masking": 1}}]}', "'masking' .* holds 1"),
        ("health.json", '{"energies": {"masking": {"clean": 1}}}', "'clean' .* not a list"),
        ("evaluation.json", "[{", "no list of evaluation rows"),
        ("evaluation.json", json.dumps([EVALUATION[0] | {"accuracy_mean": "x"}]), "not a number"),
        (
            "evaluation.json",
            json.dumps([EVALUATION[0] | {"labels": []}]),
            "'labels' .* not a number",
        ),
        ("evaluation.json", json.dumps([EVALUATION[0] | {"data": 3}]), "'data' .* not a text"),
        ("evaluation.json", json.dumps([EVALUATION[0] | {"step": "3"}]), "'step' .* not a number"),
        ("metrics.csv", "epoch,loss\n1,2\n", "has the columns epoch, loss, and no step"),
        ("metrics.csv", "step,loss\n1,2\n2,low\n", "line 3 holds 'low', which is no number"),
        ("metrics.csv", "step,loss\nnan,2\n", "line 2 has the step 'nan'"),
    ],
)
def test_a_broken_file_gives_one_line_with_its_path(run_folder, name, content, complaint):
    (run_folder / name).write_text(content)
    with pytest.raises(UserError, match=complaint) as caught:
        read_run(run_folder)
    assert str(run_folder / name) in str(caught.value)
    assert "\n" not in str(caught.value)


def test_a_file_that_is_no_text(run_folder):
    (run_folder / "run.json").write_bytes(b"\xff\xfe\x00")
    with pytest.raises(UserError, match="is no UTF-8 text"):
        read_run(run_folder)


def test_null_is_not_measured_and_nan_is_nan(run_folder):
    entry = health_entry(knn=None, auroc=math.nan)
    (run_folder / "health.json").write_text(json.dumps({"history": [entry]}))
    (run_folder / "metrics.csv").write_text("step,loss\n1,nan\n2,\n3,inf\n")
    run = read_run(run_folder)
    assert run.latest.knn is None
    assert math.isnan(run.latest.auroc)
    np.testing.assert_array_equal(run.metrics["loss"], [np.nan, np.nan, np.inf])


def test_of_repeated_steps_the_last_counts_and_half_a_line_does_not(run_folder):
    (run_folder / "metrics.csv").write_text("step,loss\n10,5\n20,4\n30,3\n20,8\n30,7\n40,0.1")
    entries = [health_entry(600, knn=1.0), health_entry(0), health_entry(600, knn=2.0)]
    (run_folder / "health.json").write_text(json.dumps({"history": entries}))
    run = read_run(run_folder)
    np.testing.assert_array_equal(run.metrics["step"], [10, 20, 30])
    np.testing.assert_array_equal(run.metrics["loss"], [5, 8, 7])
    assert [(entry.step, entry.knn) for entry in run.history] == [(0, 70.0), (600, 2.0)]


def test_a_table_without_rows(run_folder):
    for content in ("", "step,loss\n"):
        (run_folder / "metrics.csv").write_text(content)
        assert read_run(run_folder).metrics == {}
