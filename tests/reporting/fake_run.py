"""A run's folder as training and evaluation leave it, and the report's page as a tree."""

import json
from dataclasses import replace
from pathlib import Path
from xml.etree import ElementTree

import torch
from PIL import Image

from backfold.evaluation.results import OVER, Row, accuracy_rows, severity_case, write_rows
from backfold.reporting.report import write_report

FACTS = {
    "command": "backfold pretrain --backbone vit_tiny",
    "versions": {"backfold": "0.1.0", "torch": "2.11.0"},
    "backbone": "vit_tiny",
    "parameters": 5526528,
    "image_size": [28, 30],
    "data": "some images",
    "held_out_images": 512,
    "tasks": ["masking", "denoising"],
    "steps": 1200,
    "total_steps": 1200,
}
METRICS = "step,data_wait,lr,loss,gradient_norm\n400,0.01,0.1,0.6,2\n1200,0.03,0,0.2,1\n"
CAVEAT = "test images may be among those pretrained on"


def entry(step: int = 1200, **changes) -> dict:
    """A look at the held-out images as ``health.json`` has it."""
    measures = {"energy_gap": 4.25, "auroc": 0.913, "psnr_corrupted_db": 12.0}
    measures |= {"psnr_restored_db": 16.2, "psnr_mean_fill_db": 11.5}
    tasks = {"masking": measures, "denoising": measures | {"psnr_restored_db": 11.6, "chroma": 0.1}}
    known = {"step": step, "rank_me": 48.0, "embedding_size": 192, "knn": 70.0 + step / 300}
    return known | {"auroc": 0.913, "psnr_gain_db": 1.9, "tasks": tasks} | changes


def health(*entries: dict) -> dict:
    kinds = {"clean": [-3.0, -2.5], "corrupted": [2.0, 2.5], "restored": [-1.0, 0.0]}
    energies = dict.fromkeys(FACTS["tasks"], kinds)
    return {"history": entries or [entry(0), entry(600), entry()], "energies": energies}


def judged(protocol: str, case: str, **accuracies: float) -> list[Row]:
    """Accuracies in percent of "pretrained" and others on 1000 images, and their differences."""
    names = (name.replace("_", " ") for name in accuracies)
    correct = {next(names): [torch.arange(1000) < 10 * share] for share in accuracies.values()}
    return accuracy_rows(protocol, case, correct, {"pretrained": "layer -2, max; C 0.01"})


def by_severity(protocol: str, metric: str, names: list[str], contenders: list[str]) -> list[Row]:
    return [
        Row(protocol, severity_case(name, level), who, metric, 1 / (level + order + 1), 0.02, 9)
        for name in names
        for level in range(1, 6)
        for order, who in enumerate(contenders)
    ]


def all_rows() -> list[Row]:
    """Every protocol's rows; pixels are ahead in one case."""
    few, validation, miou = {"before": 40.0, "pixels": 47.0}, "validation accuracy (%)", "mIoU (%)"
    rows = [
        *judged("knn", "all labels", pretrained=81.2, before=70.0, pixels=79.0),
        *judged("knn", "10 labels a class", pretrained=45.0, **few),
        *judged("linear", "1 % of the labels", pretrained=61.0, **few),
        *judged("attentive", "all labels", pretrained=90.0, before=81.0),
        *judged("finetune", "all labels", pretrained=93.0, from_scratch=91.0),
        *(
            Row.of("layers", f"linear, layer {-n}, {pooling}", who, validation, [accuracy])
            for n in range(1, 13)
            for pooling in ("average", "max")
            for who, accuracy in (("pretrained", 80 + 2 * n - n**2 / 5), ("before", 70.0 - n))
        ),
        Row.of("layers", "linear, raw pixels", "pixels", validation, [71.0]),
        Row.of("segmentation", "without the image", "most frequent class", miou, [4.04]),
        Row.of("segmentation", "decoder, frozen", "pretrained", miou, [30.0, 36.0]),
        Row.of("segmentation", "decoder, frozen", f"pretrained{OVER}before", miou, [10, 14]),
        *by_severity("energy", "AUROC", ["masking", "sorting"], ["energy", "file size"]),
        *by_severity("restoration", "PSNR (dB)", ["masking", "noise", "blur"], ["energy", "mean"]),
        *by_severity("adaptation", "accuracy (%)", ["noise"], ["as they are", "restored first"]),
        Row.of("adaptation", "clean", "as they are", "accuracy (%)", [90.0]),
    ]
    notes = (f"{row.note}{row.note and '; '}{CAVEAT}" for row in rows)
    return [replace(row, data="squares", step=1200, note=next(notes)) for row in rows]


def write_run(folder: Path, *, parts: bool = True, facts: dict | None = None) -> Path:
    """A run's folder; without its parts, only what must be there."""
    folder.mkdir(parents=True)
    (folder / "config.yaml").write_text("backbone: vit_tiny\ntasks:\n  masking:\n    ratio: 0.6\n")
    (folder / "run.json").write_text(json.dumps(FACTS | (facts or {})))
    if parts:
        (folder / "metrics.csv").write_text(METRICS)
        (folder / "health.json").write_text(json.dumps(health()))
        write_rows(folder / "evaluation.json", all_rows())
        names = ("0600-masking", "1200-masking", "09-x")
        pictures = [f"previews/step-{name}.png" for name in names]
        for name in (*pictures, "evaluation/segmentation.png"):
            (folder / name).parent.mkdir(exist_ok=True)
            Image.new("L", (900, 300), 60).save(folder / name)
        (folder / "backbone.safetensors").touch()
    return folder


def page_of(folder: Path) -> ElementTree.Element:
    """The page, which is XML too: whatever is not closed or escaped is an error here."""
    return ElementTree.fromstring(write_report(folder).read_text(encoding="utf-8"))


def text(element: ElementTree.Element) -> str:
    return " ".join("".join(element.itertext()).split())


def with_class(root: ElementTree.Element, name: str) -> list[ElementTree.Element]:
    return [element for element in root.iter() if name in element.get("class", "").split()]
