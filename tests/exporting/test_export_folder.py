"""What an export leaves, refuses and says."""

import logging
import shutil
import socket
import sys
from unittest.mock import Mock

import pytest
import torch
import yaml
from safetensors.torch import load_file

from backfold import UserError
from backfold.batch_norm import refresh_batch_norm
from backfold.evaluation.results import ACCURACY, Row, write_rows
from backfold.exporting import export as exporting
from backfold.exporting.export import export_run
from backfold.files import write_json
from backfold.training.run import RunFolder, load_pretrained, write_tensors


def test_an_export_is_a_folder_of_three_readable_files(make_run, tmp_path):
    run, deep = make_run(), tmp_path / "deep"
    export_run(RunFolder(run).last_checkpoint, "timm", deep / "out")
    names = {path.name for path in (deep / "out").iterdir()}
    assert names == {"model.safetensors", "config.json", "README.md"}
    assert [path.name for path in deep.iterdir()] == ["out"]
    card = (deep / "out" / "README.md").read_text()
    assert "| training images | 123 |" in card
    assert "Not evaluated." in card
    code = card.split("```python\n")[1].split("```")[0]
    scope = {}
    exec(code.replace("PATH", str(deep / "out")), scope)  # the card's own lines load the model
    assert scope["model"](torch.zeros(2, 3, 28, 28)).shape == (2, 16)


def test_a_checkpoint_away_from_its_run_is_exported_without_anybody_s_facts(make_run, tmp_path):
    another, out = make_run(), tmp_path / "out"
    away = another / "away" / "copy.ckpt"  # in a folder of another run's
    away.parent.mkdir()
    shutil.copy(RunFolder(another).last_checkpoint, away)
    export_run(away, "timm", out)
    written = load_file(out / "model.safetensors")
    for name, tensor in load_pretrained(away).energy.backbone.state_dict().items():
        assert torch.equal(written[name], tensor)
    assert "training images" not in (out / "README.md").read_text()


def test_files_of_others_are_never_replaced(tmp_path):
    out = tmp_path / "out"
    out.mkdir()
    (out / "thesis.tex").write_text("years")
    with pytest.raises(UserError, match=r"thesis\.tex.*choose another --out"):
        export_run(tmp_path, "timm", out, overwrite=True)
    with pytest.raises(UserError, match="format is 'safetensors'; choose from timm, hugg"):
        export_run(tmp_path, "safetensors", out)
    with pytest.raises(UserError, match=r"thesis\.tex exists; give --overwrite"):
        export_run(tmp_path, "timm", out / "thesis.tex")
    assert (out / "thesis.tex").read_text() == "years"


def test_an_export_that_fails_leaves_the_old_one(make_run, tmp_path, monkeypatch):
    run, out = make_run(), tmp_path / "out"
    export_run(run, "timm", out)
    before = {path.name: path.read_bytes() for path in out.iterdir()}
    full = Mock(side_effect=OSError(28, "No space left on device"))
    monkeypatch.setattr(exporting, "write_graph", full)
    with pytest.raises(UserError, match=r"can't write .*out: No space left on device; free space"):
        export_run(run, "pt2", out, overwrite=True)
    assert {path.name: path.read_bytes() for path in out.iterdir()} == before
    assert not list(tmp_path.glob(".out*"))


