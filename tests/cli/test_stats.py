import json
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from backfold.cli.main import main


@pytest.fixture(autouse=True)
def _elsewhere(tmp_path, monkeypatch):
    (tmp_path / "here").mkdir()
    monkeypatch.chdir(tmp_path / "here")


def test_stats_prints_a_table_and_writes_json_if_asked(make_folder, capsys, snapshot, tmp_path):
    folder = make_folder(count=12, broken=2)
    (folder / "copy.png").write_bytes((folder / "000.png").read_bytes())
    before = snapshot(folder)
    assert main(["stats", f"--data={folder}", "--num-workers=0"]) == 0
    output = capsys.readouterr()
    assert not output.err
    assert list(Path().iterdir()) == []
    for part in ("PNG (11)", "3 (11)", "30 to 30, median 30 pixels", "010.png: not an image"):
        assert part in " ".join(output.out.split())
    out = tmp_path / "deep" / "x.json"
    assert main(["stats", f"--data={folder}", "--num-workers=0", f"--out={out}"]) == 0
    assert capsys.readouterr().out.splitlines()[-1] == f"stats: {out}"
    found = json.loads(out.read_text())
    whole = [file for file in sorted(folder.iterdir()) if len(before[file.name]) > 20]
    pixels = [np.asarray(Image.open(file)) / 255 for file in whole]
    np.testing.assert_allclose(found["mean"], np.mean(pixels, axis=(0, 1, 2)), rtol=1e-6)
    np.testing.assert_allclose(found["std"], np.std(pixels, axis=(0, 1, 2)), rtol=1e-6)
    assert (found["images"], found["broken_count"]) == (13, 2)
    assert found["duplicates"] == [[str(folder / "000.png"), str(folder / "copy.png")]]
    assert snapshot(folder) == before


def test_the_embedded_images_need_no_argument_and_large_ones_are_refused(make_folder, capsys):
    assert main(["stats", "--max-images=50", "--num-workers=0"]) == 0
    assert "50 of 10000" in capsys.readouterr().out
    assert main(["stats", f"--data={make_folder()}", "--max-pixels=959", "--num-workers=0"]) == 2
    assert "30 x 32 pixels" in capsys.readouterr().err
