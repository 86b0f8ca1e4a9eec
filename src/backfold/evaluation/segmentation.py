"""Semantic segmentation by heads on a backbone's feature maps, frozen and fine-tuned.

All contenders have the same budget and seeds: a seed decides the decoder's first weights and the
order of the images. Nothing is chosen; test images are looked at by the final predictions alone.
"""

import copy
import io
import logging
import math
import warnings
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, cast

import matplotlib as mpl
import numpy as np
import torch
from matplotlib.figure import Figure
from numpy.typing import NDArray
from torch import Tensor, nn
from torch.nn import functional as F
from torchmetrics.classification import MulticlassJaccardIndex

from backfold.backbone import ImageSize, check_image_size, feature_map
from backfold.batch_norm import measure_batch_norm, refresh_batch_norm
from backfold.data.decode import as_float
from backfold.data.segmentation import VOID, MaskedImages, MaskedSource, load_masked, open_masked
from backfold.data.source import SubsetSource
from backfold.data.statistics import ChannelStatistics, measure_statistics
from backfold.embedding import grid_shape
from backfold.errors import UserError
from backfold.evaluation.results import OVER, PIXELS, PRETRAINED, RANDOM, SCRATCH, Row
from backfold.evaluation.seeding import seeded
from backfold.evaluation.subject import Subject
from backfold.training.config import parse_image_size

if TYPE_CHECKING:
    from backfold.evaluation.evaluate import Evaluation

LOGGER = logging.getLogger("backfold")
PROTOCOL, METRIC = "segmentation", "mIoU (%)"
LINEAR, DECODER = "linear head", "decoder"
HEADS = (LINEAR, DECODER)
FROZEN, TUNED = "frozen", "fine-tuned"
NO_IMAGE, COMMONEST = "without the image", "most frequent class"
PICTURE = "segmentation.png"

DECODER_WIDTH, DECODER_STRIDE = 64, 4
HEAD_RATE, WEIGHT_DECAY, WARM_UP_SHARE = 2e-3, 0.01, 0.1
FROZEN_LINEAR_RATE = 5e-3  # convex; at less, few features (pixels) stay behind many for long
BATCH_NORM_IMAGES = 64
KEPT_BYTES = 2**30  # of the feature maps of one part
SHOWN_IMAGES, TILE_INCHES, COLOURS = 4, 2.2, 20


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


def segmentation(given: "Evaluation") -> list[Row]:
    """Rows for each head and contender, frozen and fine-tuned; leaves a picture of test images.

    Beside the backbones there are heads on the pixels themselves, at the feature map's resolution,
    and the floor: the training masks' most frequent class everywhere.

    Raises:
        UserError: no masks, or an image size that the backbone can't take.
    """
    work, settings = _Work(given), given.settings.segmentation
    scores: dict[str, dict[str, list[float]]] = {}
    shown: dict[str, Tensor] = {}
    for name, encoder in work.encoders():
        LOGGER.info(f"segmentation: {name}")
        parts = work.parts
        maps = [_Maps(encoder, part, given.device, settings.batch_size) for part in parts]
        for head in HEADS:
            found, predicted = work.run(head, nn.Identity(), maps, settings.epochs)
            scores.setdefault(f"{head}, {FROZEN}", {})[name] = found
            shown.setdefault(name, predicted)
        if name == PIXELS:
            continue
        start = SCRATCH if name == given.subject.scratch else name
        for head in HEADS if settings.finetune_epochs else ():
            epochs, rate = settings.finetune_epochs, settings.finetune_rate
            found, _ = work.run(head, encoder, parts, epochs, rate)
            scores.setdefault(f"{head}, {TUNED}", {})[start] = found
    given.pictures[PICTURE] = draw_segmentation(*work.examples(), shown)
    return [_floor(*work.parts), *(row for case in scores for row in _rows(case, scores[case]))]


