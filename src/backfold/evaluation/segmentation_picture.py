"""Test images beside their truth and what was predicted for them."""

import io
from collections.abc import Mapping

import matplotlib as mpl
import numpy as np
from matplotlib.figure import Figure
from numpy.typing import NDArray
from torch import Tensor

from backfold.data.decode import as_float
from backfold.data.segmentation import VOID, MaskedImages

TILE_INCHES = 2.2
COLOURS = 20


def draw_segmentation(test: MaskedImages, predicted: Mapping[str, Tensor]) -> bytes:
    """A PNG with a row an image: the image, its truth, and each prediction; void is black.

    Args:
        test: its first images are drawn, as many as there are predictions.
        predicted: by the column's heading, (images, height, width) each.
    """
    count = min([len(test), *(len(masks) for masks in predicted.values())])
    height, width = test.masks.shape[1:]
    columns: dict[str, NDArray[np.float64]] = {
        "image": _shown(test.images[:count]),
        "truth": _coloured(test.masks[:count]),
        **{name: _coloured(masks) for name, masks in predicted.items()},
    }
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


def _shown(images: Tensor) -> NDArray[np.float64]:
    pixels = as_float(images).double().clamp(0.0, 1.0).permute(0, 2, 3, 1).numpy()
    return pixels[..., :3] if pixels.shape[3] >= 3 else pixels[..., :1].repeat(3, axis=3)


def _coloured(masks: Tensor) -> NDArray[np.float64]:
    colours = mpl.colormaps["tab20"](np.arange(COLOURS))[:, :3]
    positions = masks.numpy()
    coloured: NDArray[np.float64] = colours[positions % COLOURS]
    coloured[positions == VOID] = 0.0
    return coloured
