"""`backfold embed` and `backfold score`."""

from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.csv
import pyarrow.parquet as pq
import pytest
import tifffile
import torch

from backfold import Backfold
from backfold.cli.main import main
from backfold.data.open import open_source
from backfold.embedding import EmbeddingChoice
from backfold.inference.jobs import EmbeddingJob

HERE = ["--accelerator=cpu", "--num-workers=0"]
DEFECTS = [
    "gradient_norm", "nearest", "mahalanobis", "largest_gradient", "largest_error",
    "largest_distance", "largest_alone", "largest_pixels", "joined",
]  # fmt: skip


def interrupt():
    raise KeyboardInterrupt


def test_vectors_of_the_run_s_own_images(finished, tmp_path, capsys):
    out = tmp_path / "vectors.parquet"
    assert main(["embed", f"--checkpoint={finished}", f"--out={out}", *HERE]) == 0
    assert capsys.readouterr().out == f"60 vectors: {out}\n"
    table = pq.read_table(out)
    source = open_source(finished.with_name("images.parquet"), "train")
    assert table.column_names == ["path", "vector"]
    assert table["path"].to_pylist() == [source.describe(index) for index in range(60)]
    images = torch.stack([source.read(index) for index in range(60)])
    torch.testing.assert_close(
        torch.tensor(table["vector"].to_pylist()), Backfold.load(finished).embed(images)
    )
    assert not out.with_name("vectors.parquet.parts").exists()


def test_vectors_of_other_images_with_another_pooling(finished, make_folder, tmp_path, refused):
    folder, out = make_folder(count=9), tmp_path / "vectors.npz"
    command = ["embed", f"--checkpoint={finished}", f"--data={folder}", f"--out={out}", *HERE]
    for choice in (EmbeddingChoice(), EmbeddingChoice(pooling="class_token")):
        assert main([*command, f"--embedding.pooling={choice.pooling}", "--overwrite"]) == 0
        paths, before = sorted(folder.iterdir()), out.read_bytes()
        with np.load(out) as arrays:
            assert arrays["path"].tolist() == [str(path) for path in paths]
            given = torch.from_numpy(arrays["vector"])
        torch.testing.assert_close(given, Backfold.load(finished).embed(paths, choice))
        refused(command, "vectors.npz exists; give --overwrite")
        assert out.read_bytes() == before


def test_an_interrupted_command_goes_on_and_leaves_broken_images_out(
    finished, make_folder, tmp_path, capsys, monkeypatch
):
    folder, out = make_folder(count=12, broken=1), tmp_path / "vectors.parquet"
    command = ["embed", f"--checkpoint={finished}", f"--data={folder}", f"--out={out}", *HERE]
    command += ["--batch-size=4", "--part-size=4"]
    first, real = iter([True, False]), EmbeddingJob.__call__
    with monkeypatch.context() as patch:
        patch.setattr(
            EmbeddingJob, "__call__", lambda *given: real(*given) if next(first) else interrupt()
        )
        assert main(command) == 130
    assert "interrupted; the same command goes on" in capsys.readouterr().err
    assert not out.exists()
    assert main(command) == 0
    captured = capsys.readouterr()
    assert "1 of 3 parts are done already" in captured.err
    assert captured.out == f"11 vectors: {out}\n"
    assert "011.png" in captured.err
    assert "warning: 1 of 12 images could not be read" in captured.err


@pytest.fixture
def score(finished, make_folder, tmp_path):
    folder = make_folder(count=10)

    def start(name, *arguments):
        out = tmp_path / name
        command = ["score", f"--checkpoint={finished}", f"--data={folder}", f"--out={out}"]
        assert main([*command, *HERE, *arguments]) == 0
        table = pyarrow.csv.read_csv(out) if out.suffix == ".csv" else pq.read_table(out)
        return folder, out, table

    return start


def test_energies_and_errors_of_every_image(finished, score, capsys):
    folder, out, table = score("scores.parquet")
    paths = sorted(folder.iterdir())
    assert table.column_names == ["path", "energy", "error_masking", *DEFECTS]
    assert table["path"].to_pylist() == [str(path) for path in paths]
    energies = torch.tensor(table["energy"].to_pylist())
    torch.testing.assert_close(energies, Backfold.load(finished).energy(paths))
    assert min(table["error_masking"].to_pylist()) > 0
    sheet = out.with_suffix(".html")
    captured = capsys.readouterr()
    assert captured.out == f"10 scores: {out}\ncontact sheet: {sheet}\n"
    # The run is a conditional one, and an energy of whole images is not what it learned.
    assert "pretrain with --energy dense to judge images" in " ".join(captured.err.split())
    assert all(f'alt="{path}"' in sheet.read_text() for path in paths)


