"""What pretraining takes on 1, 8 and 64 H100s: a calculation, written into docs/scale.md.

python scripts/scale.py

Operations and bytes of a ViT-B/16's steps are counted on the meta device, without computing; rates
are from data sheets; the share of the peak that a step reaches is an assumption, and named as one.
"""

import json
import sys
import weakref
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import timm
import torch
from torch import Tensor, nn
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from torch.utils.weak import WeakIdKeyDictionary

from backfold.backbone import feature_map, use_plain_attention
from backfold.energy import LinearHead
from backfold.restoration import training_step
from backfold.sparse import sparse_feature_map

sys.path.append(str(Path(__file__).resolve().parents[1] / "benchmarks"))
from step_cost.operations import count_operations
from step_cost.page import fill
from step_cost.tables import grouped, markdown_table

ROOT = Path(__file__).resolve().parents[1]
PAGE = ROOT / "docs" / "scale.md"
RESULTS = ROOT / "benchmarks" / "results"

BACKBONE = "vit_base_patch16_224"
SIDE, TOKENS = 224, 196
# Of 196 patches a quarter is visible; a third of the hidden ones runs beside them.
SPARSE_TOKENS = TOKENS // 4 + TOKENS // 4
COUNTED_IMAGES = 4

# NVIDIA's data sheets of the H100 SXM5 and of the DGX H100, each link in one direction.
PEAK_BF16 = 989.4e12  # dense matrix products
GPU_BYTES = 80e9
NVLINK = 450e9  # 900 GB/s in both directions together
NETWORK = 400e9  # of a machine: eight InfiniBand ports of 400 Gbit/s
UTILISATIONS = (0.1, 0.2, 0.3)
MACHINES = {1: "1 H100", 8: "8 H100", 64: "8 x 8 H100"}

BATCH = 4096
EPOCHS = 100
IMAGENET_IMAGES = 1_281_167
IMAGENET_BYTES = 147.9e9  # ILSVRC2012_img_train.tar
MANY_IMAGES = 100_000_000
MEASURED_JPEG = "640 x 480"  # a little larger than ImageNet's usual 500 x 375


class Counted(NamedTuple):
    """What a step of a method takes for one image, and what its weights are.

    ``operations`` are those in matrix products and convolutions, ``peak_bytes`` those of float32
    tensors by which each image raises the step's highest point, ``parameters`` all that train.
    """

    operations: float
    peak_bytes: float
    parameters: int


class PeakBytes(TorchDispatchMode):
    """The most bytes of storages used within that are alive at one time, on the meta device too."""

    def __init__(self) -> None:
        super().__init__()
        self.now = self.peak = 0
        self.known: WeakIdKeyDictionary = WeakIdKeyDictionary()

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        """Run the operation, and count the storages among its results that are new."""
        del types
        result = func(*args, **(kwargs or {}))
        for tensor in (leaf for leaf in tree_leaves(result) if isinstance(leaf, Tensor)):
            storage = tensor.untyped_storage()
            if storage not in self.known:
                self.known[storage] = True
                self._add(storage.nbytes())
                weakref.finalize(storage, self._add, -storage.nbytes()).atexit = False
        return result

    def _add(self, size: int) -> None:
        self.now += size
        self.peak = max(self.peak, self.now)


def count(sparse: bool) -> Counted:
    """Count one exact restoration step, forward and backward."""
    energy = _energy()

    def step(batch: int) -> None:
        images = torch.empty(batch, 3, SIDE, SIDE, device="meta")
        energies = partial(_run, energy, sparse=sparse)
        training_step(energies, images, images, images[:, :1] > 0)[0].backward()

    # What does not grow with the batch, such as weights and gradients, drops out of the difference.
    peaks = []
    for batch in (COUNTED_IMAGES, 2 * COUNTED_IMAGES):
        with PeakBytes() as bytes_of:
            step(batch)
        peaks.append(bytes_of.peak)
    return Counted(
        count_operations(partial(step, COUNTED_IMAGES)) / COUNTED_IMAGES,
        (peaks[1] - peaks[0]) / COUNTED_IMAGES,
        sum(parameter.numel() for parameter in energy.parameters()),
    )


