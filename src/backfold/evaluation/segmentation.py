"""Semantic segmentation by heads on a backbone's feature maps, frozen and fine-tuned.

All contenders have the same budget and seeds: a seed decides the decoder's first weights and the
order of the images. Nothing is chosen; test images are looked at by the final predictions alone.
"""

import copy
import logging
import math
import warnings
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any, cast

import matplotlib as mpl
import numpy as np
import torch
from PIL import ImageDraw
from torch import Tensor, nn
from torch.nn import functional as F
from torch.utils.data import TensorDataset
from torchmetrics.classification import MulticlassJaccardIndex
from torchvision.ops import Conv2dNormActivation
from torchvision.transforms.v2.functional import to_pil_image
from torchvision.utils import make_grid

from backfold.backbone import ImageSize, check_image_size, feature_map
from backfold.batch_norm import measure_batch_norm, refresh_batch_norm
from backfold.data import masks as masked
from backfold.data.decode import as_float
from backfold.data.masks import VOID, MaskedSource
from backfold.data.source import SubsetSource
from backfold.data.statistics import ChannelStatistics
from backfold.data.survey import ENOUGH, survey
from backfold.embedding import grid_shape
from backfold.errors import UserError, at_least, check_ranges, positive
from backfold.evaluation.images import seeded
from backfold.evaluation.results import OVER, PIXELS, PRETRAINED, RANDOM, SCRATCH, Row
from backfold.pictures import png_bytes
from backfold.training.config import parse_image_size

if TYPE_CHECKING:
    from backfold.evaluation.evaluate import Evaluation
    from backfold.evaluation.subject import Subject

LOGGER = logging.getLogger("backfold")
PROTOCOL, METRIC = "segmentation", "mIoU (%)"
LINEAR, DECODER = "linear head", "decoder"
DECODER_WIDTH, DECODER_STRIDE = 64, 4
HEAD_RATE, WEIGHT_DECAY, WARM_UP_SHARE = 2e-3, 0.01, 0.1
FROZEN_LINEAR_RATE = 5e-3  # convex; at less, few features (pixels) stay behind many for long
BATCH_NORM_IMAGES, SHOWN_IMAGES = 64, 4
KEPT_BYTES = 2**30  # of the feature maps of one part
TILE_WIDTH, GAP, HEADING = 240, 4, 20  # of the picture, in pixels

# From each batch's places to images or feature maps with their masks.
Load = Callable[[Sequence[Tensor]], Iterator[tuple[Tensor, Tensor]]]


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
        ranges = (
            at_least(0, "finetune_epochs"), at_least(1, "epochs seeds"),
            at_least(2, "batch_size limit"), positive("finetune_rate"),
        )  # fmt: skip
        check_ranges(self, ranges, "segmentation's ")


def segmentation(given: "Evaluation") -> list[Row]:
    """Rows for each head and contender, frozen and fine-tuned; leaves a picture of test images.

    Beside the backbones there are heads on the pixels themselves, at the feature map's resolution,
    and the floor: the training masks' most frequent class everywhere.
    """
    work = _Work(given)
    scores: dict[str, dict[str, list[float]]] = {}
    ((images, truth),) = work.parts[1].batches([work.shown])
    shown = {"truth": truth}
    for name, encoder in work.encoders():
        LOGGER.info(f"segmentation: {name}")
        is_tuned = name != PIXELS and given.settings.segmentation.finetune_epochs > 0
        for tuned in (False, True)[: 1 + is_tuned]:
            inputs = (encoder, work.loads) if tuned else work.kept(encoder)
            contender = SCRATCH if tuned and name == given.subject.scratch else name
            for head in (LINEAR, DECODER):
                found, predicted = work.scores(head, *inputs, tuned)
                case = f"{head}, {'fine-tuned' if tuned else 'frozen'}"
                scores.setdefault(case, {})[contender] = found
                shown.setdefault(name, predicted)
    given.pictures["segmentation.png"] = draw_segmentation(images, shown)
    rows = [Row.of(PROTOCOL, "without the image", "most frequent class", METRIC, [work.floor()])]
    for case, of_case in scores.items():
        rows += [Row.of(PROTOCOL, case, name, METRIC, values) for name, values in of_case.items()]
        for name in [each for each in of_case if each != PRETRAINED]:
            gaps = np.subtract(of_case[PRETRAINED], of_case[name]).tolist()  # seed by seed
            rows.append(Row.of(PROTOCOL, case, f"{PRETRAINED}{OVER}{name}", METRIC, gaps))
    return rows


