"""Images of a Python ``Dataset``."""

from collections.abc import Mapping, Sequence
from typing import Any, Protocol

import numpy as np
import torch
from numpy.typing import NDArray
from PIL import Image
from torch import Tensor

from backfold.data.arrays import (
    MAX_CHANNELS,
    MAX_PIXELS,
    channels_last,
    check_size,
    in_range,
    to_tensor,
)
from backfold.data.decode import decode_pillow
from backfold.errors import BrokenImage, UserError

IMAGE_KEYS = ("image", "img", "pixel_values")


class MapDataset(Protocol):
    """What ``torch.utils.data.Dataset`` is when it has a length."""

    def __len__(self) -> int: ...

    def __getitem__(self, index: int, /) -> Any: ...


class DatasetSource:
    """An `ImageSource` of the items of a Python data set.

    An item is an image, a tuple or list that starts with one, as (image, label), or a mapping with
    the key ``image``. An image is

    - of Pillow, read as a file of the same kind would be (see `decode`);
    - a tensor, (height, width) or (channels, height, width);
    - a NumPy array, (height, width), (height, width, channels) or (channels, height, width): see
      `channels_last` for how these are told apart;

    with values as in files: uint8, uint16 (65535 is 1), or floats and other integers, kept as they
    are. Random transforms make a run differ from its continuation: let them be done here, after
    reading. An item that raises is broken.

    Args:
        dataset: has ``len`` and items by number; pickled for worker processes that are not forked.
        labels: integers from 0, one an item; ``dataset.targets`` by default, where it has them.
        class_names: of the labels; ``dataset.classes`` by default, where it has them.
        name: for logs and messages.
        max_pixels: larger images are broken.

    Raises:
        UserError: an empty or unsized data set, or labels that don't fit it.
    """

    def __init__(
        self,
        dataset: MapDataset,
        labels: Sequence[int] | NDArray[np.int64] | None = None,
        class_names: Sequence[str] = (),
        name: str | None = None,
        max_pixels: int = MAX_PIXELS,
    ) -> None:
        self._dataset, self._max_pixels = dataset, max_pixels
        self.name = name or type(dataset).__name__
        if not hasattr(dataset, "__len__") or not hasattr(dataset, "__getitem__"):
            raise UserError(f"{self.name} has no length or no items; give a map-style Dataset")
        if not len(dataset):
            raise UserError(f"{self.name} is empty; give at least one image")
        self.labels: NDArray[np.int64] | None = None
        self.class_names: tuple[str, ...] = ()
        given = getattr(dataset, "targets", None) if labels is None else labels
        if given is not None:
            self.labels = self._check_labels(given)
            names = tuple(class_names) or tuple(getattr(dataset, "classes", ()))
            count = int(self.labels.max()) + 1
            self.class_names = names or tuple(str(number) for number in range(count))
            if len(self.class_names) < count:
                raise UserError(
                    f"{self.name} has {len(self.class_names)} class names and labels to "
                    f"{count - 1}; name every class"
                )

    def _check_labels(self, given: Any) -> NDArray[np.int64]:
        labels = np.asarray(given)
        if labels.shape != (len(self),) or labels.dtype.kind not in "iu" or labels.min() < 0:
            raise UserError(
                f"{self.name}: labels are {labels.dtype} of shape {labels.shape}; give "
                f"{len(self)} integers from 0 or none"
            )
        return labels.astype(np.int64)

    def __len__(self) -> int:
        return len(self._dataset)

    def read(self, index: int, min_side: int | None = None) -> Tensor:  # noqa: ARG002
        """See `ImageSource.read`."""
        try:
            return image_tensor(_image_of(self._dataset[index]), self._max_pixels)
        except BrokenImage:
            raise
        except Exception as error:  # the data set is the user's own: it may raise anything
            raise BrokenImage(" ".join(f"{type(error).__name__}: {error}".split())) from error

    def describe(self, index: int) -> str:
        """The data set's name and the item's number, from 0."""
        return f"{self.name} item {index}"


def _image_of(item: Any) -> Any:
    if isinstance(item, Mapping):
        return next((item[key] for key in IMAGE_KEYS if key in item), item)
    return item[0] if isinstance(item, (tuple, list)) and item else item


def image_tensor(image: Any, max_pixels: int = MAX_PIXELS) -> Tensor:
    """(channels, height, width) of uint8 or float32 from an image of Pillow, a tensor or an array.

    Raises:
        BrokenImage: anything else, too large, or numbers that are not finite.
    """
    if isinstance(image, Image.Image):
        check_size(image.height, image.width, 1, max_pixels)
        return decode_pillow(image).image
    if isinstance(image, Tensor):
        image = image.detach().cpu()
        image = (image.float() if image.dtype == torch.bfloat16 else image).numpy()
        array = np.moveaxis(image, 0, -1) if image.ndim == 3 else image
        if array.ndim == 2:
            array = array[..., None]
        if array.ndim != 3 or array.shape[2] > MAX_CHANNELS:
            raise BrokenImage(f"a tensor of {tuple(image.shape)}; give (channels, height, width)")
    elif isinstance(image, np.ndarray):
        array = channels_last(image)
    else:
        raise BrokenImage(f"a {type(image).__name__}; give an image of Pillow, a tensor or array")
    height, width, channels = array.shape
    check_size(height, width, channels, max_pixels)
    return to_tensor(in_range(array))
