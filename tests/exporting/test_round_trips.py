"""Weights that left give the outputs that they gave here."""

import json
from pathlib import Path

import pytest
import timm
import torch
from safetensors import safe_open
from torchvision.transforms.v2.functional import to_pil_image

from backfold import Backfold
from backfold.exporting.export import export_run

MODELS = ["vit", "convnext", "swin", "resnet"]
PAGE = Path(__file__).parents[2] / "docs" / "using-a-run.md"
CLOSE = {"rtol": 1e-5, "atol": 1e-5}


def exported(make_run, kind, tmp_path, model="vit", channels=3):
    run = make_run(model, channels)
    export_run(run, kind, tmp_path / "out")
    return Backfold.load(run), tmp_path / "out"


@pytest.mark.parametrize(
    ("model", "channels"), [("vit", 1), ("convnext", 3), ("swin", 3), ("resnet", 1)]
)
def test_timm_loads_the_weights_by_name(make_run, pixels, tmp_path, model, channels):
    ours, out = exported(make_run, "timm", tmp_path, model, channels)
    config = json.loads((out / "config.json").read_text())
    theirs = timm.create_model(
        ours.run.config.backbone,
        checkpoint_path=out / "model.safetensors",
        num_classes=0,
        **config["model_args"],
    ).eval()
    with safe_open(out / "model.safetensors", "pt") as file:
        assert file.metadata() == {"format": "pt"}
    images = pixels(3, channels, ours.run.image_size)
    normalised = ours.run.statistics.normalize(images)
    with torch.no_grad():
        features = theirs.forward_features(normalised)
        expected = ours.run.energy.backbone.forward_features(normalised)
        output = theirs(normalised)
    torch.testing.assert_close(features, expected, **CLOSE)
    is_pooled = model != "convnext"  # its own norm comes after the mean
    said = "is the mean over positions" if is_pooled else "pools otherwise"
    assert said in (out / "README.md").read_text()
    assert torch.allclose(output, ours.embed(images), **CLOSE) == is_pooled


@pytest.mark.parametrize("model", ["vit", "swin", "resnet"])
def test_transformers_and_timm_load_the_folder_and_prepare_images_alike(
    make_run, pixels, tmp_path, model
):
    transformers = pytest.importorskip("transformers", reason="transformers is not installed")
    ours, out = exported(make_run, "huggingface", tmp_path, model)
    picture = to_pil_image(pixels(1, size=ours.run.image_size)[0])
    theirs = transformers.AutoModel.from_pretrained(out).eval()
    assert type(theirs).__name__ == "TimmWrapperModel"
    processor = transformers.AutoImageProcessor.from_pretrained(out)
    plain = timm.create_model(f"local-dir:{out}", pretrained=True).eval()
    classifier = timm.create_model(f"local-dir:{out}", pretrained=True, num_classes=5).eval()
    transform = timm.data.create_transform(**timm.data.resolve_model_data_config(plain))
    image = transform(picture)[None]
    with torch.no_grad():
        outputs = (
            plain(image),
            classifier.forward_head(classifier.forward_features(image), pre_logits=True),
            theirs(**processor(picture, return_tensors="pt")).pooler_output,
        )
        assert classifier(image).shape == (1, 5)
    for output in outputs:
        torch.testing.assert_close(output, ours.embed([picture]), **CLOSE)


def load_graph(path):
    """A function of images to (embedding, energy)."""
    if path.suffix == ".pt2":
        return torch.export.load(path).module()
    onnxruntime = pytest.importorskip("onnxruntime", reason="onnxruntime is not installed")
    session = onnxruntime.InferenceSession(path, providers=["CPUExecutionProvider"])

    def graph(images):
        return map(torch.tensor, session.run(["embedding", "energy"], {"images": images.numpy()}))

    return graph


@pytest.mark.parametrize(
    ("kind", "model"),
    [*(("pt2", model) for model in MODELS), ("onnx", "vit"), ("onnx", "resnet")],
)
def test_graphs_give_the_backbone_s_own_features_and_energies(
    make_run, pixels, tmp_path, kind, model
):
    if kind == "onnx":
        pytest.importorskip("onnxscript", reason="onnxscript is not installed")
    ours, out = exported(make_run, kind, tmp_path, model)
    graph = load_graph(out / f"model.{kind}")
    for count in (1, 3):
        images = pixels(count, size=ours.run.image_size)
        with torch.no_grad():
            outputs = graph(images)
        for given, expected in zip(outputs, (ours.embed(images), ours.energy(images)), strict=True):
            scale = 1 + float(expected.abs().max())
            torch.testing.assert_close(given, expected, rtol=0, atol=1e-5 * scale)


def test_the_page_on_using_a_run_has_five_lines_that_work(make_run, pixels, tmp_path, monkeypatch):
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
