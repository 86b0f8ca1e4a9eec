"""What an export leaves, refuses and says."""

import logging
import stat
import sys
import threading
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from types import SimpleNamespace

import pytest
import torch
import yaml
from safetensors.torch import load_file

from backfold import UserError
from backfold.batch_norm import refresh_batch_norm
from backfold.evaluation.results import Row, write_rows
from backfold.exporting import run as exporting
from backfold.exporting.run import export_run
from backfold.training.pretrained import load_pretrained
from backfold.training.run_folder import RunFolder, write_json, write_tensors


def test_an_export_is_a_folder_of_three_readable_files(make_run, tmp_path):
    export_run(make_run(), "timm", tmp_path / "deep" / "out")
    files = list((tmp_path / "deep" / "out").iterdir())
    assert {path.name for path in files} == {"model.safetensors", "config.json", "README.md"}
    assert len({stat.S_IMODE(path.stat().st_mode) for path in files}) == 1
    assert [path.name for path in (tmp_path / "deep").iterdir()] == ["out"]


def test_a_checkpoint_file_may_be_given(make_run, tmp_path):
    run = make_run()
    export_run(RunFolder(run).last_checkpoint, "timm", tmp_path / "a")
    export_run(run, "timm", tmp_path / "b")
    for name in ("model.safetensors", "config.json"):
        assert (tmp_path / "a" / name).read_bytes() == (tmp_path / "b" / name).read_bytes()
    assert "| training images | 123 |" in (tmp_path / "a" / "README.md").read_text()


def test_an_existing_export_is_replaced_only_on_request(make_run, tmp_path):
    run, out = make_run(), tmp_path / "out"
    export_run(run, "pt2", out)
    before = (out / "model.pt2").read_bytes()
    with pytest.raises(UserError, match=r"out exists; give --overwrite"):
        export_run(run, "timm", out)
    assert (out / "model.pt2").read_bytes() == before
    export_run(run, "timm", out, overwrite=True)
    assert not (out / "model.pt2").exists()


def test_files_of_others_are_never_replaced(make_run, tmp_path):
    out = tmp_path / "out"
    out.mkdir()
    (out / "thesis.tex").write_text("years")
    with pytest.raises(UserError, match=r"thesis\.tex.*choose another --out"):
        export_run(make_run(), "timm", out, overwrite=True)
    with pytest.raises(UserError, match=r"thesis\.tex exists; give --overwrite"):
        export_run(make_run(name="b"), "timm", out / "thesis.tex")
    assert (out / "thesis.tex").read_text() == "years"


def test_an_export_that_fails_leaves_the_old_one(make_run, tmp_path, monkeypatch):
    run, out = make_run(), tmp_path / "out"
    export_run(run, "timm", out)
    before = {path.name: path.read_bytes() for path in out.iterdir()}

    def full(*_):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(exporting, "write_pt2", full)
    with pytest.raises(UserError, match=r"can't write .*out: No space left on device; free space"):
        export_run(run, "pt2", out, overwrite=True)
    assert {path.name: path.read_bytes() for path in out.iterdir()} == before
    assert not list(tmp_path.glob(".out*"))


def test_the_card_has_recipe_statistics_and_results_but_no_paths(make_run, tmp_path):
    run = make_run()
    rows = [
        Row("knn", "all labels", contender, metric, mean, 1.0, 1, "squares", 7, note)
        for contender, metric, mean, note in (
            ("pretrained", "accuracy (%)", 61.25, "layer -2, max"),
            ("before", "accuracy (%)", 50.5, ""),
            ("pixels", "accuracy (%)", 55.0, ""),
            ("pretrained over before", "accuracy (%)", 10.75, ""),
            ("energy", "AUROC", 0.9, ""),
        )
    ]
    write_rows(RunFolder(run).evaluation, rows)
    write_json(RunFolder(run).health, {"history": [{"step": 7, "psnr_gain_db": 3.456}]})
    export_run(run, "huggingface", tmp_path / "out")
    card = (tmp_path / "out" / "README.md").read_text()
    results = [line for line in card.splitlines() if line.startswith("| knn")]
    assert results == [
        "| knn | all labels | pretrained | 61.25 | 1.00 | squares | layer -2, max |",
        "| knn | all labels | before | 50.50 | 1.00 | squares |  |",
        "| knn | all labels | pixels | 55.00 | 1.00 | squares |  |",
    ]
    assert "gained 3.46 dB of PSNR at step 7" in card
    assert "| mean of pixels in [0, 1] | 0.3, 0.4, 0.5 |" in card
    assert "| deviation | 0.2, 0.25, 0.3 |" in card
    assert "somebody" not in card
    assert str(tmp_path) not in card
    front_matter = card.split("---\n")[1]
    assert yaml.safe_load(front_matter)["library_name"] == "timm"
    recipe = yaml.safe_load(card.split("```yaml\n")[1].split("```")[0])
    assert recipe["backbone_options"]["embed_dim"] == 16
    assert recipe["data"] == "pictures"
    assert card.count("```") % 2 == 0


