"""Compare layers and poolings as embeddings on a finished run; prints a Markdown table.

python scripts/compare_embeddings.py runs/demo
"""

import sys
from pathlib import Path

from backfold.cli.evaluation import choose_device
from backfold.embedding import EmbeddingChoice, Pooling
from backfold.evaluation.run import evaluate_run, open_labelled
from backfold.training.pretrained import load_pretrained

CHOICES: tuple[tuple[int, Pooling], ...] = (
    (-1, "average"), (-2, "average"), (-3, "average"), (-1, "max"), (-1, "class_token"),
)  # fmt: skip


def main(run_folder: Path) -> None:
    """Evaluate every choice; untrained -> pretrained."""
    run = load_pretrained(run_folder)
    images = open_labelled(run.config.data)
    print("| layer | pooling | linear, all | linear, 10 a class | kNN, all | kNN, 10 a class |")
    print("|---|---|---|---|---|---|")
    for layer, pooling in CHOICES:
        choice = EmbeddingChoice(layer, pooling)
        rows = evaluate_run(
            run, images, ["linear", "knn"], choice, device=choose_device(run.config.accelerator)
        )
        cells = [
            " -> ".join(
                f"{row.accuracy_mean:.1f}"
                for name in ("untrained", "pretrained")
                for row in rows
                if (row.protocol, row.labels, row.backbone) == (protocol, labels, name)
            )
            for protocol in ("linear", "knn")
            for labels in ("all", 10)
        ]
        print(f"| {layer} | {pooling} | " + " | ".join(cells) + " |", flush=True)


if __name__ == "__main__":
    main(Path(sys.argv[1]))
