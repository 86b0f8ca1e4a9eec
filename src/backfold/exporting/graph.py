"""The energy as one graph for other runtimes: images in [0, 1] to embeddings and energies."""

import io
import warnings
from collections.abc import Callable, Sequence
from importlib import import_module
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from backfold.backbone import as_positions
from backfold.errors import UserError
from backfold.training.run import Pretrained

INPUT = "images"
OUTPUTS = ("embedding", "energy")
TOLERANCE = 1e-5
BATCHES = (2, 1, 5)  # images: exported with the first, and held against the model at all


class EnergyGraph(nn.Module):
    """Normalises, and gives a backbone's average last features and the run's energy of them."""

    mean: Tensor
    std: Tensor

    def __init__(self, run: Pretrained, backbone: nn.Module) -> None:
        super().__init__()
        self.backbone, self.head = backbone, run.energy.head.cpu()
        self.register_buffer("mean", torch.tensor(run.statistics.mean).view(-1, 1, 1))
        self.register_buffer("std", torch.tensor(run.statistics.std).view(-1, 1, 1))

    def forward(self, images: Tensor) -> tuple[Tensor, Tensor]:
        """(batch, channels, height, width) in [0, 1] -> (batch, features), (batch,)."""
        # Not feature_map: it asks for the batch's length, which would fix it in the graph.
        forward = getattr(self.backbone, "forward_features", self.backbone)
        features = as_positions(self.backbone, forward((images - self.mean) / self.std))
        return features.mean(dim=1), self.head(features)


def write_graph(path: Path, run: Pretrained, backbone: nn.Module) -> None:
    """Export as the suffix says (.onnx or .pt2), read it back and compare at several batch sizes.

    UserError: packages are missing, the backbone can't be exported, or the graph differs.
    """
    graph = EnergyGraph(run, backbone).eval()
    shapes = {INPUT: {0: torch.export.Dim("batch")}}
    generator = torch.Generator().manual_seed(0)
    sizes = [(count, run.channels, *run.image_size) for count in BATCHES]
    batches = [torch.rand(size, generator=generator) for size in sizes]
    kind, name = ("ONNX" if path.suffix == ".onnx" else "pt2"), run.config.backbone
    try:
        with torch.no_grad():
            program = torch.export.export(graph, (batches[0],), dynamic_shapes=shapes, strict=False)
            if kind == "ONNX":
                infer = _save_onnx(path, program)
            else:
                buffer = io.BytesIO()
                torch.export.save(program, buffer)
                path.write_bytes(buffer.getvalue())
                infer = torch.export.load(path).module()
            outputs = [(infer(images), graph(images)) for images in batches]
    except (OSError, UserError):
        raise
    except Exception as error:  # whatever a backbone's operations lead to
        lines = [line for line in str(error).splitlines() if line.strip()]
        reason = (lines[-1] if lines else type(error).__name__)[:200]
        raise UserError(
            f"{name!r} can't be exported to {kind}: {reason}; export to timm"
        ) from error
    for count, pair in zip(BATCHES, outputs, strict=True):
        for output, found, expected in zip(OUTPUTS, *pair, strict=True):
            worst = float((found - expected).abs().max()) / (1 + float(expected.abs().max()))
            if not worst <= TOLERANCE:
                raise UserError(
                    f"the {kind} graph of {name!r} gives another {output} than the model "
                    f"(relative difference {worst:.1g} for {count} images); export to timm"
                )


def _save_onnx(
    path: Path, program: torch.export.ExportedProgram
) -> Callable[[Tensor], Sequence[Tensor]]:
    try:
        import onnxscript  # noqa: F401 - torch's exporter needs it

        runtime: Any = import_module("onnxruntime")
    except ImportError as error:
        raise UserError(
            'exporting to ONNX needs onnx, onnxscript and onnxruntime; pip install "backfold'
            '[export]"'
        ) from error
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        torch.onnx.export(
            program, (), path, dynamo=True, external_data=False, verbose=False,
            input_names=[INPUT], output_names=list(OUTPUTS),
        )  # fmt: skip
    session = runtime.InferenceSession(str(path), providers=["CPUExecutionProvider"])

    def infer(images: Tensor) -> list[Tensor]:
        return [torch.from_numpy(each) for each in session.run(OUTPUTS, {INPUT: images.numpy()})]

    return infer
