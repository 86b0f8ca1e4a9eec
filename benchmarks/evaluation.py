"""How much of an evaluation's time is the backbone's forward pass.

    OMP_NUM_THREADS=1 python benchmarks/evaluation.py --data ../shared/data/imagenette160

Embeds 5,000 images at 224 pixels, then evaluates kNN and linear probes on all of the data, with a
timm model whose forward passes are timed from outside. Writes results/evaluation.json.
"""

import argparse
import json
from collections.abc import Callable
from functools import wraps
from pathlib import Path
from typing import Any

import timm
import torch
from torch.utils.benchmark import timer

from backfold.evaluation.evaluate import EvaluateSettings, Evaluation
from backfold.evaluation.frozen import knn, linear
from backfold.evaluation.results import PRETRAINED
from backfold.evaluation.subject import open_subject
from backfold.files import write_json
from backfold.training.devices import choose_device
from step_cost.measuring import facts

BACKBONE = "vit_tiny_patch16_224"


class Passes:
    """The seconds of a timm class's forward passes, of all copies together."""

    def __init__(self, kind: type) -> None:
        self.seconds, self.depth = 0.0, 0
        for name in ("forward_features", "forward_intermediates"):
            setattr(kind, name, self._timed(getattr(kind, name)))

    def _timed(self, method: Callable[..., Any]) -> Callable[..., Any]:
        @wraps(method)
        def timed(*arguments: Any, **options: Any) -> Any:
            start, self.depth = timer(), self.depth + 1  # the timer waits for the device
            found = method(*arguments, **options)
            self.depth -= 1
            if not self.depth:  # passes within passes count once
                self.seconds += timer() - start
            return found

        return timed

    def beside(self, work: Callable[[], Any]) -> tuple[Any, dict[str, float]]:
        """What ``work`` returns, its seconds, and those of the passes in it."""
        start, before = timer(), self.seconds
        found = work()
        return found, {"seconds": timer() - start, "forward": self.seconds - before}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--data", required=True)
    parser.add_argument("--images", type=int, default=5000, help="to embed alone")
    parser.add_argument("--embed-only", action="store_true")
    parser.add_argument("--out", type=Path, default=Path(__file__).with_name("results"))
    arguments = parser.parse_args()
    backbone = timm.create_model(BACKBONE, num_classes=0)
    passes = Passes(type(backbone))
    settings = EvaluateSettings(data=arguments.data)
    given = Evaluation(settings, open_subject(backbone), choose_device("auto"))
    places = torch.arange(len(given.parts.train))[: arguments.images]
    assert given.frozen.contenders
    _, embedding = passes.beside(lambda: given.frozen.prepare([(PRETRAINED, "")], [places]))
    found: dict[str, Any] = {
        "backbone": BACKBONE,
        "embedded images": len(places),
        "embedding": embedding,
        "own time beside the forward pass": embedding["seconds"] / embedding["forward"] - 1,
        "machine": facts(given.device),
    }
    if not arguments.embed_only:
        rows, whole = passes.beside(lambda: [*knn(given), *linear(given)])
        found |= {
            "images": len(given.parts.train) + len(given.parts.test),
            "evaluation": whole,
            "forward pass's share": whole["forward"] / whole["seconds"],
            "rows": len(rows),
        }
    write_json(arguments.out / "evaluation.json", found)
    print(json.dumps(found, indent=2))


if __name__ == "__main__":
    main()
