"""How much of an evaluation's time is the backbone's forward pass.

    OMP_NUM_THREADS=1 python benchmarks/evaluation.py --data ../shared/data/imagenette160

Embeds 5,000 images at 224 pixels, then evaluates kNN and linear probes on all of the data, with a
timm model whose forward passes are timed from outside. Writes results/evaluation.json.
"""

import argparse
import json
import shlex
import sys
import time
from pathlib import Path
from typing import Any

import timm
import torch
from torch import nn

from backfold.evaluation.evaluate import EvaluateSettings, Evaluation
from backfold.evaluation.frozen import knn, linear
from backfold.evaluation.results import PRETRAINED
from backfold.evaluation.subject import open_subject
from backfold.training.distribution import choose_device
from step_cost.environment import facts


class Timed(nn.Module):
    """A backbone that counts the seconds of its passes."""

    seconds = 0.0  # of all copies together

    def __init__(self, name: str) -> None:
        super().__init__()
        self.inner = timm.create_model(name, num_classes=0)
        for attribute in ("cls_token", "num_prefix_tokens", "pretrained_cfg"):
            if hasattr(self.inner, attribute):
                self.__dict__[attribute] = getattr(self.inner, attribute)

    def forward_features(self, images: torch.Tensor) -> Any:
        """As timm's."""
        return self._timed("forward_features", images)

    def forward_intermediates(
        self, images: torch.Tensor, return_prefix_tokens: bool = False, **options: Any
    ) -> Any:
        """As timm's."""
        if return_prefix_tokens:
            options["return_prefix_tokens"] = True
        return self._timed("forward_intermediates", images, **options)

    def _timed(self, method: str, images: torch.Tensor, **options: Any) -> Any:
        start = time.perf_counter()
        found = getattr(self.inner, method)(images, **options)
        if images.device.type == "cuda":
            torch.cuda.synchronize()
        Timed.seconds += time.perf_counter() - start
        return found


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--data", required=True)
    parser.add_argument("--backbone", default="vit_tiny_patch16_224")
    parser.add_argument("--images", type=int, default=5000)
    parser.add_argument("--embed-only", action="store_true")
    parser.add_argument("--out", type=Path, default=Path(__file__).with_name("results"))
    arguments = parser.parse_args()
    settings = EvaluateSettings(data=arguments.data)
    subject = open_subject(Timed(arguments.backbone))
    given = Evaluation(settings, subject, choose_device("auto"))
    places = torch.arange(len(given.parts.train))[: arguments.images]
    assert given.frozen.contenders
    start, before = time.perf_counter(), Timed.seconds
    given.frozen.prepare([(PRETRAINED, "")], places)
    embedding = {"seconds": time.perf_counter() - start, "forward": Timed.seconds - before}
    found: dict[str, Any] = {
        "backbone": arguments.backbone,
        "embedded images": len(places),
        "embedding": embedding,
        "own time beside the forward pass": embedding["seconds"] / embedding["forward"] - 1,
        "machine": {**facts(given.device), "command": shlex.join(["python", *sys.argv])},
    }
    if not arguments.embed_only:
        start, before = time.perf_counter(), Timed.seconds
        rows = [*knn(given), *linear(given)]
        whole = {"seconds": time.perf_counter() - start, "forward": Timed.seconds - before}
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