def open_masks(given: "Evaluation") -> tuple[MaskedSource, MaskedSource]:
    """The training and the test part of the data that are asked for, or of the run's own."""
    settings, run = given.settings, given.subject.run
    own = run.config.data if run is not None and settings.data is None else settings.data
    return masked.open_masked(settings.segmentation.data or own, settings.seed)


class _Work:
    """What is done with every contender: ``parts`` are to learn from, and to test on."""

    def __init__(self, given: "Evaluation") -> None:
        self._given, self._device, settings = given, given.device, given.settings.segmentation
        subject, void, sources = given.subject, settings.void, open_masks(given)
        self._size = _image_size(subject, sources[0], settings.image_size)
        self.parts = train, test = masked.load_masked(
            sources, self._size, subject.channels, void, settings.limit, given.num_workers
        )
        self.loads: list[Load] = [part.batches for part in self.parts]
        self._classes = len(train.class_ids)
        counts = f"{len(train)} images to train, {len(test)} to test, {self._classes} classes"
        LOGGER.info(f"segmentation: {counts}, {self._size[0]} x {self._size[1]} pixels")
        own = SubsetSource(sources[0].images, sources[0].indices)
        workers = min(1, given.num_workers)
        self._statistics = (
            subject.statistics
            or survey(own, subject.channels, ENOUGH, num_workers=workers).statistics
        )
        # Far apart, as neighbours are often frames of one film.
        self.shown = masked.spread(len(test), SHOWN_IMAGES)
        self._every = [torch.arange(len(part)).split(settings.batch_size) for part in self.parts]

    @torch.no_grad()
    def encoders(self) -> Iterator[tuple[str, nn.Module]]:
        """Each contender as images -> feature maps, in eval mode on the device."""
        subject, train = self._given.subject, self.parts[0]
        ((images, _),) = train.batches([masked.spread(len(train), BATCH_NORM_IMAGES)])
        images, grid = images.to(self._device), torch.Size()
        normalised = self._statistics.normalize(images)
        for name in subject.weights:
            backbone = resized(subject.backbone(name), self._size, subject.channels, subject.name)
            backbone.to(self._device)
            if name in (subject.scratch, RANDOM):
                measure_batch_norm(backbone, normalised)
            else:  # the same function with these images' statistics, as training starts there
                refresh_batch_norm(backbone, [normalised])
            encoder = FeatureGrid(backbone, self._statistics)
            grid = encoder(images[:2]).shape[2:]
            yield name, encoder
        yield PIXELS, FeatureGrid(nn.AdaptiveAvgPool2d((grid[0], grid[1])), self._statistics)

    @torch.no_grad()
    def kept(self, encoder: nn.Module) -> tuple[nn.Module, Sequence[Load]]:
        """A frozen encoder and the images, or nothing and its feature maps, where these are few."""
        encoder.eval()
        found: list[Load] = []
        for part, every in zip(self.parts, self._every, strict=True):
            pairs = []
            for images, masks in part.batches(every):
                pairs.append((encoder(images.to(self._device)).cpu(), masks))
                if pairs[0][0][0].nbytes * max(map(len, self.parts)) > KEPT_BYTES:
                    return encoder, self.loads
            kept = TensorDataset(*map(torch.cat, zip(*pairs, strict=True)))
            found.append(partial(map, kept.__getitem__))
        return nn.Identity(), found

    def scores(
        self, head: str, encoder: nn.Module, loads: Sequence[Load], tuned: bool
    ) -> tuple[list[float], Tensor]:
        """Each seed's mIoU in percent, and what the last seed makes of the images shown."""
        scores, settings = [], self._given.settings
        for seed in range(settings.seed, settings.seed + settings.segmentation.seeds):
            with seeded(seed, self._device):
                model = self._trained(head, encoder, loads[0], tuned, seed)
            scores.append(mean_iou(self._predicted(model, loads[1](self._every[1])), self._classes))
        return scores, next(self._predicted(model, loads[1]([self.shown])))[0].cpu()

    def floor(self) -> float:
        """The mIoU in percent of the training masks' most frequent class everywhere."""
        train, test = self.parts
        commonest = int(np.argmax([train.pixels[each] for each in train.class_ids]))
        batches = test.batches(self._every[1])
        return mean_iou(((torch.full_like(m, commonest), m) for _, m in batches), self._classes)

    def _trained(
        self, head_name: str, encoder: nn.Module, load: Load, tuned: bool, seed: int
    ) -> nn.Module:
        """The encoder (a copy, if trained too; then half of the images are mirrored) and a head."""
        settings, device = self._given.settings.segmentation, self._device
        encoder = copy.deepcopy(encoder) if tuned else encoder
        with torch.no_grad():
            ((first, _),) = load([torch.tensor([0])])
            features, rows = encoder(first.to(device)).shape[1:3]
        head = new_head(head_name, features, self._classes, self._size[0] / rows).to(device)
        generator = torch.Generator().manual_seed(seed)
        order: list[Tensor] = []
        for _ in range(settings.finetune_epochs if tuned else settings.epochs):
            places = torch.randperm(len(self.parts[0]), generator=generator)
            order += places.tensor_split(len(self._every[0]))
        is_convex = head_name == LINEAR and not tuned
        rates = [FROZEN_LINEAR_RATE if is_convex else HEAD_RATE, settings.finetune_rate]
        groups = [{"params": list(part.parameters())} for part in (head, encoder)[: 1 + tuned]]
        optimizer = torch.optim.AdamW(groups, weight_decay=WEIGHT_DECAY)
        total = max(2, len(order))
        # A warm-up of exactly one step would have torch divide by zero.
        share = WARM_UP_SHARE if WARM_UP_SHARE * total != 1 else 2 / total
        schedule = torch.optim.lr_scheduler.OneCycleLR(
            optimizer, rates[: 1 + tuned], total, pct_start=share, cycle_momentum=False
        )
        head.train()
        encoder.train(tuned)
        for batch, masks in load(order):
            inputs, truth = batch.to(device, non_blocking=True), masks.to(device).long()
            if tuned:
                mirrored = (torch.rand(len(inputs), generator=generator) < 0.5).to(device)
                inputs = torch.where(mirrored[:, None, None, None], inputs.flip(-1), inputs)
                truth = torch.where(mirrored[:, None, None], truth.flip(-1), truth)
            with torch.set_grad_enabled(tuned):
                maps = encoder(inputs)
            logits = F.interpolate(head(maps), truth.shape[1:], mode="bilinear")
            # A batch of nothing but void has no mean.
            loss = F.cross_entropy(logits, truth, ignore_index=VOID, reduction="sum")
            (loss / (truth != VOID).sum().clamp_min(1)).backward()
            optimizer.step()
            optimizer.zero_grad()
            schedule.step()
        return nn.Sequential(encoder, head).eval()

    @torch.no_grad()
    def _predicted(
        self, model: nn.Module, loaded: Iterable[tuple[Tensor, Tensor]]
    ) -> Iterator[tuple[Tensor, Tensor]]:
        """The likeliest class of each pixel, uint8, and the masks, by batches."""
        for batch, masks in loaded:
            logits = model(batch.to(self._device, non_blocking=True))
            logits = F.interpolate(logits, masks.shape[1:], mode="bilinear")
            yield logits.argmax(dim=1).to(torch.uint8), masks.to(self._device)


