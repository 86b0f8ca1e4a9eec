"""Defects drawn on textures: our scores and maps beside PatchCore on the same backbone.

    python benchmarks/defects.py --data ../shared/data/dtd10 --classes 0 4 7

One model a texture is pretrained on its first 90 images and never sees a defect. On the others five
kinds are drawn, one an image: a part of the image turned and put elsewhere (cut), a scratch, a
blot, blur, and another colour; clean images of the same textures are what they are held against.
anomalib's PatchCore gets the features of the pretrained backbone, of the same one at its random
start, and the pixels of each patch. Each texture leaves a JSON file; what is there is not done
again. Needs `pip install anomalib`.
"""

import argparse
import json
import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import torch
from anomalib.metrics.aupro import _AUPRO as AUPRO
from anomalib.models.image.patchcore.torch_model import PatchcoreModel
from safetensors.torch import load_file
from sklearn.metrics import roc_auc_score
from torch import Tensor, nn
from torch.nn import functional as F
from torchmetrics.functional.image import total_variation
from torchvision.transforms.v2 import functional as T

import backfold
from backfold.backbone import feature_map
from backfold.data.open import open_source
from backfold.embedding import grid_shape
from backfold.evaluation.energy import file_sizes
from backfold.files import write_json
from backfold.inference.jobs import find_defects

SIDE, PATCH, TRAINED_ON, BATCH = 96, 8, 90, 32
SHAPE = {"patch_size": PATCH, "weight_init": "jax", "depth": 4, "embed_dim": 128, "num_heads": 4}
KINDS = ("cut", "scratch", "blot", "blur", "colour")

# Scores (images,) by name, and maps (images, 1, height, width) by name.
Judged = tuple[dict[str, Tensor], dict[str, Tensor]]
Judge = Callable[[Tensor], Judged]


def textures(data: str, number: int) -> Tensor:
    """The class's images, their middle square: uint8 (images, 3, side, side)."""
    source = open_source(data, "train", labelled=True)
    assert source.labels is not None
    images = [source.read(place) for place in np.flatnonzero(np.equal(source.labels, number))]
    squares = [T.center_crop(image, [min(image.shape[1:])] * 2) for image in images]
    return torch.stack([T.resize(square, [SIDE, SIDE], antialias=True) for square in squares])


