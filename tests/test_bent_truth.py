"""A deliberate fault, made from outside: the check that passes must then fail.

Others are made beside what they bend: tests/evaluation/test_frozen.py, test_finetune.py,
test_subject.py, test_segmentation.py.
"""

import pytest
import torch

from backfold.training import pretrain as trainer
from tiny_run import tiny_config


@pytest.mark.parametrize("bent", [False, True])
def test_warm_up_sees_the_run_s_own_images(tmp_path, monkeypatch, bent):
    seen, real = [], trainer.warm_up

    def looks(taken, images, *rest):
        seen.append(torch.zeros_like(images) if bent else images)
        return real(taken, seen[0], *rest)

    monkeypatch.setattr(trainer, "warm_up", looks)
    trainer.pretrain(tiny_config(out=tmp_path / "run", max_steps=1))
    (images,) = seen
    own = bool((images.flatten(1).std(dim=1) > 0.1).all())
    assert (own and len(images.flatten(1).unique(dim=0)) == len(images) == 8) is not bent
