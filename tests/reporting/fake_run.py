"""A run's folder as training and evaluation leave it, and the report's page as a tree."""

import io
import json
from dataclasses import replace
from html.parser import HTMLParser
from pathlib import Path
from xml.etree.ElementTree import Element

import numpy as np
import torch
from PIL import Image

from backfold.evaluation.results import OVER, Row, accuracy_rows, severity_case, write_rows
from backfold.reporting.report import write_report

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
VOID = {"meta", "img", "br", "hr", "link", "input", "base"}


def entry(step: int = 1200, **changes) -> dict:
    """A look at the held-out images as ``health.json`` has it."""
    energies = {"energy_gap": 4.25, "auroc": 0.913}
    psnr = {"psnr_corrupted_db": 12.0, "psnr_restored_db": 16.2, "psnr_mean_fill_db": 11.5}
    return {
        "step": step,
        "epoch": step / 222,
        "psnr_gain_db": 1.9,
        "rank_me": 48.0,
        "embedding_size": 192,
        "knn": 70.0 + step / 300,
        "tasks": {
            "masking": psnr | energies,
            "denoising": psnr | energies | {"psnr_restored_db": 11.6, "chroma_error_restored": 0.1},
        },
    } | (energies | changes)


def health(*entries: dict) -> dict:
    random = np.random.default_rng(0)
    means = {"clean": -3.0, "corrupted": 2.0, "restored": -1.0}
    return {
        "history": list(entries) or [entry(0), entry(600), entry()],
        "energies": {
            task: {name: random.normal(mean, 1, 50).tolist() for name, mean in means.items()}
            for task in FACTS["tasks"]
        },
    }


def right(accuracy: float, draws: int = 1, images: int = 1000) -> list[torch.Tensor]:
    """Which images were right, of so many draws with about this accuracy in percent."""
    shares = [accuracy / 100 + 0.004 * (draw - (draws - 1) / 2) for draw in range(draws)]
    return [torch.arange(images) < share * images for share in shares]


def judged(protocol: str, case: str, draws: int = 1, **accuracies: float) -> list[Row]:
    """Accuracies of "pretrained" and others, and the differences between them."""
    correct = {name.replace("_", " "): right(a, draws) for name, a in accuracies.items()}
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
    few = {"draws": 3, "before": 40.0, "pixels": 47.0}
    rows = [
        *judged("knn", "all labels", pretrained=81.2, before=70.0, pixels=79.0),
        *judged("knn", "10 labels a class", pretrained=45.0, **few),
        *judged("linear", "all labels", pretrained=88.0, before=80.0, pixels=80.0),
        *judged("attentive", "all labels", pretrained=90.0, before=81.0),
        *judged("finetune", "all labels", pretrained=93.0, from_scratch=91.0),
        *judged("linear", "1 % of the labels", pretrained=61.0, **few),
        *(
            Row.of("layers", f"linear, layer {-n}, {pooling}", who, "validation accuracy (%)", [a])
            for n in range(1, 13)
            for pooling in ("average", "max")
            for who, a in (("pretrained", 80 + 2 * n - n**2 / 5), ("before", 70.0 - n))
        ),
        Row.of("layers", "linear, raw pixels", "pixels", "validation accuracy (%)", [71.0]),
        Row.of("segmentation", "without the image", "most frequent class", "mIoU (%)", [4.04]),
        Row.of("segmentation", "decoder, frozen", "pretrained", "mIoU (%)", [30.0, 36.0]),
        Row.of("segmentation", "decoder, frozen", "before", "mIoU (%)", [20.0, 22.0]),
        Row.of("segmentation", "decoder, frozen", f"pretrained{OVER}before", "mIoU (%)", [10, 14]),
        *by_severity("energy", "AUROC", ["masking", "sorting"], ["energy", "file size"]),
        Row.of("energy", "one class against the rest", "energy", "AUROC", [0.5, 0.6]),
        *by_severity(
            "restoration",
            "PSNR (dB)",
            ["masking", "denoising", "superresolution"],
            ["energy, 1 step", "energy, 4 steps", "identity", "total variation", "mean fill"],
        ),
        *by_severity("restoration", "SSIM", ["masking"], ["energy, 1 step", "identity"]),
        *by_severity("adaptation", "accuracy (%)", ["noise"], ["as they are", "restored first"]),
        Row.of("adaptation", "clean", "as they are", "accuracy (%)", [90.0]),
    ]
    caveat = "test images may be among those pretrained on"
    return [
        replace(row, data="squares", step=1200, note="; ".join(filter(None, (row.note, caveat))))
        for row in rows
    ]


def png(colour: int, size: tuple[int, int] = (12, 8)) -> bytes:
    buffer = io.BytesIO()
    Image.new("L", size, colour).save(buffer, "PNG")
    return buffer.getvalue()


def write_run(folder: Path, *, parts: bool = True, facts: dict | None = None) -> Path:
    """A run's folder; without its parts, only what must be there."""
    folder.mkdir(parents=True)
    (folder / "config.yaml").write_text("backbone: vit_tiny\ntasks:\n  masking:\n    ratio: 0.6\n")
    (folder / "run.json").write_text(json.dumps(FACTS | (facts or {})))
    if parts:
        (folder / "metrics.csv").write_text(METRICS)
        (folder / "health.json").write_text(json.dumps(health()))
        write_rows(folder / "evaluation.json", all_rows())
        for name in ("previews", "evaluation", "checkpoints"):
            (folder / name).mkdir()
        (folder / "evaluation" / "segmentation.png").write_bytes(png(200, (900, 300)))
        for step, task, colour in ((600, "masking", 60), (1200, "masking", 120), (9, "x", 90)):
            (folder / "previews" / f"step-{step:07d}-{task}.png").write_bytes(png(colour))
        (folder / "backbone.safetensors").touch()
    return folder


class TreeParser(HTMLParser):
    """The page as a tree; every end tag must match the last open one."""

    def __init__(self):
        super().__init__()
        self.root = Element("root")
        self.open = [self.root]

    def handle_starttag(self, tag, attrs):
        element = Element(tag, {name: value or "" for name, value in attrs})
        self.open[-1].append(element)
        if tag not in VOID:
            self.open.append(element)

    def handle_endtag(self, tag):
        assert self.open.pop().tag == tag

    def handle_data(self, data):
        parent = self.open[-1]
        if len(parent):
            parent[-1].tail = (parent[-1].tail or "") + data
        else:
            parent.text = (parent.text or "") + data


def parse(html: str) -> Element:
    parser = TreeParser()
    parser.feed(html)
    parser.close()
    assert parser.open == [parser.root]
    return parser.root


def page_of(folder: Path) -> Element:
    return parse(write_report(folder).read_text(encoding="utf-8"))


def text(element: Element) -> str:
    return " ".join("".join(element.itertext()).split())


def with_class(root: Element, name: str) -> list[Element]:
    return [element for element in root.iter() if name in element.get("class", "").split()]