def _rows(case: str, scores: Mapping[str, Sequence[float]]) -> Iterator[Row]:
    """Each contender's, and by how much the pretrained one is ahead, seed by seed."""
    for name, values in scores.items():
        yield Row.of(PROTOCOL, case, name, METRIC, values)
    for name, values in scores.items():
        if name != PRETRAINED:
            gaps = [ours - its for ours, its in zip(scores[PRETRAINED], values, strict=True)]
            yield Row.of(PROTOCOL, case, f"{PRETRAINED}{OVER}{name}", METRIC, gaps)


def _floor(train: MaskedImages, test: MaskedImages) -> Row:
    commonest = max(train.class_ids, key=lambda value: train.pixels[value])
    counted = {value: test.pixels[value] for value in train.class_ids if test.pixels[value]}
    overlap = counted.get(commonest, 0) / sum(counted.values())
    score = 100 * overlap / len(counted.keys() | {commonest})
    return Row.of(PROTOCOL, NO_IMAGE, COMMONEST, METRIC, [score])


def open_masks(given: "Evaluation") -> tuple[MaskedSource, MaskedSource]:
    """The training and the test part of the data that are asked for, or of the run's own.

    Raises:
        UserError: no such data, or data without masks.
    """
    settings, run = given.settings, given.subject.run
    own = run.config.data if run is not None and settings.data is None else settings.data
    return open_masked(settings.segmentation.data or own, settings.seed)


class _Work:
    """What is done with every contender; ``parts`` are to learn from, and to test on."""

    def __init__(self, given: "Evaluation") -> None:
        self._given, self._settings = given, given.settings.segmentation
        subject, void = given.subject, self._settings.void
        sources = open_masks(given)
        self._size = _image_size(subject, sources[0], self._settings.image_size)
        self.parts = load_masked(
            sources, self._size, subject.channels, void, self._settings.limit, given.num_workers
        )
        train, test = self.parts
        LOGGER.info(
            f"segmentation: {len(train)} images to train, {len(test)} to test, {self._size[0]} x "
            f"{self._size[1]} pixels, {len(train.class_ids)} classes"
        )
        if void not in train.pixels:
            LOGGER.info(f"segmentation: no pixel has the id {void}, void")
        own = SubsetSource(sources[0].images, sources[0].indices)
        self._statistics = subject.statistics or measure_statistics(own, subject.channels)
        # Neighbours are often frames of one film.
        self._shown = _spread(test, SHOWN_IMAGES)

    def encoders(self) -> Iterator[tuple[str, nn.Module]]:
        """Each contender as images -> feature maps, in eval mode on the device."""
        subject, grid = self._given.subject, torch.Size()
        ((images, _),) = self.parts[0].batches([_spread(self.parts[0], BATCH_NORM_IMAGES)])
        images = images.to(self._given.device)
        for name in subject.weights:
            backbone = resized(subject.backbone(name), self._size, subject.channels, subject.name)
            backbone.to(self._given.device)
            with torch.no_grad():
                if name in (subject.scratch, RANDOM):
                    measure_batch_norm(backbone, self._statistics.normalize(images))
                else:  # the same function with these images' statistics, as training starts there
                    refresh_batch_norm(backbone, [self._statistics.normalize(images)])
                encoder = FeatureGrid(backbone, self._statistics)
                grid = encoder(images[:2]).shape
            yield name, encoder
        yield PIXELS, PixelGrid((grid[2], grid[3]), self._statistics)

    def run(
        self,
        head_name: str,
        encoder: nn.Module,
        parts: Sequence["_Pairs"],
        epochs: int,
        encoder_rate: float = 0.0,
    ) -> tuple[list[float], Tensor]:
        """Each seed's mIoU in percent, and what the first seed makes of the images shown."""
        given, batch_size = self._given, self._settings.batch_size
        scores: list[float] = []
        shown: list[Tensor] = []
        for seed in range(given.settings.seed, given.settings.seed + self._settings.seeds):
            with seeded(seed, given.device):
                own = copy.deepcopy(encoder) if encoder_rate else encoder
                head = self._new_head(head_name, own, parts[0])
                head_rate = (
                    FROZEN_LINEAR_RATE if own is encoder and head_name == LINEAR else HEAD_RATE
                )
                fit(own, head, parts[0], epochs, batch_size, (head_rate, encoder_rate), seed)
            every = torch.arange(len(parts[1])).split(batch_size)
            predictions = predict(own, head, parts[1], every)
            scores.append(mean_iou(predictions, len(self.parts[0].class_ids)))
            if not shown:
                shown = [each.cpu() for each, _ in predict(own, head, parts[1], [self._shown])]
        return scores, torch.cat(shown)

    def _new_head(self, name: str, encoder: nn.Module, train: "_Pairs") -> nn.Module:
        ((first, _),) = train.batches([torch.tensor([0])])
        with torch.no_grad():
            features, rows = encoder(first.to(self._given.device)).shape[1:3]
        classes = len(self.parts[0].class_ids)
        made = (
            linear_head(features, classes)
            if name == LINEAR
            else decoder(features, classes, self._size[0] / rows)
        )
        return made.to(self._given.device)

    def examples(self) -> tuple[Tensor, Tensor]:
        """Images and masks that are shown."""
        ((images, masks),) = self.parts[1].batches([self._shown])
        return images, masks