def count_ordinary() -> float:
    """Operations of an ordinary training step on one image: forward, backward, all gradients."""
    energy, images = _energy(), torch.empty(COUNTED_IMAGES, 3, SIDE, SIDE, device="meta")
    with sdpa_kernel(SDPBackend.MATH):
        operations = count_operations(lambda: _run(energy, images).sum().backward())
    return operations / COUNTED_IMAGES


def _energy() -> nn.ModuleDict:
    """A backbone and its head without numbers: on the meta device, and not calibrated."""
    with torch.device("meta"):
        backbone = timm.create_model(BACKBONE, num_classes=0)
        use_plain_attention(backbone)
        return nn.ModuleDict({"backbone": backbone, "head": LinearHead(backbone.num_features)})


def _run(energy: nn.ModuleDict, images: Tensor, sparse: bool = False) -> Tensor:
    """Energies of the images, of all patches or of those that run in a sparse step."""
    if not sparse:
        return energy["head"](feature_map(energy["backbone"], images))
    chosen = torch.empty(len(images), SPARSE_TOKENS, dtype=torch.int64, device="meta")
    return energy["head"](sparse_feature_map(energy["backbone"], images, chosen))


class Estimate(NamedTuple):
    """H100s (eight a machine), operations for an image, parameters, assumed share of the peak."""

    devices: int
    operations: float
    parameters: int
    utilisation: float

    @property
    def compute_seconds(self) -> float:
        """Of an optimizer step."""
        return BATCH * self.operations / (PEAK_BF16 * self.utilisation * self.devices)

    @property
    def network_bytes(self) -> float:
        """That each device sends in an optimizer step: float32 gradients, reduced in a ring."""
        return 2 * (self.devices - 1) / self.devices * 4 * self.parameters

    @property
    def network_seconds(self) -> float:
        """Of an optimizer step, at the rate of the slowest link.

        A ring leaves each machine once, and what crosses is spread over the machine's ports.
        """
        return self.network_bytes / (NVLINK if self.devices <= 8 else NETWORK)

    @property
    def images_per_second(self) -> float:
        """Over all devices, with no overlap of computing and sending."""
        return BATCH / (self.compute_seconds + self.network_seconds)

    def hours(self, images: int, epochs: int) -> float:
        """For passes over a data set, incomplete batches left out."""
        return images // BATCH * epochs * BATCH / self.images_per_second / 3600


Estimates = Mapping[str, Sequence[Estimate]]


def page(text: str) -> str:
    """The page with each table renewed between its markers."""
    methods = {"dense": count(sparse=False), "sparse": count(sparse=True)}
    estimates = {
        f"{machine}, {name}": [
            Estimate(devices, counted.operations, counted.parameters, share)
            for share in UTILISATIONS
        ]
        for name, counted in methods.items()
        for devices, machine in MACHINES.items()
    }
    parts = {
        "counted": _counted_table(methods, count_ordinary()),
        "rates": _rates_line(),
        "time": _table(estimates, {
            "images/s": lambda each: each.images_per_second,
            "step, s": lambda each: BATCH / each.images_per_second,
            "sent by each GPU in a step": lambda each: f"{each.network_bytes / 1e9:.2f} GB",
            "of the step, s": lambda each: _number(each.network_seconds),
            f"ImageNet-1K, {EPOCHS} epochs, h": lambda each: each.hours(IMAGENET_IMAGES, EPOCHS),
            "100 million images, one epoch, h": lambda each: each.hours(MANY_IMAGES, 1),
        }),
        "memory": _memory_table(methods),
        "loading": _loading_table(estimates),
    }  # fmt: skip
    return fill(text, parts)


