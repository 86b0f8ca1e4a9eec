"""`backfold export`."""

from dataclasses import dataclass
from pathlib import Path

from backfold.exporting.export import Format, export_run
from backfold.training.log import log_to, terminal
from backfold.training.run import DEMO_RUN


@dataclass
class ExportSettings:
    """How `backfold export` takes a pretrained backbone elsewhere, with a model card.

    Args:
        checkpoint: a run's folder or a .ckpt file.
        format: timm (weights and config that timm.create_model loads), huggingface (the same, for
            transformers too), onnx or pt2 (images in [0, 1] to embeddings and energies; pt2 is
            torch.export's).
        out: the folder.
        overwrite: replace an earlier export.
    """

    checkpoint: Path = DEMO_RUN
    format: Format = "timm"
    out: Path = Path("exported")
    overwrite: bool = False


def run_export(settings: ExportSettings) -> None:
    """Writes the folder, prints its path."""
    with log_to(None, terminal()):
        export_run(settings.checkpoint, settings.format, settings.out, settings.overwrite)
    print(f"{settings.format}: {settings.out}")
