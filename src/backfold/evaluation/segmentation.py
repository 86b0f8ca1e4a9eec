"""Semantic segmentation by heads on a backbone's feature maps, frozen and fine-tuned."""

import copy
import logging
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor, nn

from backfold.batch_norm import refresh_batch_norm
from backfold.data.segmentation import VOID, MaskedImages, MaskedSource, load_masked
from backfold.data.statistics import ChannelStatistics
from backfold.errors import UserError
from backfold.evaluation.measures import MeasureRow
from backfold.evaluation.segmentation_picture import draw_segmentation
from backfold.evaluation.segmenter import (
    FeatureGrid,
    decoder,
    fit,
    linear_head,
    mean_iou,
    predict,
    resized,
    segmentation_size,
)
from backfold.evaluation.untrained import untrained_backbone
from backfold.training.pretrained import Pretrained

LOGGER = logging.getLogger("backfold")
PROTOCOL = "segmentation"
METRIC = "mIoU (%)"
LINEAR, DECODER = "linear head", "decoder"
HEADS = (LINEAR, DECODER)
FROZEN, TUNED = "frozen", "fine-tuned"
NO_IMAGE = "without the image"
SHOWN_CASE = f"{LINEAR}, {FROZEN}"
SHOWN_IMAGES = 4
BATCH_NORM_IMAGES = 64


@dataclass
class SegmentationSettings:
    """How segmentation is learned and measured.

    Args:
        data: parquet files with columns image and mask (PNG of class ids), split into train and
            test; none takes --data.
        image_size: N or HxW pixels, to which images and masks are stretched; none takes the first
            image's size, rounded to what the backbone's stride fits into.
        void: the id of pixels that are no class.
        epochs: passes over the training images with the backbone frozen.
        finetune_epochs: passes with the backbone trained too; 0 leaves fine-tuning out.
        finetune_rate: the backbone's highest learning rate in these.
        batch_size: images a step.
        seeds: how often each head is trained; the table shows mean and deviation.
        limit: images of each part; none takes all.
    """

    data: str | Path | None = None
    image_size: int | str | None = None
    void: int = VOID
    epochs: int = 20
    finetune_epochs: int = 10
    finetune_rate: float = 3e-4
    batch_size: int = 16
    seeds: int = 3
    limit: int | None = None

    def __post_init__(self) -> None:
        lowest = {"epochs": 1, "finetune_epochs": 0, "batch_size": 2, "seeds": 1, "limit": 2}
        for name, least in lowest.items():
            value = getattr(self, name)
            if value is not None and value < least:
                raise UserError(f"segmentation's {name} is {value}; give {least} or more")
        if not self.finetune_rate > 0:
            raise UserError(
                f"segmentation's finetune_rate is {self.finetune_rate:g}; give a number above 0"
            )


@dataclass(frozen=True)
class SegmentationResult:
    """The rows, and a PNG of test images, their truth, and what both backbones make of them."""

    rows: list[MeasureRow]
    picture: bytes


def segment_with_run(
    run: Pretrained,
    parts: tuple[MaskedSource, MaskedSource],
    settings: SegmentationSettings,
    *,
    seed: int = 0,
    device: torch.device,
) -> SegmentationResult:
    """`compare_segmentation` of a run's backbone and the same with its first weights.

    Raises:
        UserError: what loading raises, or an image size that the backbone can't take.
    """
    size = segmentation_size(run.energy.backbone, parts[0], settings.image_size)
    train, test = load_masked(parts, size, run.channels, settings.void, settings.limit)
    LOGGER.info(
        f"segmentation: {len(train)} images to train, {len(test)} to test, {size[0]} x {size[1]} "
        f"pixels, {len(train.class_ids)} classes"
    )
    if not (train.masks == VOID).any():
        LOGGER.info(f"segmentation: no pixel has the id {settings.void}, void")
    first = run.statistics.normalize(train.images[:BATCH_NORM_IMAGES]).to(device)
    untrained = untrained_backbone(run, first, device, size)
    pretrained = resized(run.energy.backbone, size, run.channels, run.config.backbone).to(device)
    # The same function with the new images' statistics, so that training starts from it.
    refresh_batch_norm(pretrained, [first])
    backbones = {"untrained": untrained, "pretrained": pretrained}
    return compare_segmentation(backbones, train, test, run.statistics, settings, seed=seed)