def test_the_same_seed_gives_the_same_numbers(score):
    _, _, table = score("a.parquet")
    _, first, again = score("b.csv", "--batch-size=3", "--part-size=3")
    assert again.column_names == table.column_names
    assert again["path"] == table["path"]
    _, _, other = score("c.parquet", "--seed=1", "--pretext=mixture", "--num-steps=2")
    errors = [given["error_masking"].to_pylist() for given in (table, again, other)]
    assert errors[1] == pytest.approx(errors[0], rel=1e-5)
    energies = table["energy"].to_pylist()
    assert again["energy"].to_pylist() == pytest.approx(energies, rel=1e-5)
    assert errors[2] != errors[0]
    assert other["energy"] == table["energy"]
    assert other.column_names == [
        "path", "energy", "error_masking", "error_sorting", "misplaced",
        "error_superresolution", "error_denoising", *DEFECTS,
    ]  # fmt: skip
    _, _, plain = score("d.parquet", "--usual-images=0")
    assert plain.column_names == ["path", "energy", "error_masking"]
    assert first.with_suffix(".html").is_file()


def test_maps_of_defects_and_which_score_to_trust(finished, make_folder, tmp_path, capsys):
    folder, maps = tmp_path / "all", tmp_path / "maps"
    folder.mkdir()
    for name in ("class0", "class1"):
        make_folder(f"all/{name}", count=6)
    (folder / "class0" / "002.png").write_bytes(b"no image")  # has neither row nor map
    command = ["score", f"--checkpoint={finished}", f"--data={folder}", *HERE]
    command += [f"--out={tmp_path / 'scores.csv'}", f"--maps={maps}"]
    assert main([*command, "--good=class0"]) == 0
    table = pyarrow.csv.read_csv(tmp_path / "scores.csv")
    printed = capsys.readouterr().out.splitlines()[2:]
    found = {line.split()[2]: float(line.split()[1].strip(":")) for line in printed}
    assert [*found] == sorted(found, key=found.__getitem__, reverse=True)
    assert set(found) == {"energy", "error_masking", *DEFECTS}
    good = np.array(["class0" in path for path in table["path"].to_pylist()])
    values = table["nearest"].to_numpy()
    bad, usual = values[~good][:, None], values[good][None]
    wins = np.mean((bad > usual) + (bad == usual) / 2)
    assert found["nearest"] == pytest.approx(wins, abs=0.002)
    run = Backfold.load(finished)
    paths = [Path(path) for path in table["path"].to_pylist()]
    expected, scores = run.defect_map(paths), run.score(paths)
    assert scores["joined"].tolist() == pytest.approx(table["joined"].to_pylist(), abs=1e-3)
    numbers = pyarrow.csv.read_csv(
        tmp_path / "scores.csv",
        convert_options=pyarrow.csv.ConvertOptions(column_types={"map": pa.string()}),
    )["map"].to_pylist()
    assert len(numbers) == 11
    for number, each in zip(numbers, expected, strict=True):
        written = torch.from_numpy(tifffile.imread(maps / f"{number}.tiff"))
        torch.testing.assert_close(written, each[0], atol=1e-3, rtol=1e-3)
        assert (maps / f"{number}.png").read_bytes()[:4] == b"\x89PNG"
    assert 'alt="where it is strange"' in (tmp_path / "scores.html").read_text()


def test_maps_never_replace_or_join_images(finished, make_folder, tmp_path, refused):
    for split in ("train", "test"):  # only the test split has both classes
        (tmp_path / "all" / split).mkdir(parents=True)
    make_folder("all/test/class0", count=8)
    make_folder("all/test/class1", count=8)
    folder, out = make_folder("all/train/class0", count=8), tmp_path / "scores.csv"
    before = sorted(folder.iterdir())
    command = ["score", f"--checkpoint={finished}", f"--data={tmp_path / 'all'}", f"--out={out}"]
    refused([*command, f"--maps={folder}"], "class0 exists; choose another folder")
    refused([*command, f"--maps={folder / '000.png'}"], "000.png exists")
    refused([*command, f"--maps={folder / 'maps'}"], "maps would lie among the images")
    refused([*command, "--good=class0"], "all images of", "give data with both, or another --split")
    assert sorted(folder.iterdir()) == before
    assert not out.exists()


def test_a_contact_sheet_of_somebody_else_is_not_replaced(finished, tmp_path, refused):
    (tmp_path / "scores.html").write_text("mine")
    command = ["score", f"--checkpoint={finished}", f"--out={tmp_path / 'scores.csv'}", *HERE]
    refused(command, "scores.html exists; give --overwrite")
    assert (tmp_path / "scores.html").read_text() == "mine"
    assert not (tmp_path / "scores.csv").exists()