def _spread(images: MaskedImages, most: int) -> Tensor:
    return torch.linspace(0, len(images) - 1, min(most, len(images))).round().long()


class FeatureGrid(nn.Module):
    """A backbone as images, as they were loaded -> (batch, features, rows, columns), float32.

    Args:
        backbone: as `feature_map` takes it.
        statistics: normalise the images.
    """

    def __init__(self, backbone: nn.Module, statistics: ChannelStatistics) -> None:
        super().__init__()
        self.backbone, self._statistics = backbone, statistics

    def forward(self, images: Tensor) -> Tensor:
        """The feature map.

        Raises:
            UserError: the positions form no grid of the images' shape.
        """
        positions = feature_map(self.backbone, self._statistics.normalize(images)).float()
        shape = grid_shape(positions.shape[1], (images.shape[2], images.shape[3]))
        grid: Tensor = positions.transpose(1, 2).unflatten(2, shape)
        return grid


class PixelGrid(nn.Module):
    """Images as a feature map: the mean colour at each position of such rows and columns."""

    def __init__(self, shape: tuple[int, int], statistics: ChannelStatistics) -> None:
        super().__init__()
        self._shape, self._statistics = shape, statistics

    def forward(self, images: Tensor) -> Tensor:
        """(batch, channels, rows, columns)."""
        return F.adaptive_avg_pool2d(self._statistics.normalize(images), self._shape)


class _Maps:
    """A frozen encoder's maps with the masks, as `MaskedImages` has images; few are kept."""

    def __init__(
        self, encoder: nn.Module, images: MaskedImages, device: torch.device, batch_size: int
    ) -> None:
        self._encoder, self._images, self._device = encoder.eval(), images, device
        self._kept: tuple[Tensor, Tensor] | None = None
        every = torch.arange(len(images)).split(batch_size)
        ((first, mask),) = self._encoded([every[0][:1]])
        if len(images) * (first.nbytes + mask.nbytes) <= KEPT_BYTES:
            maps, masks = zip(*((each.cpu(), m) for each, m in self._encoded(every)), strict=True)
            self._kept = torch.cat(maps), torch.cat(masks)

    def __len__(self) -> int:
        return len(self._images)

    def batches(self, indices: Sequence[Tensor]) -> Iterator[tuple[Tensor, Tensor]]:
        """(batch, features, rows, columns) and masks (batch, height, width), uint8."""
        if self._kept is None:
            yield from self._encoded(indices)
        else:
            yield from ((self._kept[0][places], self._kept[1][places]) for places in indices)

    def _encoded(self, indices: Sequence[Tensor]) -> Iterator[tuple[Tensor, Tensor]]:
        for images, masks in self._images.batches(indices):
            with torch.no_grad():
                maps = self._encoder(images.to(self._device, non_blocking=True))
            yield maps, masks


_Pairs = MaskedImages | _Maps


def linear_head(features: int, classes: int) -> nn.Module:
    """Standardised features, one weight for each of them and each class, at first 0."""
    weights = nn.Conv2d(features, classes, 1)
    for parameter in weights.parameters():
        nn.init.zeros_(parameter)
    return nn.Sequential(nn.BatchNorm2d(features, affine=False), weights)


