"""Operations and bytes of a ViT-B/16's steps, counted on the meta device; see `scale.py`."""

import sys
import weakref
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import timm
import torch
from torch import Tensor, nn
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from backfold.backbone import feature_map, use_plain_attention
from backfold.energy import LinearHead
from backfold.restoration import training_step
from backfold.sparse import sparse_feature_map

sys.path.append(str(Path(__file__).resolve().parent.parent / "benchmarks"))
from step_cost.operations import count_operations

BACKBONE = "vit_base_patch16_224"
SIDE, TOKENS = 224, 196
# Of 196 patches a quarter is visible; a third of the hidden ones runs beside them.
SPARSE_TOKENS = TOKENS // 4 + TOKENS // 4
COUNTED_IMAGES = 4


class Energy(nn.Module):
    """A backbone and its head without numbers: on the meta device, and not calibrated."""

    def __init__(self) -> None:
        super().__init__()
        self.backbone = timm.create_model(BACKBONE, num_classes=0)
        self.head = LinearHead(self.backbone.num_features)
        use_plain_attention(self)

    def forward(self, images: Tensor, tokens: Tensor | None = None) -> Tensor:
        """Energies of the images, of all patches or of the tokens."""
        if tokens is None:
            return self.head(feature_map(self.backbone, images))
        return self.head(sparse_feature_map(self.backbone, images, tokens))


@dataclass(frozen=True)
class Counted:
    """What a step of the method takes for one image, and what its weights are.

    Attributes:
        operations: in matrix products and convolutions.
        peak_bytes: of float32 tensors, by which each image raises the step's highest point.
        parameters: of the backbone and the head.
    """

    operations: float
    peak_bytes: float
    parameters: int


class PeakBytes(TorchDispatchMode):
    """The most bytes of storages made within that are alive at one time, on the meta device too."""

    def __init__(self) -> None:
        super().__init__()
        self.now = self.peak = 0
        self.known: set[int] = set()

    def __torch_dispatch__(
        self,
        func: Callable[..., Any],
        types: Sequence[type],
        args: tuple[Any, ...] = (),
        kwargs: Mapping[str, Any] | None = None,
    ) -> Any:
        """Run the operation, and count the storages among its results that are new."""
        del types
        result = func(*args, **(kwargs or {}))
        given = {_identity(tensor) for tensor in tree_leaves((args, kwargs)) if _is_tensor(tensor)}
        for tensor in filter(_is_tensor, tree_leaves(result)):
            key, size = _identity(tensor), tensor.untyped_storage().nbytes()
            if key not in given and key not in self.known:
                self.known.add(key)
                self.now += size
                self.peak = max(self.peak, self.now)
                weakref.finalize(tensor.untyped_storage(), self._forget, key, size).atexit = False
        return result

    def _forget(self, key: int, size: int) -> None:
        self.known.discard(key)
        self.now -= size


def _is_tensor(leaf: object) -> bool:
    return isinstance(leaf, Tensor)


def _identity(tensor: Tensor) -> int:
    return int(tensor.untyped_storage()._cdata)


def count(sparse: bool) -> Counted:
    """Count one exact restoration step, forward and backward."""
    with torch.device("meta"):
        energy = Energy()
    step = partial(_restoration, energy, sparse)
    # What does not grow with the batch, such as gradients, drops out of the difference.
    peaks = [_peak(partial(step, images)) for images in (COUNTED_IMAGES, 2 * COUNTED_IMAGES)]
    return Counted(
        count_operations(partial(step, COUNTED_IMAGES)) / COUNTED_IMAGES,
        (peaks[1] - peaks[0]) / COUNTED_IMAGES,
        sum(parameter.numel() for parameter in energy.parameters()),
    )


def _restoration(energy: Energy, sparse: bool, batch: int) -> None:
    with torch.device("meta"):
        images = torch.empty(batch, 3, SIDE, SIDE)
        mask = torch.empty(batch, 1, SIDE, SIDE, dtype=torch.bool)
        tokens = torch.empty(batch, SPARSE_TOKENS, dtype=torch.int64) if sparse else None
    training_step(partial(energy, tokens=tokens), images, images, mask)[0].backward()


def _peak(function: Callable[[], object]) -> int:
    with PeakBytes() as bytes_of:
        function()
    return bytes_of.peak


def count_ordinary() -> float:
    """Operations of an ordinary training step on one image: forward, backward, all gradients."""
    with torch.device("meta"):
        energy, images = Energy(), torch.empty(COUNTED_IMAGES, 3, SIDE, SIDE)
    with sdpa_kernel(SDPBackend.MATH):
        operations = count_operations(lambda: energy(images).sum().backward())
    return operations / COUNTED_IMAGES
