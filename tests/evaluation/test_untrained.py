"""The backbone that pretraining is held against has the run's first weights."""

import pytest
import torch

from backfold.backbone import feature_map
from backfold.batch_norm import batch_norms
from backfold.data.statistics import ChannelStatistics
from backfold.errors import UserError
from backfold.evaluation.untrained import untrained_backbone
from backfold.training.config import PretrainConfig
from backfold.training.pretrained import Pretrained
from backfold.training.setup import build_energy

CPU = torch.device("cpu")
STATISTICS = ChannelStatistics((0.5,) * 3, (0.25,) * 3)
VIT = {"patch_size": 8, "embed_dim": 16, "depth": 1, "num_heads": 2}


def trained(backbone, side, options=None):
    """A run whose weights have moved since the start; its seed is 5."""
    config = PretrainConfig(
        backbone=backbone, image_size=side, backbone_options=options or {}, seed=5
    )
    energy = build_energy(config, 3).eval()
    with torch.no_grad():
        for weight in energy.backbone.parameters():
            weight.add_(0.1)
    return Pretrained(energy, config, STATISTICS, 3, (side, side), 7)


@pytest.mark.parametrize(("backbone", "options"), [("test_resnet", None), ("test_vit", VIT)])
def test_weights_are_those_before_training(backbone, options):
    run = trained(backbone, 32, options)
    first = dict(build_energy(run.config, 3).backbone.named_parameters())
    found = untrained_backbone(run, torch.randn(4, 3, 32, 32), CPU)
    assert not any(part.training for part in found.modules())
    assert dict(found.named_parameters()).keys() == first.keys()
    for name, weight in found.named_parameters():
        assert torch.equal(weight, first[name])
    moved = dict(run.energy.backbone.named_parameters())
    assert not any(torch.equal(weight, moved[name]) for name, weight in first.items())


def test_batch_norms_have_the_statistics_of_the_images():
    run = trained("test_resnet", 32)
    images = 3 + 2 * torch.randn(6, 3, 32, 32, generator=torch.Generator().manual_seed(0))
    found = untrained_backbone(run, images, CPU)
    norms, inputs = batch_norms(found), {}
    hooks = [
        norm.register_forward_pre_hook(lambda norm, given: inputs.update({norm: given[0]}))
        for norm in norms
    ]
    with torch.no_grad():
        feature_map(found, images)
    for hook in hooks:
        hook.remove()
    assert len(norms) > 2
    # Only the first norm's input is the same in both modes, up to what the others measured.
    values = inputs[norms[0]].double().transpose(0, 1).flatten(1)
    torch.testing.assert_close(norms[0].running_mean, values.mean(1).float())
    torch.testing.assert_close(norms[0].running_var, values.var(1).float())


def test_another_image_size_is_taken():
    run = trained("test_vit", 16, VIT)
    images = torch.randn(2, 3, 24, 40)
    found = untrained_backbone(run, images, CPU, (24, 40))
    with torch.no_grad():
        assert feature_map(found, images).shape == (2, 3 * 5, 16)
    with pytest.raises(UserError, match="15"):
        untrained_backbone(run, images, CPU, (15, 24))
