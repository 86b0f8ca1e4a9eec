"""What pretraining takes on 1, 8 and 64 H100s: a calculation, written into docs/scale.md.

python scripts/scale.py

Operations and bytes are counted, without computing; rates are from data sheets; the share of the
peak that a step reaches is an assumption, and named as one.
"""

import json
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from scale_counts import Counted, count, count_ordinary

ROOT = Path(__file__).resolve().parent.parent
PAGE = ROOT / "docs" / "scale.md"
RESULTS = ROOT / "benchmarks" / "results"

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


@dataclass(frozen=True)
class Estimate:
    """A machine, a method and an assumed share of the peak.

    Attributes:
        devices: H100s, eight in a machine.
        operations: for one image.
        parameters: that are trained.
        utilisation: share of the peak that a step reaches, assumed.
        batch: images in an optimizer step, over all devices.
    """

    devices: int
    operations: float
    parameters: int
    utilisation: float
    batch: int = BATCH

    @property
    def compute_seconds(self) -> float:
        """Of an optimizer step."""
        rate = PEAK_BF16 * self.utilisation * self.devices
        return self.batch * self.operations / rate

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
        return self.batch / (self.compute_seconds + self.network_seconds)

    def hours(self, images: int, epochs: int) -> float:
        """For passes over a data set, incomplete batches left out."""
        steps = images // self.batch * epochs
        return steps * self.batch / self.images_per_second / 3600


def loading_seconds() -> float:
    """To read, decode, crop and scale one image on one core, as measured."""
    measured = json.loads((RESULTS / "loading.json").read_text())["loading_ms"]
    return float(measured[MEASURED_JPEG]["reduced size, uint8 batches"]) / 1e3


def measured_rates() -> list[float]:
    """Operations a second of exact dense steps over those of ordinary steps, on a CPU."""
    rates: dict[tuple[Any, ...], dict[str, float]] = {}
    for row in json.loads((RESULTS / "cost-cpu.json").read_text())["rows"]:
        if row["precision"] != "float32" or row["num_steps"] > 1:
            continue  # in bf16 fused attention is slow on that CPU
        if row["method"] in ("ordinary", "exact"):
            key = (row["model"], row["compiled"])
            rate = row["operations"] / row["seconds"]["median"]
            rates.setdefault(key, {})[row["method"]] = rate
    return [pair["exact"] / pair["ordinary"] for pair in rates.values() if len(pair) == 2]


def parts() -> dict[str, str]:
    """The tables of the page, by the names of their places in it."""
    methods = {"dense": count(sparse=False), "sparse": count(sparse=True)}
    return {
        "counted": _counted_table(methods, count_ordinary()),
        "rates": _rates_line(measured_rates()),
        "time": _time_table(methods),
        "memory": _memory_table(methods),
        "loading": _loading_table(methods),
    }


