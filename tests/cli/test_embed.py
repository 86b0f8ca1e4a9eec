"""`backfold embed` on a run of its own."""

import numpy as np
import pyarrow.parquet as pq
import pytest
import torch

from backfold import Backfold
from backfold.cli.main import main
from backfold.data.source import open_source
from backfold.embedding import EmbeddingChoice

HERE = ["--accelerator=cpu", "--num-workers=0"]


def test_vectors_of_the_run_s_own_images(run_folder, tmp_path, capsys):
    out = tmp_path / "vectors.parquet"
    assert main(["embed", f"--checkpoint={run_folder}", f"--out={out}", *HERE]) == 0
    assert capsys.readouterr().out == f"60 vectors: {out}\n"
    table = pq.read_table(out)
    source = open_source(tmp_path / "images.parquet", "train")
    assert table.column_names == ["path", "vector"]
    assert table["path"].to_pylist() == [source.describe(index) for index in range(60)]
    images = torch.stack([source.read(index) for index in range(60)])
    torch.testing.assert_close(
        torch.tensor(table["vector"].to_pylist()), Backfold.load(run_folder).embed(images)
    )
    assert not out.with_name("vectors.parquet.parts").exists()


def test_vectors_of_other_images_with_another_pooling(run_folder, make_folder, tmp_path, capsys):
    folder = make_folder(count=9)
    out = tmp_path / "vectors.npz"
    arguments = [f"--data={folder}", f"--out={out}", "--embedding.pooling=class_token"]
    assert main(["embed", f"--checkpoint={run_folder}", *arguments, *HERE]) == 0
    paths = sorted(folder.iterdir())
    with np.load(out) as arrays:
        assert arrays["path"].tolist() == [str(path) for path in paths]
        given = torch.from_numpy(arrays["vector"])
    choice = EmbeddingChoice(pooling="class_token")
    torch.testing.assert_close(given, Backfold.load(run_folder).embed(paths, choice))
    capsys.readouterr()


def test_an_interrupted_command_goes_on_where_it_stopped(
    run_folder, make_folder, tmp_path, capsys, monkeypatch
):
    from backfold.inference.jobs import EmbeddingJob

    folder, out = make_folder(count=12), tmp_path / "vectors.parquet"
    command = ["embed", f"--checkpoint={run_folder}", f"--data={folder}", f"--out={out}", *HERE]
    command += ["--batch-size=4", "--part-size=4"]
    real, seen = EmbeddingJob.__call__, []

    def counting(self, clean, indices):
        if len(seen) == 2:
            raise KeyboardInterrupt
        seen.append(list(indices))
        return real(self, clean, indices)

    monkeypatch.setattr(EmbeddingJob, "__call__", counting)
    assert main(command) == 130
    assert "interrupted; the same command goes on" in capsys.readouterr().err
    assert not out.exists()
    monkeypatch.setattr(
        EmbeddingJob, "__call__", lambda *given: (seen.append(list(given[2])), real(*given))[1]
    )
    assert main(command) == 0
    captured = capsys.readouterr()
    assert "2 of 3 parts are done already" in captured.err
    assert captured.out == f"12 vectors: {out}\n"
    assert seen == [[0, 1, 2, 3], [4, 5, 6, 7], [8, 9, 10, 11]]


def test_broken_images_are_left_out_and_said(run_folder, make_folder, tmp_path, capsys):
    folder, out = make_folder(count=12, broken=1), tmp_path / "vectors.parquet"
    command = ["embed", f"--checkpoint={run_folder}", f"--data={folder}", f"--out={out}", *HERE]
    assert main(command) == 0
    captured = capsys.readouterr()
    assert captured.out == f"11 vectors: {out}\n"
    assert "warning: skipped: " in captured.err
    assert "011.png" in captured.err
    assert "warning: 1 of 12 images could not be read" in captured.err


def test_an_existing_file_is_replaced_on_request(run_folder, tmp_path, refused):
    out = tmp_path / "vectors.parquet"
    command = ["embed", f"--checkpoint={run_folder}", f"--out={out}", *HERE]
    assert main(command) == 0
    before = out.read_bytes()
    refused(command, "vectors.parquet exists; give --overwrite")
    assert out.read_bytes() == before
    assert main([*command, "--embedding.pooling=max", "--overwrite"]) == 0
    assert out.read_bytes() != before


@pytest.mark.parametrize(
    ("arguments", "parts"),
    [
        (["--out=vectors.txt"], ["vectors.txt", ".parquet or .npz"]),
        (["--engine=spark"], ["--engine", "spark"]),
        (["--batch-size=0"], ["batch_size is 0"]),
        (["--data=nowhere"], ["nowhere does not exist"]),
        (["--split=test"], ["has no test split"]),
    ],
)
def test_unfit_arguments_are_refused(run_folder, refused, arguments, parts, monkeypatch, tmp_path):
    monkeypatch.chdir(tmp_path)
    refused(["embed", f"--checkpoint={run_folder}", *HERE, *arguments], *parts)
    assert not (tmp_path / "vectors.parquet").exists()


def test_without_a_run_it_says_so(refused, monkeypatch, tmp_path):
    monkeypatch.chdir(tmp_path)
    for command in ("embed", "score"):
        refused([command], "there is no checkpoint at runs/demo")
    assert list(tmp_path.iterdir()) == []