class FeatureGrid(nn.Module):
    """A backbone as images, as they were loaded -> (batch, features, rows, columns), float32."""

    def __init__(self, backbone: nn.Module, statistics: ChannelStatistics) -> None:
        super().__init__()
        self.backbone, self._statistics = backbone, statistics

    def forward(self, images: Tensor) -> Tensor:
        """Raises UserError where the positions form no grid of the images' shape."""
        positions = feature_map(self.backbone, self._statistics.normalize(images)).float()
        shape = grid_shape(positions.shape[1], (images.shape[2], images.shape[3]))
        return cast(Tensor, positions.transpose(1, 2).unflatten(2, shape))


def new_head(name: str, features: int, classes: int, stride: float) -> nn.Module:
    """Feature maps, ``stride`` pixels apart, to logits: linear, at first 0, or 4 pixels apart."""
    norm, width = nn.BatchNorm2d(features, affine=False), DECODER_WIDTH
    if name == LINEAR:
        weights = nn.Conv2d(features, classes, 1)
        for parameter in weights.parameters():
            nn.init.zeros_(parameter)
        return nn.Sequential(norm, weights)
    layers = [norm, nn.Conv2d(features, width, 1), Conv2dNormActivation(width, width)]
    for _ in range(round(math.log2(stride / DECODER_STRIDE))):
        layers += [nn.Upsample(scale_factor=2, mode="bilinear"), Conv2dNormActivation(width, width)]
    return nn.Sequential(*layers, nn.Conv2d(width, classes, 1))