def decoder(features: int, classes: int, stride: float) -> nn.Module:
    """A small convolutional decoder, whose logits are some 4 pixels apart.

    Args:
        features: of the feature map.
        classes: logits.
        stride: pixels between the feature map's positions.
    """
    doublings = max(0, round(math.log2(stride / DECODER_STRIDE)))
    return nn.Sequential(
        nn.BatchNorm2d(features, affine=False),
        nn.Conv2d(features, DECODER_WIDTH, 1),
        *_block(DECODER_WIDTH),
        *(
            part
            for _ in range(doublings)
            for part in (nn.Upsample(scale_factor=2, mode="bilinear"), *_block(DECODER_WIDTH))
        ),
        nn.Conv2d(DECODER_WIDTH, classes, 1),
    )


def _block(width: int) -> tuple[nn.Module, ...]:
    return nn.Conv2d(width, width, 3, padding=1, bias=False), nn.BatchNorm2d(width), nn.ReLU()


def fit(
    encoder: nn.Module,
    head: nn.Module,
    train: _Pairs,
    epochs: int,
    batch_size: int,
    rates: tuple[float, float],
    seed: int = 0,
) -> None:
    """Train a head, and its encoder if that gets a learning rate, in place.

    AdamW, one cycle of the learning rate, cross-entropy of the logits at the masks' resolution.
    While the encoder trains, half of the images are mirrored.

    Args:
        encoder: what ``train`` holds -> feature maps (batch, features, rows, columns).
        head: on the device; feature maps -> logits of any resolution.
        train: images or feature maps, with masks.
        epochs: passes over them.
        batch_size: of them in a step.
        rates: the head's and the encoder's highest learning rate; an encoder of rate 0 stays as it
            is, in eval mode.
        seed: of the order and the mirroring.
    """
    tuned = rates[1] > 0
    groups = [{"params": list(part.parameters())} for part in (head, encoder)][: 1 + tuned]
    optimizer = torch.optim.AdamW(groups, weight_decay=WEIGHT_DECAY)
    generator = torch.Generator().manual_seed(seed)
    count = math.ceil(len(train) / batch_size)
    orders = [torch.randperm(len(train), generator=generator) for _ in range(epochs)]
    order = [places for each in orders for places in each.tensor_split(count)]
    schedule = torch.optim.lr_scheduler.OneCycleLR(
        optimizer,
        list(rates[: 1 + tuned]),
        max(2, len(order)),
        pct_start=WARM_UP_SHARE,
        cycle_momentum=False,
    )
    head.train()
    encoder.train(tuned)
    device = next(head.parameters()).device
    for batch, masks in train.batches(order):
        inputs, truth = batch.to(device, non_blocking=True), masks.to(device).long()
        if tuned:
            mirrored = (torch.rand(len(inputs), generator=generator) < 0.5).to(device)
            inputs = torch.where(mirrored[:, None, None, None], inputs.flip(-1), inputs)
            truth = torch.where(mirrored[:, None, None], truth.flip(-1), truth)
        logits = F.interpolate(head(encoder(inputs)), truth.shape[1:], mode="bilinear")
        # A batch of nothing but void has no mean.
        loss = F.cross_entropy(logits, truth, ignore_index=VOID, reduction="sum")
        (loss / (truth != VOID).sum().clamp_min(1)).backward()
        optimizer.step()
        optimizer.zero_grad()
        schedule.step()


@torch.no_grad()
def predict(
    encoder: nn.Module, head: nn.Module, test: _Pairs, indices: Sequence[Tensor]
) -> Iterator[tuple[Tensor, Tensor]]:
    """The likeliest class of each pixel, uint8 on the head's device, and the masks, by batches.

    Encoder, head and ``test`` are as for `fit`; ``indices`` are places of each batch.
    """
    encoder.eval()
    head.eval()
    device = next(head.parameters()).device
    for batch, masks in test.batches(indices):
        logits = head(encoder(batch.to(device, non_blocking=True)))
        logits = F.interpolate(logits, masks.shape[1:], mode="bilinear")
        yield logits.argmax(dim=1).to(torch.uint8), masks.to(device)