def draw(image: Tensor, kind: str, random: torch.Generator) -> tuple[Tensor, Tensor]:
    """The image, uint8, with one defect, and where it is: bool, (height, width)."""
    pixels, where = image.float() / 255, ellipse(random)
    is_bright = bool(pixels.mean() > 0.4)
    if kind == "cut":
        changed = pixels.rot90(1, (1, 2)).roll((SIDE // 3, SIDE // 2), (1, 2))
    elif kind == "scratch":
        start, end = 10 + (SIDE - 20) * torch.rand(2, 2, generator=random)
        length = 14 + 30 * torch.rand((), generator=random)
        along = torch.linspace(0, 1, 400)[:, None] * (end - start) / (end - start).norm()
        rows, columns = (start + length * along).round().long().clamp(1, SIDE - 2).T
        where = torch.zeros(SIDE, SIDE, dtype=torch.bool)
        where[rows, columns] = where[rows + 1, columns] = True
        changed = torch.full_like(pixels, float(not is_bright))
    elif kind == "blot":
        changed = 0.35 * pixels if is_bright else 1 - 0.35 * (1 - pixels)
    elif kind == "blur":
        changed = T.gaussian_blur(pixels, [13, 13], [3.0, 3.0])
    else:
        shift = torch.tensor([0.18, -0.1, -0.12])[torch.randperm(3, generator=random)]
        changed = (pixels + shift[:, None, None]).clamp(0, 1)
    return (torch.where(where, changed, pixels) * 255).round().to(torch.uint8), where


def ellipse(random: torch.Generator) -> Tensor:
    """Anywhere in the image, its half-axes 5 to 12 pixels."""
    centre = 12 + (SIDE - 24) * torch.rand(2, 1, 1, generator=random)
    long, wide = 5 + 7 * torch.rand(2, generator=random)
    angle = math.pi * torch.rand((), generator=random)
    row, column = torch.stack(torch.meshgrid(2 * [torch.arange(SIDE)], indexing="ij")) - centre
    along = row * angle.cos() + column * angle.sin()
    across = column * angle.cos() - row * angle.sin()
    return (along / long).square() + (across / wide).square() < 1


class Features(nn.Module):
    """What anomalib's extractor gives: feature maps by layer, here the last one alone."""

    def __init__(self, backbone: nn.Module | None) -> None:
        super().__init__()
        self.backbone = backbone

    def forward(self, images: Tensor) -> dict[str, Tensor]:
        """Of normalised images."""
        if self.backbone is None:
            return {"last": F.pixel_unshuffle(images, PATCH)}
        positions = feature_map(self.backbone, images)
        grid = grid_shape(positions.shape[1], (SIDE, SIDE))
        return {"last": positions.transpose(1, 2).unflatten(2, grid)}


def patchcore(backbone: nn.Module | None, train: Tensor) -> Callable[[Tensor], tuple[Tensor, ...]]:
    """anomalib's, with all patches in its memory: images -> scores and maps."""
    model = PatchcoreModel(layers=["last"], backbone="resnet18", pre_trained=False)
    model.feature_extractor = Features(backbone)
    model.train()
    for batch in train.split(BATCH):
        model(batch)
    model.memory_bank = torch.cat(model.embedding_store)
    model.eval()

    def judge(images: Tensor) -> tuple[Tensor, ...]:
        found = [model(batch) for batch in images.split(BATCH)]
        maps = torch.cat([each.anomaly_map for each in found])
        return torch.cat([each.pred_score.flatten() for each in found]), maps

    return judge


def judges(run: backfold.Backfold, train: Tensor) -> Judge:
    """All contenders at once."""
    statistics, config = run.run.statistics, run.run.config
    usual = statistics.normalize(train)
    finder = find_defects(run.run, usual.split(BATCH))
    start = backfold.EnergyModel(
        config.backbone, image_size=SIDE, backbone_options=config.backbone_options
    ).backbone.eval()
    start.load_state_dict(load_file(run.path / "initial.safetensors"))
    backbones = {"": run.run.energy.backbone, ", random": start, ", pixels": None}
    rivals = {f"PatchCore{name}": patchcore(each, usual) for name, each in backbones.items()}

    @torch.no_grad()
    def judge(images: Tensor) -> Judged:
        clean = statistics.normalize(images)
        scores, joined = finder(clean)
        _, maps = finder.measure(clean)
        maps["joined"] = joined
        scores["file size"] = file_sizes(clean, statistics)
        scores["total variation"] = total_variation(clean, reduction="none")
        for name, rival in rivals.items():
            scores[name], maps[name] = rival(clean)
        return scores, maps

    return judge


def measure(judge: Judge, test: Tensor) -> dict[str, dict[str, list[float]]]:
    """By measure and contender a number for each kind of defect."""
    random = torch.Generator().manual_seed(1)
    usual, _ = judge(test)
    found: dict[str, dict[str, list[float]]] = {"image AUROC": {}, "pixel AUROC": {}, "AUPRO": {}}
    for kind in KINDS:
        images, masks = map(
            torch.stack, zip(*(draw(each, kind, random) for each in test), strict=True)
        )
        scores, maps = judge(images)
        truth = [0] * len(test) + [1] * len(test)
        for name, values in scores.items():
            both = torch.cat([usual[name], values]).nan_to_num(posinf=1e30)
            found["image AUROC"].setdefault(name, []).append(roc_auc_score(truth, both))
        for name, found_maps in maps.items():
            values = found_maps.nan_to_num(posinf=1e30)
            flat = masks.flatten().numpy(), values.flatten().numpy()
            found["pixel AUROC"].setdefault(name, []).append(roc_auc_score(*flat))
            low, high = values.aminmax()
            pro = AUPRO()((values[:, 0] - low) / (high - low), masks.int())
            found["AUPRO"].setdefault(name, []).append(float(pro))
    return found


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--data", required=True)
    parser.add_argument("--classes", nargs="+", type=int, default=list(range(10)))
    parser.add_argument("--epochs", type=float, default=100.0, help="of two steps each")
    parser.add_argument("--runs", type=Path, default=Path("runs/defects"))
    parser.add_argument("--out", type=Path, default=Path(__file__).parent / "results" / "defects")
    options = parser.parse_args()
    for number in options.classes:
        path = options.out / f"texture-{number}.json"
        if path.exists():
            continue
        images = textures(options.data, number)
        train, test = images[:TRAINED_ON], images[TRAINED_ON:]
        settings: dict[str, Any] = {
            "backbone": "vit_tiny_patch16_224", "backbone_options": SHAPE, "image_size": SIDE,
            "epochs": options.epochs, "batch_size": BATCH, "num_workers": 0, "held_out": 9,
            "tasks": {"masking": {"mask_patch_size": PATCH}}, "watch_every": 1000.0,
            "optimizer": {"base_lr": 8e-3, "warmup_epochs": 10}, "seed": number,
        }  # fmt: skip
        folder = options.runs / f"texture-{number}"
        if (folder / "backbone.safetensors").exists():
            run = backfold.load(folder)
        else:
            run = backfold.pretrain(train, out=folder, overwrite=True, **settings)
        write_json(path, {"settings": settings, **measure(judges(run, train), test)})
        print(f"{path}: {json.loads(path.read_text())['image AUROC']}", flush=True)
    files = sorted(options.out.glob("texture-*.json"))
    found = [json.loads(file.read_text()) for file in files]
    print(f"{len(found)} textures, mean of all kinds and deviation over textures")
    for name in ("image AUROC", "pixel AUROC", "AUPRO"):
        for contender in found[0][name]:
            means = [float(np.mean(each[name][contender])) for each in found]
            print(f"{name:12} {contender:22} {np.mean(means):.3f} ± {np.std(means):.3f}")


if __name__ == "__main__":
    main()
