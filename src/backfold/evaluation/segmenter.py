"""Segmenting images: backbones at their size, heads, their training, and how right they are."""

import copy
import math
import warnings
from collections.abc import Sequence
from typing import Any, cast

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torchmetrics.functional.classification import multiclass_jaccard_index

from backfold.backbone import ImageSize, check_image_size, feature_map
from backfold.data.segmentation import VOID, MaskedSource
from backfold.data.statistics import ChannelStatistics
from backfold.errors import UserError
from backfold.training.config import parse_image_size

DECODER_WIDTH, DECODER_STRIDE = 64, 4
HEAD_RATE = 2e-3
WEIGHT_DECAY = 0.01
WARM_UP_SHARE = 0.1


class FeatureGrid(nn.Module):
    """A backbone as images -> (batch, features, rows, columns).

    Args:
        backbone: as `feature_map` takes it.
        statistics: normalise the images.
    """

    def __init__(self, backbone: nn.Module, statistics: ChannelStatistics) -> None:
        super().__init__()
        self.backbone, self._statistics = backbone, statistics

    def forward(self, images: Tensor) -> Tensor:
        """The feature map, in float32, of images as they were loaded (see `Batch.images`).

        Raises:
            UserError: the positions form no grid of the images' shape.
        """
        positions = feature_map(self.backbone, self._statistics.normalize(images)).float()
        rows, columns = grid_shape(positions.shape[1], (images.shape[2], images.shape[3]))
        grid: Tensor = positions.transpose(1, 2).unflatten(2, (rows, columns))
        return grid


def grid_shape(positions: int, image_size: ImageSize) -> tuple[int, int]:
    """Rows and columns of a feature map that has the image's shape.

    Raises:
        UserError: no whole numbers of them make up the positions.
    """
    height, width = image_size
    rows = max(1, round(math.sqrt(positions * height / width)))
    columns = positions // rows
    if rows * columns != positions:
        raise UserError(
            f"the backbone's {positions} positions are no grid over {height} x {width} pixels; "
            "give an --segmentation.image-size whose sides are multiples of its stride"
        )
    return rows, columns


def linear_head(features: int, classes: int) -> nn.Module:
    """Standardised features, one weight for each of them and each class."""
    return nn.Sequential(nn.BatchNorm2d(features, affine=False), nn.Conv2d(features, classes, 1))


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
    inputs: Tensor,
    masks: Tensor,
    *,
    epochs: int,
    batch_size: int,
    encoder_rate: float = 0.0,
    seed: int = 0,
) -> None:
    """Train a head, and its encoder if that gets a learning rate, in place.

    AdamW, one cycle of the learning rate, cross-entropy of the logits at the masks' resolution.
    While the encoder trains, half of the images are mirrored.

    Args:
        encoder: inputs -> feature maps (batch, features, rows, columns); identity where the inputs
            are feature maps already. On the device of the head.
        head: feature maps -> logits of any resolution.
        inputs: (images, channels, height, width).
        masks: (images, height, width), uint8, `VOID` where there is no class.
        epochs: passes over the inputs.
        batch_size: inputs a step.
        encoder_rate: its highest learning rate; 0 leaves it as it is, in eval mode.
        seed: of the order and the mirroring.
    """
    device = next(head.parameters()).device
    tuned = encoder_rate > 0
    parts, rates = [head], [HEAD_RATE]
    if tuned:
        parts, rates = [head, encoder], [HEAD_RATE, encoder_rate]
    batches = math.ceil(len(inputs) / batch_size)
    optimizer = torch.optim.AdamW(
        [{"params": [w for w in part.parameters() if w.requires_grad]} for part in parts],
        weight_decay=WEIGHT_DECAY,
    )
    schedule = torch.optim.lr_scheduler.OneCycleLR(
        optimizer,
        rates,
        max(2, epochs * batches),
        pct_start=WARM_UP_SHARE,
        cycle_momentum=False,
    )
    generator = torch.Generator().manual_seed(seed)
    head.train()
    encoder.train(tuned)
    for _ in range(epochs):
        for chosen in torch.randperm(len(inputs), generator=generator).tensor_split(batches):
            batch, truth = inputs[chosen].to(device), masks[chosen].to(device).long()
            if tuned and torch.rand((), generator=generator) < 0.5:
                batch, truth = batch.flip(-1), truth.flip(-1)
            with torch.set_grad_enabled(tuned):
                features = encoder(batch)
            logits = _enlarge(head(features), truth.shape[1:])
            # A batch of nothing but void has no mean.
            loss = F.cross_entropy(logits, truth, ignore_index=VOID, reduction="sum")
            (loss / (truth != VOID).sum().clamp_min(1)).backward()
            optimizer.step()
            optimizer.zero_grad()
            schedule.step()


