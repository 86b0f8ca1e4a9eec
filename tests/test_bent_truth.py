"""A deliberate fault, made from outside: the check that passes must then fail.

Others are made beside what they bend: tests/evaluation/test_frozen.py, test_finetune.py,
test_subject.py, test_segmentation.py.
"""

import pytest
import torch

from backfold.pretext import Masking
from backfold.training import pretrain as trainer
from backfold.training.config import PretrainConfig, TaskSettings


@pytest.mark.parametrize("bent", [False, True])
def test_warm_up_sees_the_run_s_own_images(tmp_path, monkeypatch, bent):
    seen, real = [], trainer.warm_up

    def looks(taken, images, *rest):
        seen.append(torch.zeros_like(images) if bent else images)
        return real(taken, seen[0], *rest)

    monkeypatch.setattr(trainer, "warm_up", looks)
    config = PretrainConfig(
        out=tmp_path / "run", backbone="vit_tiny_patch16_224", image_size=28, batch_size=8,
        backbone_options={"patch_size": 7, "embed_dim": 16, "depth": 1, "num_heads": 2},
        max_steps=1, held_out=8, num_workers=0, accelerator="cpu", devices=1,
        precision="32-true", tasks=TaskSettings(masking=Masking(mask_patch_size=7)),
    )  # fmt: skip
    trainer.pretrain(config)
    (images,) = seen
    own = bool((images.flatten(1).std(dim=1) > 0.1).all())
    assert (own and len(images.flatten(1).unique(dim=0)) == len(images) == 8) is not bent