def _table(head: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    lines = [head, ["---"] + ["---:"] * (len(head) - 1), *rows]
    return "\n".join(f"| {' | '.join(line)} |" for line in lines)


def _counted_table(methods: Mapping[str, Counted], ordinary: float) -> str:
    rows = [["ordinary training step", f"{ordinary / 1e9:.1f}", "1.00", ""]]
    rows += [
        [
            f"restoration step, {name}",
            f"{counted.operations / 1e9:.1f}",
            f"{counted.operations / ordinary:.2f}",
            f"{counted.peak_bytes / 1e6:.0f}",
        ]
        for name, counted in methods.items()
    ]
    parameters = methods["dense"].parameters
    table = _table(["for one image", "GFLOP", "x", "float32 MB at the peak"], rows)
    return f"{table}\n\nTrained parameters: {parameters / 1e6:.1f} million."


def _rates_line(rates: Sequence[float]) -> str:
    return (
        f"On the CPU of [cost.md](cost.md), in {len(rates)} pairs of measurements in float32, the\n"
        f"exact dense step does {min(rates):.2f} to {max(rates):.2f} times as many operations a "
        "second as the ordinary step of\nthe same backbone."
    )


def _time_table(methods: Mapping[str, Counted]) -> str:
    head = [
        "", "images/s", "step, s", "sent by each GPU in a step", "of the step, s",
        f"ImageNet-1K, {EPOCHS} epochs, h", "100 million images, one epoch, h",
    ]  # fmt: skip
    rows = []
    for name, counted in methods.items():
        for devices, machine in MACHINES.items():
            made = [
                Estimate(devices, counted.operations, counted.parameters, share)
                for share in UTILISATIONS
            ]
            rows.append([
                f"{machine}, {name}",
                _range(each.images_per_second for each in made),
                _range(each.batch / each.images_per_second for each in made),
                f"{made[0].network_bytes / 1e9:.2f} GB",
                _number(made[0].network_seconds),
                _range(each.hours(IMAGENET_IMAGES, EPOCHS) for each in made),
                _range(each.hours(MANY_IMAGES, 1) for each in made),
            ])  # fmt: skip
    return _table(head, rows)


def _memory_table(methods: Mapping[str, Counted]) -> str:
    parameters = methods["dense"].parameters
    gigabytes = [
        [machine, *(f"{value / 1e9:.2f}" for value in fixed_bytes(devices, parameters))]
        for devices, machine in MACHINES.items()
    ]
    fixed = _table(["GB on each GPU", "optimizer whole", "optimizer sharded"], gigabytes)
    fits = ", ".join(f"{images_at_once(counted):.0f} ({name})" for name, counted in methods.items())
    return f"{fixed}\n\nImages at once beside that, in float32, on a GPU of 80 GB: {fits}."


def fixed_bytes(devices: int, parameters: int) -> tuple[float, float]:
    """Weights, gradients and AdamW's two moments on each device, whole and sharded; float32."""
    kept = 4 + 4
    return float((kept + 8) * parameters), (kept + 8 / devices) * parameters


def images_at_once(counted: Counted) -> int:
    """Images in a micro-batch that fill a GPU, a tenth left free."""
    return int((0.9 * GPU_BYTES - fixed_bytes(1, counted.parameters)[0]) // counted.peak_bytes)


def _loading_table(methods: Mapping[str, Counted]) -> str:
    bytes_each = IMAGENET_BYTES / IMAGENET_IMAGES
    rows = []
    for name, counted in methods.items():
        for devices, machine in MACHINES.items():
            made = [
                Estimate(devices, counted.operations, counted.parameters, share).images_per_second
                for share in UTILISATIONS
            ]
            rows.append([
                f"{machine}, {name}",
                _range(rate * bytes_each / 1e6 for rate in made),
                _range(rate * loading_seconds() for rate in made),
            ])  # fmt: skip
    sizes = (
        f"An image has {bytes_each / 1e3:.0f} kB on average; 100 million such images are "
        f"{MANY_IMAGES * bytes_each / 1e12:.1f} TB. Loading one takes a core\n"
        f"{1e3 * loading_seconds():.1f} ms."
    )
    return f"{sizes}\n\n{_table(['', 'MB/s to read', 'cores that load'], rows)}"


def _range(values: Iterable[float]) -> str:
    """The values at the lowest, middle and highest utilisation."""
    return " / ".join(_number(value) for value in values)


def _number(value: float) -> str:
    return f"{value:,.0f}" if value >= 100 else f"{value:.3g}"


def page(text: str) -> str:
    """The page with each table renewed between its markers."""
    for name, part in parts().items():
        before, begin, rest = text.partition(f"<!-- begin {name} -->")
        _, end, after = rest.partition(f"<!-- end {name} -->")
        assert begin, name
        assert end, name
        text = f"{before}{begin}\n\n{part}\n\n{end}{after}"
    return text


def main() -> None:
    PAGE.write_text(page(PAGE.read_text()))


if __name__ == "__main__":
    main()