def _counted_table(methods: Mapping[str, Counted], ordinary: float) -> str:
    rows = [["ordinary training step", f"{ordinary / 1e9:.1f}", "1.00", ""]]
    for name, counted in methods.items():
        numbers = f"{counted.operations / 1e9:.1f}", f"{counted.operations / ordinary:.2f}"
        rows.append([f"restoration step, {name}", *numbers, f"{counted.peak_bytes / 1e6:.0f}"])
    table = markdown_table(["for one image", "GFLOP", "x", "float32 MB at the peak"], rows)
    return f"{table}\n\nTrained parameters: {methods['dense'].parameters / 1e6:.1f} million."


def _rates_line() -> str:
    """Operations a second of exact dense steps over those of ordinary steps, on a CPU."""
    measured = json.loads((RESULTS / "cost-cpu.json").read_text())["rows"]
    rates = []
    for group, rows in grouped(measured, "model", "compiled", "precision").items():
        found = {row["method"]: row["operations"] / row["seconds"]["median"]
                 for row in rows if row["num_steps"] == 1}  # fmt: skip
        # In bf16 fused attention is slow on that CPU.
        if "float32" in group and {"exact", "ordinary"} <= found.keys():
            rates.append(found["exact"] / found["ordinary"])
    return (
        f"On the CPU of [cost.md](cost.md), in {len(rates)} pairs of measurements in float32, the\n"
        f"exact dense step does {min(rates):.2f} to {max(rates):.2f} times as many operations a "
        "second as the ordinary step of\nthe same backbone."
    )


def _table(estimates: Estimates, columns: Mapping[str, Callable[[Estimate], float | str]]) -> str:
    """Numbers at the lowest, middle and highest utilisation; a text does not depend on it."""
    rows = []
    for title, made in estimates.items():
        cells = [[column(each) for each in made] for column in columns.values()]
        texts = [cell[0] if isinstance(cell[0], str) else " / ".join(map(_number, cell))
                 for cell in cells]  # fmt: skip
        rows.append([title, *texts])
    return markdown_table(["", *columns], rows)


def _number(value: float) -> str:
    return f"{value:,.0f}" if value >= 100 else f"{value:.3g}"


def _memory_table(methods: Mapping[str, Counted]) -> str:
    parameters = methods["dense"].parameters
    gigabytes = [
        [machine, *(f"{value / 1e9:.2f}" for value in fixed_bytes(devices, parameters))]
        for devices, machine in MACHINES.items()
    ]
    fixed = markdown_table(["GB on each GPU", "optimizer whole", "optimizer sharded"], gigabytes)
    fits = ", ".join(f"{images_at_once(counted):.0f} ({name})" for name, counted in methods.items())
    return f"{fixed}\n\nImages at once beside that, in float32, on a GPU of 80 GB: {fits}."


def fixed_bytes(devices: int, parameters: int) -> tuple[float, float]:
    """Weights, gradients and AdamW's two moments on each device, whole and sharded; float32."""
    kept = 4 + 4
    return float((kept + 8) * parameters), (kept + 8 / devices) * parameters


def images_at_once(counted: Counted) -> int:
    """Images in a micro-batch that fill a GPU, a tenth left free."""
    return int((0.9 * GPU_BYTES - fixed_bytes(1, counted.parameters)[0]) // counted.peak_bytes)


def _loading_table(estimates: Estimates) -> str:
    measured = json.loads((RESULTS / "loading.json").read_text())["loading_ms"]
    milliseconds = measured[MEASURED_JPEG]["reduced size, uint8 batches"]  # on one core
    bytes_each = IMAGENET_BYTES / IMAGENET_IMAGES
    table = _table(estimates, {
        "MB/s to read": lambda each: each.images_per_second * bytes_each / 1e6,
        "cores that load": lambda each: each.images_per_second * milliseconds / 1e3,
    })  # fmt: skip
    return (
        f"An image has {bytes_each / 1e3:.0f} kB on average; 100 million such images are "
        f"{MANY_IMAGES * bytes_each / 1e12:.1f} TB. Loading one takes a core\n"
        f"{milliseconds:.1f} ms.\n\n{table}"
    )


if __name__ == "__main__":
    PAGE.write_text(page(PAGE.read_text()))