def compare_segmentation(
    backbones: Mapping[str, nn.Module],
    train: MaskedImages,
    test: MaskedImages,
    statistics: ChannelStatistics,
    settings: SegmentationSettings,
    *,
    seed: int = 0,
) -> SegmentationResult:
    """Rows for each head and backbone, frozen and fine-tuned, all with the same budget.

    A seed decides the head's first weights and the order of the images, the same for each backbone.

    Args:
        backbones: by the name that the rows give them; in eval mode, each on its device.
        train: what the heads learn from.
        test: what they are measured on.
        statistics: normalise the images.
        settings: the budget.
        seed: the first of the seeds.

    Raises:
        UserError: a backbone whose feature map is no grid.
    """
    rows = [_without_image(train, test)]
    shown: dict[str, Tensor] = {}
    seeds = range(seed, seed + settings.seeds)
    # Neighbours are often frames of one film.
    drawn = torch.linspace(0, len(test) - 1, min(SHOWN_IMAGES, len(test))).round().long()
    for name, backbone in backbones.items():
        LOGGER.info(f"segmentation: heads on the frozen backbone, {name}")
        maps = _feature_maps(FeatureGrid(backbone, statistics), train, test, settings.batch_size)
        for head in HEADS:
            runs = [_learn_on_maps(head, maps, train, settings, seed) for seed in seeds]
            rows.append(_row(f"{head}, {FROZEN}", name, runs, test))
            if f"{head}, {FROZEN}" == SHOWN_CASE:
                shown[name] = runs[0][drawn]
    for name, backbone in backbones.items() if settings.finetune_epochs else ():
        LOGGER.info(f"segmentation: fine-tuning the backbone, {name}")
        grid = FeatureGrid(backbone, statistics)
        for head in HEADS:
            runs = [_fine_tune(head, grid, train, test, settings, seed) for seed in seeds]
            rows.append(_row(f"{head}, {TUNED}", name, runs, test))
    examples = MaskedImages(test.images[drawn], test.masks[drawn], test.class_ids)
    return SegmentationResult(rows, draw_segmentation(examples, shown))


def _row(case: str, name: str, runs: list[Tensor], test: MaskedImages) -> MeasureRow:
    values = [mean_iou(predicted, test.masks, len(test.class_ids)) for predicted in runs]
    return MeasureRow.of(PROTOCOL, case, name, METRIC, values)


def _without_image(train: MaskedImages, test: MaskedImages) -> MeasureRow:
    """The floor: the training masks' most frequent class everywhere."""
    commonest = train.masks[train.masks != VOID].mode().values
    predicted = commonest.expand(test.masks.shape)
    return _row(NO_IMAGE, "most frequent class", [predicted], test)


@dataclass(frozen=True)
class _Maps:
    """Feature maps (images, features, rows, columns) on the CPU, and where heads are trained."""

    train: Tensor
    test: Tensor
    device: torch.device


@torch.no_grad()
def _feature_maps(
    grid: FeatureGrid, train: MaskedImages, test: MaskedImages, batch_size: int
) -> _Maps:
    device = _device(grid)
    parts = [
        torch.cat([grid(batch.to(device)).cpu() for batch in part.images.split(batch_size)])
        for part in (train, test)
    ]
    return _Maps(parts[0], parts[1], device)


def _device(module: nn.Module) -> torch.device:
    return next(module.parameters()).device


def _new_head(name: str, maps: Tensor, train: MaskedImages, seed: int) -> nn.Module:
    """A head for such feature maps, (images, features, rows, columns)."""
    features, classes = maps.shape[1], len(train.class_ids)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        if name == LINEAR:
            return linear_head(features, classes)
        return decoder(features, classes, train.masks.shape[1] / maps.shape[2])


def _learn_on_maps(
    name: str, maps: _Maps, train: MaskedImages, settings: SegmentationSettings, seed: int
) -> Tensor:
    """A head's predictions for the test images, the backbone frozen."""
    head = _new_head(name, maps.train, train, seed).to(maps.device)
    fit(
        nn.Identity(),
        head,
        maps.train,
        train.masks,
        epochs=settings.epochs,
        batch_size=settings.batch_size,
        seed=seed,
    )
    size = (train.masks.shape[1], train.masks.shape[2])
    return predict(nn.Identity(), head, maps.test, size, settings.batch_size)


def _fine_tune(
    name: str,
    grid: FeatureGrid,
    train: MaskedImages,
    test: MaskedImages,
    settings: SegmentationSettings,
    seed: int,
) -> Tensor:
    """A head's predictions for the test images, the backbone trained with it; a copy is."""
    encoder, device = copy.deepcopy(grid), _device(grid)
    with torch.no_grad():
        maps = grid(train.images[:1].to(device))
    head = _new_head(name, maps, train, seed).to(device)
    fit(
        encoder,
        head,
        train.images,
        train.masks,
        epochs=settings.finetune_epochs,
        batch_size=settings.batch_size,
        encoder_rate=settings.finetune_rate,
        seed=seed,
    )
    size = (train.masks.shape[1], train.masks.shape[2])
    return predict(encoder, head, test.images, size, settings.batch_size)
