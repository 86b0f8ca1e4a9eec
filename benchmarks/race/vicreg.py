"""VICReg: lightly's views, projection head and loss on any timm backbone."""

from typing import Any

from lightly.loss import VICRegLoss
from lightly.models.modules.heads import VICRegProjectionHead
from lightly.transforms import VICRegTransform
from torch import nn

from backfold.training.config import PretrainConfig
from backfold.training.images import Images
from race.contest import fit, start
from race.simclr import TwoViews, view_options

WIDTH = 2048  # of the head; the paper's 8192 is for 1000 classes


def train(
    backbone_name: str, options: dict[str, Any], images: Images, settings: PretrainConfig
) -> nn.Module:
    """A timm backbone after VICReg; goes on with a cut run in the settings' ``out``."""
    backbone: Any = start(backbone_name, options, images, settings)
    head = VICRegProjectionHead(backbone.num_features, WIDTH, WIDTH)
    views = VICRegTransform(**view_options(settings))
    return fit("vicreg", TwoViews(backbone, head, VICRegLoss(), views, images), images, settings)