def test_the_card_s_own_lines_load_the_model(make_run, tmp_path):
    export_run(make_run(), "timm", tmp_path / "out")
    card = (tmp_path / "out" / "README.md").read_text()
    code = card.split("```python\n")[1].split("```")[0]
    scope = {}
    exec(code.replace("PATH", str(tmp_path / "out")), scope)
    images = torch.zeros(2, 3, 28, 28)
    assert scope["model"](images).shape == (2, 16)


def test_a_run_that_was_not_evaluated_says_so(make_run, tmp_path):
    export_run(make_run(), "timm", tmp_path / "out")
    assert "Not evaluated." in (tmp_path / "out" / "README.md").read_text()


def refreshed_weights(run):
    """The run's backbone as `Recorder.export` writes it."""
    backbone = load_pretrained(run).energy.backbone
    before = {name: tensor.clone() for name, tensor in backbone.state_dict().items()}
    refresh_batch_norm(backbone, [torch.randn(8, 3, 32, 32) * 3 + 1])
    after = backbone.state_dict()
    assert any(not torch.equal(before[name], after[name]) for name in after)
    return after


def test_refreshed_batch_norms_are_exported(make_run, tmp_path, caplog):
    run = make_run("resnet")
    weights = refreshed_weights(run)
    write_tensors(RunFolder(run).backbone, weights)
    with caplog.at_level(logging.WARNING, "backfold"):
        export_run(run, "timm", tmp_path / "out")
    assert not caplog.records
    written = load_file(tmp_path / "out" / "model.safetensors")
    assert all(torch.equal(written[name], tensor) for name, tensor in weights.items())


@pytest.mark.parametrize("stale", [True, False])
def test_batch_norms_of_another_checkpoint_are_not(make_run, tmp_path, caplog, stale):
    run = make_run("resnet")
    if stale:
        weights = refreshed_weights(run)
        weights["layer1.0.conv1.weight"].add_(1e-3)
        write_tensors(RunFolder(run).backbone, weights)
    with caplog.at_level(logging.WARNING, "backfold"):
        export_run(run, "timm", tmp_path / "out")
    assert "export a finished run" in caplog.text
    written = load_file(tmp_path / "out" / "model.safetensors")
    expected = load_pretrained(run).energy.backbone.state_dict()
    assert all(torch.equal(written[name], tensor) for name, tensor in expected.items())


def test_a_backbone_that_can_t_be_exported_is_refused(make_run, tmp_path, monkeypatch):
    def fails(*_, **__):
        raise RuntimeError("Exporter cannot\n\ninfer type")

    monkeypatch.setattr(torch.export, "export", fails)
    with pytest.raises(UserError, match="can't be exported to pt2: infer type; export to timm"):
        export_run(make_run(), "pt2", tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_a_graph_with_other_outputs_is_refused(make_run, tmp_path, monkeypatch):
    load = torch.export.load

    def wrong(path):
        graph = load(path).module()
        return SimpleNamespace(
            module=lambda: lambda images: (graph(images)[0] * 1.001, graph(images)[1])
        )

    monkeypatch.setattr(torch.export, "load", wrong)
    with pytest.raises(UserError, match="gives another embedding than the model"):
        export_run(make_run(), "pt2", tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_onnx_without_its_packages_says_what_to_install(make_run, tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "onnxruntime", None)
    with pytest.raises(UserError, match=r'pip install "backfold\[export\]"'):
        export_run(make_run(), "onnx", tmp_path / "out")


def test_names_of_anybody_are_text_on_the_card(make_run, tmp_path):
    run = make_run()
    row = Row("knn", "a", "pretrained", "accuracy (%)", 1.0, 0.0, 1, "x|y", 7, "<b>[a](b)\n# c")
    write_rows(RunFolder(run).evaluation, [row])
    out = tmp_path / "out <script>"
    export_run(run, "timm", out)
    card = (out / "README.md").read_text()
    assert "# out &lt;script&gt;" in card
    assert r"| 1.00 | 0.00 | x\|y | &lt;b&gt;\[a\](b) # c |" in card
    assert "<" not in card.split("## Recipe")[0].replace("&lt;", "")


def test_a_stranger_s_checkpoint_asks_for_nothing(make_run):
    """It names an address that timm would load a pickle from."""
    asked = []

    class Listener(BaseHTTPRequestHandler):
        def do_GET(self):
            asked.append(self.path)
            self.send_error(404)

        do_HEAD = do_GET  # noqa: N815 - the server's name

    with ThreadingHTTPServer(("127.0.0.1", 0), Listener) as server:
        threading.Thread(target=server.serve_forever, daemon=True).start()
        path = RunFolder(make_run()).last_checkpoint
        content = torch.load(path, weights_only=True)
        url = f"http://127.0.0.1:{server.server_port}/weights.pth"
        content["config"]["backbone_options"] |= {"pretrained_cfg": {"url": url}}
        content["config"]["backbone_options"]["pretrained"] = True
        torch.save(content, path)
        with pytest.raises(UserError, match=r"'pretrained(_cfg)?' is no part of the architecture"):
            load_pretrained(path)
        server.shutdown()
    assert not asked
