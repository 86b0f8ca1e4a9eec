"""The energy as one graph for other runtimes: images in [0, 1] to embeddings and energies."""

import io
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from backfold.backbone import as_positions
from backfold.errors import UserError
from backfold.training.pretrained import Pretrained
from backfold.training.run_folder import write_atomically

INPUT = "images"
OUTPUTS = ("embedding", "energy")
TOLERANCE = 1e-5
# Sizes at which a graph is held against the model; it is exported with two images.
CHECKED_BATCHES = (1, 2, 5)

Runner = Callable[[Tensor], tuple[Tensor, Tensor]]


class EnergyGraph(nn.Module):
    """Normalises, and gives the last layer's average and the energy.

    Args:
        run: statistics and head.
        backbone: in place of the run's own.
    """

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


def write_pt2(path: Path, run: Pretrained, graph: EnergyGraph) -> None:
    """Export with `torch.export`, save, load again and compare.

    Raises:
        UserError: the backbone can't be exported.
    """
    buffer = io.BytesIO()
    torch.export.save(_program("pt2", run, graph), buffer)
    write_atomically(path, buffer.getvalue())
    _check("pt2", run, graph, torch.export.load(path).module())


def write_onnx(path: Path, run: Pretrained, graph: EnergyGraph) -> None:
    """Export, and compare what onnxruntime computes.

    Raises:
        UserError: the packages are missing, or the backbone can't be exported.
    """
    onnxruntime = _onnxruntime()
    program = _program("ONNX", run, graph)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        try:
            torch.onnx.export(
                program,
                (),
                path,
                dynamo=True,
                external_data=False,
                verbose=False,
                input_names=[INPUT],
                output_names=list(OUTPUTS),
            )
        except Exception as error:  # the exporter wraps whatever a model's operations lead to
            raise _refusal("ONNX", run, error) from error
    session = onnxruntime.InferenceSession(str(path), providers=["CPUExecutionProvider"])

    def infer(images: Tensor) -> tuple[Tensor, Tensor]:
        embedding, energy = session.run(list(OUTPUTS), {INPUT: np.asarray(images)})
        return torch.from_numpy(embedding), torch.from_numpy(energy)

    _check("ONNX", run, graph, infer)


def _program(name: str, run: Pretrained, graph: EnergyGraph) -> torch.export.ExportedProgram:
    """The graph for batches of any size."""
    shapes = {INPUT: {0: torch.export.Dim("batch")}}
    try:
        with torch.no_grad():
            return torch.export.export(
                graph, (_images(run, 2),), dynamic_shapes=shapes, strict=False
            )
    except Exception as error:  # whatever a backbone's operations lead to
        raise _refusal(name, run, error) from error


def _onnxruntime() -> Any:
    try:
        import onnxruntime
        import onnxscript  # noqa: F401 - torch's exporter needs it
    except ImportError as error:
        raise UserError(
            'exporting to ONNX needs onnx, onnxscript and onnxruntime; pip install "backfold'
            '[export]"'
        ) from error
    return onnxruntime


def _images(run: Pretrained, count: int) -> Tensor:
    generator = torch.Generator().manual_seed(count)
    return torch.rand(count, run.channels, *run.image_size, generator=generator)


@torch.no_grad()
def _check(name: str, run: Pretrained, graph: EnergyGraph, infer: Runner) -> None:
    """Raise UserError unless embeddings and energies are the model's, at several batch sizes."""
    for count in CHECKED_BATCHES:
        images = _images(run, count)
        try:
            given = infer(images)
        except Exception as error:
            raise _refusal(name, run, error) from error
        for output, values, expected in zip(OUTPUTS, given, graph(images), strict=True):
            scale = 1 + float(expected.abs().max())
            worst = float((values - expected).abs().max()) / scale
            if not worst <= TOLERANCE:
                raise UserError(
                    f"the {name} graph of {run.config.backbone!r} gives another {output} than the "
                    f"model (relative difference {worst:.1g} for {count} images); export to timm"
                )


def _refusal(name: str, run: Pretrained, error: Exception) -> UserError:
    lines = [line for line in str(error).splitlines() if line.strip()]
    reason = (lines[-1] if lines else type(error).__name__)[:200]
    return UserError(
        f"{run.config.backbone!r} can't be exported to {name}: {reason}; export to timm"
    )