def mean_iou(batches: Iterable[tuple[Tensor, Tensor]], classes: int) -> float:
    """Intersection over union in percent, over all pixels: the mean of the classes that occur.

    Predictions and masks are (batch, height, width); `VOID` in masks does not count.
    """
    index = MulticlassJaccardIndex(classes, ignore_index=VOID, validate_args=False)
    for predicted, masks in batches:
        index.to(predicted.device).update(predicted.long(), masks.long())
    return 100 * float(index.compute())


def _image_size(subject: "Subject", source: MaskedSource, wanted: int | str | None) -> ImageSize:
    """What is asked for, or the first image's, rounded to multiples of the backbone's stride."""
    information: Any = getattr(subject.backbone(PRETRAINED), "feature_info", None)
    stride = int(information[-1]["reduction"]) if information else 1
    height, width = parse_image_size(wanted) or source.read(0, subject.channels)[0].shape[1:]
    rows, columns = (max(1, round(side / stride)) * stride for side in (height, width))
    if wanted is not None and (height, width) != (rows, columns):
        raise UserError(
            f"--segmentation.image-size is {height}x{width}, and the backbone's stride is "
            f"{stride}; give multiples of it, such as {rows}x{columns}"
        )
    return rows, columns


def resized(backbone: Any, size: ImageSize, channels: int, name: str) -> nn.Module:
    """Make a module take images of another size, in place; timm resamples position embeddings."""
    try:
        # timm resamples Swin's tables of positions in ways that PyTorch finds old.
        with warnings.catch_warnings(action="ignore", category=UserWarning):
            if hasattr(backbone, "set_input_size"):
                backbone.set_input_size(img_size=size)
    except Exception as error:  # each family checks its own conditions, by whatever fails
        raise UserError(
            f"backbone {name!r} can't take {size[0]} x {size[1]} pixels: "
            f"{' '.join(str(error).split())[:200]}; give another --segmentation.image-size"
        ) from error
    check_image_size(backbone, size, channels, name)
    return cast(nn.Module, backbone)


def draw_segmentation(images: Tensor, masks: Mapping[str, Tensor]) -> bytes:
    """A PNG with a row an image: the image, and by their headings the masks; void is black."""
    colours = torch.tensor(mpl.colormaps["tab20"](range(20)))[:, :3].float().repeat(13, 1)
    colours[VOID] = 0.0
    pixels = as_float(images).clamp(0.0, 1.0)
    shown = pixels[:, :3] if pixels.shape[1] >= 3 else pixels[:, :1].expand(-1, 3, -1, -1)
    columns = [shown, *(colours[each.long()].permute(0, 3, 1, 2) for each in masks.values())]
    size = (round(TILE_WIDTH * images.shape[2] / images.shape[3]), TILE_WIDTH)
    tiles = F.interpolate(torch.stack(columns, dim=1).flatten(0, 1), size, mode="nearest-exact")
    grid = make_grid(tiles, nrow=len(columns), padding=GAP, pad_value=1.0)
    picture = to_pil_image(F.pad(grid, (0, 0, HEADING, 0), value=1.0))
    for column, heading in enumerate(("image", *masks)):
        place = (GAP + column * (TILE_WIDTH + GAP), GAP)
        ImageDraw.Draw(picture).text(place, heading, "black", font_size=HEADING - GAP)
    return png_bytes(picture)