def test_the_card_has_recipe_statistics_and_results_but_no_paths(make_run, tmp_path):
    run = make_run()
    rows = [
        Row("knn", "all labels", "pretrained", ACCURACY, 61.25, 1.0, 1, "squares", 7, ""),
        Row("knn", "all labels", "pixels", ACCURACY, 55.0, 1.0, 1, "squares", 7, ""),
        Row("knn", "all", "pretrained over before", ACCURACY, 10.75, 1.0, 1, "squares", 7, ""),
        Row("knn", "all labels", "energy", "AUROC", 0.9, 1.0, 1, "squares", 7, ""),
        Row("knn", "of another step", "pretrained", ACCURACY, 70.0, 1.0, 1, "squares", 6, ""),
        Row("knn", "a", "from scratch", ACCURACY, 1.0, 0.0, 1, "x|y", 7, "<b>[a](b)\n# c"),
    ]
    write_rows(RunFolder(run).evaluation, rows)
    write_json(RunFolder(run).health, {"history": [{"step": 7, "psnr_gain_db": 3.456}]})
    out = tmp_path / "out <script>"
    export_run(run, "huggingface", out)
    card = (out / "README.md").read_text()
    assert "# out &lt;script&gt;" in card
    assert "<" not in card.split("## Recipe")[0]  # names may be anybody's
    results = [line for line in card.splitlines() if line.startswith("| knn")]
    assert results == [
        "| knn | all labels | pretrained | 61.25 | 1.00 | squares |  |",
        "| knn | all labels | pixels | 55.00 | 1.00 | squares |  |",
        r"| knn | a | from scratch | 1.00 | 0.00 | x\|y | &lt;b&gt;\[a\](b) # c |",
    ]
    assert "gained 3.46 dB of PSNR at step 7" in card
    assert "| mean of pixels in [0, 1] | 0.3, 0.4, 0.5 |" in card
    assert "| deviation | 0.2, 0.25, 0.3 |" in card
    assert "somebody" not in card
    assert str(tmp_path) not in card
    assert yaml.safe_load(card.split("---\n")[1])["library_name"] == "timm"
    recipe = yaml.safe_load(card.split("```yaml\n")[1].split("```")[0])
    assert recipe["backbone_options"]["embed_dim"] == 16
    assert recipe["data"] == "pictures"


@pytest.mark.parametrize("state", ["refreshed", "stale", "missing"])
def test_refreshed_batch_norms_of_this_checkpoint_are_exported(make_run, tmp_path, caplog, state):
    run = make_run("resnet")
    backbone = load_pretrained(run).energy.backbone
    refresh_batch_norm(backbone, [torch.randn(8, 3, 32, 32) * 3 + 1])
    refreshed = backbone.state_dict()
    if state == "stale":
        refreshed["layer1.0.conv1.weight"].add_(1e-3)
    if state != "missing":
        write_tensors(RunFolder(run).backbone, refreshed)
    with caplog.at_level(logging.WARNING, "backfold"):
        export_run(run, "timm", tmp_path / "out")
    written = load_file(tmp_path / "out" / "model.safetensors")
    own = load_pretrained(run).energy.backbone.state_dict()
    assert any(not torch.equal(refreshed[name], own[name]) for name in own)
    expected = refreshed if state == "refreshed" else own
    assert all(torch.equal(written[name], tensor) for name, tensor in expected.items())
    assert ("export a finished run" in caplog.text) == (state != "refreshed")


def test_graphs_that_can_t_be_made_or_give_other_outputs_are_refused(
    make_run, tmp_path, monkeypatch
):
    run, out, load = make_run(), tmp_path / "out", torch.export.load

    def wrong(path):
        graph = load(path).module()
        return Mock(module=lambda: lambda images: (graph(images)[0] * 1.001, graph(images)[1]))

    monkeypatch.setattr(torch.export, "load", wrong)
    with pytest.raises(UserError, match="gives another embedding than the model"):
        export_run(run, "pt2", out)
    monkeypatch.setitem(sys.modules, "onnxruntime", None)
    with pytest.raises(UserError, match=r'pip install "backfold\[export\]"'):
        export_run(run, "onnx", out)
    fails = Mock(side_effect=RuntimeError("Exporter cannot\n\ninfer type"))
    monkeypatch.setattr(torch.export, "export", fails)
    with pytest.raises(UserError, match="can't be exported to pt2: infer type; export to timm"):
        export_run(run, "pt2", out)
    assert not out.exists()


def test_a_stranger_s_checkpoint_asks_for_nothing(make_run):
    """It names an address that timm would load a pickle from."""
    with socket.create_server(("127.0.0.1", 0)) as server:
        server.settimeout(0.1)
        path = RunFolder(make_run()).last_checkpoint
        content = torch.load(path, weights_only=True)
        url = f"http://127.0.0.1:{server.getsockname()[1]}/weights.pth"
        content["config"]["backbone_options"] |= {"pretrained_cfg": {"url": url}}
        content["config"]["backbone_options"]["pretrained"] = True
        torch.save(content, path)
        with pytest.raises(UserError, match=r"backbone option pretrained(_cfg)? is "):
            load_pretrained(path)
        with pytest.raises(TimeoutError):  # nobody called
            server.accept()
