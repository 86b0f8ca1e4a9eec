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
from backfold.training.devices import choose_device
from step_cost.measuring import facts


class Timed:
    """Counts the seconds of a timm class's passes, of all copies together."""

    seconds, depth = 0.0, 0

    @classmethod
    def count(cls, kind: type, name: str) -> None:
        """Of a method of the class; passes within passes count once."""
        method = getattr(kind, name)

        def timed(*arguments: Any, **options: Any) -> Any:
            start, cls.depth = timer(), cls.depth + 1  # the timer waits for the device
            found = method(*arguments, **options)
            cls.depth -= 1
            cls.seconds += 0.0 if cls.depth else timer() - start
            return found

        setattr(kind, name, wraps(method)(timed))


def measure(work: Callable[[], Any]) -> tuple[Any, dict[str, float]]:
    """What ``work`` returns, its seconds, and those of the forward passes in it."""
    start, before = timer(), Timed.seconds
    found = work()
    return found, {"seconds": timer() - start, "forward": Timed.seconds - before}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--data", required=True)
    parser.add_argument("--backbone", default="vit_tiny_patch16_224")
    parser.add_argument("--images", type=int, default=5000)
    parser.add_argument("--embed-only", action="store_true")
    parser.add_argument("--out", type=Path, default=Path(__file__).with_name("results"))
    arguments = parser.parse_args()
    backbone = timm.create_model(arguments.backbone, num_classes=0)
    for name in ("forward_features", "forward_intermediates"):
        Timed.count(type(backbone), name)
    settings = EvaluateSettings(data=arguments.data)
    given = Evaluation(settings, open_subject(backbone), choose_device("auto"))
    places = torch.arange(len(given.parts.train))[: arguments.images]
    assert given.frozen.contenders
    _, embedding = measure(lambda: given.frozen.prepare([(PRETRAINED, "")], [places]))
    found: dict[str, Any] = {
        "backbone": arguments.backbone,
        "embedded images": len(places),
        "embedding": embedding,
        "own time beside the forward pass": embedding["seconds"] / embedding["forward"] - 1,
        "machine": facts(given.device),
    }
    if not arguments.embed_only:
        rows, whole = measure(lambda: [*knn(given), *linear(given)])
        found |= {
            "images": len(given.parts.train) + len(given.parts.test),
            "evaluation": whole,
            "forward pass's share": whole["forward"] / whole["seconds"],
            "rows": len(rows),
        }
    text = json.dumps(found, indent=1)
    (arguments.out / "evaluation.json").write_text(text + "\n")
    print(text)


if __name__ == "__main__":
    main()