def mean_iou(batches: Iterable[tuple[Tensor, Tensor]], classes: int) -> float:
    """Intersection over union in percent, the mean of the classes that occur in either.

    It is counted over all pixels of all images; those that are `VOID` in the masks don't count.

    Args:
        batches: predictions and masks, (batch, height, width): whole numbers below ``classes``, in
            masks `VOID`, too.
        classes: how many there are.
    """
    index = MulticlassJaccardIndex(classes, ignore_index=VOID, validate_args=False)
    for predicted, masks in batches:
        index.to(predicted.device).update(predicted.long(), masks.long())
    return 100 * float(index.compute())


def _image_size(subject: Subject, source: MaskedSource, wanted: int | str | None) -> ImageSize:
    """What is asked for, or the first image's, rounded to multiples of the stride."""
    information: Any = getattr(subject.backbone(PRETRAINED), "feature_info", None)
    stride = int(information[-1]["reduction"]) if information else 1
    size = parse_image_size(wanted) or source.read(0)[0].shape[1:]
    rows, columns = (max(1, round(side / stride)) * stride for side in size)
    if wanted is not None and tuple(size) != (rows, columns):
        raise UserError(
            f"--segmentation.image-size is {size[0]}x{size[1]}, and the backbone's stride is "
            f"{stride}; give multiples of it, such as {rows}x{columns}"
        )
    return rows, columns


def resized(backbone: nn.Module, size: ImageSize, channels: int, name: str) -> nn.Module:
    """Make it take images of another size, in place; timm resamples its position embeddings.

    Raises:
        UserError: the backbone, of this name, can't take images of this (height, width).
    """
    if hasattr(backbone, "set_input_size"):
        try:
            with warnings.catch_warnings():
                # timm resamples Swin's tables of positions in ways that PyTorch finds old.
                warnings.simplefilter("ignore", UserWarning)
                cast(Any, backbone).set_input_size(img_size=size)
        except Exception as error:
            # Each family has its own conditions, and checks them by whatever fails.
            raise UserError(
                f"backbone {name!r} can't take {size[0]} x {size[1]} pixels: "
                f"{' '.join(str(error).split())[:200]}; give another --segmentation.image-size"
            ) from error
    check_image_size(backbone, size, channels, name)
    return backbone


def draw_segmentation(images: Tensor, masks: Tensor, predicted: Mapping[str, Tensor]) -> bytes:
    """A PNG with a row an image: the image, its truth, and each prediction; void is black.

    Args:
        images: (images, channels, height, width), as they were loaded (see `Batch.images`).
        masks: (images, height, width), with `VOID`.
        predicted: by the column's heading, shaped as ``masks``.
    """
    count, height, width = masks.shape
    pixels = as_float(images).double().clamp(0.0, 1.0).permute(0, 2, 3, 1).numpy()
    shown = pixels[..., :3] if pixels.shape[3] >= 3 else pixels[..., :1].repeat(3, axis=3)
    coloured = {name: _coloured(each) for name, each in {"truth": masks, **predicted}.items()}
    columns = {"image": shown, **coloured}
    inches = (TILE_INCHES * len(columns), (TILE_INCHES * height / width + 0.1) * count + 0.2)
    figure = Figure(figsize=inches, layout="constrained")
    axes = figure.subplots(count, len(columns), squeeze=False)
    for column, (heading, pictures) in enumerate(columns.items()):
        axes[0, column].set_title(heading, fontsize=9)
        for row, picture in enumerate(pictures):
            axes[row, column].imshow(picture, interpolation="nearest")
            axes[row, column].set_axis_off()
    buffer = io.BytesIO()
    figure.savefig(buffer, format="png", dpi=110, metadata={"Software": None})
    return buffer.getvalue()


def _coloured(masks: Tensor) -> NDArray[np.float64]:
    colours = mpl.colormaps["tab20"](np.arange(COLOURS))[:, :3]
    positions = masks.numpy()
    coloured: NDArray[np.float64] = colours[positions % COLOURS]
    coloured[positions == VOID] = 0.0
    return coloured
