"""`backfold score` on a run of its own."""

import pyarrow.csv
import pyarrow.parquet as pq
import pytest
import torch

from backfold import Backfold
from backfold.cli.main import main

HERE = ["--accelerator=cpu", "--num-workers=0"]


@pytest.fixture
def score(run_folder, make_folder, tmp_path):
    folder = make_folder(count=10)

    def start(name, *arguments):
        out = tmp_path / name
        command = ["score", f"--checkpoint={run_folder}", f"--data={folder}", f"--out={out}"]
        assert main([*command, *HERE, *arguments]) == 0
        table = pyarrow.csv.read_csv(out) if out.suffix == ".csv" else pq.read_table(out)
        return folder, out, table

    return start


def test_energies_and_errors_of_every_image(run_folder, score, capsys):
    folder, out, table = score("scores.parquet")
    paths = sorted(folder.iterdir())
    assert table.column_names == ["path", "energy", "error_masking"]
    assert table["path"].to_pylist() == [str(path) for path in paths]
    energies = torch.tensor(table["energy"].to_pylist())
    torch.testing.assert_close(energies, Backfold.load(run_folder).energy(paths))
    assert min(table["error_masking"].to_pylist()) > 0
    sheet = out.with_suffix(".html")
    assert capsys.readouterr().out == f"10 scores: {out}\ncontact sheet: {sheet}\n"
    page = sheet.read_text()
    order = sorted(range(10), key=lambda index: energies[index])
    views = page.split("<h2>")
    lowest = [views[1].index(f'alt="{paths[index]}"') for index in order]
    highest = [views[2].index(f'alt="{paths[index]}"') for index in order[::-1]]
    assert lowest == sorted(lowest)
    assert highest == sorted(highest)


def test_the_same_seed_gives_the_same_file(score):
    _, first, table = score("a.csv")
    _, second, _ = score("b.csv", "--batch-size=3", "--part-size=3")
    _, _, other = score("c.csv", "--seed=1")
    assert table.column_names == ["path", "energy", "error_masking"]
    again = pyarrow.csv.read_csv(second)
    assert again["error_masking"].to_pylist() == pytest.approx(
        table["error_masking"].to_pylist(), rel=1e-5
    )
    assert other["energy"] == table["energy"]
    assert other["error_masking"] != table["error_masking"]
    assert first.with_suffix(".html").is_file()


def test_a_mixture_has_a_column_for_each_task(score):
    _, _, table = score("a.parquet", "--pretext=mixture", "--num-steps=2", "--step-size=0.5")
    assert table.column_names == [
        "path", "energy", "error_masking", "error_sorting", "error_superresolution",
        "error_denoising",
    ]  # fmt: skip


def test_a_contact_sheet_of_somebody_else_is_not_replaced(run_folder, tmp_path, refused):
    (tmp_path / "scores.html").write_text("mine")
    command = ["score", f"--checkpoint={run_folder}", f"--out={tmp_path / 'scores.csv'}", *HERE]
    refused(command, "scores.html exists; give --overwrite")
    assert (tmp_path / "scores.html").read_text() == "mine"
    assert not (tmp_path / "scores.csv").exists()


@pytest.mark.parametrize(
    ("arguments", "parts"),
    [
        (["--out=scores.npz"], ["scores.npz", ".parquet or .csv"]),
        (["--num-steps=-1"], ["num_steps is -1"]),
        (["--pretext=puzzle"], ["unknown pretext task 'puzzle'"]),
    ],
)
def test_unfit_arguments_are_refused(run_folder, refused, arguments, parts, monkeypatch, tmp_path):
    monkeypatch.chdir(tmp_path)
    refused(["score", f"--checkpoint={run_folder}", *HERE, *arguments], *parts)