@torch.no_grad()
def predict(
    encoder: nn.Module, head: nn.Module, inputs: Tensor, image_size: ImageSize, batch_size: int
) -> Tensor:
    """The likeliest class of each pixel, (images, *image_size), uint8 on the CPU.

    Args:
        encoder: as for `fit`.
        head: as for `fit`.
        inputs: (images, channels, height, width).
        image_size: (height, width) of the prediction, to which the logits are enlarged.
        batch_size: inputs at a time.
    """
    device = next(head.parameters()).device
    encoder.eval()
    head.eval()
    return torch.cat(
        [
            _enlarge(head(encoder(batch.to(device))), image_size)
            .argmax(dim=1)
            .to("cpu", torch.uint8)
            for batch in inputs.split(batch_size)
        ]
    )


def _enlarge(logits: Tensor, size: Sequence[int]) -> Tensor:
    return F.interpolate(logits, tuple(size), mode="bilinear")


def mean_iou(predicted: Tensor, masks: Tensor, classes: int) -> float:
    """Intersection over union in percent, the mean of the classes that occur in either.

    It is counted over all pixels of all images; those that are `VOID` in the masks don't count.

    Args:
        predicted: (images, height, width), whole numbers below ``classes``.
        masks: of the same shape, with `VOID`.
        classes: how many there are.

    Raises:
        UserError: every pixel is void.
    """
    if bool((masks == VOID).all()):
        raise UserError("every pixel of the test masks is void; give masks with classes")
    index = multiclass_jaccard_index(
        predicted.long(), masks.long(), classes, average="macro", ignore_index=VOID
    )
    return 100 * index.item()


def segmentation_size(
    backbone: nn.Module, source: MaskedSource, wanted: int | str | None
) -> ImageSize:
    """The (height, width) asked for, or the first image's, rounded to multiples of the stride.

    Raises:
        UserError: no size, or one that is no multiple of the stride.
    """
    stride = _stride(backbone)
    asked = parse_image_size(wanted)
    if asked is None:
        height, width = source.read(0)[0].shape[1:]
        return _rounded(height, stride), _rounded(width, stride)
    if asked[0] % stride or asked[1] % stride:
        raise UserError(
            f"--segmentation.image-size is {asked[0]}x{asked[1]}, and the backbone's stride is "
            f"{stride}; give multiples of it, such as "
            f"{_rounded(asked[0], stride)}x{_rounded(asked[1], stride)}"
        )
    return asked


def _rounded(side: int, stride: int) -> int:
    return max(1, round(side / stride)) * stride


def _stride(backbone: nn.Module) -> int:
    information: Any = getattr(backbone, "feature_info", None)
    return int(information[-1]["reduction"]) if information else 1


def resized(backbone: nn.Module, size: ImageSize, channels: int, name: str) -> nn.Module:
    """A copy for images of another size, its position embeddings resampled by timm.

    Raises:
        UserError: the backbone can't take this size.
    """
    changed = copy.deepcopy(backbone).eval()
    if hasattr(changed, "set_input_size"):
        try:
            with warnings.catch_warnings():
                # timm resamples Swin's tables of positions in ways that PyTorch finds old.
                warnings.simplefilter("ignore", UserWarning)
                cast(Any, changed).set_input_size(img_size=size)
        except Exception as error:
            # Each family has its own conditions, and checks them by whatever fails.
            raise UserError(
                f"backbone {name!r} can't take {size[0]} x {size[1]} pixels: "
                f"{' '.join(str(error).split())[:200]}; give another --segmentation.image-size"
            ) from error
    check_image_size(changed, size, channels, name)
    return changed
