"""The page on using a run shows code that works."""

from pathlib import Path

from torchvision.transforms.v2.functional import to_pil_image

PAGE = Path(__file__).parents[2] / "docs" / "using-a-run.md"


def test_the_page_s_python_runs(make_run, pixels, tmp_path, monkeypatch):
    run = make_run()
    monkeypatch.chdir(tmp_path)
    to_pil_image(pixels(1)[0]).save("photo.png")
    (code,) = [part.split("```")[0] for part in PAGE.read_text().split("```python\n")[1:]]
    assert len([line for line in code.splitlines() if line]) == 5
    scope = {}
    exec(code.replace("runs/demo", str(run)), scope)
    assert scope["energies"].shape == (1,)
    assert scope["vectors"].shape == (1, 16)
    assert scope["restored"].shape == (1, 3, 28, 28)
